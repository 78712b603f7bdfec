"""Time and memory of probes, and their accuracy on the fridge photos.

    python benchmarks/probe.py [knn|cached|fridge ...] [--photos 1000000]

- knn: exact weighted neighbours of 10,000 queries among a million random features of 384 numbers
  in a memory-mapped file. Limits: 300 s, 2 GiB.
- cached: neighbours and logistic regression of 10,000 features of 384 numbers, of 10 and of 100
  classes, with 2,000 test photos and by 5 folds. Limits: 20 s, 1 GiB.
- fridge: DINOv2-small on the two sets of ../shared/data, by 5 folds of seed 0: the class token of
  the last layer with scikit-learn's own C and with a chosen C, and layer and pool chosen, too.

Each measurement is a process of its own with 2 threads, whose peak resident memory (mapped pages of
files included) and CPU time are printed too. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from setting import SHARED, describe_run, markdown_table

PARTS = ("knn", "cached", "fridge")
WIDTH, QUERIES = 384, 10_000
SETS = {"fridge_multiclass": False, "fridge_multilabel": True}


def measure_knn(photos: int) -> dict[str, Any]:
    """Neighbours of random queries among random features in a file."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        shape = (photos, WIDTH)
        mapped = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        for start in range(0, photos, 50_000):
            rows = mapped[start : start + 50_000]
            rows[:] = random.standard_normal(rows.shape, dtype=np.float32)
        mapped.flush()
        del mapped, rows
        return run_knn(np.load(path, mmap_mode="r"), random)


def run_knn(features: np.ndarray, random: np.random.Generator) -> dict[str, Any]:
    """Time neighbours and votes alone."""
    from vitlib.probe import knn

    targets = random.integers(0, 1000, len(features))
    queries = random.standard_normal((QUERIES, WIDTH), dtype=np.float32)
    before, start = time.process_time(), time.perf_counter()
    scores = knn(features, targets, queries, num_classes=1000)
    seconds, cpu = time.perf_counter() - start, time.process_time() - before
    return {"seconds": seconds, "cpu": cpu, "k": sorted(scores)}


def measure_cached(classes: int, kind: str) -> dict[str, Any]:
    """Neighbours and logistic regression of cached features of made-up classes."""
    from vitlib.data import LabelledPhotos, Photo
    from vitlib.probe.division import divide_photos
    from vitlib.probe.measure import Task, measure_feature

    random = np.random.default_rng(0)
    count = 10_000
    total = count + 2_000 * (kind == "split")
    centers = random.standard_normal((classes, WIDTH))
    targets = random.integers(0, classes, total)
    # Noise of ten directions that all photos share, as real features have, and of each feature.
    shared = random.standard_normal((total, 10)) @ random.standard_normal((10, WIDTH)) * 0.7
    features = 0.2 * centers[targets] + shared + random.standard_normal((total, WIDTH)) * 1.2
    labels = tuple(f"{i:03}" for i in range(classes))
    photos = LabelledPhotos(
        tuple(Photo(Path(f"{i}"), (labels[t],)) for i, t in enumerate(targets)), labels, False, ""
    )
    test = photos.subset(range(count, total)) if total > count else None
    division = divide_photos(photos.subset(range(count)), test, 0)
    task = Task(targets, labels, division, ("knn", "logistic"))
    vectors = features.astype(np.float32)
    before, start = time.process_time(), time.perf_counter()
    result = measure_feature(vectors, task)
    seconds, cpu = time.perf_counter() - start, time.process_time() - before
    accuracy = {m.method: m.metrics["accuracy"] for m in result["methods"]}
    return {"seconds": seconds, "cpu": cpu, **accuracy}


def measure_fridge(name: str) -> dict[str, Any]:
    """Probe a set of the fridge photos."""
    from vitlib import metrics, probe
    from vitlib.data import folds, read_photos
    from vitlib.features import Feature, extract
    from vitlib.predict.predictor import Predictor

    multi_label, model = SETS[name], SHARED / "models" / "dinov2-small"
    photos = read_photos(SHARED / "data" / name, multi_label=multi_label)
    feature = Feature(12, "cls")
    paths = [photo.path for photo in photos.photos]
    x = extract(Predictor.load(model), paths, [feature]).vectors[feature]
    values, targets = [], photos.targets()
    metric = "iou" if multi_label else "accuracy"
    for train, test in folds(photos, 5, 0):
        head = probe.logistic(x[train], targets[train], c=1.0, num_classes=len(photos.labels))
        values.append(metrics.quick(targets[test], head.scores(x[test]), multi_label)[metric])
    with tempfile.TemporaryDirectory() as folder:
        before, start = time.process_time(), time.perf_counter()
        report = probe.run(
            SHARED / "data" / name, str(model), Path(folder) / "out", layers="all",
            pools=("cls", "mean", "cls+mean"), methods=("knn", "logistic"),
            multi_label=multi_label,
        )  # fmt: skip
        seconds, cpu = time.perf_counter() - start, time.process_time() - before
    rows = {(r.layer, r.pool, r.method): r for r in report.rows}
    last, nested = rows[12, "cls", "logistic"], report.selected[0]
    return {
        "c_1": float(np.mean(values)), "c_chosen": last.value, "interval": last.interval,
        "knn": rows[12, "cls", "knn"].value, "selected": nested.value,
        "selected_interval": nested.interval,
        "choices": [f"{layer} {pool}" for _, layer, pool in nested.choices],
        "best": f"{report.best.layer} {report.best.pool}" if report.best else "",
        "highest": max(row.value for row in report.rows), "seconds": seconds, "cpu": cpu,
    }  # fmt: skip


def run_alone(*arguments: object) -> dict[str, Any]:
    """Run a measurement in a process of its own with two threads."""
    environment = dict(os.environ, OMP_NUM_THREADS="2", OPENBLAS_NUM_THREADS="2")
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def work(name: str, *arguments: str) -> None:
    """Run a measurement here, and print it as JSON with the peak memory."""
    if name == "knn":
        result = measure_knn(int(arguments[0]))
    elif name == "cached":
        result = measure_cached(int(arguments[0]), arguments[1])
    else:
        result = measure_fridge(arguments[0])
    result["mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(result))


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--photos", type=int, default=1_000_000)
    options = parser.parse_args()
    import sklearn
    import torch

    print(describe_run({"torch": torch.__version__, "scikit-learn": sklearn.__version__}), "\n")
    rows = []
    if "knn" in options.parts:
        result = run_alone("knn", options.photos)
        name = f"kNN, {QUERIES:,} queries, {options.photos:,} x {WIDTH}"
        rows.append([name, *cells(result), f"k = {', '.join(map(str, result['k']))}"])
    for classes in (10, 100) if "cached" in options.parts else ():
        for kind in ("split", "folds"):
            result = run_alone("cached", classes, kind)
            text = f"kNN {result['knn']:.3f}, logistic regression {result['logistic']:.3f}"
            rows.append([f"10,000 features, {classes} classes, {kind}", *cells(result), text])
    if rows:
        print(markdown_table(["", "s", "CPU s", "peak MiB", "accuracy"], rows), "\n")
    for name in SETS if "fridge" in options.parts else ():
        result = run_alone("fridge", name)
        print(name, json.dumps(result, indent=1))


def cells(result: dict[str, Any]) -> list[str]:
    """Format time and memory."""
    return [f"{result['seconds']:.1f}", f"{result['cpu']:.1f}", f"{result['mib']:.0f}"]


if __name__ == "__main__":
    main()
