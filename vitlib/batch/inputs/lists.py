"""Lists of images -> items: text (a path a line), CSV, JSONL and Parquet.

In CSV, JSONL and Parquet a column holds the images: paths, base64 (also with line breaks or as a
data URL), or in Parquet bytes, alone or as Hugging Face's datasets write them, {bytes, path}. A
value with a dot is a path, as base64 has none. URLs are not fetched: their rows fail, and say so.

Lines, cells and files are hostile: a line's length is bounded before it is in memory.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import IO, Any

from vitlib.batch.inputs.items import (
    MAX_BYTES,
    Base64,
    Encoded,
    File,
    Item,
    Place,
    Stamped,
    Wrong,
    stamp_of,
)
from vitlib.errors import SourceError
from vitlib.image.base64_text import is_data_url
from vitlib.system.csv_rows import iter_csv_rows

Needed = Callable[[int], bool]  # whether an item's bytes will be read, by its position in the list
COLUMNS = (
    *("image", "path", "file", "filename", "file_name", "image_path", "image_file", "image_url"),
    *("image_base64", "base64", "bytes", "image_bytes", "jpg", "url"),
)
MAX_LINE = MAX_BYTES * 4 // 3 + 2**20
MAX_PATH = 4096
_BATCH = 64  # rows of a Parquet file that are read at a time


def text_items(path: str, root: str | None) -> Iterator[Item]:
    """A file with a path a line; blank lines are none."""
    base = root or str(Path(path).parent)
    rows = count()
    for line in _lines(path, MAX_PATH * 4):
        if line.strip():
            yield Item(next(rows), line, 0, _place(line, base, text_only=True))


def csv_items(path: str, root: str | None, column: str | None) -> Iterator[Item]:
    """A CSV with a header."""
    base = root or str(Path(path).parent)
    reader = csv.reader((line + "\n" for line in _lines(path, MAX_LINE)), strict=True)
    rows = iter_csv_rows(reader, MAX_LINE)
    try:
        names = next(rows, [])
        if not names:
            raise SourceError(f"{path} is empty: expected a header and a row for each image")
        at = names.index(column_of(path, names, column))
        for row, cells in enumerate(cells for cells in rows if cells):
            value = cells[at] if len(cells) == len(names) else None
            if value is None:
                why = f"line {reader.line_num} has {len(cells)} columns: expected {len(names)}"
                yield Item(row, path, row, Wrong(why))
            else:
                yield _item(path, row, value, base)
    except csv.Error as error:
        raise SourceError(f"{path}: line {reader.line_num} is not CSV ({error})") from error


def jsonl_items(path: str, root: str | None, column: str | None) -> Iterator[Item]:
    """JSONL: a line is an object with a column, or a text."""
    base = root or str(Path(path).parent)
    row = 0
    for number, line in enumerate(_lines(path, MAX_LINE), 1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path}: line {number} is not JSON ({error})") from error
        if isinstance(said, dict):
            if row == 0 or column is None:
                column = column_of(path, list(said), column)
            said = said.get(column)
        yield _item(path, row, said, base)
        row += 1


def parquet_items(
    path: str, root: str | None, column: str | None, needed: Needed
) -> Iterator[Item]:
    """A Parquet file; its bytes are read only where they are needed."""
    base = root or str(Path(path).parent)
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise SourceError(
            f"{path}: Parquet needs pyarrow: pip install 'vitlib[parquet]'"
        ) from error
    of = stamp_of(path)
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            name = column_of(path, file.schema_arrow.names, column)
            kind = file.schema_arrow.field(name).type
            named = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            row = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if not named and not any(map(needed, range(row, row + size))):
                    yield from (
                        Item(i, path, i, Encoded(b"", f"{of}:{i}")) for i in range(row, row + size)
                    )
                    row += size
                    continue
                for some in file.iter_batches(_BATCH, row_groups=[group], columns=[name]):
                    for value in some.column(0).to_pylist():
                        yield (
                            _item(path, row, value, base)
                            if named
                            else _cell(path, row, value, base, of)
                        )
                        row += 1
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path} is not Parquet, or damaged ({error})") from error


def column_of(path: str, names: list[str], column: str | None) -> str:
    """The name of the column that holds the images. Raises SourceError where there is none."""
    shown = ", ".join(map(repr, names[:20]))
    if column is not None:
        if column not in names:
            raise SourceError(f"{path} has no column {column!r}: it has {shown}")
        return column
    known = [name for word in COLUMNS for name in names if name.lower() == word]
    if not known:
        raise SourceError(
            f"{path} has the columns {shown}: expected image, path or file; name another with "
            "--column"
        )
    return known[0]


def _item(path: str, row: int, value: Any, base: str) -> Item:
    """A cell of a list."""
    place = _place(value, base)
    if isinstance(place, File):
        return Item(row, value, 0, place)
    return Item(row, path, row, place)


def _cell(path: str, row: int, value: Any, base: str, of: str) -> Item:
    """A cell of a Parquet file that may hold the image itself."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    stamp = f"{of}:{row}"
    if isinstance(value, bytes):
        return Item(row, path, row, Encoded(value, stamp))
    return Item(row, path, row, Stamped(_place(value, base), stamp))


def _place(value: Any, base: str, *, text_only: bool = False) -> Place:
    """What a value of a list says of where an image is."""
    if not isinstance(value, str) or not value.strip():
        return Wrong("names no image" if value is None or value == "" else "is no text")
    if value[:8].lower().startswith(("http://", "https://")):
        return Wrong("is a URL, which is not fetched: download it first")
    if text_only or ("." in value and len(value) <= MAX_PATH and not is_data_url(value)):
        return File(os.path.join(base, value.removeprefix("file://")))  # noqa: PTH118
    return Base64(value)


def _lines(path: str, longest: int) -> Iterator[str]:
    """Lines without their ends, of bounded length, in UTF-8 or as bytes that names may have."""
    try:
        with Path(path).open("rb") as file:
            first = True
            for number in count(1):
                line = _line(path, file, number, longest)
                if not line:
                    return
                if first:
                    line, first = line.removeprefix(b"\xef\xbb\xbf"), False
                if b"\0" in line:
                    raise SourceError(f"{path}: line {number} is no text")
                yield line.decode("utf-8", "surrogateescape").rstrip("\r\n")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error


def _line(path: str, file: IO[bytes], number: int, longest: int) -> bytes:
    line = file.readline(longest + 1)
    if len(line) > longest:
        raise SourceError(f"{path}: line {number} is longer than {longest} bytes")
    return line
