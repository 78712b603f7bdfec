"""Time to load a checkpoint and to start the command line, relative to transformers and torch.

    python benchmarks/start.py [--rounds 15] [--deit FOLDER] [--photo FILE]

Each figure is a median over rounds that interleave two sides, so that other load on the machine
affects both. The script saves a ViT-B/16 of 346 MB with transformers, reads it once, and measures:

- the load by transformers' from_pretrained and by vitlib.load in one process. Each model is freed
  before the next load, and garbage is collected outside the timed code;
- the same with a first forward of one image;
- the growth of private memory by a load in a new process (Linux);
- the logits of both on the same images, relative to transformers in float64;
- the whole processes `vitlib classify` with one photo and `python -c "import torch"`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared"
MEMORY_SCRIPT = """
import json, sys, torch
def private():
    rows = dict(r.split(":", 1) for r in open("/proc/self/smaps_rollup") if ":" in r and r[0] > "9")
    kinds = ("Private_Dirty", "Private_Clean", "Anonymous")
    return {kind: int(rows[kind].split()[0]) / 1024 for kind in kinds}
if sys.argv[1] == "vitlib":
    import vitlib; load = vitlib.load
else:
    import transformers
    transformers.utils.logging.disable_progress_bar()
    load = transformers.ViTForImageClassification.from_pretrained
before = private()
model = load(sys.argv[2])
after = private()
print(json.dumps({k: after[k] - before[k] for k in before}))
"""


def measure_seconds(call: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time the sides in turns, after a warm-up round; return the seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_index in range(rounds + 1):
        for name, call in sides.items():
            gc.collect()
            elapsed = measure_seconds(call)
            if round_index:
                seconds[name].append(elapsed)
    return seconds


def median_ratio(seconds: dict[str, list[float]], side: str, reference: str) -> float:
    """Return the median of the rounds' ratios of two sides."""
    return statistics.median(
        numerator / denominator
        for numerator, denominator in zip(seconds[side], seconds[reference], strict=True)
    )


def measure_loading(folder: Path, rounds: int) -> None:
    """Print the time to load a checkpoint, without and with a first forward."""
    import torch
    import transformers

    import vitlib

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    images = torch.randn(1, 3, 224, 224)
    hf_class = transformers.ViTForImageClassification
    if not (folder / "model.safetensors").exists():
        hf_class(transformers.ViTConfig(num_labels=1000)).save_pretrained(folder)
    (folder / "model.safetensors").read_bytes()

    @torch.inference_mode()
    def forward(model: torch.nn.Module) -> object:
        return model(images)

    sides: dict[str, Callable[[], object]] = {
        "transformers": lambda: hf_class.from_pretrained(folder),
        "vitlib": lambda: vitlib.load(folder),
    }
    with_forward: dict[str, Callable[[], object]] = {
        "transformers": lambda: forward(hf_class.from_pretrained(folder)),
        "vitlib": lambda: forward(vitlib.load(folder)),
    }
    for title, calls in (("load", sides), ("load + first forward", with_forward)):
        seconds = interleave(calls, rounds)
        vitlib_ms, hf_ms = (1e3 * statistics.median(seconds[n]) for n in ("vitlib", "transformers"))
        print(
            f"| {title} of 346 MB float32 | {vitlib_ms:.0f} ms | {hf_ms:.0f} ms "
            f"| {median_ratio(seconds, 'vitlib', 'transformers'):.2f} |"
        )


def measure_agreement(folder: Path) -> None:
    """Print the difference of both sides' logits, and their errors against float64."""
    import torch
    import transformers

    import vitlib

    reference = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    model = vitlib.load(folder)
    for shape in ((8, 3, 224, 224), (8, 3, 256, 320)):
        images = torch.randn(shape)
        with torch.inference_mode():
            hf_logits = reference(images, interpolate_pos_encoding=True).logits
            vitlib_logits = model(images)
            exact = reference.double()(images.double(), interpolate_pos_encoding=True).logits
        reference.float()
        difference = float((vitlib_logits - hf_logits).abs().max() / hf_logits.abs().max())
        errors = [float((x - exact).square().mean().sqrt()) for x in (vitlib_logits, hf_logits)]
        print(
            f"| logits at {shape[2]}x{shape[3]}, largest difference; error against float64 "
            f"| {difference:.1e} | | {errors[0] / errors[1]:.2f} |"
        )


def measure_memory(folder: Path) -> None:
    """Print the growth of memory by a load in a new process."""
    growth = {}
    for side in ("vitlib", "transformers"):
        command = [sys.executable, "-c", MEMORY_SCRIPT, side, str(folder)]
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        growth[side] = json.loads(process.stdout.splitlines()[-1])
    for kind, description in (
        ("Anonymous", "growth of anonymous memory by load"),
        ("Private_Dirty", "growth of private dirty memory by load"),
        ("Private_Clean", "pages of the file mapped by load (reclaimable)"),
    ):
        vitlib_mib, hf_mib = growth["vitlib"][kind], growth["transformers"][kind]
        print(f"| {description} | {vitlib_mib:.1f} MiB | {hf_mib:.1f} MiB | |")


def measure_command_line(deit: Path, photo: Path, rounds: int) -> None:
    """Print the time of `vitlib classify`, and of `import torch` alone."""
    vitlib_command = [sys.executable, "-m", "vitlib", "classify", str(photo), "--model", str(deit)]
    torch_command = [sys.executable, "-c", "import torch"]

    def run(command: list[str]) -> Callable[[], object]:
        return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    seconds = interleave({"vitlib": run(vitlib_command), "torch": run(torch_command)}, rounds)
    vitlib_seconds, torch_seconds = (
        statistics.median(seconds[name]) for name in ("vitlib", "torch")
    )
    difference = statistics.median(
        a - b for a, b in zip(seconds["vitlib"], seconds["torch"], strict=True)
    )
    print(
        f"| `vitlib classify`, process start to label, DeiT-tiny | {vitlib_seconds:.2f} s "
        f"| `import torch` {torch_seconds:.2f} s "
        f"| {vitlib_seconds / torch_seconds:.2f}, {difference:+.2f} s |"
    )


def main() -> None:
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--deit", type=Path, default=SHARED / "models/deit-tiny-patch16-224")
    parser.add_argument("--photo", type=Path, default=SHARED / "data/photos/two_cats.png")
    options = parser.parse_args()
    torch.set_num_threads(2)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(
        f"{date.today()}, commit {commit}, {platform.machine()} with {os.cpu_count()} CPUs, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, medians of {options.rounds}\n"
    )
    print("| metric | vitlib | peer | ratio |\n|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        measure_loading(Path(folder), options.rounds)
        measure_memory(Path(folder))
        measure_agreement(Path(folder))
    if options.deit.exists() and options.photo.exists():
        measure_command_line(options.deit, options.photo, options.rounds)


if __name__ == "__main__":
    main()
