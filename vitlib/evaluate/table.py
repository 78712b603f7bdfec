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

    Of a regression file, "true:" and "predicted:" and each output, error.

    With several labels a photo, true, unknown and predicted are JSON lists, as labels may hold any
    character. errors: index in `photos` -> why it has no scores.
    """
    several, labels = photos.multi_label, photos.labels
    head = [
        "file",
        "true",
        *["unknown"] * several,
        "predicted",
        *_columns("score", labels),
        "error",
    ]
    blank = [""] * (1 + len(labels))
    if photos.regression:
        head = ["file", *_columns("true", labels), *_columns("predicted", labels), "error"]
        blank = [""] * len(labels)
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        told = _told(answers)
        for index, photo in enumerate(photos.photos):
            given = [str(photo.path)]
            given += map(_number, photo.values) if photos.regression else _given(photo, several)
            if index in errors:
                writer.writerow([*given, *blank, errors[index]])
            else:
                writer.writerow([*given, *next(told), ""])
        for name, why in photos.left_out:
            writer.writerow([name, *[""] * (len(head) - 2 - len(blank)), *blank, why])


def _number(value: float) -> str:
    return f"{value:.9g}"


def _columns(what: str, labels: Sequence[str]) -> list[str]:
    """A name a score; two classes of one name are told apart by their numbers."""
    times = Counter(labels)
    return [
        f"{what}:{label}" if times[label] == 1 else f"{what}:{label}#{index}"
        for index, label in enumerate(labels)
    ]


def _told(answers: Answers) -> Iterator[list[str]]:
    if answers.photos.regression:
        yield from ([_number(value) for value in row] for row in answers.scores.tolist())
        return
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
