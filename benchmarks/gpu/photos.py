"""From JPEGs to labels: decoding alone, the model alone, and both by Predictor and vitlib.batch."""

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
from setting import photos_of

import vitlib.batch
from benchmarks.gpu.experiment import Experiment
from benchmarks.gpu.timing import seconds_of
from vitlib import Predictor
from vitlib.image.prefetch import stack
from vitlib.predict.engine import InferenceEngine

DISTINCT = 128
ROUNDS = 3


def photo_files(experiment: Experiment) -> tuple[list[Path], str]:
    """Return paths of JPEGs, each of some repeated, and what they are: real ones where there are.

    Those that are drawn here are as large as the real ones.
    """
    count = experiment.sizes.photos
    found = photos_of("fridge_multilabel")[:DISTINCT]
    kind = f"{len(found)} real photos"
    if not found:
        found = draw_photos(experiment.work / "photos", min(count, DISTINCT))
        kind = f"{len(found)} drawn photos"
    return list(itertools.islice(itertools.cycle(found), count)), kind


def draw_photos(folder: Path, count: int) -> list[Path]:
    """Write photos of 499x666 with detail at several scales, and return their paths."""
    folder.mkdir()
    random = np.random.default_rng(0)
    paths = [folder / f"{index:03}.jpg" for index in range(count)]
    for path in paths:
        image = np.zeros((666, 499, 3), np.float32)
        for cells, weight in ((6, 0.5), (40, 0.3), (200, 0.2)):
            noise = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
            image += weight * np.asarray(noise.resize((499, 666), Image.Resampling.BICUBIC))
        Image.fromarray(image.astype(np.uint8)).save(path, quality=90)
    return paths


def measure_photos(experiment: Experiment) -> None:
    """Measure the three ways, and record photos a second of each."""
    files, kind = photo_files(experiment)
    batch, cores = experiment.sizes.reading_batch, os.cpu_count() or 1
    folder, device = experiment.work / "hf", str(experiment.device)
    predictor = Predictor.load(folder, precision="bf16", device=device)
    engine = predictor.engine()
    sample = stack([engine.preprocess(path) for path in files[:batch]], engine.device)

    def record(way: str, work: Callable[[], object], count: int, **more: object) -> None:
        with experiment.attempt("photos", way=way):
            seconds = statistics.median(seconds_of(experiment, work) for _ in range(ROUNDS))
            experiment.record(
                "photos",
                way=way,
                photos_s=round(count / seconds, 1),
                files=kind,
                cores=cores,
                **more,
            )

    for threads in sorted({min(8, cores), cores}):
        record("decoding alone", lambda n=threads: decode(engine, files, n), len(files),
               threads=threads)  # fmt: skip
    rounds = max(1, len(files) // batch)
    engine.scores(sample)
    record(
        "model alone", lambda: [engine.scores(sample) for _ in range(rounds)], rounds * len(sample)
    )
    record("Predictor", lambda: predictor.classify(files, batch_size=batch), len(files),
           batch=batch)  # fmt: skip

    def run_batch() -> None:
        with tempfile.TemporaryDirectory() as out:
            vitlib.batch.run(files, model=predictor, out=out)

    record("vitlib.batch", run_batch, len(files))


def decode(engine: InferenceEngine, files: list[Path], threads: int) -> None:
    """Read files to what the model takes, and drop it."""
    with torch.inference_mode(), ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(engine.preprocess, files):
            pass
