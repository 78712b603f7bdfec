"""finetune with nothing but photos, beside logistic regression and transformers' Trainer.

    python benchmarks/defaults.py MODEL [--sets NAME|PHOTOS:COUNT ...] [--seeds 2]

Each set is divided into photos to train with and held-out photos that no side sees. The three sides
run one after the other in this process, on the same division:

- vitlib: `finetune(photos, model, out)`, whose settings the photos choose;
- logistic regression: scikit-learn's, with its defaults, on standardised frozen features;
- Trainer: 3 epochs, batches of 8, a rate of 5e-5 that falls linearly, AdamW, random resized crops
  and flips, as in transformers' guide to image classification.

Printed are held-out accuracy, or mean average precision of several labels, and seconds. Needs
scikit-learn, transformers and accelerate. The named sets are those of ../shared/data, and the
digits of scikit-learn drawn as pictures; PHOTOS:COUNT is a folder of your own, as `vitlib finetune`
reads it, of which COUNT photos are trained with and at most 400 others held out.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from setting import SHARED

import vitlib
from vitlib.data import LabelledPhotos, Photo, read_photos
from vitlib.train import finetune
from vitlib.train.augment import Augment

Scores = np.ndarray[Any, Any]
# Photos to train with, of how many classes, from which data.
SETS = {
    "fridge 12": ("fridge_multiclass", 12, 4),
    "fridge two classes": ("fridge_multiclass", 32, 2),
    "fridge": ("fridge_multiclass", 67, 4),
    "fridge several labels": ("fridge_multilabel", 64, 4),
    "digits 100": ("digits", 100, 10),
    "digits 400": ("digits", 400, 10),
}


def read_set(name: str, folder: Path) -> tuple[LabelledPhotos, int]:
    """Read a set, and how many of its photos to train with; digits are drawn into the folder."""
    if name not in SETS:
        path, _, number = name.rpartition(":")
        labels = next(iter(Path(path).glob("*.csv")), None)
        return read_photos(labels or path, multi_label=labels is not None), int(number)
    source, count, classes = SETS[name]
    return read_named_set(source, classes, folder), count


def read_named_set(source: str, classes: int, folder: Path) -> LabelledPhotos:
    """Read a set of SETS."""
    if source != "digits":
        photos = read_photos(SHARED / "data" / source, multi_label="multilabel" in source)
        if classes < len(photos.labels):
            labels = photos.labels[:classes]
            kept = tuple(photo for photo in photos.photos if photo.labels[0] in labels)
            photos = LabelledPhotos(kept, labels, False, photos.source)
        return photos
    from sklearn.datasets import load_digits

    digits, rows = load_digits(), []
    for index, (picture, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / f"{index}.png"
        drawn = Image.fromarray((picture * 15.9).astype(np.uint8)).convert("RGB")
        drawn.resize((64, 64), Image.Resampling.BICUBIC).save(path)
        rows.append(Photo(path, (str(label),)))
    return LabelledPhotos(tuple(rows), tuple(map(str, range(10))), False, "digits")


def divide(photos: LabelledPhotos, count: int, seed: int) -> tuple[LabelledPhotos, LabelledPhotos]:
    """Divide a set into `count` photos of every class and at most 400 others."""
    order = np.random.default_rng(seed).permutation(len(photos))
    if not photos.multi_label:
        labels = np.array([photos.photos[i].labels[0] for i in order])
        ranks = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)])
        order = order[np.argsort(ranks, kind="stable")]
    parts = order[:count], order[count : count + 400]
    training, held_out = (photos.subset(sorted(part.tolist())) for part in parts)
    return training, held_out


def measure(photos: LabelledPhotos, scores: Scores) -> float:
    """Compute the accuracy, or the mean average precision of several labels."""
    targets = photos.targets()
    if photos.multi_label:
        from sklearn.metrics import average_precision_score

        return float(average_precision_score(targets, scores))
    return float((scores.argmax(axis=1) == targets).mean())


def run_vitlib(training: LabelledPhotos, held_out: LabelledPhotos, model: str) -> Scores:
    """Train with the settings that the photos choose."""
    with tempfile.TemporaryDirectory() as folder:
        finetune(training, model, Path(folder, "run"), multi_label=training.multi_label)
        predictor = vitlib.Predictor.load(Path(folder, "run"), device="cpu")
        return predictor.probabilities([photo.path for photo in held_out.photos])


def run_logistic(training: LabelledPhotos, held_out: LabelledPhotos, model: str) -> Scores:
    """Fit logistic regression to frozen features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    predictor = vitlib.Predictor.load(model, device="cpu")
    features = [predictor.embed([p.path for p in part.photos]) for part in (training, held_out)]
    regression: Any = LogisticRegression(max_iter=5000)
    if training.multi_label:
        regression = OneVsRestClassifier(regression)
    fitted = make_pipeline(StandardScaler(), regression).fit(features[0], training.targets())
    return np.asarray(fitted.predict_proba(features[1]))


def run_trainer(training: LabelledPhotos, held_out: LabelledPhotos, model: str) -> Scores:
    """Train with transformers' Trainer by the recipe of its guide."""
    from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

    processor = vitlib.Predictor.load(model, device="cpu").image_processor
    crop, rng = Augment.light(), np.random.default_rng(0)
    kind = "multi_label" if training.multi_label else "single_label"
    network = AutoModelForImageClassification.from_pretrained(
        model, num_labels=len(training.labels), ignore_mismatched_sizes=True,
        problem_type=f"{kind}_classification",
    )  # fmt: skip
    size = processor.crop_size or (224, 224)

    class Rows(torch.utils.data.Dataset[dict[str, Any]]):
        def __init__(self, photos: LabelledPhotos, augment: bool) -> None:
            self.photos, self.augment, self.targets = photos, augment, photos.targets()

        def __len__(self) -> int:
            return len(self.photos)

        def __getitem__(self, index: int) -> dict[str, Any]:
            image = Image.open(self.photos.photos[index].path).convert("RGB")
            if self.augment:
                pixels = processor(Image.fromarray(crop.apply(np.asarray(image), size, rng)))
            else:
                pixels = processor(image)
            target = torch.as_tensor(self.targets[index])
            label = target.float() if self.photos.multi_label else target.long()
            return {"pixel_values": pixels[0], "labels": label}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=3, learning_rate=5e-5, per_device_train_batch_size=8,
            report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(network, arguments, train_dataset=Rows(training, True))
        trainer.train()
        return np.asarray(trainer.predict(Rows(held_out, False)).predictions)


SIDES: dict[str, Callable[[LabelledPhotos, LabelledPhotos, str], Scores]] = {
    "vitlib": run_vitlib, "logistic regression": run_logistic, "Trainer": run_trainer,
}  # fmt: skip


def main() -> None:
    """Run the sides on each set and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    logging.getLogger("vitlib").setLevel(logging.ERROR)
    print("| set | photos | seed |", " | ".join(SIDES), "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sets:
            photos, count = read_set(name, Path(folder))
            for seed in range(options.seeds):
                training, held_out = divide(photos, count, seed)
                cells = []
                for side in SIDES.values():
                    start = time.perf_counter()
                    value = measure(held_out, side(training, held_out, options.model))
                    cells.append(f"{value:.3f} in {time.perf_counter() - start:.0f} s")
                title = name if name in SETS else Path(name.rpartition(":")[0]).name
                print(f"| {title} | {count} | {seed} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
