"""Fine-tuning on the fridge photos, measured on folds that took no part: accuracy or IoU, and time.

    python examples/fridge.py DATA --model M [--seeds 1 2 3] [--set setting=value ...]

For each seed the photos are dealt into five folds; each fold is held out once, a model is trained
on the other four by the recipe, for all of its epochs, without looking at the fold, and then
measured on it. A seed's figure is the mean over its five folds. The recipe was chosen on seed 0.
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

# Half of the model stays as it is: few photos move few weights well, and a step costs half as much.
COMMON = {
    "num_train_epochs": 10,
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-4,
    "layers_to_freeze": 7,
    "precision": "bf16",
    "augment": "light",
}
# Of several labels each must stay in sight: the photo is not cropped, and in training less.
SEVERAL = {"fit": "squash", "crop_scale": [0.6, 1.0]}


def measured(photos: Any, seed: int, options: argparse.Namespace, config: TrainConfig) -> Any:
    """Per fold: (figure, seconds of training)."""
    found = []
    for number, (train, held) in enumerate(folds(photos, 5, seed)):
        if options.folds and number not in options.folds:
            continue
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            done = finetune(photos.subset(train), options.model, Path(folder) / "m", config=config)
            seconds = time.perf_counter() - start
            vit = vitlib.Predictor.load(done.out)
            test = photos.subset(held)
            scores = vit.probabilities([str(p.path) for p in test.photos])
            said = metrics.quick(test.targets(), scores, photos.multi_label)
            name = "iou" if photos.multi_label else "accuracy"
            found.append((said[name], seconds))
            print(
                f"seed {seed} fold {number}: {name} {said[name]:.4f}  {seconds:.0f} s", flush=True
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folds", type=int, nargs="*")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], metavar="setting=value")
    options = parser.parse_args()
    logging.getLogger("vitlib").setLevel(logging.ERROR)
    changed = {
        k: json.loads(v) if v[0] in "0123456789[.t" else v
        for k, _, v in (s.partition("=") for s in options.settings)
    }
    multi = (options.data / "labels.csv").is_file()
    recipe = {**COMMON, **(SEVERAL if multi else {})}
    config = TrainConfig.from_dict({"validation_split": 0, **recipe, **changed})
    photos = read_photos(options.data, multi_label=multi)
    means = []
    for seed in options.seeds:
        found = measured(photos, seed, options, config)
        means.append(statistics.mean(f for f, _ in found))
        slowest = max(s for _, s in found)
        print(f"seed {seed}: {means[-1]:.4f}  slowest fold {slowest:.0f} s", flush=True)
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    print(f"mean {statistics.mean(means):.4f}, spread {spread:.4f}, over seeds {options.seeds}")


if __name__ == "__main__":
    main()
