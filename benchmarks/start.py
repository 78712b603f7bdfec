"""From nothing to the first answer: loading a checkpoint, and the command line, as ratios.

    python benchmarks/start.py [--rounds 15] [--deit FOLDER] [--photo FILE]

Every figure is a median over rounds in which the two sides take turns on this machine, so that what
slows the machine slows both. It writes a ViT-B/16 of 346 MB with transformers, reads it once, and:

- loads it in one process with transformers' from_pretrained and with vitlib.load, each freed before
  the other, garbage collected outside the clock; then the same with a first forward of one image;
- loads it in a process of its own and reads how private memory grew (Linux);
- runs both on the same images, and transformers in float64;
- starts `vitlib classify` on one photo, and `python -c "import torch"`, as whole processes.
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
MEMORY = """
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


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, the sides in turn; one round first that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for count in range(rounds + 1):
        for name, work in sides.items():
            gc.collect()
            took = timed(work)
            if count:
                seconds[name].append(took)
    return seconds


def ratio(seconds: dict[str, list[float]], ours: str, theirs: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True))


def loading(folder: Path, rounds: int) -> None:
    import torch
    import transformers

    import vitlib

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    images = torch.randn(1, 3, 224, 224)
    theirs = transformers.ViTForImageClassification
    if not (folder / "model.safetensors").exists():
        theirs(transformers.ViTConfig(num_labels=1000)).save_pretrained(folder)
    (folder / "model.safetensors").read_bytes()

    @torch.inference_mode()
    def forward(model: torch.nn.Module) -> object:
        return model(images)

    sides: dict[str, Callable[[], object]] = {
        "transformers": lambda: theirs.from_pretrained(folder),
        "vitlib": lambda: vitlib.load(folder),
    }
    with_forward: dict[str, Callable[[], object]] = {
        "transformers": lambda: forward(theirs.from_pretrained(folder)),
        "vitlib": lambda: forward(vitlib.load(folder)),
    }
    for title, pair in (("load", sides), ("load + first forward", with_forward)):
        seconds = alternate(pair, rounds)
        ours, other = (1e3 * statistics.median(seconds[n]) for n in ("vitlib", "transformers"))
        print(
            f"| {title} of 346 MB float32 | {ours:.0f} ms | {other:.0f} ms "
            f"| {ratio(seconds, 'vitlib', 'transformers'):.2f} |"
        )


def agreement(folder: Path) -> None:
    """Logits of the same file, and how far each side is from float64."""
    import torch
    import transformers

    import vitlib

    reference = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    model = vitlib.load(folder)
    for shape in ((8, 3, 224, 224), (8, 3, 256, 320)):
        images = torch.randn(shape)
        with torch.inference_mode():
            theirs = reference(images, interpolate_pos_encoding=True).logits
            ours = model(images)
            exact = reference.double()(images.double(), interpolate_pos_encoding=True).logits
        reference.float()
        apart = float((ours - theirs).abs().max() / theirs.abs().max())
        errors = [float((x - exact).square().mean().sqrt()) for x in (ours, theirs)]
        print(
            f"| logits at {shape[2]}x{shape[3]}, largest difference; error against float64 "
            f"| {apart:.1e} | | {errors[0] / errors[1]:.2f} |"
        )


def memory(folder: Path) -> None:
    grown = {}
    for side in ("vitlib", "transformers"):
        command = [sys.executable, "-c", MEMORY, side, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        grown[side] = json.loads(done.stdout.splitlines()[-1])
    for kind, what in (
        ("Anonymous", "anonymous memory grown by load"),
        ("Private_Dirty", "private dirty memory grown by load"),
        ("Private_Clean", "pages of the file mapped by load (reclaimable)"),
    ):
        ours, theirs = grown["vitlib"][kind], grown["transformers"][kind]
        print(f"| {what} | {ours:.1f} MiB | {theirs:.1f} MiB | |")


def command_line(deit: Path, photo: Path, rounds: int) -> None:
    vitlib_command = [sys.executable, "-m", "vitlib", "classify", str(photo), "--model", str(deit)]
    torch_command = [sys.executable, "-c", "import torch"]

    def run(command: list[str]) -> Callable[[], object]:
        return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    seconds = alternate({"vitlib": run(vitlib_command), "torch": run(torch_command)}, rounds)
    ours, torch_alone = (statistics.median(seconds[name]) for name in ("vitlib", "torch"))
    more = statistics.median(
        a - b for a, b in zip(seconds["vitlib"], seconds["torch"], strict=True)
    )
    print(
        f"| `vitlib classify`, process start to label, DeiT-tiny | {ours:.2f} s "
        f"| `import torch` {torch_alone:.2f} s | {ours / torch_alone:.2f}, {more:+.2f} s |"
    )


def main() -> None:
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--deit", type=Path, default=SHARED / "models/deit-tiny-patch16-224")
    parser.add_argument("--photo", type=Path, default=SHARED / "data/photos/two_cats.png")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(
        f"{date.today()}, commit {commit}, {platform.machine()} with {os.cpu_count()} CPUs, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, medians of {arguments.rounds}\n"
    )
    print("| what | vitlib | peer | ratio |\n|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        loading(Path(folder), arguments.rounds)
        memory(Path(folder))
        agreement(Path(folder))
    if arguments.deit.exists() and arguments.photo.exists():
        command_line(arguments.deit, arguments.photo, arguments.rounds)


if __name__ == "__main__":
    main()
