"""vitlib beside transformers, timm, ONNX Runtime and OpenVINO: speed, memory, load, as ratios.

    python benchmarks/compare.py [--quick] [--models B/16 dinov2-small] [--batches 1 8 32]
        [--precisions fp32 bf16 int8] [--rounds 11] [--python PEERS] [--out FILE] [--chart FILE]

Each side is a process of its own (peers.py) and takes its turn when asked, round after round, so
that what slows the machine slows all. They read one checkpoint: random weights as transformers
draws them, DINOv2-small the real one. `--python` names the interpreter of an environment that has
the peers: pip install torch transformers onnx onnxruntime openvino nncf, then timm and torchvision
with --no-deps; what it lacks is left out and named. `--work` keeps the files made for the peers.
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
from setting import SHARED, heading, photos_of, write_whole
from turns import MIB, Worker, WorkerError, in_turns

HERE = Path(__file__).resolve().parent
TIMM = {
    "S/16": "vit_small_patch16_224",
    "B/16": "vit_base_patch16_224",
    "L/16": "vit_large_patch16_224",
    "dinov2-small": "vit_small_patch14_dinov2",
}
IMAGES = 32  # that are timed, and as many others to calibrate with


class Case(NamedTuple):
    """A side of a group: which worker, and what its task says beyond the group's."""

    name: str
    side: str
    package: str = ""  # that the peers' interpreter must have
    file: str = ""  # that must have been prepared: a key of prepare.FILES
    more: dict[str, Any] = {}  # noqa: RUF012  # never written


TRANSFORMERS = Case("transformers", "transformers", "transformers", more={"precision": "fp32"})
GROUPS = {
    "fp32": (
        Case("vitlib", "vitlib"),
        Case("vitlib, not optimized", "vitlib-plain"),
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
        Case("transformers, bf16 matmul", "transformers", "transformers", more={"bf16_matmul": 1}),
        Case("timm bf16", "timm", "timm"),
        Case("OpenVINO bf16", "openvino", "openvino", "openvino"),
        Case(GEMM, "gemm"),
    ),
    "int8": (
        Case("vitlib int8", "vitlib", more={"calibrates": True}),
        Case("vitlib int8, no photos", "vitlib"),
        TRANSFORMERS,
        Case("ONNX Runtime int8, dynamic", "onnxruntime", "onnxruntime", "onnx-dynamic"),
        Case("ONNX Runtime int8, static", "onnxruntime", "onnxruntime", "onnx-static"),
        Case("OpenVINO int8", "openvino", "openvino", "openvino-int8"),
        Case(GEMM, "gemm"),
    ),
}


class Model(NamedTuple):
    """A model's files, and what was not made of them."""

    name: str
    folder: Path
    timm_folder: Path
    into: Path
    num_classes: int
    gflop: float
    failed: dict[str, str]

    @property
    def weights(self) -> float:
        return (self.folder / "model.safetensors").stat().st_size / MIB


