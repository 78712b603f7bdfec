"""Images of lists: text (a path a line), CSV, JSONL and Parquet.

A column of CSV, JSONL and Parquet contains the images: paths, base64 (also with line breaks or as a
data URL), or in Parquet bytes, alone or as Hugging Face's datasets write them, {bytes, path}. A
value with a dot is a path, since base64 has none. Files are searched where finetune searches them:
in the list's folder and its images/. A URL is not fetched. It stands for a local file of its name;
without one the row fails with an error that says so.

Lists are hostile input: the length of a line is bounded before it is in memory.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

from vitlib.batch.inputs.items import (
    MAX_BYTES,
    Base64,
    Encoded,
    File,
    ImageRef,
    InvalidRow,
    Item,
    ListCell,
    file_fingerprint,
)
from vitlib.data.from_folder import is_photo
from vitlib.data.locate_photos import find_photo
from vitlib.errors import SourceError
from vitlib.image.base64_text import is_data_url
from vitlib.system.csv_rows import iter_csv_rows
from vitlib.system.requirements import import_extra

IsNeeded = Callable[[int], bool]  # True for rows of a list whose bytes will be read
COLUMNS = (
    *("image", "path", "file", "filename", "file_name", "image_path", "image_file", "image_url"),
    *("image_base64", "base64", "bytes", "image_bytes", "jpg", "url"),
)
MAX_LINE = MAX_BYTES * 4 // 3 + 2**20
MAX_PATH = 4096
_BATCH = 64  # rows of a Parquet file that are read at a time


def iter_text_items(path: str, root: str | None) -> Iterator[Item]:
    """Yield the items of a file with a path a line; blank lines are skipped.

    Args:
        path: the file.
        root: folder that paths are relative to; None for the file's own.

    Yields:
        The items.

    Raises:
        SourceError: for a file that cannot be read.
    """
    base = root or str(Path(path).parent)
    rows = count()
    for line in _iter_lines(path, MAX_PATH * 4):
        if line.strip():
            yield Item(next(rows), line, 0, _parse_ref(line, base, text_only=True))


def iter_csv_items(path: str, root: str | None, column: str | None) -> Iterator[Item]:
    """Yield the items of a CSV with a header, or of one whose first cell is a photo.

    Args:
        path: the file.
        root: folder that paths are relative to; None for the file's own.
        column: column of the images; None detects it.

    Yields:
        The items; a line of another number of columns is an InvalidRow.

    Raises:
        SourceError: for a file that is not CSV, or has no such column.
    """
    base = root or str(Path(path).parent)
    reader = csv.reader((line + "\n" for line in _iter_lines(path, MAX_LINE)), strict=True)
    rows = iter_csv_rows(reader, MAX_LINE)
    try:
        names = next(rows, [])
        if not names:
            raise SourceError(f"{path} is empty: expected a header and a row for each image")
        if column is None and _is_photo(names[0], base):  # as finetune reads a CSV without a header
            index, rows = 0, chain([names], rows)
        else:
            index = names.index(find_column(path, names, column))
        for row, cells in enumerate(cells for cells in rows if cells):
            value = cells[index] if len(cells) == len(names) else None
            if value is None:
                error = f"line {reader.line_num} has {len(cells)} columns: expected {len(names)}"
                yield Item(row, path, row, InvalidRow(error))
            else:
                yield _make_item(path, row, value, base)
    except csv.Error as csv_error:
        message = f"{path}: line {reader.line_num} is not CSV ({csv_error})"
        raise SourceError(message) from csv_error


def iter_jsonl_items(path: str, root: str | None, column: str | None) -> Iterator[Item]:
    """Yield the items of a JSONL, whose lines are objects with a column, or texts.

    Args:
        path: the file.
        root: folder that paths are relative to; None for the file's own.
        column: column of the images; None detects it.

    Yields:
        The items.

    Raises:
        SourceError: for a line that is not JSON, or has no such column.
    """
    base = root or str(Path(path).parent)
    row = 0
    for number, line in enumerate(_iter_lines(path, MAX_LINE), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path}: line {number} is not JSON ({error})") from error
        if isinstance(value, dict):
            if row == 0 or column is None:
                column = find_column(path, list(value), column)
            value = value.get(column)
        yield _make_item(path, row, value, base)
        row += 1


def iter_parquet_items(
    path: str, root: str | None, column: str | None, is_needed: IsNeeded
) -> Iterator[Item]:
    """Yield the items of a Parquet file.

    Args:
        path: the file.
        root: folder that paths are relative to; None for the file's own.
        column: column of the images; None detects it.
        is_needed: function of a row, True if its bytes will be read.

    Yields:
        The items; without bytes for row groups that are not needed.

    Raises:
        SourceError: for a file that is not Parquet, has no such column, or without pyarrow.
    """
    base = root or str(Path(path).parent)
    purpose = f"{path}: Parquet needs pyarrow"
    pa = import_extra("parquet", "pyarrow", purpose, kind=SourceError)
    parquet = import_extra("parquet", "pyarrow", purpose, "pyarrow.parquet", SourceError)
    origin = file_fingerprint(path)
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            name = find_column(path, file.schema_arrow.names, column)
            kind = file.schema_arrow.field(name).type
            is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            row = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if not is_text and not any(map(is_needed, range(row, row + size))):
                    yield from (
                        Item(i, path, i, Encoded(b"", f"{origin}:{i}"))
                        for i in range(row, row + size)
                    )
                    row += size
                    continue
                for batch in file.iter_batches(_BATCH, row_groups=[group], columns=[name]):
                    for value in batch.column(0).to_pylist():
                        yield (
                            _make_item(path, row, value, base)
                            if is_text
                            else _make_cell_item(path, row, value, base, origin)
                        )
                        row += 1
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} is not Parquet, or damaged ({error})") from error


def find_column(path: str, names: list[str], column: str | None) -> str:
    """Find the column that contains the images.

    Args:
        path: the list, for messages.
        names: names of its columns.
        column: name that the user gives; None takes the first of COLUMNS.

    Returns:
        The name.

    Raises:
        SourceError: where there is no such column.
    """
    listing = ", ".join(map(repr, names[:20]))
    if column is not None:
        if column not in names:
            raise SourceError(f"{path} has no column {column!r}: it has {listing}")
        return column
    matches = [name for word in COLUMNS for name in names if name.lower() == word]
    if not matches:
        raise SourceError(
            f"{path} has the columns {listing}: expected image, path or file; name another with "
            "--column"
        )
    return matches[0]


def _make_item(path: str, row: int, value: Any, base: str) -> Item:
    """Make the item of a cell."""
    ref = _parse_ref(value, base)
    if isinstance(ref, File):
        return Item(row, value, 0, ref)
    return Item(row, path, row, ref)


def _make_cell_item(path: str, row: int, value: Any, base: str, origin: str) -> Item:
    """Make the item of a cell of a Parquet file that may contain the encoded image."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    fingerprint = f"{origin}:{row}"
    if isinstance(value, bytes):
        return Item(row, path, row, Encoded(value, fingerprint))
    return Item(row, path, row, ListCell(_parse_ref(value, base), fingerprint))


