"""Leave photos out of a set, by a list of files such as `vitlib audit --fix-list` writes."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Sequence
from dataclasses import replace

from vitlib.data.from_csv import FILE_WORDS, MAX_CELL
from vitlib.data.photos import LabelledPhotos, join_names
from vitlib.errors import DataError, count_noun
from vitlib.source.locate import ALWAYS_SHOW
from vitlib.system.atomic import expand_home
from vitlib.system.csv_rows import iter_csv_rows

logger = logging.getLogger("vitlib")

MAX_LIST_BYTES = 1 << 30


def read_exclusions(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a list of photos to leave out.

    Args:
        path: A CSV with a header, one of whose columns is `filename`. Relative names are those of
            the folder of the list.

    Returns:
        Name in the list, by the real path of the photo.

    Raises:
        DataError: The list cannot be read, or has no such column.
    """
    path = expand_home(path)
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise DataError(f"{path}: over {MAX_LIST_BYTES >> 20} MiB: expected a list of photos")
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = iter_csv_rows(csv.reader(file, strict=True), MAX_CELL)
            header = [name.strip().lower() for name in next(rows, [])]
            column = next((i for i, name in enumerate(header) if name in FILE_WORDS), -1)
            if column < 0:
                raise DataError(
                    f"{path}: expected a CSV whose header has the column filename, got "
                    f"{join_names(map(repr, header)) or 'nothing'}"
                )
            names = [row[column] for row in rows if len(row) > column and row[column]]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}; expected a CSV of photos") from error
    return {os.path.realpath(path.parent / name): name for name in names}


def exclude_photos(
    sets: Sequence[LabelledPhotos | None], path: str | os.PathLike[str]
) -> list[LabelledPhotos | None]:
    """Leave out the photos of a list, and log their number and the names that are in no set.

    Args:
        sets: The sets; None is returned as None.
        path: As for read_exclusions.

    Returns:
        The rest of each set, with the same classes.

    Raises:
        DataError: The list cannot be read, or no photo of a set is left.
    """
    names = read_exclusions(path)
    rest, used = list[LabelledPhotos | None](), set[str]()
    for photos in sets:
        if photos is None:
            rest.append(None)
            continue
        real = [os.path.realpath(photo.path) for photo in photos.photos]
        indices = [index for index, name in enumerate(real) if name not in names]
        if not indices:
            raise DataError(f"{photos.source}: {path} leaves out all {len(photos)} photos")
        count = count_noun(len(photos) - len(indices), "photo")
        logger.warning("%s: %s left out by %s", photos.source, count, path, extra=ALWAYS_SHOW)
        rest.append(replace(photos.subset(indices), left_out=photos.left_out))
        used |= names.keys() & set(real)
    absent = [name for target, name in names.items() if target not in used]
    if absent:
        count = count_noun(len(absent), "name")
        logger.warning(
            "%s: %s of photos that are in no set: %s", path, count, join_names(absent),
            extra=ALWAYS_SHOW,
        )  # fmt: skip
    return rest
