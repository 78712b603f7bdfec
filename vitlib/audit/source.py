"""Sets to audit: labelled ones, folders of photos without labels, and training and test in one.

A part is a list of photos of one split. Photos of all parts have numbers, the audited parts first.

Shapes: N photos.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vitlib.batch.inputs.walk import expand_pattern, is_pattern, walk_images
from vitlib.data import LabelledPhotos, read_photos, read_split
from vitlib.data.from_folder import is_photo, list_visible
from vitlib.data.read import find_parts, find_table
from vitlib.errors import DataError
from vitlib.system.atomic import expand_home

AGAINST = "against"
ADVICE = "name a folder with a folder per class, a .csv or a .jsonl"


@dataclass(frozen=True)
class Part:
    """Photos of one split.

    Attributes:
        name: "data", "train", the name of the validation folder, or "against".
        source: where the photos come from.
        photos: files.
        labelled: the same photos with labels; None without labels.
        reason: why there are no labels; "" where there are.
        left_out: (file, error) of photos that are not there or have no class.
    """

    name: str
    source: str
    photos: tuple[Path, ...]
    labelled: LabelledPhotos | None = None
    reason: str = ""
    left_out: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class AuditSet:
    """All parts of an audit.

    Attributes:
        parts: the audited ones, then "against" where it is given.
        inputs: what was named to read.
    """

    parts: tuple[Part, ...]
    inputs: tuple[str, ...]

    @property
    def photos(self) -> list[Path]:
        """The photos of all parts."""
        return [path for part in self.parts for path in part.photos]

    @property
    def splits(self) -> npt.NDArray[np.int64]:
        """The number of each photo's part, (N,)."""
        return np.repeat(np.arange(len(self.parts)), [len(part.photos) for part in self.parts])

    @property
    def audited(self) -> int:
        """Count the photos of the audited parts, which come first."""
        return sum(len(part.photos) for part in self.parts if part.name != AGAINST)

    @property
    def labels(self) -> list[tuple[str, ...] | None]:
        """The labels of each photo; None where its part has none."""
        return [
            labels
            for part in self.parts
            for labels in (
                [None] * len(part.photos)
                if part.labelled is None
                else [photo.labels for photo in part.labelled.photos]
            )
        ]

    def join_labelled(self) -> LabelledPhotos | None:
        """Join the labelled photos of the audited parts; None without labels."""
        sets = [part.labelled for part in self.parts if part.name != AGAINST]
        first = sets[0]
        if first is None or any(part is None for part in sets):
            return None
        photos = tuple(photo for part in sets if part is not None for photo in part.photos)
        return replace(first, photos=photos, left_out=())


def read_set(
    data: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    multi_label: bool = False,
    unlabelled: bool = False,
) -> AuditSet:
    """Read the photos of an audit.

    Args:
        data: a labelled set as read_photos() takes it, a folder with train/ and val/, or a folder,
            a pattern or a file of photos without labels.
        against: photos that should not be in `data`, in the same forms.
        multi_label: True if a photo may have several labels.
        unlabelled: True reads any folder as photos without labels.

    Returns:
        The parts.

    Raises:
        DataError: for sources without photos, labels of another form, or `against` that is `data`.
    """
    if against is not None and _same(data, against):
        raise DataError(
            f"{against} is both the data and --against: name another set, or leave it out"
        )
    parts = _read_parts(expand_home(data), multi_label, unlabelled)
    if against is not None:
        if len(parts) > 1:
            raise DataError(
                f"{data} has {parts[0].name}/ and {parts[1].name}/, which are compared: leave "
                f"--against out, or name {parts[0].source}"
            )
        other = _read_part(expand_home(against), AGAINST, multi_label, unlabelled)
        parts = (*parts, other)
    inputs = [data] if against is None else [data, against]
    return AuditSet(parts, tuple(os.fspath(name) for name in inputs))


def _same(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Return True for two names of one file or folder."""
    return os.path.realpath(expand_home(first)) == os.path.realpath(expand_home(second))


def _read_parts(path: Path, multi_label: bool, unlabelled: bool) -> tuple[Part, ...]:
    """Read one set, or training and validation photos."""
    folders = find_parts(path) if path.is_dir() and not unlabelled else None
    if folders is None:
        return (_read_part(path, "data", multi_label, unlabelled),)
    sets = read_split(path, multi_label=multi_label, on_bad_image="skip", check="none")
    return tuple(
        _labelled_part(folder.name, photos)
        for folder, photos in zip(folders, sets, strict=True)
        if photos is not None
    )


def _read_part(path: Path, name: str, multi_label: bool, unlabelled: bool) -> Part:
    """Read a part, with labels where it has them."""
    reason = "read without labels (--unlabelled)" if unlabelled else _why_unlabelled(path)
    if not reason:
        photos = read_photos(path, multi_label=multi_label, on_bad_image="skip", check="none")
        return _labelled_part(name, photos)
    paths = tuple(map(Path, _list_photos(path)))
    if not paths:
        raise DataError(f"{path}: no photo in it: {ADVICE}, or photos")
    return Part(name, str(path), paths, reason=reason)


def _labelled_part(name: str, photos: LabelledPhotos) -> Part:
    """Make a part of labelled photos."""
    paths = tuple(photo.path for photo in photos.photos)
    return Part(name, photos.source, paths, photos, left_out=photos.left_out)


def _why_unlabelled(path: Path) -> str:
    """Say why a source has no labels; "" where it should have them."""
    if is_pattern(str(path)):
        return "photos by a pattern have no labels"
    if not path.is_dir():
        return "a single photo has no labels" if is_photo(path) else ""
    if find_table(path) is not None:
        return ""
    classes = [entry for entry in list_visible(path) if entry.is_dir() and _has_photo(entry)]
    if not classes:
        return f"no folder per class and no labels.csv: {ADVICE}"
    if len(classes) == 1:
        return f"all photos are in one folder, {classes[0].name!r}: two classes or more have labels"
    return ""


def _has_photo(folder: Path) -> bool:
    """Return True if a photo is in or below a folder."""
    return next(walk_images(str(folder), lambda _: None, set()), None) is not None


def _list_photos(path: Path) -> Sequence[str]:
    """List the photos of a folder, a pattern or a file."""
    if path.is_dir():
        return list(walk_images(str(path), lambda _: None, set()))
    if is_pattern(str(path)):
        return [name for name in expand_pattern(str(path)) if Path(name).is_file()]
    return [str(path)]
