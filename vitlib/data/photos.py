"""A labelled set of photos: which files, which labels, and the numbers a loss takes.

Shapes: N photos, C classes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vitlib.data.rows import composed, output_names
from vitlib.errors import DataError
from vitlib.scores import Task
from vitlib.source.locate import ALWAYS_SHOW
from vitlib.system.memory import available_memory

logger = logging.getLogger("vitlib")


class Photo(NamedTuple):
    """One photo, and what is said of it."""

    path: Path
    labels: tuple[str, ...]  # single-label: exactly one; multi-label: sorted, none is allowed
    unknown: tuple[str, ...] = ()  # multi-label: classes about which nothing is known
    values: tuple[float, ...] = ()  # regression: one an output, and no labels


@dataclass(frozen=True, repr=False)
class LabelledPhotos:
    """Photos with labels, in the order they were read; a class's number is its place in `labels`.

    read_photos() makes one. The fields can also be given: `photos` in any order, `labels` as the
    classes are to be numbered.
    """

    photos: tuple[Photo, ...]
    labels: tuple[str, ...]  # the classes; read_photos sorts them
    multi_label: bool
    source: str  # what they were read from, for messages
    left_out: tuple[tuple[str, str], ...] = ()  # (path, why) of photos that could not be used
    regression: bool = False  # photos have values; `labels` name the outputs, in the file's order

    @property
    def task(self) -> Task:
        """What a model of these photos answers."""
        if self.regression:
            return "regression"
        several = self.multi_label
        return "multi_label_classification" if several else "single_label_classification"

    def __len__(self) -> int:
        """How many photos."""
        return len(self.photos)

    def __repr__(self) -> str:
        """Short: a set may have millions."""
        return f"LabelledPhotos({len(self)} photos, {len(self.labels)} labels, {self.source!r})"

    def targets(self) -> npt.NDArray[Any]:
        """Class numbers (N,), int64; of a multi-label set (N, C), float32: 1 where a class is in
        the photo, 0 where it is not, NaN where that is unknown; of a regression the values, (N, C)
        float32.

        Raises DataError for a label that is no class, and where (N, C) does not fit in memory.
        """
        if self.regression:
            self._fits()
            wrong = [photo for photo in self.photos if len(photo.values) != len(self.labels)]
            if wrong:
                raise DataError(
                    f"{self.source}: {wrong[0].path} has {len(wrong[0].values)} values: expected "
                    f"{len(self.labels)}, one an output"
                )
            return np.array([photo.values for photo in self.photos], np.float32)
        number = {label: index for index, label in reversed(list(enumerate(self.labels)))}
        try:
            if not self.multi_label:
                return np.array([number[photo.labels[0]] for photo in self.photos], np.int64)
            self._fits()
            targets = np.zeros((len(self), len(self.labels)), np.float32)
            for row, photo in zip(targets, self.photos, strict=True):
                if photo.unknown:
                    row[[number[label] for label in photo.unknown]] = np.nan
                if photo.labels:
                    row[[number[label] for label in photo.labels]] = 1
        except KeyError as error:
            raise DataError(
                f"{self.source}: the label {error.args[0]!r} is none of the classes, "
                f"{listed(self.labels)}"
            ) from error
        return targets

    def counts(self) -> dict[str, int]:
        """How many photos have each label, in the order of `labels`; 0 where none has."""
        found = Counter(label for photo in self.photos for label in photo.labels)
        return {label: found[label] for label in self.labels}

    def subset(self, indices: Iterable[int] | npt.NDArray[np.integer[Any]]) -> LabelledPhotos:
        """These photos, in this order, with the same classes; `left_out` stays with the whole."""
        photos = tuple(self.photos[int(index)] for index in indices)
        return replace(self, photos=photos, left_out=())

    def with_labels(self, labels: Sequence[str], *, ids: bool = False) -> LabelledPhotos:
        """The same photos in these classes, in this order: a model's, a training set's.

        Labels are compared in Unicode's composed form; the photos then have the classes' spelling.
        Two classes of one name (ImageNet's "crane") are told apart as "crane (class 134)". Classes
        that the set does not know are in none of its photos: 0 in multi-label targets. Outputs of a
        regression are matched by name; a single one, or those that the file does not name, by
        position.

        Args:
            labels: The classes.
            ids: Labels that are all whole numbers, and none of them a class, are numbers of the
                classes, from 0; it is logged.

        Raises:
            DataError: Labels of photos are not among the classes, or are two of them.
        """
        if self.regression:
            return self._with_outputs(tuple(labels))
        names = told_apart(labels)
        if self.labels == names:
            return self
        number: dict[str, list[int]] = {}
        for index, label in enumerate(labels):
            number.setdefault(composed(label), []).append(index)
        counts = self.counts()
        used = [label for label, n in counts.items() if n]
        if ids and self._are_ids(used, number, len(labels)):
            number = {str(index): [index] for index in range(len(labels))}
            logger.warning(
                "%s: the labels are numbers and taken for those of the classes: %s is %r",
                self.source, used[0], short(names[int(used[0])]), extra=ALWAYS_SHOW,
            )  # fmt: skip
        self._check_known(labels, {label: number.get(composed(label), []) for label in counts})
        own = {x: names[number[composed(x)][0]] for x in counts if composed(x) in number}
        other = [x for x, name in own.items() if x != name and x in used and not x.isdecimal()]
        if other:
            logger.warning(
                "%s: %s: taken for the classes that differ by their Unicode form alone",
                self.source, listed(map(repr, other)), extra=ALWAYS_SHOW,
            )  # fmt: skip
        same = all(x == name for x, name in own.items()) and len(own) == len(counts)
        photos = self.photos if same else tuple(spelled(p, own) for p in self.photos)
        return replace(self, photos=photos, labels=names)

    def _are_ids(self, used: list[str], number: dict[str, list[int]], count: int) -> bool:
        """Whether labels are numbers of `count` classes: whole, as one writes them, no names."""
        whole = [x.isascii() and x.isdecimal() and x == str(int(x[:9])) for x in used]
        if not used or not all(whole) or any(composed(x) in number for x in used):
            return False
        return all(int(x) < count for x in used)

    def _check_known(self, labels: Sequence[str], places: dict[str, list[int]]) -> None:
        """Raise DataError for labels of photos that are none of the classes, or several."""
        counts, classes = self.counts(), {composed(label) for label in labels}
        lost = [f"{x!r} (photos: {n})" for x, n in counts.items() if n and not places[x]]
        if lost:
            several = all({*x.split()} <= classes for x in counts if not places[x])
            what = "say that they are several (--multi-label)" if several else "rename them"
            raise DataError(
                f"{self.source}: the labels {listed(lost)} are not among the {len(labels)} classes "
                f"{listed(labels)}: {what}, map them (class_map=, --class-map), or take their "
                "photos out"
            )
        twice = [(x, places[x]) for x, n in counts.items() if n and len(places[x]) > 1]
        if twice:
            numbers = " and ".join(map(str, twice[0][1]))
            raise DataError(
                f"{self.source}: {listed(repr(x) for x, _ in twice)} is the name of two classes or "
                f"more ({numbers}): say which by a table of numbers (class_map=, --class-map)"
            )

    def _with_outputs(self, names: tuple[str, ...]) -> LabelledPhotos:
        """The same values under a model's names of its outputs, in its order."""
        if len(names) != len(self.labels):
            raise DataError(
                f"{self.source}: {len(self.labels)} numbers a photo ({listed(self.labels)}), the "
                f"model gives {len(names)} ({listed(names)}): expected one for each of its outputs"
            )
        if len(names) == 1 or self.labels in (names, output_names(len(names))):
            return replace(self, labels=names)
        if sorted(names) != sorted(self.labels) or len(set(names)) < len(names):
            raise DataError(
                f"{self.source}: the numbers are called {listed(self.labels)}, the model's outputs "
                f"{listed(names)}: call them alike, so that none is taken for another"
            )
        order = [self.labels.index(name) for name in names]
        photos = tuple(p._replace(values=tuple(p.values[i] for i in order)) for p in self.photos)
        return replace(self, photos=photos, labels=names)

    def _fits(self) -> None:
        needed, free = 4 * len(self) * len(self.labels), available_memory(torch.device("cpu"))
        if free is not None and needed > free:
            raise DataError(
                f"{self.source}: targets of {len(self)} photos and {len(self.labels)} classes take "
                f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free: expected fewer"
            )


def told_apart(labels: Sequence[str]) -> tuple[str, ...]:
    """The classes' names; those that are alike with the number of their class."""
    known = Counter(map(composed, labels))
    return tuple(
        f"{label} (class {index})" if known[composed(label)] > 1 else label
        for index, label in enumerate(labels)
    )


def spelled(photo: Photo, names: dict[str, str]) -> Photo:
    """A photo with its labels under other names; those that have none are left out."""
    labels = tuple(sorted({names[label] for label in photo.labels}))
    return photo._replace(
        labels=labels, unknown=tuple(names[label] for label in photo.unknown if label in names)
    )


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first names for a message, each cut to 80 characters; "…" stands for the others."""
    names = list(names)
    first = [short(name) for name in names[:most]]
    return ", ".join(first) + (f", … ({len(names)} in all)" if len(names) > most else "")


def short(text: str) -> str:
    """What a hostile file holds, for a message: at most 80 characters of it."""
    return text if len(text) <= 80 else text[:79] + "…"


def short_file(file: str) -> str:
    """A file's name for a message, in quotes: at most the last 80 characters of it."""
    return repr(file if len(file) <= 80 else "…" + file[-79:])
