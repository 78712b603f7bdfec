"""The whole path, photos on disk to labels, beside transformers' pipeline and beside its own parts.

    python benchmarks/photos.py [--files 256] [--rounds 5] [--precisions fp32 bf16 int8]
        [--models B/16 deit-tiny] [--python PEERS] [--out FILE]

640x480 JPEG files are cut from the real photos. vitlib's Predictor classifies all of them in
batches of 32; so does the pipeline, with the fastest of its batch sizes 1, 8 and 32 and of its
image processors. In the same rounds: the optimised model alone on levels that lie ready, and the
decoding alone on as many threads as Predictor has. Decoding and model share the cores, so the most
that the whole can reach is 1 / (1/model + 1/decoding).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from compare import checkpoint
from setting import SHARED, heading, photos_of, table, write_whole
from turns import Worker, WorkerError, in_turns

HERE = Path(__file__).resolve().parent
SIDES = HERE / "photo_sides.py"
PIPELINE, DECODE = "pipeline", "decoding"
BATCH = 32


def cut(folder: Path, count: int) -> list[str]:
    """Write 640x480 JPEG files: real photos cut to that shape in several places, or noise."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    cats = SHARED / "data/photos/two_cats.png"
    sources = photos_of("fridge_multilabel") + ([cats] if cats.exists() else [])
    noise = np.random.default_rng(0)
    files = []
    for index in range(count):
        if sources:
            image = Image.open(sources[index % len(sources)]).convert("RGB")
        else:
            image = Image.fromarray(noise.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        width = min(image.width, image.height * 4 // 3)
        height = width * 3 // 4
        place = (index // max(1, len(sources))) % 3 / 2  # from the top, the middle, the bottom
        left, top = (image.width - width) // 2, round((image.height - height) * place)
        part = image.crop((left, top, left + width, top + height)).resize((640, 480))
        path = folder / f"{index:04d}.jpg"
        part.save(path, quality=90)
        files.append(str(path))
    return files


def classifier(name: str, work: Path) -> Path:
    """A folder with weights, labels and preprocessing that both sides open."""
    if name == "deit-tiny":
        folder = SHARED / "models/deit-tiny-patch16-224"
        if not folder.exists():
            raise FileNotFoundError("the real model is not there")
        return folder
    import vitlib

    folder = work / "classifier" / name.replace("/", "-")
    if not folder.exists():
        half = (0.5, 0.5, 0.5)
        rule = vitlib.ImageProcessor(size=(224, 224), image_mean=half, image_std=half)
        vitlib.save(vitlib.load(checkpoint(name, work)), folder, image_processor=rule)
    return folder


def measured(
    folder: Path, files: list[str], options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, str], dict[str, str]]:
    """Seconds of every side by rounds; why some failed; what there is to say of others."""
    task = {
        "folder": str(folder),
        "files": files,
        "batch_size": BATCH,
        "batch_sizes": [1, 8, BATCH],
    }
    task["threads"] = options.threads
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    notes: dict[str, str] = {}
    labels: dict[str, list[int]] = {}
    try:
        for name in (PIPELINE, *options.precisions):
            ours = name != PIPELINE
            python = sys.executable if ours else options.python
            more = {"kind": "vitlib" if ours else "pipeline", "precision": name}
            try:
                workers[name] = Worker(python, SIDES, task | more, options.threads)
                labels[name] = workers[name].ask("labels")
            except WorkerError as error:
                failed[name] = str(error)
                workers.pop(name, None)
        if PIPELINE in workers:
            notes[PIPELINE] = workers[PIPELINE].ask("chosen")
            for name in workers:
                pairs = list(zip(labels[name], labels[PIPELINE], strict=True))
                notes.setdefault(name, f"{sum(a == b for a, b in pairs)} of {len(pairs)} labels "
                                 "as the pipeline's")  # fmt: skip
        seconds = in_turns(turns_of(workers), options.rounds, options.warmup, failed)
    finally:
        for worker in workers.values():
            worker.end()
    return seconds, failed, notes


def turns_of(workers: dict[str, Worker]) -> dict[str, partial[float]]:
    """The pipeline; the decoding, once; for each precision the whole and the model alone."""
    turns = {}
    for name, worker in workers.items():
        turns[name] = partial(worker.ask, "whole")
        if name != PIPELINE:
            turns[f"{name} model"] = partial(worker.ask, "model")
            turns.setdefault(DECODE, partial(worker.ask, "decode"))
    return turns


def told(
    seconds: dict[str, list[float]], notes: dict[str, str], count: int, names: list[str]
) -> str:
    """A table: rates, and the shares by rounds."""

    def rate(name: str) -> str:
        return f"{count / statistics.median(seconds[name]):.1f}" if name in seconds else ""

    def share(over: list[str], name: str) -> str:
        if name not in seconds or not all(other in seconds for other in over):
            return ""
        best = [sum(parts) for parts in zip(*(seconds[other] for other in over), strict=True)]
        pairs = zip(best, seconds[name], strict=True)
        return f"{statistics.median(a / b for a, b in pairs):.3f}"

    rows = []
    if PIPELINE in seconds:
        rows.append(("transformers' pipeline", rate(PIPELINE), *[""] * 5, notes[PIPELINE]))
    for name in names:
        if name in seconds:
            model = f"{name} model"
            shares = (share([PIPELINE], name), share([model], name), share([model, DECODE], name))
            row = (f"vitlib {name}", rate(name), rate(model), rate(DECODE), *shares)
            rows.append((*row, notes.get(name, "")))
    head = ("side", "img/s", "model alone", "decoding alone", "vitlib / pipeline",
            "of the model alone", "of 1 / (1/model + 1/decoding)", "")  # fmt: skip
    return table(head, rows)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--files", type=int, default=256)
    add("--rounds", type=int, default=5)
    add("--warmup", type=int, default=1, help="rounds that do not count (default: 1)")
    add("--threads", type=int, default=2)
    add("--models", nargs="+", default=["B/16", "deit-tiny"])
    precisions = ["fp32", "bf16", "int8"]
    add("--precisions", nargs="+", choices=precisions, default=precisions)
    add("--python", default=sys.executable, help="an interpreter that has transformers")
    add("--work", type=Path, help="keep the checkpoints here, for the next run")
    add("--out", type=Path, help="write the report here too")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    sys.path.insert(0, str(HERE.parent))  # this checkout's vitlib, as the workers take it
    probe = [options.python, str(HERE / "peers.py"), "probe"]
    said = subprocess.run(probe, capture_output=True, text=True, check=True).stdout
    versions = json.loads(said.splitlines()[-1])
    listed = {name: versions[name] for name in ("torch", "transformers")}
    parts = [
        f"{heading(listed)} {options.threads} threads, {options.files} files of 640x480 JPEG, "
        f"batches of {BATCH}, medians of {options.rounds} rounds; shares by round."
    ]
    with tempfile.TemporaryDirectory() as temporary:
        files = cut(Path(temporary) / "photos", options.files)
        for name in options.models:
            try:
                folder = classifier(name, options.work or Path(temporary))
            except FileNotFoundError as error:
                parts.append(f"{name} is skipped: {error}.")
                continue
            seconds, failed, notes = measured(folder, files, options)
            parts.append(f"## {name}\n\n{told(seconds, notes, len(files), options.precisions)}")
            parts += [f"- {side} is left out: {why}" for side, why in failed.items()]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.out:
        write_whole(options.out, text)


if __name__ == "__main__":
    main()
