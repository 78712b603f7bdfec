"""Fine-tune on the fridge photos by cross-validation; print accuracy or IoU, and training time.

    python examples/fridge.py DATA --model M [--seeds 1 2 3] [--set setting=value ...]

Each seed splits the photos into five folds. For each fold, a model trains on the other four for all
epochs of the recipe, and is then tested on that fold. The result of a seed is the mean over its
five folds. The recipe was chosen on seed 0.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import vitlib
from vitlib import metrics
from vitlib.data import folds, read_photos
from vitlib.train import TrainConfig, finetune

# Half of the layers are frozen: few photos cannot train all weights, and steps take half the time.
RECIPE = {
    "num_train_epochs": 10,
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-4,
    "layers_to_freeze": 7,
    "precision": "bf16",
    "augment": "light",
}
# A crop could remove an object whose label remains. So evaluation does not crop, and training less.
MULTI_LABEL_RECIPE = {"fit": "squash", "crop_scale": [0.6, 1.0]}


def cross_validate(
    photos: Any, seed: int, options: argparse.Namespace, config: TrainConfig
) -> list[tuple[float, float]]:
    """Return accuracy or IoU and the seconds of training, for each fold."""
    results = []
    for number, (train_indices, test_indices) in enumerate(folds(photos, 5, seed)):
        if options.folds and number not in options.folds:
            continue
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            training = photos.subset(train_indices)
            run = finetune(training, options.model, Path(folder) / "m", config=config)
            seconds = time.perf_counter() - start
            predictor = vitlib.Predictor.load(run.out)
            test = photos.subset(test_indices)
            y_score = predictor.probabilities([str(photo.path) for photo in test.photos])
            name = "iou" if photos.multi_label else "accuracy"
            value = metrics.quick(test.targets(), y_score, photos.multi_label)[name]
            results.append((value, seconds))
            print(f"seed {seed} fold {number}: {name} {value:.4f}  {seconds:.0f} s", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folds", type=int, nargs="*")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], metavar="setting=value")
    options = parser.parse_args()
    logging.getLogger("vitlib").setLevel(logging.ERROR)
    settings = {
        name: json.loads(value) if value[0] in "0123456789[.t" else value
        for name, _, value in (setting.partition("=") for setting in options.settings)
    }
    is_multi_label = (options.data / "labels.csv").is_file()
    recipe = {**RECIPE, **(MULTI_LABEL_RECIPE if is_multi_label else {})}
    config = TrainConfig.from_dict({"validation_split": 0, **recipe, **settings})
    photos = read_photos(options.data, multi_label=is_multi_label)
    means = []
    for seed in options.seeds:
        results = cross_validate(photos, seed, options, config)
        means.append(statistics.mean(value for value, _ in results))
        slowest = max(seconds for _, seconds in results)
        print(f"seed {seed}: {means[-1]:.4f}  slowest fold {slowest:.0f} s", flush=True)
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    print(f"mean {statistics.mean(means):.4f}, spread {spread:.4f}, over seeds {options.seeds}")


if __name__ == "__main__":
    main()
