"""What a file says of photos, row by row, before anything is looked for; and how large it may be.

Everything is hostile: a file's size, its lines, rows and labels are counted before they take
memory.
"""

from __future__ import annotations

import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from vitlib.errors import DataError

MAX_FILE_BYTES = 512 * 2**20
MAX_LINE_BYTES = 4 * 2**20  # a header of 100,000 classes
MAX_ROWS = 10_000_000
MAX_CLASSES = 100_000
MAX_LABEL = 1_000  # characters
MAX_NUMBER = 1e18  # of a regression: float32 holds its square
MAX_MARKS = 50_000_000  # labels and unknowns of all photos together: 400 MiB

# How labels are written. "field": the second column of a CSV. "columns": one column a class.
# The next five: in JSONL. "stray": a photo that is in no class's folder.
Kind = Literal["field", "columns", "text", "number", "list", "numbers", "object", "folder", "stray"]


class Row(NamedTuple):
    """One photo as it is written down."""

    line: int  # from 1; 0: in no file
    file: str
    labels: tuple[str, ...]
    kind: Kind
    unknown: tuple[str, ...] = ()
    values: tuple[float, ...] = ()  # of a regression, one an output; then there are no labels

    @property
    def where(self) -> str:
        """How a message begins."""
        return f"line {self.line}: " if self.line else ""


# What a message says where one was found in place of the other.
FOR_CLASSES = "classes are read without regression=True (vitlib finetune without --regression)"
FOR_NUMBERS = "numbers to predict are read with regression=True (vitlib finetune --regression)"


def number_of(text: str) -> float | None:
    """A decimal number as float32 can hold it; None: it is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= MAX_NUMBER and "_" not in text else None


def output_names(count: int) -> tuple[str, ...]:
    """What the outputs of a regression are called where the file does not name them."""
    return ("value",) if count == 1 else tuple(f"value_{i}" for i in range(count))


def composed(text: str) -> str:
    """A label in Unicode's composed form (NFC), in which all labels are compared."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


class Rows(Protocol):
    """A source of rows, to be gone through once."""

    @property
    def classes(self) -> tuple[str, ...]:
        """After the last row: the classes that are there whether or not a photo has them."""

    def __iter__(self) -> Iterator[Row]:
        """Raises DataError naming the line that is none."""


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text without its end) of each line of a UTF-8 file that is not blank.

    Raises DataError where it cannot be read, is too large, or is not UTF-8.
    """
    try:
        _check_size(path)
        with path.open("rb") as file:
            number = total = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                total += len(line)
                if len(line) > MAX_LINE_BYTES or total > MAX_FILE_BYTES:
                    raise DataError(
                        f"{path}: line {number} is too long: expected at most {MAX_LINE_BYTES} "
                        f"bytes a line, {MAX_FILE_BYTES} in all"
                    )
                text = _text(path, number, line)
                if text.strip():
                    yield number, text.rstrip("\r\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _check_size(path: Path) -> None:
    there = path.stat()
    if not stat.S_ISREG(there.st_mode):
        raise DataError(f"{path} is no regular file: expected a .csv or .jsonl file")
    if there.st_size > MAX_FILE_BYTES:
        raise DataError(
            f"{path} has {there.st_size} bytes: expected at most {MAX_FILE_BYTES}; split it"
        )


def _text(path: Path, number: int, line: bytes) -> str:
    try:
        # Excel writes a byte order mark at the start.
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        form = "as CSV UTF-8" if path.suffix.lower() == ".csv" else "in UTF-8"
        raise DataError(f"{path}: line {number} is not UTF-8: save it {form}") from error
