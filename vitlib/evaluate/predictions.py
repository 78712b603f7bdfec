"""The file predictions.csv: a row for each photo, also for those that cannot be read."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vitlib.data import LabelledPhotos, Photo
from vitlib.evaluate.report import Predictions


def write_predictions(
    path: Path, photos: LabelledPhotos, predictions: Predictions, errors: Mapping[int, str]
) -> None:
    """Write a row for each photo, then a row for each photo that was left out of the set.

    The columns are file, true, predicted, "score:" and each class, error. With several labels a
    photo there is a column unknown, and true, unknown and predicted are JSON lists, since labels
    may contain any character. The columns of a regression are file, "true:" and each output,
    "predicted:" and each output, error.

    Args:
        path: the file to write.
        photos: the whole set, in the order of the rows.
        predictions: of the photos that can be read.
        errors: error of each other photo, by its index in `photos`.
    """
    multi_label, labels = photos.multi_label, photos.labels
    head = ["file", "true", "predicted", *_columns("score", labels), "error"]
    if multi_label:
        head.insert(2, "unknown")
    blank = [""] * (1 + len(labels))
    if photos.regression:
        head = ["file", *_columns("true", labels), *_columns("predicted", labels), "error"]
        blank = [""] * len(labels)
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        cells = _prediction_cells(predictions)
        for index, photo in enumerate(photos.photos):
            row = [str(photo.path)]
            if photos.regression:
                row += map(_number, photo.values)
            else:
                row += _label_cells(photo, multi_label)
            if index in errors:
                writer.writerow([*row, *blank, errors[index]])
            else:
                writer.writerow([*row, *next(cells), ""])
        for name, error in photos.left_out:
            writer.writerow([name, *[""] * (len(head) - 2 - len(blank)), *blank, error])


def _number(value: float) -> str:
    return f"{value:.9g}"


def _columns(prefix: str, labels: Sequence[str]) -> list[str]:
    """Name a column for each label; classes of the same name are numbered."""
    times = Counter(labels)
    return [
        f"{prefix}:{label}" if times[label] == 1 else f"{prefix}:{label}#{index}"
        for index, label in enumerate(labels)
    ]


def _prediction_cells(predictions: Predictions) -> Iterator[list[str]]:
    """Yield the predicted labels and the scores of each photo, as text."""
    if predictions.photos.regression:
        yield from ([_number(value) for value in row] for row in predictions.scores.tolist())
        return
    labels, y_pred = predictions.photos.labels, predictions.y_pred
    for predicted, scores in zip(y_pred, predictions.scores, strict=True):
        if predictions.photos.multi_label:
            names = _json_list(labels[i] for i in np.flatnonzero(predicted))
        else:
            names = labels[int(predicted)]
        yield [names, *(f"{score:.7g}" for score in scores)]


def _label_cells(photo: Photo, multi_label: bool) -> list[str]:
    if multi_label:
        return [_json_list(photo.labels), _json_list(photo.unknown)]
    return [photo.labels[0]]


def _json_list(names: Iterable[str]) -> str:
    return json.dumps(list(names), ensure_ascii=False)
