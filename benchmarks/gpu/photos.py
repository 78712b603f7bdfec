"""From JPEGs to labels: decoding alone, the model alone, Predictor and vitlib.batch."""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from setting import list_photos

import vitlib.batch
from benchmarks.gpu.experiment import Experiment
from benchmarks.gpu.timing import measure_seconds
from vitlib import Predictor
from vitlib.image.prefetch import stack
from vitlib.predict.engine import InferenceEngine

NUM_DISTINCT = 128  # different files; further ones repeat them
ROUNDS = 3


def list_files(experiment: Experiment) -> tuple[list[Path], str]:
    """Return paths of JPEG files, and a description of them.

    They are the real photos, or generated ones of the same size if these are absent.
    """
    count = experiment.sizes.photos
    paths = list_photos("fridge_multilabel")[:NUM_DISTINCT]
    description = f"{len(paths)} real photos"
    if not paths:
        paths = generate_photos(experiment.work / "photos", min(count, NUM_DISTINCT))
        description = f"{len(paths)} generated photos"
    return list(itertools.islice(itertools.cycle(paths), count)), description


def generate_photos(folder: Path, count: int) -> list[Path]:
    """Write photos of 499x666 with detail at several scales; return their paths."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = [folder / f"{index:03}.jpg" for index in range(count)]
    for path in paths:
        image = np.zeros((666, 499, 3), np.float32)
        for cells, weight in ((6, 0.5), (40, 0.3), (200, 0.2)):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            image += weight * np.asarray(noise.resize((499, 666), Image.Resampling.BICUBIC))
        Image.fromarray(image.astype(np.uint8)).save(path, quality=90)
    return paths


def measure_photos(experiment: Experiment) -> None:
    """Measure each workload, and record its photos per second."""
    files, description = list_files(experiment)
    batch, cores = experiment.sizes.photo_batch, os.cpu_count() or 1
    folder, device = experiment.work / "hf", str(experiment.device)
    predictor = Predictor.load(folder, precision="bf16", device=device)
    engine = predictor.engine()
    images = stack([engine.preprocess(path) for path in files[:batch]], engine.device)

    def record(workload: str, call: Callable[[], object], count: int, **more: object) -> None:
        with experiment.attempt("photos", workload=workload):
            seconds = statistics.median(measure_seconds(experiment, call) for _ in range(ROUNDS))
            experiment.record(
                "photos",
                workload=workload,
                photos_s=round(count / seconds, 1),
                files=description,
                cores=cores,
                **more,
            )

    for threads in sorted({min(8, cores), cores}):
        record(
            "decoding alone",
            lambda num_threads=threads: decode_files(engine, files, num_threads),
            len(files),
            threads=threads,
        )
    repeats = max(1, len(files) // batch)
    engine.scores(images)
    record(
        "model alone",
        lambda: [engine.scores(images) for _ in range(repeats)],
        repeats * len(images),
    )
    record("Predictor", lambda: predictor.classify(files, batch_size=batch), len(files),
           batch=batch)  # fmt: skip

    def run_batch() -> None:
        with tempfile.TemporaryDirectory() as out:
            vitlib.batch.run(files, model=predictor, out=out)

    record("vitlib.batch", run_batch, len(files))


def decode_files(engine: InferenceEngine, files: list[Path], threads: int) -> None:
    """Decode and preprocess files, and drop the results."""
    with torch.inference_mode(), ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(engine.preprocess, files):
            pass
