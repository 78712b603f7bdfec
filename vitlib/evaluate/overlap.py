"""Photos that are in two sets which must be apart: by their files, or as copies by their bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from vitlib.data import LabelledPhotos
from vitlib.data.write_list import TRAINING_LIST, VALIDATION_LIST, find_list, read_paths
from vitlib.errors import VitlibError, count_noun
from vitlib.source.locate import resolve_source
from vitlib.system.atomic import expand_home


def list_overlap(photos: LabelledPhotos, others: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """List the photos of a set that are among other files, or have the bytes of one of them.

    Args:
        photos: the set.
        others: files; those that are gone are compared by their path alone.

    Returns:
        The photos, in the order of the set.
    """
    paths = {os.path.realpath(path) for path in others}
    # Only files of one size are read: copies are rare, and sets may be large.
    sizes: dict[int, list[str]] = {}
    for path in paths:
        sizes.setdefault(_size(path), []).append(path)
    digests = {
        size: {_digest(path) for path in sizes[size]}
        for size in {_size(photo.path) for photo in photos.photos} & sizes.keys() - {0}
    }
    shared = []
    for photo in photos.photos:
        same = digests.get(_size(photo.path))
        if os.path.realpath(photo.path) in paths or (same and _digest(photo.path) in same):
            shared.append(photo.path)
    return shared


def describe_overlap(
    model: str | os.PathLike[str], photos: LabelledPhotos, tune: LabelledPhotos | None
) -> tuple[str, ...]:
    """Say how many of the photos took part before, by themselves or by a copy.

    Args:
        model: where the model was loaded from.
        photos: the photos it is measured on.
        tune: the photos its calibration is fitted on.

    Returns:
        A sentence for each set of which photos are in the list of training photos that finetune
        writes beside a model, and one for copies of tuning photos among the measured ones.
    """
    notes = []
    copies = [] if tune is None else list_overlap(photos, [photo.path for photo in tune.photos])
    if copies:
        count = count_noun(len(copies), "copy")
        notes.append(f"{count} of tuning photos, such as {copies[0]}: the metrics are too good")
    return (*notes, *_describe_training(model, photos, tune))


def _describe_training(
    model: str | os.PathLike[str], photos: LabelledPhotos, tune: LabelledPhotos | None
) -> tuple[str, ...]:
    """Say how many photos of each set trained the model, where finetune listed them beside it."""
    folder = expand_home(resolve_source(model)) if os.fspath(model) else None
    listed = find_list(folder, TRAINING_LIST) if folder is not None and folder.is_dir() else None
    if listed is None:
        return ()
    try:
        trained = read_paths(listed)
    except (VitlibError, ValueError, LookupError) as error:
        return (f"{listed} cannot be read, so it is unknown if these photos trained: {error}",)
    held_out = find_list(listed.parent, VALIDATION_LIST)
    advice = f"; {held_out} lists photos that did not train" if held_out is not None else ""
    effects = {"photo": (photos, "the metrics are too good")}
    if tune is not None:
        effects["tuning photo"] = (tune, "the calibration takes the model for surer than it is")
    notes = []
    for noun, (part, effect) in effects.items():
        count = len(list_overlap(part, trained))
        if count:
            total = count_noun(len(part), noun)
            notes.append(f"{count} of {total} trained this model ({listed}): {effect}{advice}")
    return tuple(notes)


def _size(path: str | os.PathLike[str]) -> int:
    """Return the bytes of a file; 0 for one that is not there."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _digest(path: str | os.PathLike[str]) -> str:
    """Return a hash of a file's bytes; its path if it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return os.fspath(path)
