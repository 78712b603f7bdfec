"""The photos of a run: training and validation, of one task and of the same classes or outputs."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace

from vitlib.data import LabelledPhotos, read_photos, read_split, split
from vitlib.data.class_map import ClassMap
from vitlib.data.photos import join_names
from vitlib.errors import ConfigError, DataError
from vitlib.train.config import Runtime


def read(
    data: str | os.PathLike[str] | LabelledPhotos,
    validation: str | os.PathLike[str] | LabelledPhotos | None,
    run: Runtime,
    *,
    multi_label: bool,
    regression: bool,
    class_map: str | os.PathLike[str] | None = None,
) -> tuple[LabelledPhotos, LabelledPhotos | None]:
    """The training set and the validation set, of the same classes or outputs.

    Raises DataError for a set that cannot be used, ConfigError for one that was read for another
    task than is asked for.
    """
    beside = None
    if isinstance(data, LabelledPhotos):
        training = data
        _check_task(training, multi_label, regression)
        if class_map is not None:
            training = ClassMap.read(class_map).apply(training, None)
    else:
        training, beside = read_split(
            data,
            multi_label=multi_label,
            on_bad_image=run.on_bad_image,
            regression=regression,
            class_map=class_map,
        )
    if validation is None and beside is None:
        if not run.validation_split:
            return training, None
        part, rest = split(training, run.validation_split, run.seed, run.split)
        return replace(part, left_out=training.left_out), rest
    own = [name for name in ("validation_split", "split") if _is_set(run, name)]
    if own and run.validation_split:
        raise ConfigError(
            f"{' and '.join(own)}: of photos held out of the training set, and there is a "
            "validation set: leave it out"
        )
    held: LabelledPhotos | None = beside
    if isinstance(validation, LabelledPhotos):
        held = validation
        if held.task != training.task:
            raise DataError(
                f"{held.source} is of {held.task}, the training set of {training.task}: expected "
                "two of one task"
            )
        if class_map is not None:
            held = ClassMap.read(class_map).apply(held, None)
    elif validation is not None:
        held = read_photos(
            validation,
            multi_label=training.multi_label,
            on_bad_image=run.on_bad_image,
            regression=training.regression,
            class_map=class_map,
        )
    assert held is not None
    return training, held.with_labels(training.labels)


def _is_set(run: Runtime, name: str) -> bool:
    """Whether a setting is not its default."""
    return bool(getattr(run, name) != getattr(Runtime(), name))


def digest(photos: LabelledPhotos) -> str:
    """Of a set's names and labels, in their order."""
    made = hashlib.sha256()
    for photo in photos.photos:
        said = (photo.path.name, photo.labels, photo.unknown)
        made.update(repr(said + (photo.values,) * bool(photo.values)).encode())
    return made.hexdigest()[:16]


def notes(training: LabelledPhotos, held_out: LabelledPhotos | None) -> list[str]:
    """What is allowed, and seldom meant."""
    found = []
    empty = [label for label, count in training.counts().items() if not count]
    if empty and not training.regression:
        found.append(f"no training photo shows {join_names(empty)}: such a class cannot be learned")
    both = {p.path for p in training.photos} & {p.path for p in (held_out or training).photos}
    if held_out is not None and both:
        found.append(
            f"{len(both)} photos train and validate too: what validation says is flattered"
        )
    return found


def _check_task(photos: LabelledPhotos, multi_label: bool, regression: bool) -> None:
    """Raise ConfigError where a set that was read before is not of the task that is asked for."""
    for name, asked, own in (
        ("multi_label", multi_label, photos.multi_label),
        ("regression", regression, photos.regression),
    ):
        if asked and not own:
            raise ConfigError(
                f"{name}=True, and {photos.source} was read for {photos.task}: read it with "
                f"{name}=True"
            )
