"""The training set and the validation set of a run: one task, the same classes or outputs."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace

from vitlib.data import LabelledPhotos, read_photos, read_split, split
from vitlib.data.class_map import ClassMap
from vitlib.data.exclude import exclude_photos
from vitlib.data.photos import join_names
from vitlib.errors import ConfigError, DataError
from vitlib.train.settings import Runtime


def read_sets(
    data: str | os.PathLike[str] | LabelledPhotos,
    validation: str | os.PathLike[str] | LabelledPhotos | None,
    run: Runtime,
    *,
    multi_label: bool,
    regression: bool,
    class_map: str | os.PathLike[str] | None = None,
    exclude: str | os.PathLike[str] | None = None,
) -> tuple[LabelledPhotos, LabelledPhotos | None]:
    """Read the training set and the validation set.

    Args:
        data: The training set, or a folder that holds both sets.
        validation: The validation set; None for the one in `data`, or a split of it.
        run: Its split and validation_split.
        multi_label: Photos have any number of labels.
        regression: Photos have numbers instead of labels.
        class_map: Table from labels to names of classes.
        exclude: List of photos to leave out of both: see vitlib/data/exclude.py.

    Returns:
        The training set; and the validation set with its classes, or None.

    Raises:
        DataError: A set cannot be used.
        ConfigError: A set was read for another task, or a setting of the split has no effect.
    """
    held_out: LabelledPhotos | None = None
    if isinstance(data, LabelledPhotos):
        training = data
        _check_task(training, multi_label, regression)
        if class_map is not None:
            training = ClassMap.read(class_map).apply(training, None)
    else:
        training, held_out = read_split(
            data,
            multi_label=multi_label,
            on_bad_image=run.on_bad_image,
            regression=regression,
            class_map=class_map,
        )
    if validation is not None:
        held_out = _read_validation(validation, training, run, class_map)
    if exclude is not None:
        rest, held_out = exclude_photos((training, held_out), exclude)
        assert rest is not None
        training = rest
    if held_out is None:
        if not run.validation_split:
            return training, None
        return hold_out(training, run)
    changed = [name for name in ("validation_split", "split") if not _is_default(run, name)]
    if changed and run.validation_split:
        raise ConfigError(
            f"{' and '.join(changed)}: for photos held out of the training set, and there is a "
            "validation set: leave it out"
        )
    return training, held_out.with_labels(training.labels)


def hold_out(training: LabelledPhotos, run: Runtime) -> tuple[LabelledPhotos, LabelledPhotos]:
    """Hold a share of the photos out of the training set.

    Args:
        training: The photos.
        run: Its validation_split, seed and split.

    Returns:
        The rest, and the photos that are held out.

    Raises:
        DataError: There are too few photos.
    """
    part, rest = split(training, run.validation_split, run.seed, run.split)
    return replace(part, left_out=training.left_out), rest


def _read_validation(
    validation: str | os.PathLike[str] | LabelledPhotos,
    training: LabelledPhotos,
    run: Runtime,
    class_map: str | os.PathLike[str] | None,
) -> LabelledPhotos:
    """Read a validation set of the training set's task."""
    if not isinstance(validation, LabelledPhotos):
        return read_photos(
            validation,
            multi_label=training.multi_label,
            on_bad_image=run.on_bad_image,
            regression=training.regression,
            class_map=class_map,
        )
    if validation.task != training.task:
        raise DataError(
            f"{validation.source} is of {validation.task}, the training set of {training.task}: "
            "expected two of one task"
        )
    if class_map is None:
        return validation
    return ClassMap.read(class_map).apply(validation, None)


def _is_default(run: Runtime, name: str) -> bool:
    """Return True if a setting has its default value."""
    return bool(getattr(run, name) == getattr(Runtime(), name))


def digest(photos: LabelledPhotos) -> str:
    """Compute a digest of a set's file names and labels, in their order.

    Args:
        photos: The set.

    Returns:
        16 hexadecimal digits.
    """
    sha = hashlib.sha256()
    for photo in photos.photos:
        row = (photo.path.name, photo.labels, photo.unknown)
        sha.update(repr(row + (photo.values,) * bool(photo.values)).encode())
    return sha.hexdigest()[:16]


def find_oddities(training: LabelledPhotos, held_out: LabelledPhotos | None) -> list[str]:
    """Describe what is allowed but seldom intended.

    Args:
        training: The training set.
        held_out: The validation set, or None.

    Returns:
        One line for each oddity.
    """
    notes = []
    empty = [label for label, count in training.counts().items() if not count]
    if empty and not training.regression:
        notes.append(f"no training photo shows {join_names(empty)}: such a class cannot be learned")
    both = {p.path for p in training.photos} & {p.path for p in (held_out or training).photos}
    if held_out is not None and both:
        notes.append(
            f"{len(both)} photos are in the training set and the validation set: metrics of "
            "validation are too good"
        )
    return notes


def _check_task(photos: LabelledPhotos, multi_label: bool, regression: bool) -> None:
    """Raise ConfigError if a set was read for another task than the one requested."""
    for name, is_requested, is_task in (
        ("multi_label", multi_label, photos.multi_label),
        ("regression", regression, photos.regression),
    ):
        if is_requested and not is_task:
            raise ConfigError(
                f"{name}=True, and {photos.source} was read for {photos.task}: read it with "
                f"{name}=True"
            )
