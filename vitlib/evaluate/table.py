"""predictions.csv: one row a photo, those that could not be read too."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vitlib.data import LabelledPhotos, Photo
from vitlib.evaluate.report import Answers


def write_predictions(
    path: Path, photos: LabelledPhotos, answers: Answers, errors: Mapping[int, str]
) -> None:
    """The columns file, true, predicted, "score:" and each class, error; in the order of `photos`,
    then those that were left out when the set was read.

    With several labels a photo, true, unknown and predicted are JSON lists, as labels may hold any
    character. errors: index in `photos` -> why it has no scores.
    """
    several, labels = photos.multi_label, photos.labels
    head = ["file", "true", *["unknown"] * several, "predicted", *_columns(labels), "error"]
    blank = [""] * (1 + len(labels))
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        told = _told(answers)
        for index, photo in enumerate(photos.photos):
            given = [str(photo.path), *_given(photo, several)]
            if index in errors:
                writer.writerow([*given, *blank, errors[index]])
            else:
                writer.writerow([*given, *next(told), ""])
        for name, why in photos.left_out:
            writer.writerow([name, *[""] * (1 + several), *blank, why])


def _columns(labels: Sequence[str]) -> list[str]:
    """A name a score; two classes of one name are told apart by their numbers."""
    times = Counter(labels)
    return [
        f"score:{label}" if times[label] == 1 else f"score:{label}#{index}"
        for index, label in enumerate(labels)
    ]


def _told(answers: Answers) -> Iterator[list[str]]:
    labels, said = answers.photos.labels, answers.said
    for answer, scores in zip(said, answers.scores, strict=True):
        if answers.photos.multi_label:
            names = _listed(labels[i] for i in np.flatnonzero(answer))
        else:
            names = labels[int(answer)]
        yield [names, *(f"{score:.7g}" for score in scores)]


def _given(photo: Photo, several: bool) -> list[str]:
    return [_listed(photo.labels), _listed(photo.unknown)] if several else [photo.labels[0]]


def _listed(names: Iterable[str]) -> str:
    return json.dumps(list(names), ensure_ascii=False)