def checkpoint(name: str, work: Path) -> Path:
    """The folder that every side reads. Raises FileNotFoundError where a real model is absent."""
    if name == "dinov2-small":
        folder = SHARED / "models/dinov2-small"
        if not folder.exists():
            raise FileNotFoundError("the real model is not there")
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
    """Multiplications and additions of one image at 224x224, every token through every block."""
    p, q = cfg.patch_size
    patches = (224 // p) * (224 // q)
    t, d = patches + cfg.num_prefix_tokens, cfg.embed_dim
    block = 2 * t * d * (4 * d + 2 * cfg.mlp_dim) + 4 * t * t * d
    embed, head = 2 * patches * cfg.in_channels * p * q * d, 2 * d * cfg.num_classes
    return float(cfg.depth * block + embed + head) / 1e9


def made(name: str, work: Path, options: argparse.Namespace, pieces: set[str]) -> Model:
    """The checkpoint, the same as timm names it, and the peers' own files."""
    import vitlib

    folder, into = checkpoint(name, work), work / name.replace("/", "-")
    model = vitlib.load(folder)
    if not (into / "timm" / "model.safetensors").exists():
        vitlib.save(model, into / "timm", layout="timm")
    task = {
        "folder": str(folder),
        "into": str(into),
        "calibration": str(work / "calibration.npy"),
        "pieces": [piece for piece in FILES if piece in pieces],
    }
    command = [options.python, str(HERE / "prepare.py"), json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    failed = dict.fromkeys(FILES, "preparing it failed")
    if done.returncode == 0:
        failed = json.loads(done.stdout.splitlines()[-1])
    cfg = model.config
    return Model(name, folder, into / "timm", into, cfg.num_classes, nominal_gflop(cfg), failed)


def save_pixels(work: Path) -> str:
    """Write what is timed and what calibrates, (32, 3, 224, 224) each; says what they are."""
    import numpy as np

    import vitlib

    photos = photos_of("fridge_multilabel")
    names = ("images", "calibration")
    half = (0.5, 0.5, 0.5)
    rule = vitlib.ImageProcessor(size=(224, 224), image_mean=half, image_std=half)
    for count, name in enumerate(names):
        chosen = photos[count * IMAGES : (count + 1) * IMAGES]
        if len(chosen) == IMAGES:
            pixels = rule(chosen).numpy()
        else:
            shape = (IMAGES, 3, 224, 224)
            pixels = np.random.default_rng(count).standard_normal(shape, dtype=np.float32)
        np.save(work / f"{name}.npy", pixels)
    return "real photos" if len(photos) >= 2 * IMAGES else "seeded noise: no photos here"


def missing(case: Case, model: Model, versions: dict[str, str]) -> str:
    """Why a side cannot take part; "" where it can."""
    needed = [case.package] if case.package else []
    needed += ["onnx"] if case.file else []
    needed += ["nncf"] if case.file == "openvino-int8" else []
    for package in needed:
        if versions[package].startswith("missing"):
            return f"{package}: {versions[package]}"
    while case.file:  # a file made of another is not there without it
        if case.file in model.failed:
            return f"{case.file}: {model.failed[case.file]}"
        case = case._replace(file="" if case.file == "onnx" else "onnx")
    return ""


def begin(
    case: Case, model: Model, precision: str, options: argparse.Namespace, work: Path
) -> tuple[Worker, Start, float]:
    """A side at work: its process, its beginnings, its anonymous memory before it loaded."""
    ours = not case.package
    task = {
        "side": case.side,
        "precision": precision,
        "folder": str(model.timm_folder if case.side == "timm" else model.folder),
        "timm": TIMM[model.name],
        "num_classes": model.num_classes,
        "file": str(model.into / FILES[case.file]) if case.file else "",
        "pixels": str(work / "images.npy"),
        "calibration": str(work / "calibration.npy") if case.more.get("calibrates") else "",
        "threads": options.threads,
        **case.more,
    }
    start = Start()
    for left in reversed(range(1 if case.name == GEMM else options.starts)):
        python = sys.executable if ours else options.python
        worker = Worker(python, HERE / "peers.py", task, options.threads)
        try:
            before = worker.anonymous()
            seconds, peak = worker.watched("load")
            worker.ask("batch", size=options.batches[0])
            worker.ask("turn", seconds=0)
            start.first.append(worker.age())
            start.load.append(seconds)
            start.grown = peak - before
            start.logits = [] if left else worker.ask("answer")
        except WorkerError:
            worker.end()
            raise
        if left:
            worker.end()
    return worker, start, before


def measured(
    model: Model,
    precision: str,
    versions: dict[str, str],
    options: argparse.Namespace,
    work: Path,
) -> Group:
    """All sides of one precision, batch after batch, in turns."""
    group = Group(model.name, precision, model.gflop, model.weights)
    workers: dict[str, Worker] = {}
    before: dict[str, float] = {}
    try:
        for case in GROUPS[precision]:
            try:
                why = missing(case, model, versions)
                if why:
                    raise WorkerError(why)
                name = case.name
                workers[name], group.starts[name], before[name] = begin(
                    case, model, precision, options, work
                )
            except WorkerError as error:
                group.left_out[case.name] = str(error)
        for batch in options.batches:
            folders = [model.folder, model.into]
            group.memory[batch] = remembered(workers, before, batch, folders, group.left_out)
            turns = {
                name: partial(worker.ask, "turn", seconds=options.seconds)
                for name, worker in workers.items()
                if name not in group.left_out
            }
            group.seconds[batch] = in_turns(turns, options.rounds, options.warmup, group.left_out)
    finally:
        for worker in workers.values():
            worker.end()
    return group


def remembered(
    workers: dict[str, Worker],
    before: dict[str, float],
    batch: int,
    folders: list[Path],
    left_out: dict[str, str],
) -> dict[str, Memory]:
    """Memory of the first calls with a batch; they are a warm-up too."""
    found = {}
    for name, worker in workers.items():
        if name in left_out:
            continue
        try:
            worker.ask("batch", size=batch)
            _, peak = worker.watched("turn", seconds=0.1)
        except WorkerError as error:
            left_out[name] = str(error)
            continue
        found[name] = Memory(peak, before[name], worker.mapped(folders))
    return found


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=TIMM, default=["B/16", "S/16", "L/16", "dinov2-small"])
    add("--batches", nargs="+", type=int, default=[1, 8, 32])
    add("--precisions", nargs="+", choices=GROUPS, default=list(GROUPS))
    add("--rounds", type=int, default=11)
    add("--warmup", type=int, default=2, help="rounds that do not count (default: 2)")
    add("--seconds", type=float, default=0.5, help="of a turn, at least one call (default: 0.5)")
    add("--starts", type=int, default=3, help="processes of a side, for load and start-up")
    add("--threads", type=int, default=2)
    add("--python", default=sys.executable, help="an interpreter that has the peers")
    add("--work", type=Path, help="keep checkpoints and the peers' files here, for the next run")
    add("--out", type=Path, help="write the report here too")
    add("--json", type=Path, help="write every measured number here")
    add("--chart", type=Path, help="draw bars, .svg or .png; needs matplotlib")
    add("--quick", action="store_true", help="ViT-B/16, batches 1 and 8, few rounds")
    options = parser.parse_args()
    if options.quick:
        options.models, options.batches = ["B/16"], [1, 8]
        options.rounds, options.warmup, options.starts = min(options.rounds, 5), 1, 1
    return options


def main() -> None:
    options = parsed()
    sys.path.insert(0, str(HERE.parent))  # this checkout's vitlib, as the workers take it
    probe = subprocess.run(
        [options.python, str(HERE / "peers.py"), "probe"],
        capture_output=True,
        text=True,
        check=True,
    )
    versions = json.loads(probe.stdout.splitlines()[-1])
    pieces = {case.file for name in options.precisions for case in GROUPS[name] if case.file}
    groups, skipped = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        pixels = save_pixels(work)
        for name in options.models:
            try:
                model = made(name, work, options, pieces | {"onnx"})
            except FileNotFoundError as error:
                skipped[name] = str(error)
                continue
            for precision in options.precisions:
                print(f"{name}, {precision} ...", file=sys.stderr)
                groups.append(measured(model, precision, versions, options, work))
    head = heading({name: said for name, said in versions.items() if "missing" not in said})
    text = report(f"{head} {options.threads} threads, {options.rounds} rounds, {pixels}.", groups,
                  skipped)  # fmt: skip
    print(text)
    if options.out:
        write_whole(options.out, text)
    if options.json:
        write_whole(options.json, json.dumps([asdict(group) for group in groups]))
    if options.chart:
        from chart import draw

        draw(groups, options.chart)


if __name__ == "__main__":
    main()