def _parse_ref(value: Any, base: str, *, text_only: bool = False) -> ImageRef:
    """Parse the value of a cell as a reference to an image."""
    if not isinstance(value, str) or not value.strip():
        return InvalidRow("names no image" if value is None or value == "" else "is not text")
    if value[:8].lower().startswith(("http://", "https://")):
        local = _find_file(value, base)
        if local is not None:
            return File(local)
        return InvalidRow("is a URL, which is not fetched: download it first")
    if text_only or ("." in value and len(value) <= MAX_PATH and not is_data_url(value)):
        path = os.path.join(base, value.removeprefix("file://"))  # noqa: PTH118
        return File(path if os.path.isfile(path) else _find_file(value, base) or path)  # noqa: PTH113
    return Base64(value)


def _is_photo(name: str, base: str) -> bool:
    """Return True for the name of a file with the suffix of an image."""
    ref = _parse_ref(name, base)
    return isinstance(ref, File) and is_photo(Path(name)) and Path(ref.path).is_file()


def _find_file(name: str, base: str) -> str | None:
    """Find a photo where finetune finds it: by its path or URL, in a folder or its images/."""
    return find_photo(name, (Path(base), Path(base, "images")))


def _iter_lines(path: str, longest: int) -> Iterator[str]:
    """Yield lines of bounded length without their ends; bytes that are not UTF-8 are escaped."""
    try:
        with Path(path).open("rb") as file:
            first = True
            for number in count(1):
                line = _read_line(path, file, number, longest)
                if not line:
                    return
                if first:
                    line, first = line.removeprefix(b"\xef\xbb\xbf"), False
                if b"\0" in line:
                    raise SourceError(f"{path}: line {number} is not text")
                yield line.decode("utf-8", "surrogateescape").rstrip("\r\n")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_line(path: str, file: IO[bytes], number: int, longest: int) -> bytes:
    """Read a line. Raises SourceError for one that is too long."""
    line = file.readline(longest + 1)
    if len(line) > longest:
        raise SourceError(f"{path}: line {number} is longer than {longest} bytes")
    return line
