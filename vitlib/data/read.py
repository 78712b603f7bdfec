"""Read a labelled set from a folder, a CSV or a JSONL.

A folder has one of three forms. With `labels.csv`, or a single .csv or .jsonl, that file describes
the photos in the folder or in its `images/`. With `train/` and `val/` (or `valid/`, `validation/`,
`test/`) that are sets themselves, it is two sets. Else its subfolders are the classes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import get_args

from vitlib.data.class_map import ClassMap
from vitlib.data.from_csv import CsvRows
from vitlib.data.from_folder import FolderRows, is_photo, list_visible
from vitlib.data.from_jsonl import JsonlRows
from vitlib.data.gather import Check, OnBadImage, gather
from vitlib.data.photos import LabelledPhotos, join_names, short_file
from vitlib.data.rows import FOR_NUMBERS, Rows, parse_number
from vitlib.errors import ConfigError, DataError
from vitlib.system.atomic import expand_home

logger = logging.getLogger("vitlib")

CSV, JSONL = (".csv",), (".jsonl", ".ndjson")
VALIDATION_NAMES = ("val", "valid", "validation", "test")
EXPECTED = "expected a folder with a folder per class or labels.csv, a .csv or a .jsonl file"


def read_photos(
    source: str | os.PathLike[str],
    *,
    multi_label: bool = False,
    on_bad_image: OnBadImage = "fail",
    check: Check = "header",
    labels: Sequence[str] | None = None,
    regression: bool = False,
    class_map: str | os.PathLike[str] | None = None,
) -> LabelledPhotos:
    """Read the labelled photos of a folder, a .csv or a .jsonl.

    The forms of a folder are above; those of the files are in from_csv.py and from_jsonl.py.

    Args:
        source: the folder or file.
        multi_label: True if a photo may have any number of labels, 0 included; else exactly one.
        on_bad_image: "fail" raises one error that names the photos which are absent or not images;
            "skip" leaves them out, names them in `left_out` and logs them.
        check: "header" opens the header of every photo, so that most bad photos are known before
            the first epoch; a photo that is cut off later fails when it is decoded. "none" only
            looks for the files.
        labels: classes of a model, in its order. Then one class is enough, and labels that are all
            numbers are numbers of these classes. None sorts the labels of the photos.
        regression: True to read numbers in place of labels, one an output, from a CSV or JSONL;
            its columns or keys name the outputs, in their order.
        class_map: table from the labels of the photos (synsets, ...) to classes: class_map.py.

    Returns:
        The set.

    Raises:
        DataError: for a source of another form, lines that are not rows, several labels without
            multi_label, fewer than two classes (multi-label: one), labels that are not among
            `labels`, and numbers where classes are expected or the reverse.
        ConfigError: for another on_bad_image or check.
    """
    path = expand_home(source)
    photos = _read(path, multi_label, on_bad_image, check, regression)
    if class_map is not None:
        photos = ClassMap.read(class_map).apply(photos, labels)
    if labels is not None:
        return photos.with_labels(labels, ids=True)
    if not regression:
        _check_classes(photos, path)
    return photos


def read_split(
    source: str | os.PathLike[str],
    *,
    multi_label: bool = False,
    on_bad_image: OnBadImage = "fail",
    check: Check = "header",
    labels: Sequence[str] | None = None,
    regression: bool = False,
    class_map: str | os.PathLike[str] | None = None,
) -> tuple[LabelledPhotos, LabelledPhotos | None]:
    """Read the training and validation photos of a folder with both.

    Such a folder has the subfolders `train` and one of `val`, `valid` and `validation`, or `test`.
    Beside one of the three, `test` is not read, which is logged. The validation photos have the
    classes of the training photos.

    Args:
        source: as for read_photos.
        multi_label: as for read_photos.
        on_bad_image: as for read_photos.
        check: as for read_photos.
        labels: as for read_photos.
        regression: as for read_photos.
        class_map: as for read_photos.

    Returns:
        Training and validation photos; all photos and None for another source.

    Raises:
        DataError: as read_photos does, and for labels in validation without a training photo.
        ConfigError: as read_photos does.
    """
    read = partial(
        read_photos, multi_label=multi_label, on_bad_image=on_bad_image, check=check, labels=labels,
        regression=regression, class_map=class_map,
    )  # fmt: skip
    path = expand_home(source)
    parts = find_parts(path)
    if parts is None:
        return read(path), None
    train, held_out = parts
    training = read(train)
    validation = _read(held_out, multi_label, on_bad_image, check, regression)
    if class_map is not None:
        validation = ClassMap.read(class_map).apply(validation, labels)
    trained = training.counts()
    unseen = [label for label, n in validation.counts().items() if n and not trained.get(label)]
    if unseen:
        raise DataError(
            f"{held_out}: validation has the labels {join_names(map(repr, unseen))}, which no "
            "photo in "
            f"{train} has: add training photos of them, or remove them"
        )
    return training, validation.with_labels(training.labels)


def _read(
    path: Path, multi_label: bool, on_bad: OnBadImage, check: Check, regression: bool
) -> LabelledPhotos:
    """Read a set with the classes of its photos, without checking their number."""
    for name, value, choices in (("on_bad_image", on_bad, OnBadImage), ("check", check, Check)):
        if value not in get_args(choices):
            listing = ", ".join(map(repr, get_args(choices)))
            raise ConfigError(f"{name}={value!r}: expected one of {listing}")
    if multi_label and regression:
        raise ConfigError("multi_label and regression: expected one of them, or none")
    options = multi_label, on_bad, check, regression
    if not _is_folder(path):
        return gather(_file_rows(path, multi_label, regression), str(path), path.parent, *options)
    if find_parts(path) is not None:
        raise DataError(
            f"{path} has train/ and validation photos: name one of them, or read both with "
            "read_split"
        )
    table = find_table(path)
    if table is None and regression:
        raise DataError(
            f"{path} has no .csv or .jsonl: regression takes a number for each photo, such as a "
            "labels.csv with the header filename,value; a folder per class has no numbers"
        )
    rows = FolderRows(path) if table is None else _file_rows(table, multi_label, regression)
    return gather(rows, str(table or path), path, *options)


def _is_folder(path: Path) -> bool:
    """Return True for a folder, False for a file. Raises DataError where neither exists."""
    with suppress(OSError, ValueError):  # too long, NUL
        if path.exists():
            return path.is_dir()
    raise DataError(f"{short_file(str(path))} is not there: {EXPECTED}")


def _file_rows(path: Path, multi_label: bool, regression: bool) -> Rows:
    """Make the rows of a file by its suffix."""
    suffix = path.suffix.lower()
    if suffix in CSV:
        return CsvRows(path, multi_label, regression)
    if suffix in JSONL:
        return JsonlRows(path, regression)
    raise DataError(f"{path} ends in {suffix or 'no suffix'}: {EXPECTED}")


def find_table(folder: Path) -> Path | None:
    """Find the CSV or JSONL that describes the photos of a folder.

    Args:
        folder: the folder.

    Returns:
        The file; None where there is none.

    Raises:
        DataError: for several, none of which is labels.csv.
    """
    if (folder / "labels.csv").is_file():
        return folder / "labels.csv"
    tables = [p for p in list_visible(folder) if p.suffix.lower() in CSV + JSONL and p.is_file()]
    if len(tables) > 1:
        raise DataError(
            f"{folder} has {join_names(p.name for p in tables)}: name the file to read, such as "
            f"{tables[0]}"
        )
    return tables[0] if tables else None


def find_parts(path: Path) -> tuple[Path, Path] | None:
    """Find the folders of training and validation photos.

    Args:
        path: a folder or file.

    Returns:
        Both; None in a folder of another form.

    Raises:
        DataError: for several validation folders, and for photos without classes.
    """
    if not _is_folder(path):
        return None
    folders = {p.name.lower(): p for p in list_visible(path) if p.is_dir()}
    present = [name for name in VALIDATION_NAMES if name in folders]
    if not present or folders.keys() != {"train", *present}:
        return None
    train = folders["train"]
    if not _is_set(train):
        if find_table(path) is None and any(map(is_photo, list_visible(train))):
            raise DataError(
                f"{train} has photos and no classes: expected a folder per class or labels.csv "
                "in it"
            )
        return None
    if len([name for name in present if name != "test"]) > 1:
        raise DataError(
            f"{path} has {join_names(present)}: expected one folder of validation photos"
        )
    if "test" in present:
        use = "is not read" if len(present) > 1 else "serves as validation"
        logger.warning("%s: test/ %s", path, use)
    return train, folders[present[0]]


def _is_set(folder: Path) -> bool:
    """Return True if a folder has subfolders or a file of labels."""
    return any(p.is_dir() or p.suffix.lower() in CSV + JSONL for p in list_visible(folder))


def _check_classes(photos: LabelledPhotos, path: Path) -> None:
    """Raise DataError for too few classes, and for classes that look like numbers to predict."""
    classes = [label for label, count in photos.counts().items() if count]
    if classes and not photos.multi_label and _are_numbers(classes):
        raise DataError(
            f"{photos.source}: all labels are numbers with fractions, such as {classes[0]!r}: "
            f"{FOR_NUMBERS}; if they are classes, give them names that are not numbers, such as "
            "'size 1.5'"
        )
    if len(classes) >= (1 if photos.multi_label else 2):
        return
    if not classes:
        raise DataError(f"{photos.source}: no photo has a label: expected one class or more")
    deeper = path / classes[0]
    nested = path.is_dir() and deeper.is_dir() and any(p.is_dir() for p in list_visible(deeper))
    hint = f" (if they are the folders in {deeper}, name that)" if nested else ""
    raise DataError(
        f"{photos.source}: all photos ({len(photos)}) have the label {classes[0]!r}: "
        f"expected two classes or more{hint}"
    )


def _are_numbers(labels: Sequence[str]) -> bool:
    """Return True if all labels are decimal numbers, and at least one is not whole."""
    values = [parse_number(label) for label in labels]
    numbers = [value for value in values if value is not None]
    return len(numbers) == len(values) and any(not value.is_integer() for value in numbers)
