"""Photos of a probe: read, checked, and without those that cannot be used."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vitlib.data import LabelledPhotos, read_split
from vitlib.data.from_folder import is_photo, list_visible
from vitlib.data.photos import join_names
from vitlib.errors import DataError, count_noun
from vitlib.source.locate import ALWAYS_SHOW
from vitlib.system.atomic import expand_home

logger = logging.getLogger("vitlib")


@dataclass(frozen=True)
class ProbePhotos:
    """Training photos, and test photos where the set has some.

    Attributes:
        training: Photos of train/, or all.
        test: Photos of val/ or test/; None where the set has none.
        notes: Sentences on the labels, for the report.
        failed: (file, error) of photos that cannot be used.
    """

    training: LabelledPhotos
    test: LabelledPhotos | None
    notes: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()

    @property
    def all(self) -> LabelledPhotos:
        """Training photos, and the test photos after them."""
        if self.test is None:
            return self.training
        return replace(self.training, photos=(*self.training.photos, *self.test.photos))

    def without(self, errors: Mapping[int, str]) -> ProbePhotos:
        """Leave photos out that cannot be read.

        Args:
            errors: Error by the index of the photo in `all`.

        Returns:
            The other photos; the errors are in `failed`.
        """
        if not errors:
            return self
        photos, count = self.all.photos, len(self.training)
        failed = [(str(photos[i].path), error) for i, error in sorted(errors.items())]
        training = self.training.subset(i for i in range(count) if i not in errors)
        test = self.test
        if test is not None:
            test = test.subset(i for i in range(len(test)) if count + i not in errors)
        return replace(self, training=training, test=test, failed=(*self.failed, *failed))


def read_probe_photos(
    data: str | os.PathLike[str],
    *,
    multi_label: bool,
    on_bad_image: Literal["fail", "skip"],
) -> ProbePhotos:
    """Read the photos of a probe, and tell what makes a class hard to measure.

    Args:
        data: Labelled photos, as read_split() takes them.
        multi_label: True if a photo may have any number of labels.
        on_bad_image: "skip" leaves photos out that are not images; "fail" raises.

    Returns:
        The photos.

    Raises:
        DataError: The photos have no labels or cannot be used.
    """
    try:
        training, test = read_split(data, multi_label=multi_label, on_bad_image=on_bad_image)
    except DataError as error:
        if _has_no_labels(expand_home(data)):
            raise DataError(
                f"{error}. A probe compares photos by their labels; vitlib audit needs none"
            ) from error
        raise
    failed = (*training.left_out, *(test.left_out if test is not None else ()))
    notes = []
    # A photo of which nothing is known can neither train nor measure.
    training, blank = _drop_unlabelled(training)
    if test is not None:
        test, more = _drop_unlabelled(test)
        blank += more
    if blank:
        notes.append(f"{count_noun(blank, 'photo')} of which no label is known: left out")
    if single := _describe_single(training, test):
        notes.append(single)
    for note in notes:
        logger.warning("%s: %s", os.fspath(data), note, extra=ALWAYS_SHOW)
    return ProbePhotos(training, test, tuple(notes), failed)


def _has_no_labels(path: Path) -> bool:
    """Return True for a folder of photos without a folder of a class or a list."""
    if not path.is_dir():
        return False
    entries = list_visible(path)
    return any(map(is_photo, entries)) and not any(
        entry.is_dir() or entry.suffix.lower() in (".csv", ".jsonl", ".ndjson") for entry in entries
    )


def _drop_unlabelled(photos: LabelledPhotos) -> tuple[LabelledPhotos, int]:
    """Leave photos out of which it is unknown whether they show any class; count them."""
    count = len(photos.labels)
    rows = [i for i, photo in enumerate(photos.photos) if len(photo.unknown) < count]
    return (photos if len(rows) == len(photos) else photos.subset(rows)), len(photos) - len(rows)


def _describe_single(training: LabelledPhotos, test: LabelledPhotos | None) -> str:
    """Describe classes with one photo; "" without any."""
    single = [label for label, count in training.counts().items() if count == 1]
    if not single:
        return ""
    names, many = join_names(map(repr, single)), len(single) > 1
    start = f"{'the classes' if many else 'the class'} {names} {'have' if many else 'has'} one"
    if test is not None:
        return f"{start} training photo: no part of them can be held out to choose by"
    return (
        f"{start} photo, which cannot be both trained on and measured: it counts as wrong; add "
        "photos, or leave the class out"
    )
