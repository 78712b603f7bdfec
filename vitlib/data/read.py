"""Where labelled photos are -> the labelled set: a folder, a CSV or a JSONL.

A folder is one of three. With `labels.csv`, or one .csv or .jsonl alone, it is what that file says;
its photos lie beside it or in `images/`. With `train/` and `val/` (or `valid/`, `validation/`,
`test/`) that are sets themselves, it is two sets. Else the folders in it are the classes.
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
from vitlib.data.from_folder import FolderRows, is_photo, visible
from vitlib.data.from_jsonl import JsonlRows
from vitlib.data.gather import Check, OnBadImage, gather
from vitlib.data.photos import LabelledPhotos, listed, short_file
from vitlib.data.rows import FOR_NUMBERS, Rows, number_of
from vitlib.errors import ConfigError, DataError

logger = logging.getLogger("vitlib")

CSV, JSONL = (".csv",), (".jsonl", ".ndjson")
HELD_OUT = ("val", "valid", "validation", "test")
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
    """The labelled photos of a folder, a .csv or a .jsonl (see above, from_csv.py, from_jsonl.py).

    multi_label: any number of labels a photo, 0 included; else exactly one.
    on_bad_image: "fail" raises one error that names photos which are not there or no images;
    "skip" leaves them out, names them in `left_out` and logs it. check: "header" opens the header
    of every photo, so that they are known before the first epoch (what is cut off further down
    shows when it is decoded); "none" only looks whether the files are there.
    labels: the classes, as a model has them, in its order; then one class is enough, and labels
    that are all numbers are numbers of these. Default: those that are found, sorted.
    class_map: a table from the labels of the photos (synsets, ...) to the classes: class_map.py.
    regression: numbers in place of labels, one an output, out of a CSV or a JSONL; the columns or
    keys name the outputs, in their order.

    Raises DataError for what is no such source, for lines that are no rows, for several labels
    without multi_label, for fewer than two classes (multi-label: for none), and for labels that
    are not among `labels`, and for numbers where classes are expected or the reverse; ConfigError
    for another on_bad_image or check.
    """
    path = Path(source).expanduser()
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
    """(training photos, validation photos) of a folder that holds both; else (all, None).

    It holds both where the folders in it are `train` and one of `val`, `valid` and `validation`,
    or `test`; with one of the three, `test` is not read, which is logged. The validation photos
    have the classes of the training photos. Arguments and errors are those of read_photos; also
    raises DataError for labels in validation that no training photo has.
    """
    read = partial(
        read_photos, multi_label=multi_label, on_bad_image=on_bad_image, check=check, labels=labels,
        regression=regression, class_map=class_map,
    )  # fmt: skip
    path = Path(source).expanduser()
    parts = _parts(path)
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
            f"{held_out}: validation has the labels {listed(map(repr, unseen))}, which no photo in "
            f"{train} has: add training photos of them, or take them out"
        )
    return training, validation.with_labels(training.labels)


def _read(
    path: Path, multi_label: bool, on_bad: OnBadImage, check: Check, regression: bool
) -> LabelledPhotos:
    """The set with the classes that are found, however few."""
    for name, value, known in (("on_bad_image", on_bad, OnBadImage), ("check", check, Check)):
        if value not in get_args(known):
            listing = ", ".join(map(repr, get_args(known)))
            raise ConfigError(f"{name}={value!r}: expected one of {listing}")
    if multi_label and regression:
        raise ConfigError("multi_label and regression: expected one of them, or none")
    how = multi_label, on_bad, check, regression
    if not _is_folder(path):
        return gather(_file_rows(path, multi_label, regression), str(path), path.parent, *how)
    if _parts(path) is not None:
        raise DataError(
            f"{path} holds train/ and photos held out: name one of them, or read both with "
            "read_split"
        )
    table = _table(path)
    if table is None and regression:
        raise DataError(
            f"{path} has no .csv or .jsonl: regression takes a number for each photo, such as a "
            "labels.csv with the header filename,value; a folder per class holds none"
        )
    rows = FolderRows(path) if table is None else _file_rows(table, multi_label, regression)
    return gather(rows, str(table or path), path, *how)


def _is_folder(path: Path) -> bool:
    """Raises DataError where nothing is there."""
    with suppress(OSError, ValueError):  # too long, NUL
        if path.exists():
            return path.is_dir()
    raise DataError(f"{short_file(str(path))} is not there: {EXPECTED}")


def _file_rows(path: Path, multi_label: bool, regression: bool) -> Rows:
    suffix = path.suffix.lower()
    if suffix in CSV:
        return CsvRows(path, multi_label, regression)
    if suffix in JSONL:
        return JsonlRows(path, regression)
    raise DataError(f"{path} ends in {suffix or 'no suffix'}: {EXPECTED}")


def _table(folder: Path) -> Path | None:
    """The CSV or JSONL that says what the photos of a folder are; None: there is none."""
    if (folder / "labels.csv").is_file():
        return folder / "labels.csv"
    tables = [p for p in visible(folder) if p.suffix.lower() in CSV + JSONL and p.is_file()]
    if len(tables) > 1:
        raise DataError(
            f"{folder} holds {listed(p.name for p in tables)}: name the one to read, such as "
            f"{tables[0]}"
        )
    return tables[0] if tables else None


def _parts(path: Path) -> tuple[Path, Path] | None:
    """The folders of training and validation photos in a folder of both; None: it is no such one.

    Raises DataError where there is no telling which, or where they hold photos without classes.
    """
    if not _is_folder(path):
        return None
    folders = {p.name.lower(): p for p in visible(path) if p.is_dir()}
    held = [name for name in HELD_OUT if name in folders]
    if not held or folders.keys() != {"train", *held}:
        return None
    train = folders["train"]
    if not _is_set(train):
        if _table(path) is None and any(map(is_photo, visible(train))):
            raise DataError(
                f"{train} holds photos and no classes: expected a folder per class or labels.csv "
                "in it"
            )
        return None
    if len([name for name in held if name != "test"]) > 1:
        raise DataError(f"{path} holds {listed(held)}: expected one folder of validation photos")
    if "test" in held:
        use = "is not read" if len(held) > 1 else "serves as validation"
        logger.warning("%s: test/ %s", path, use)
    return train, folders[held[0]]


def _is_set(folder: Path) -> bool:
    """Whether a folder holds folders or a file of labels."""
    return any(p.is_dir() or p.suffix.lower() in CSV + JSONL for p in visible(folder))


def _check_classes(photos: LabelledPhotos, path: Path) -> None:
    found = [label for label, count in photos.counts().items() if count]
    if found and not photos.multi_label and _are_numbers(found):
        raise DataError(
            f"{photos.source}: all labels are numbers with fractions, such as {found[0]!r}: "
            f"{FOR_NUMBERS}; if they are classes, give them names that are no numbers, such as "
            "'size 1.5'"
        )
    if len(found) >= (1 if photos.multi_label else 2):
        return
    if not found:
        raise DataError(f"{photos.source}: no photo has a label: expected one class or more")
    deeper = path / found[0]
    nested = path.is_dir() and deeper.is_dir() and any(p.is_dir() for p in visible(deeper))
    hint = f" (are they the folders in {deeper}? Then name that)" if nested else ""
    raise DataError(
        f"{photos.source}: all photos ({len(photos)}) have the label {found[0]!r}: "
        f"expected two classes or more{hint}"
    )


def _are_numbers(labels: Sequence[str]) -> bool:
    """Whether all are decimal numbers, and one at least is not whole."""
    values = [number_of(label) for label in labels]
    known = [value for value in values if value is not None]
    return len(known) == len(values) and any(not value.is_integer() for value in known)
