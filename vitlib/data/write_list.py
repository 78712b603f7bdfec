"""Lists of labelled photos as files that read_photos() reads again: a CSV, or a JSONL.

A CSV is what people open. A name or a label that a line of CSV cannot hold, such as one with a line
break, makes the list a JSONL.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from vitlib.data.from_csv import FILE_WORDS, LABEL_WORDS
from vitlib.data.photos import LabelledPhotos, Photo
from vitlib.data.rows import lines
from vitlib.system.atomic import open_atomic

# Lists of a run beside the checkpoint of finetune, without their suffix.
TRAINING_LIST, VALIDATION_LIST = "training", "validation"


def write_list(photos: LabelledPhotos, folder: Path, name: str) -> Path:
    """Write a list of photos and labels, with absolute paths.

    Args:
        photos: the set.
        folder: an existing folder.
        name: name of the file without its suffix.

    Returns:
        The file, .csv or .jsonl.

    Raises:
        SourceError: it cannot be written.
    """
    rows = list(_csv_rows(photos))
    # The readers strip cells, and read quotes within a label as those around a label with spaces.
    is_clear = _header_is_clear(photos) and not any('"' in label for label in photos.labels)
    if is_clear and all(_fits_csv(cell) for row in rows for cell in row):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        path, content = folder / f"{name}.csv", text.getvalue()
    else:
        lines = (json.dumps(_json_row(photo, photos)) for photo in photos.photos)
        path, content = folder / f"{name}.jsonl", "".join(f"{line}\n" for line in lines)
    with open_atomic(path) as file:
        file.write(content.encode())
    return path


def find_list(folder: Path, name: str) -> Path | None:
    """Find a list that write_list() wrote.

    Args:
        folder: its folder.
        name: its name without suffix.

    Returns:
        The file; None where there is none.
    """
    paths = (folder / f"{name}.csv", folder / f"{name}.jsonl")
    return next((path for path in paths if path.is_file()), None)


def read_paths(path: Path) -> set[str]:
    """Read the paths of a list that write_list() wrote, without opening a photo.

    Args:
        path: the list.

    Returns:
        The paths.

    Raises:
        DataError: the list cannot be read.
    """
    paths = set()
    for number, line in lines(path):
        if path.suffix == ".jsonl":
            paths.add(str(json.loads(line)["image"]))
        elif number > 1:
            paths.add(next(csv.reader([line]))[0])
    return paths


def _has_marks(photos: LabelledPhotos) -> bool:
    """Return True if it is unknown of some photo whether it shows a class."""
    return any(photo.unknown for photo in photos.photos)


def _csv_rows(photos: LabelledPhotos) -> Iterator[list[str]]:
    """Yield the header and a row for each photo."""
    if photos.regression or _has_marks(photos):
        yield ["filename", *photos.labels]
    else:
        yield ["filename", "label"]
    for photo in photos.photos:
        if photos.regression:
            cells = list(map(repr, photo.values))
        elif _has_marks(photos):
            cells = [_mark(photo, label) for label in photos.labels]
        elif photos.multi_label:
            cells = [" ".join(f'"{x}"' if " " in x else x for x in photo.labels)]
        else:
            cells = list(photo.labels)
        yield [str(photo.path.absolute()), *cells]


def _mark(photo: Photo, label: str) -> str:
    """Return 1 for a class in the photo, 0 for one that is not, and "" where it is unknown."""
    return "" if label in photo.unknown else str(int(label in photo.labels))


def _fits_csv(cell: str) -> bool:
    """Return True for text that a cell keeps as it is."""
    return cell.isprintable() and cell == cell.strip()


def _header_is_clear(photos: LabelledPhotos) -> bool:
    """Return True if no class or output has the name of another column."""
    if not (photos.regression or _has_marks(photos)):
        return True
    return not {label.lower() for label in photos.labels} & (FILE_WORDS | LABEL_WORDS)


def _json_row(photo: Photo, photos: LabelledPhotos) -> dict[str, object]:
    """Return the object of a photo in a JSONL."""
    label: object = list(photo.labels)
    if photos.regression:
        label = dict(zip(photos.labels, photo.values, strict=True))
    elif _has_marks(photos):
        marks: dict[str, bool | None] = {name: name in photo.labels for name in photos.labels}
        label = marks | dict.fromkeys(photo.unknown)
    elif not photos.multi_label:
        label = photo.labels[0]
    return {"image": str(photo.path.absolute()), "label": label}
