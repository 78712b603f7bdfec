"""Time to load a checkpoint and to start the command line, relative to transformers and torch.

    python benchmarks/start.py [--rounds 15] [--deit FOLDER] [--photo FILE] [--only PART ...]
        [--runtimes PYTHON]

Each figure is a median over rounds that interleave two sides, so that other load on the machine
affects both. The script saves a ViT-B/16 of 346 MB with transformers, reads it once, and measures:

- the load by transformers' from_pretrained and by vitlib.load in one process. Each model is freed
  before the next load, and garbage is collected outside the timed code;
- the same with a first forward of one image;
- the growth of private memory by a load in a new process (Linux);
- the logits of both on the same images, relative to transformers in float64;
- the whole processes `vitlib classify` with one photo and `python -c "import torch"`;
- process start to the first answer of optimized models, from the checkpoint and from the folder of
  FastViT.save, relative to `import torch`. `--runtimes` is a Python that has onnxruntime, openvino
  and pillow: it runs the same model as an ONNX file and as OpenVINO's own;
- commands that need no torch: help, completion and wrong use.

Python's bytecode is cached, as it is after the first start of an installed package.
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


FIRST_ANSWER = """
import sys
from vitlib import Predictor
source, precision, photo = sys.argv[1:]
predictor = Predictor.load(source, precision=precision or None)
print(predictor.classify(photo, top_k=1), flush=True)
"""
FIRST_ANSWER_OF_RUNTIME = """
import sys
import numpy as np
from PIL import Image
name, source, photo = sys.argv[1:]
image = Image.open(photo).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
pixels = (np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255 - 0.5) / 0.5
if name == "onnxruntime":
    import onnxruntime
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 2
    session = onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
    logits = session.run(None, {session.get_inputs()[0].name: pixels})[0]
else:
    import openvino
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    settings["INFERENCE_NUM_THREADS"] = 2
    logits = openvino.Core().compile_model(source, "CPU", settings)(pixels)[0]
print(logits.argmax(), flush=True)
"""


def first_line_after(command: list[str]) -> Callable[[], object]:
    """Return a call that ends when a process has printed its first line."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"OMP_NUM_THREADS": "2"}

    def run() -> None:
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise RuntimeError(f"{command} printed nothing")
            process.kill()

    return run


def make_folders(folder: Path, runtimes: Path | None) -> dict[str, list[str]]:
    """Write a ViT-B/16 with random weights in every form; return the command of each side."""
    import numpy as np
    import torch
    from PIL import Image

    import vitlib

    torch.manual_seed(0)
    model = vitlib.ViT(vitlib.ViTConfig(num_classes=1000)).eval()
    processor = vitlib.ImageProcessor.from_profile("hf", "vit", (224, 224))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.image_processor = processor
    checkpoint, photo = folder / "b16", folder / "photo.png"
    vitlib.save(model, checkpoint, image_processor=processor)
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photo)
    python = [sys.executable, "-c", FIRST_ANSWER]
    commands = {"import torch": [sys.executable, "-c", "import torch; print(1, flush=True)"]}
    for precision in ("fp32", "bf16"):
        saved = folder / f"saved-{precision}"
        vitlib.optimize(model, precision).save(saved)
        commands[f"vitlib {precision}, checkpoint"] = [
            *(*python, str(checkpoint), precision, str(photo))
        ]
        commands[f"vitlib {precision}, saved"] = [*python, str(saved), "", str(photo)]
    if runtimes is not None:
        files = {"onnxruntime": folder / "b16.onnx", "openvino": folder / "b16.xml"}
        export = ["-m", "vitlib", "export", checkpoint, "--format", "onnx", "--input", "float"]
        subprocess.run([sys.executable, *export, "-o", files["onnxruntime"]], check=True)
        convert = (
            "import openvino, sys\nmodel = openvino.convert_model(sys.argv[1])\n"
            "openvino.save_model(model, sys.argv[2], compress_to_fp16=False)"
        )
        subprocess.run([runtimes, "-c", convert, *files.values()], check=True)
        for name, file in files.items():
            script = [str(runtimes), "-c", FIRST_ANSWER_OF_RUNTIME, name, str(file), str(photo)]
            commands[f"{name} fp32"] = script
    return commands


def measure_first_answer(folder: Path, rounds: int, runtimes: Path | None) -> None:
    """Print the time from process start to the first answer, and its excess over import torch."""
    commands = make_folders(folder, runtimes)
    seconds = interleave({k: first_line_after(v) for k, v in commands.items()}, rounds)
    print(
        "| process start to first answer, ViT-B/16 | seconds | beyond `import torch` |\n"
        "|---|--:|--:|"
    )
    for name, times in seconds.items():
        pairs = zip(times, seconds["import torch"], strict=True)
        excess = statistics.median(time - torch_time for time, torch_time in pairs)
        print(f"| {name} | {statistics.median(times):.2f} | {excess:+.2f} |")


def measure_commands(rounds: int) -> None:
    """Print the time of commands that import no torch."""
    vitlib_command = [sys.executable, "-m", "vitlib"]
    commands = {
        "`python -c pass`": [sys.executable, "-c", "pass"],
        "`python -c 'import click'`": [sys.executable, "-c", "import click"],
        "`vitlib --version`": [*vitlib_command, "--version"],
        "`vitlib --help`": [*vitlib_command, "--help"],
        "`vitlib classify --help`": [*vitlib_command, "classify", "--help"],
        "`vitlib finetune --help`": [*vitlib_command, "finetune", "--help"],
        "`vitlib classify` without an image": [*vitlib_command, "classify"],
        "`vitlib classify --no-such-option`": [*vitlib_command, "classify", "--no-such-option"],
        "`vitlib classify --precision x`": [*vitlib_command, "classify", "--precision", "x"],
        "completion of `vitlib `": vitlib_command,
    }
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    complete = {"_VITLIB_COMPLETE": "bash_complete", "COMP_WORDS": "vitlib ", "COMP_CWORD": "1"}

    def run(name: str, command: list[str]) -> Callable[[], object]:
        env = environment | (complete if name.startswith("completion") else {})
        return lambda: subprocess.run(command, check=False, capture_output=True, env=env)

    seconds = interleave({k: run(k, v) for k, v in commands.items()}, rounds)
    print("| command | seconds |\n|---|--:|")
    for name, times in seconds.items():
        print(f"| {name} | {statistics.median(times):.3f} |")


PARTS = ("loading", "classify", "first", "commands")


def main() -> None:
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--deit", type=Path, default=SHARED / "models/deit-tiny-patch16-224")
    parser.add_argument("--photo", type=Path, default=SHARED / "data/photos/two_cats.png")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--runtimes", type=Path, help="Python with onnxruntime and openvino")
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
    if "loading" in options.only or "classify" in options.only:
        print("| metric | vitlib | peer | ratio |\n|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        if "loading" in options.only:
            measure_loading(Path(folder), options.rounds)
            measure_memory(Path(folder))
            measure_agreement(Path(folder))
        if "classify" in options.only and options.deit.exists() and options.photo.exists():
            measure_command_line(options.deit, options.photo, options.rounds)
        if "first" in options.only:
            measure_first_answer(Path(folder), options.rounds, options.runtimes)
        if "commands" in options.only:
            measure_commands(options.rounds)


if __name__ == "__main__":
    main()
