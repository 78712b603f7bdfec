"""Images per second from JPEG files to labels, relative to transformers' pipeline and to the parts.

    python benchmarks/photos.py [--files 256] [--rounds 5] [--precisions fp32 bf16 int8]
        [--models B/16 deit-tiny] [--python PEERS] [--out FILE]

The files are 640x480 JPEGs, cropped from the real photos. vitlib's Predictor classifies all of them
in batches of 32. The pipeline does the same with the fastest of the batch sizes 1, 8 and 32 and of
its image processors. The same rounds also time the optimized model alone on decoded images, and
decoding alone with Predictor's number of threads. Decoding and model share the cores, so the
complete path can reach at most 1 / (1/model + 1/decoding).

--processors times files to pixels alone instead: vitlib's ImageProcessor by one thread and by all,
and both image processors of transformers, which read one image a call.
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

from compare import make_checkpoint
from setting import SHARED, describe_run, list_photos, markdown_table, write_atomically
from turns import Worker, WorkerError, interleave

HERE = Path(__file__).resolve().parent
SIDES = HERE / "photo_sides.py"
PIPELINE, DECODING = "pipeline", "decoding"
BATCH = 32


def write_photos(folder: Path, count: int) -> list[str]:
    """Write 640x480 JPEG files: crops of the real photos, or noise if these are absent.

    Args:
        folder: Folder to create.
        count: Number of files.

    Returns:
        The paths.
    """
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    cats = SHARED / "data/photos/two_cats.png"
    sources = list_photos("fridge_multilabel") + ([cats] if cats.exists() else [])
    rng = np.random.default_rng(0)
    files = []
    for index in range(count):
        if sources:
            image = Image.open(sources[index % len(sources)]).convert("RGB")
        else:
            image = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        width = min(image.width, image.height * 4 // 3)
        height = width * 3 // 4
        position = (index // max(1, len(sources))) % 3 / 2  # top, middle or bottom
        left, top = (image.width - width) // 2, round((image.height - height) * position)
        crop = image.crop((left, top, left + width, top + height)).resize((640, 480))
        path = folder / f"{index:04d}.jpg"
        crop.save(path, quality=90)
        files.append(str(path))
    return files


def make_classifier(name: str, work: Path) -> Path:
    """Return the folder of a model with weights, labels and preprocessing.

    Raises:
        FileNotFoundError: The real model is absent.
    """
    if name == "deit-tiny":
        folder = SHARED / "models/deit-tiny-patch16-224"
        if not folder.exists():
            raise FileNotFoundError("its checkpoint is absent")
        return folder
    import vitlib

    folder = work / "classifier" / name.replace("/", "-")
    if not folder.exists():
        half = (0.5, 0.5, 0.5)
        processor = vitlib.ImageProcessor(size=(224, 224), image_mean=half, image_std=half)
        vitlib.save(vitlib.load(make_checkpoint(name, work)), folder, image_processor=processor)
    return folder


def measure_sides(
    folder: Path, files: list[str], options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, str], dict[str, str]]:
    """Time all sides, interleaved.

    Returns:
        Seconds of each call by round, the reason of each failure, and notes on each side.
    """
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
            is_vitlib = name != PIPELINE
            python = sys.executable if is_vitlib else options.python
            side_task = {"kind": "vitlib" if is_vitlib else "pipeline", "precision": name}
            try:
                workers[name] = Worker(python, SIDES, task | side_task, options.threads)
                labels[name] = workers[name].call("labels")
            except WorkerError as error:
                failed[name] = str(error)
                workers.pop(name, None)
        if PIPELINE in workers:
            notes[PIPELINE] = workers[PIPELINE].call("settings")
            for name in workers:
                label_pairs = list(zip(labels[name], labels[PIPELINE], strict=True))
                num_equal = sum(a == b for a, b in label_pairs)
                equal = f"{num_equal} of {len(label_pairs)} labels equal the pipeline's"
                notes.setdefault(name, equal)
        seconds = interleave(side_calls(workers), options.rounds, options.warmup, failed)
    finally:
        for worker in workers.values():
            worker.close()
    return seconds, failed, notes


def side_calls(workers: dict[str, Worker]) -> dict[str, partial[float]]:
    """Map names to the calls that are interleaved.

    They are the pipeline, decoding once, and for each precision the complete path and the model
    alone.
    """
    calls = {}
    for name, worker in workers.items():
        calls[name] = partial(worker.call, "time_all")
        if name != PIPELINE:
            calls[f"{name} model"] = partial(worker.call, "time_model")
            calls.setdefault(DECODING, partial(worker.call, "time_decoding"))
    return calls


def measure_processors(folder: Path, files: list[str], options: argparse.Namespace) -> str:
    """Time files to pixels, interleaved.

    Returns:
        A table of milliseconds an image and of the median ratios.
    """
    task = {"kind": "processor", "folder": str(folder), "files": files, "threads": options.threads}
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    try:
        for name in ("torchvision", "pil", "vitlib"):
            python = sys.executable if name == "vitlib" else options.python
            try:
                workers[name] = Worker(python, SIDES, task | {"precision": name}, options.threads)
            except WorkerError as error:
                failed[name] = str(error)
        calls = {name: partial(worker.call, "time_all") for name, worker in workers.items()}
        together = partial(workers["vitlib"].call, "time_all", threads=options.threads)
        calls[f"vitlib, {options.threads} threads"] = together
        seconds = interleave(calls, options.rounds, options.warmup, failed)
    finally:
        for worker in workers.values():
            worker.close()
    rows = []
    for name, turns in seconds.items():
        row = [name if name.startswith("vitlib") else f"transformers, {name}"]
        for kind in range(2):  # wall clock, then processor time
            values = [turn[kind] for turn in turns]
            row.append(f"{statistics.median(values) / len(files) * 1e3:.2f}")
            for peer in ("torchvision", "pil"):
                pairs = zip(seconds.get(peer, ()), values, strict=False)
                ratios = [other[kind] / value for other, value in pairs]
                row.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        rows.append(tuple(row))
    header = ("side", "ms an image", "speedup over torchvision", "over pil",
              "processor ms", "over torchvision", "over pil")  # fmt: skip
    lines = [f"- {side} is left out: {reason}" for side, reason in failed.items()]
    return "\n".join([markdown_table(header, rows), *lines])


def format_results(
    seconds: dict[str, list[float]], notes: dict[str, str], num_files: int, precisions: list[str]
) -> str:
    """Format the table of rates and of the median ratios.

    Args:
        seconds: Results of measure_sides().
        notes: Note on each side.
        num_files: Number of files.
        precisions: Rows of vitlib.
    """

    def rate(name: str) -> str:
        return f"{num_files / statistics.median(seconds[name]):.1f}" if name in seconds else ""

    def median_ratio(references: list[str], name: str) -> str:
        if name not in seconds or not all(other in seconds for other in references):
            return ""
        reference_seconds = [
            sum(parts) for parts in zip(*(seconds[other] for other in references), strict=True)
        ]
        pairs = zip(reference_seconds, seconds[name], strict=True)
        return f"{statistics.median(a / b for a, b in pairs):.3f}"

    rows = []
    if PIPELINE in seconds:
        rows.append(("transformers' pipeline", rate(PIPELINE), *[""] * 5, notes[PIPELINE]))
    for name in precisions:
        if name in seconds:
            model = f"{name} model"
            ratios = (
                median_ratio([PIPELINE], name),
                median_ratio([model], name),
                median_ratio([model, DECODING], name),
            )
            row = (f"vitlib {name}", rate(name), rate(model), rate(DECODING), *ratios)
            rows.append((*row, notes.get(name, "")))
    header = ("side", "img/s", "model alone", "decoding alone", "speedup over pipeline",
            "share of model alone", "share of 1 / (1/model + 1/decoding)", "notes")  # fmt: skip
    return markdown_table(header, rows)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--files", type=int, default=256)
    add("--rounds", type=int, default=5)
    add("--warmup", type=int, default=1, help="rounds before the timed ones (default: 1)")
    add("--threads", type=int, default=2)
    add("--models", nargs="+", default=["B/16", "deit-tiny"])
    precisions = ["fp32", "bf16", "int8"]
    add("--precisions", nargs="+", choices=precisions, default=precisions)
    add("--processors", action="store_true", help="time files to pixels alone")
    add("--python", default=sys.executable, help="interpreter with transformers")
    add("--work", type=Path, help="folder that keeps the checkpoints")
    add("--out", type=Path, help="also write the report to this file")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    sys.path.insert(0, str(HERE.parent))  # import vitlib from this checkout, as the workers do
    command = [options.python, str(HERE / "peers.py"), "probe"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    versions = json.loads(output.splitlines()[-1])
    libraries = {name: versions[name] for name in ("torch", "transformers")}
    parts = [
        f"{describe_run(libraries)} {options.threads} threads, {options.files} files of "
        f"640x480 JPEG, batches of {BATCH}, medians of {options.rounds} rounds and of their ratios."
    ]
    with tempfile.TemporaryDirectory() as temporary:
        files = write_photos(Path(temporary) / "photos", options.files)
        for name in options.models:
            try:
                folder = make_classifier(name, options.work or Path(temporary))
            except FileNotFoundError as error:
                parts.append(f"{name} is skipped: {error}.")
                continue
            if options.processors:
                table = measure_processors(folder, files, options)
                parts.append(f"## {name}, files to pixels\n\n{table}")
                continue
            seconds, failed, notes = measure_sides(folder, files, options)
            parts.append(
                f"## {name}\n\n{format_results(seconds, notes, len(files), options.precisions)}"
            )
            parts += [f"- {side} is left out: {reason}" for side, reason in failed.items()]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.out:
        write_atomically(options.out, text)


if __name__ == "__main__":
    main()
