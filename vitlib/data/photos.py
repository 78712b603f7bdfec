"""Labelled set of photos: files, labels, and the targets of a loss.

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

from vitlib.data.rows import normalize_label, output_names
from vitlib.errors import DataError, count_noun
from vitlib.scores import Task
from vitlib.source.locate import ALWAYS_SHOW
from vitlib.system.memory import available_memory

logger = logging.getLogger("vitlib")


class Photo(NamedTuple):
    """Photo and its labels.

    Attributes:
        path: the file.
        labels: exactly one label; of a multi-label set any number, sorted.
        unknown: of a multi-label set, classes of which it is unknown if the photo has them.
        values: of a regression, a number for each output, in place of labels.
    """

    path: Path
    labels: tuple[str, ...]
    unknown: tuple[str, ...] = ()
    values: tuple[float, ...] = ()


@dataclass(frozen=True, repr=False)
class LabelledPhotos:
    """Photos with labels; the number of a class is its index in `labels`.

    read_photos() makes one from files.

    Attributes:
        photos: the photos, in the order they were read.
        labels: the classes, which read_photos sorts; of a regression the outputs.
        multi_label: True if a photo may have any number of labels.
        source: where the photos were read from, for messages.
        left_out: (path, error) of photos that cannot be used.
        regression: True if photos have values in place of labels.
    """

    photos: tuple[Photo, ...]
    labels: tuple[str, ...]
    multi_label: bool
    source: str
    left_out: tuple[tuple[str, str], ...] = ()
    regression: bool = False

    @property
    def task(self) -> Task:
        """The task of a model of these photos."""
        if self.regression:
            return "regression"
        if self.multi_label:
            return "multi_label_classification"
        return "single_label_classification"

    def __len__(self) -> int:
        """Count the photos."""
        return len(self.photos)

    def __repr__(self) -> str:
        """Describe the set in one line, without its photos."""
        photos, labels = count_noun(len(self), "photo"), count_noun(len(self.labels), "label")
        return f"LabelledPhotos({photos}, {labels}, {self.source!r})"

    def targets(self) -> npt.NDArray[Any]:
        """Convert the labels to the targets of a loss.

        Returns:
            Class numbers (N,), int64. Of a multi-label set (N, C), float32, which is 1 where the
            photo has the class, 0 where it does not, NaN where that is unknown. Of a regression the
            values, (N, C) float32.

        Raises:
            DataError: for a label that is not a class, and where (N, C) does not fit in memory.
        """
        if self.regression:
            self._check_memory()
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
            self._check_memory()
            targets = np.zeros((len(self), len(self.labels)), np.float32)
            for row, photo in zip(targets, self.photos, strict=True):
                if photo.unknown:
                    row[[number[label] for label in photo.unknown]] = np.nan
                if photo.labels:
                    row[[number[label] for label in photo.labels]] = 1
        except KeyError as error:
            raise DataError(
                f"{self.source}: the label {error.args[0]!r} is not among the classes, "
                f"{join_names(self.labels)}"
            ) from error
        return targets

    def counts(self) -> dict[str, int]:
        """Count the photos of each label.

        Returns:
            The count by label, in the order of `labels`.
        """
        counts = Counter(label for photo in self.photos for label in photo.labels)
        return {label: counts[label] for label in self.labels}

    def subset(self, indices: Iterable[int] | npt.NDArray[np.integer[Any]]) -> LabelledPhotos:
        """Select photos, with the same classes.

        Args:
            indices: indices in `photos`, in the order of the result.

        Returns:
            The subset, with an empty `left_out`.
        """
        photos = tuple(self.photos[int(index)] for index in indices)
        return replace(self, photos=photos, left_out=())

    def with_labels(self, labels: Sequence[str], *, ids: bool = False) -> LabelledPhotos:
        """Convert the set to the classes of a model or of a training set.

        Labels are compared in Unicode's composed form; the result has the spelling of the classes.
        Two classes of one name (ImageNet's "crane") become "crane (class 134)" and so on. Classes
        without photos are 0 in multi-label targets. Outputs of a regression are matched by name; a
        single output, or outputs that the file does not name, by position.

        Args:
            labels: the classes, in their order.
            ids: True to take labels that are all whole numbers, and not classes, for numbers of
                the classes, from 0; this is logged.

        Returns:
            The set with these classes.

        Raises:
            DataError: for labels that are not among the classes, or are the name of several.
        """
        if self.regression:
            return self._with_outputs(tuple(labels))
        names = number_duplicates(labels)
        if self.labels == names:
            return self
        number: dict[str, list[int]] = {}
        for index, label in enumerate(labels):
            number.setdefault(normalize_label(label), []).append(index)
        counts = self.counts()
        used = [label for label, n in counts.items() if n]
        if ids and self._are_ids(used, number, len(labels)):
            number = {str(index): [index] for index in range(len(labels))}
            logger.warning(
                "%s: the labels are numbers, read as numbers of the classes: %s is %r",
                self.source, used[0], short(names[int(used[0])]), extra=ALWAYS_SHOW,
            )  # fmt: skip
        self._check_labels(
            labels, {label: number.get(normalize_label(label), []) for label in counts}
        )
        own = {
            x: names[number[normalize_label(x)][0]] for x in counts if normalize_label(x) in number
        }
        other = [x for x, name in own.items() if x != name and x in used and not x.isdecimal()]
        if other:
            logger.warning(
                "%s: %s: read as the classes that differ only in Unicode form",
                self.source, join_names(map(repr, other)), extra=ALWAYS_SHOW,
            )  # fmt: skip
        same = all(x == name for x, name in own.items()) and len(own) == len(counts)
        photos = self.photos if same else tuple(rename_labels(p, own) for p in self.photos)
        return replace(self, photos=photos, labels=names)

    def _are_ids(self, used: list[str], number: dict[str, list[int]], count: int) -> bool:
        """Return True if labels are whole numbers below `count`, and not names of classes."""
        whole = [x.isascii() and x.isdecimal() and x == str(int(x[:9])) for x in used]
        if not used or not all(whole) or any(normalize_label(x) in number for x in used):
            return False
        return all(int(x) < count for x in used)

    def _check_labels(self, labels: Sequence[str], indices: dict[str, list[int]]) -> None:
        """Raise DataError for labels that are not among the classes, or are several of them."""
        counts, classes = self.counts(), {normalize_label(label) for label in labels}
        unmatched = [f"{x!r} (photos: {n})" for x, n in counts.items() if n and not indices[x]]
        if unmatched:
            several = all({*x.split()} <= classes for x in counts if not indices[x])
            advice = "read them as several (--multi-label)" if several else "rename them"
            raise DataError(
                f"{self.source}: the labels {join_names(unmatched)} are not among the classes "
                f"({join_names(map(repr, labels))}): "
                f"{advice}, map them (class_map=, --class-map), or leave "
                "their photos out"
            )
        ambiguous = [(x, indices[x]) for x, n in counts.items() if n and len(indices[x]) > 1]
        if ambiguous:
            numbers = " and ".join(map(str, ambiguous[0][1]))
            raise DataError(
                f"{self.source}: {join_names(repr(x) for x, _ in ambiguous)} is the name of two "
                "classes or "
                f"more ({numbers}): choose by a table of numbers (class_map=, --class-map)"
            )

    def _with_outputs(self, names: tuple[str, ...]) -> LabelledPhotos:
        """Convert a regression to the outputs of a model."""
        if len(names) != len(self.labels):
            raise DataError(
                f"{self.source}: {len(self.labels)} numbers a photo ({join_names(self.labels)}), "
                "the "
                f"model gives {len(names)} ({join_names(names)}): expected one for each of its "
                "outputs"
            )
        if len(names) == 1 or self.labels in (names, output_names(len(names))):
            return replace(self, labels=names)
        if sorted(names) != sorted(self.labels) or len(set(names)) < len(names):
            raise DataError(
                f"{self.source}: the numbers are called {join_names(self.labels)}, the model's "
                "outputs "
                f"{join_names(names)}: expected the same names"
            )
        order = [self.labels.index(name) for name in names]
        photos = tuple(p._replace(values=tuple(p.values[i] for i in order)) for p in self.photos)
        return replace(self, photos=photos, labels=names)

    def _check_memory(self) -> None:
        """Raise DataError where targets (N, C) do not fit in memory."""
        needed, free = 4 * len(self) * len(self.labels), available_memory(torch.device("cpu"))
        if free is not None and needed > free:
            raise DataError(
                f"{self.source}: targets of {len(self)} photos and {len(self.labels)} classes take "
                f"{needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free: expected fewer"
            )


def number_duplicates(labels: Sequence[str]) -> tuple[str, ...]:
    """Add the number of the class to names that several classes have.

    Args:
        labels: names of the classes.

    Returns:
        The names, such as "crane (class 134)" where a name occurs twice.
    """
    counts = Counter(map(normalize_label, labels))
    return tuple(
        f"{label} (class {index})" if counts[normalize_label(label)] > 1 else label
        for index, label in enumerate(labels)
    )


def rename_labels(photo: Photo, names: dict[str, str]) -> Photo:
    """Rename the labels of a photo.

    Args:
        photo: the photo.
        names: new name by label; unknown labels without one are left out.

    Returns:
        The photo with the new labels.
    """
    labels = tuple(sorted({names[label] for label in photo.labels}))
    return photo._replace(
        labels=labels, unknown=tuple(names[label] for label in photo.unknown if label in names)
    )


def join_names(names: Iterable[str], most: int = 5) -> str:
    """Join the first names for a message, and count the others.

    Args:
        names: names, each cut to 80 characters.
        most: number of names to join.

    Returns:
        The text.
    """
    names = list(names)
    first = [short(name) for name in names[:most]]
    return ", ".join(first) + (f", … ({len(names)} in all)" if len(names) > most else "")


def short(text: str) -> str:
    """Cut text of a hostile file to 80 characters for a message.

    Args:
        text: the text.

    Returns:
        The text, with "…" at its end where it was cut.
    """
    return text if len(text) <= 80 else text[:79] + "…"


def short_file(file: str) -> str:
    """Quote the last 80 characters of a file's name for a message.

    Args:
        file: the name.

    Returns:
        The name in quotes, with "…" at its start where it was cut.
    """
    return repr(file if len(file) <= 80 else "…" + file[-79:])
