"""Speed, memory and load time of vitlib, transformers, timm, ONNX Runtime and OpenVINO.

    python benchmarks/compare.py [--quick] [--models B/16 dinov2-small] [--batches 1 8 32]
        [--precisions fp32 bf16 int8] [--compile] [--sides WORD ...] [--rounds 11]
        [--python PEERS] [--out FILE] [--chart FILE]

Each side is a worker process (peers.py). The sides are interleaved round by round, so that other
load on the machine affects all of them alike. All sides read one checkpoint. It has random weights
in transformers' initialization; DINOv2-small has its real weights.

`--python` names the interpreter of an environment with the peers: pip install torch transformers
onnx onnxruntime openvino nncf, then timm and torchvision with --no-deps. The report lists the
missing packages. `--work` is a folder that keeps the peers' files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from prepare import FILES
from report import GEMM, Group, Memory, Start, report
from setting import SHARED, describe_run, list_photos, write_atomically
from turns import MIB, Worker, WorkerError, interleave

HERE = Path(__file__).resolve().parent
TIMM_NAMES = {
    "Ti/16": "vit_tiny_patch16_224",
    "S/16": "vit_small_patch16_224",
    "B/16": "vit_base_patch16_224",
    "L/16": "vit_large_patch16_224",
    "dinov2-small": "vit_small_patch14_dinov2",
}
NUM_IMAGES = 32  # timed images, and as many others for calibration


class Case(NamedTuple):
    """A side of a group.

    Attributes:
        name: Name in the report.
        side: Key of peers.SIDES.
        package: Package that the peers' interpreter needs; "" for none.
        file_key: Key of prepare.FILES for the file that the side reads; "" for none.
        task: Values of the worker's task besides those of the group.
    """

    name: str
    side: str
    package: str = ""
    file_key: str = ""
    task: dict[str, Any] = {}  # noqa: RUF012  # never modified


TRANSFORMERS = Case("transformers", "transformers", "transformers", task={"precision": "fp32"})
GROUPS = {
    "fp32": (
        Case("vitlib", "vitlib"),
        Case("vitlib, unoptimized", "vitlib-unoptimized"),
        TRANSFORMERS,
        Case("timm", "timm", "timm"),
        Case("ONNX Runtime", "onnxruntime", "onnxruntime", "onnx"),
        Case("OpenVINO", "openvino", "openvino", "openvino"),
        Case(GEMM, "gemm"),
    ),
    "bf16": (
        Case("vitlib bf16", "vitlib"),
        TRANSFORMERS,
        Case("transformers bf16", "transformers", "transformers"),
        Case("transformers, bf16 matmul", "transformers", "transformers", task={"bf16_matmul": 1}),
        Case("timm bf16", "timm", "timm"),
        Case("OpenVINO bf16", "openvino", "openvino", "openvino"),
        Case(GEMM, "gemm"),
    ),
    "int8": (
        Case("vitlib int8", "vitlib", task={"calibrates": True}),
        Case("vitlib int8, no photos", "vitlib"),
        TRANSFORMERS,
        Case("ONNX Runtime int8, dynamic", "onnxruntime", "onnxruntime", "onnx-dynamic"),
        Case("ONNX Runtime int8, static", "onnxruntime", "onnxruntime", "onnx-static"),
        Case("OpenVINO int8", "openvino", "openvino", "openvino-int8"),
        Case(GEMM, "gemm"),
    ),
}
# By --compile: vitlib with the forward compiled, beside the others.
COMPILED = {
    "fp32": Case("vitlib, compiled", "vitlib", task={"compiles": True}),
    "bf16": Case("vitlib bf16, compiled", "vitlib", task={"compiles": True}),
    "int8": Case("vitlib int8, compiled", "vitlib", task={"calibrates": True, "compiles": True}),
}


class Model(NamedTuple):
    """Files of a model.

    Attributes:
        name: Name in the report.
        folder: Checkpoint in transformers' layout.
        timm_folder: Checkpoint in timm's layout.
        work_folder: Folder of the peers' files.
        num_classes: Classes of the head.
        gflop: Nominal GFLOP of one image.
        failed: Reason why a file is absent, by key of prepare.FILES.
    """

    name: str
    folder: Path
    timm_folder: Path
    work_folder: Path
    num_classes: int
    gflop: float
    failed: dict[str, str]

    @property
    def weights_mib(self) -> float:
        return (self.folder / "model.safetensors").stat().st_size / MIB


def make_checkpoint(name: str, work: Path) -> Path:
    """Return the folder of the checkpoint that all sides read.

    Raises:
        FileNotFoundError: The real model is absent.
    """
    if name == "dinov2-small":
        folder = SHARED / "models/dinov2-small"
        if not folder.exists():
            raise FileNotFoundError("its checkpoint is absent")
        return folder
    folder = work / name.replace("/", "-") / "hf"
    if not (folder / "model.safetensors").exists():
        import torch
        import transformers

        import vitlib

        transformers.utils.logging.disable_progress_bar()
        size = vitlib.ViTConfig.named(name)
        torch.manual_seed(0)
        config = transformers.ViTConfig(
            hidden_size=size.embed_dim,
            num_hidden_layers=size.depth,
            num_attention_heads=size.num_heads,
            intermediate_size=size.mlp_dim,
            num_labels=1000,
        )
        transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def nominal_gflop(cfg: Any) -> float:
    """Count the GFLOP of an image at 224x224 with every token in every block."""
    patch_h, patch_w = cfg.patch_size
    patches = (224 // patch_h) * (224 // patch_w)
    tokens, width = patches + cfg.num_prefix_tokens, cfg.embed_dim
    block = 2 * tokens * width * (4 * width + 2 * cfg.mlp_dim) + 4 * tokens * tokens * width
    embed, head = (
        2 * patches * cfg.in_channels * patch_h * patch_w * width,
        2 * width * cfg.num_classes,
    )
    return float(cfg.depth * block + embed + head) / 1e9


def prepare_model(name: str, work: Path, options: argparse.Namespace, file_keys: set[str]) -> Model:
    """Make a model's checkpoints, and the peers' files in their own interpreter."""
    import vitlib

    folder, work_folder = make_checkpoint(name, work), work / name.replace("/", "-")
    model = vitlib.load(folder)
    if not (work_folder / "timm" / "model.safetensors").exists():
        vitlib.save(model, work_folder / "timm", layout="timm")
    task = {
        "folder": str(folder),
        "work_folder": str(work_folder),
        "calibration": str(work / "calibration.npy"),
        "file_keys": [key for key in FILES if key in file_keys],
    }
    command = [options.python, str(HERE / "prepare.py"), json.dumps(task)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    failed = dict.fromkeys(FILES, "prepare.py failed")
    if process.returncode == 0:
        failed = json.loads(process.stdout.splitlines()[-1])
    cfg = model.config
    return Model(
        name, folder, work_folder / "timm", work_folder, cfg.num_classes, nominal_gflop(cfg), failed
    )


def save_pixels(work: Path) -> str:
    """Save the timed and the calibration images, (32, 3, 224, 224) float32 each.

    Returns:
        A description of the images.
    """
    import numpy as np

    import vitlib

    photos = list_photos("fridge_multilabel")
    names = ("images", "calibration")
    half = (0.5, 0.5, 0.5)
    processor = vitlib.ImageProcessor(size=(224, 224), image_mean=half, image_std=half)
    for index, name in enumerate(names):
        batch = photos[index * NUM_IMAGES : (index + 1) * NUM_IMAGES]
        if len(batch) == NUM_IMAGES:
            pixels = processor(batch).numpy()
        else:
            shape = (NUM_IMAGES, 3, 224, 224)
            pixels = np.random.default_rng(index).standard_normal(shape, dtype=np.float32)
        np.save(work / f"{name}.npy", pixels)
    return (
        "real photos" if len(photos) >= 2 * NUM_IMAGES else "random pixels (the photos are absent)"
    )


def missing_reason(case: Case, model: Model, versions: dict[str, str]) -> str:
    """Return the reason why a side cannot run; "" if it can."""
    needed = [case.package] if case.package else []
    needed += ["onnx"] if case.file_key else []
    needed += ["nncf"] if case.file_key == "openvino-int8" else []
    for package in needed:
        if versions[package].startswith("missing"):
            return f"{package}: {versions[package]}"
    while case.file_key:  # the other files are made from the ONNX file
        if case.file_key in model.failed:
            return f"{case.file_key}: {model.failed[case.file_key]}"
        case = case._replace(file_key="" if case.file_key == "onnx" else "onnx")
    return ""


def start_worker(
    case: Case, model: Model, precision: str, options: argparse.Namespace, work: Path
) -> tuple[Worker, Start, float]:
    """Start a side's worker, several times, and load its model.

    Returns:
        The last worker, the measurements of the start, and the anonymous MiB before the load.
    """
    is_vitlib = not case.package
    task = {
        "side": case.side,
        "precision": precision,
        "folder": str(model.timm_folder if case.side == "timm" else model.folder),
        "timm": TIMM_NAMES[model.name],
        "num_classes": model.num_classes,
        "file": str(model.work_folder / FILES[case.file_key]) if case.file_key else "",
        "pixels": str(work / "images.npy"),
        "calibration": str(work / "calibration.npy") if case.task.get("calibrates") else "",
        "threads": options.threads,
        **case.task,
    }
    start = Start()
    for remaining in reversed(range(1 if case.name == GEMM else options.starts)):
        python = sys.executable if is_vitlib else options.python
        worker = Worker(python, HERE / "peers.py", task, options.threads)
        try:
            before_mib = worker.anonymous_mib()
            seconds, peak_mib = worker.call_with_peak("load")
            worker.call("set_batch_size", size=options.batches[0])
            worker.call("time_calls", seconds=0)
            start.first_answer_seconds.append(worker.seconds_since_start())
            start.load_seconds.append(seconds)
            start.load_mib = peak_mib - before_mib
            start.logits = [] if remaining else worker.call("first_output")
        except WorkerError:
            worker.close()
            raise
        if remaining:
            worker.close()
    return worker, start, before_mib


def measure_group(
    model: Model,
    precision: str,
    versions: dict[str, str],
    options: argparse.Namespace,
    work: Path,
) -> Group:
    """Measure all sides in one precision, interleaved, at each batch size."""
    group = Group(model.name, precision, model.gflop, model.weights_mib)
    workers: dict[str, Worker] = {}
    before_mib: dict[str, float] = {}
    try:
        for case in chosen_cases(precision, options):
            try:
                reason = missing_reason(case, model, versions)
                if reason:
                    raise WorkerError(reason)
                name = case.name
                workers[name], group.starts[name], before_mib[name] = start_worker(
                    case, model, precision, options, work
                )
            except WorkerError as error:
                group.left_out[case.name] = str(error)
        for batch in options.batches:
            folders = [model.folder, model.work_folder]
            group.memory[batch] = measure_memory(
                workers, before_mib, batch, folders, group.left_out
            )
            calls = {
                name: partial(worker.call, "time_calls", seconds=options.seconds)
                for name, worker in workers.items()
                if name not in group.left_out
            }
            group.seconds[batch] = interleave(calls, options.rounds, options.warmup, group.left_out)
    finally:
        for worker in workers.values():
            worker.close()
    return group


def chosen_cases(precision: str, options: argparse.Namespace) -> list[Case]:
    """Return the sides of a precision that the options ask for."""
    cases = [*GROUPS[precision], *([COMPILED[precision]] if options.compile else [])]
    return [
        case for case in cases if not options.sides or any(s in case.name for s in options.sides)
    ]


def measure_memory(
    workers: dict[str, Worker],
    before_mib: dict[str, float],
    batch: int,
    folders: list[Path],
    left_out: dict[str, str],
) -> dict[str, Memory]:
    """Measure the memory of the first calls at a batch size; they also warm up."""
    memory = {}
    for name, worker in workers.items():
        if name in left_out:
            continue
        try:
            worker.call("set_batch_size", size=batch)
            _, peak_mib = worker.call_with_peak("time_calls", seconds=0.1)
        except WorkerError as error:
            left_out[name] = str(error)
            continue
        memory[name] = Memory(peak_mib, before_mib[name], worker.mapped_mib(folders))
    return memory


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=TIMM_NAMES, default=list(TIMM_NAMES))
    add("--batches", nargs="+", type=int, default=[1, 8, 32])
    add("--precisions", nargs="+", choices=GROUPS, default=list(GROUPS))
    add("--compile", action="store_true", help="also vitlib with the forward compiled")
    add("--sides", nargs="+", metavar="WORD", help="only sides whose names contain one of these")
    add("--rounds", type=int, default=11)
    add("--warmup", type=int, default=2, help="rounds before the timed ones (default: 2)")
    add(
        "--seconds",
        type=float,
        default=0.5,
        help="of a turn; it has at least one call (default: 0.5)",
    )
    add("--starts", type=int, default=3, help="processes of a side that measure load and start")
    add("--threads", type=int, default=2)
    add("--python", default=sys.executable, help="interpreter with the peers")
    add("--work", type=Path, help="folder that keeps checkpoints and the peers' files")
    add("--out", type=Path, help="also write the report to this file")
    add("--json", type=Path, help="write all measurements to this file")
    add("--chart", type=Path, help="draw a bar chart (.svg, .png); needs matplotlib")
    add("--quick", action="store_true", help="ViT-B/16, batches 1 and 8, few rounds")
    options = parser.parse_args()
    if options.quick:
        options.models, options.batches = ["B/16"], [1, 8]
        options.rounds, options.warmup, options.starts = min(options.rounds, 5), 1, 1
    return options


def write_report(
    header: str, groups: list[Group], skipped: dict[str, str], options: argparse.Namespace
) -> str:
    """Write the report of the groups so far, so that a kill loses the one in progress alone.

    Args:
        header: Machine, versions and settings.
        groups: Measured groups.
        skipped: Reasons of models that were left out.
        options: Files to write.

    Returns:
        The report.
    """
    text = report(header, groups, skipped)
    if options.out:
        write_atomically(options.out, text)
    if options.json:
        write_atomically(options.json, json.dumps([asdict(group) for group in groups]))
    return text


def main() -> None:
    options = parse_options()
    sys.path.insert(0, str(HERE.parent))  # import vitlib from this checkout, as the workers do
    probe = subprocess.run(
        [options.python, str(HERE / "peers.py"), "probe"],
        capture_output=True,
        text=True,
        check=True,
    )
    versions = json.loads(probe.stdout.splitlines()[-1])
    file_keys = {
        case.file_key for name in options.precisions for case in GROUPS[name] if case.file_key
    }
    groups, skipped = [], {}
    header = describe_run(
        {name: version for name, version in versions.items() if "missing" not in version}
    )
    header += f" {options.threads} threads, {options.rounds} rounds,"
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        pixels = save_pixels(work)
        for name in options.models:
            try:
                model = prepare_model(name, work, options, file_keys | {"onnx"})
            except FileNotFoundError as error:
                skipped[name] = str(error)
                continue
            for precision in options.precisions:
                print(f"{name}, {precision} ...", file=sys.stderr)
                groups.append(measure_group(model, precision, versions, options, work))
                write_report(f"{header} {pixels}.", groups, skipped, options)
    print(write_report(f"{header} {pixels}.", groups, skipped, options))
    if options.chart:
        from chart import draw_chart

        draw_chart(groups, options.chart)


if __name__ == "__main__":
    main()
