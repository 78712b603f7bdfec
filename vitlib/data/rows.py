"""Rows of labelled photos as a file states them, and the limits on their size.

Files are hostile input: size, lines, rows and labels are counted before they take memory.
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
MAX_NUMBER = 1e18  # of a regression: its square is finite in float32
MAX_MARKS = 50_000_000  # labels and unknown labels of all photos together: 400 MiB

# Form of the labels. "field": the second column of a CSV. "columns": one column a class. The next
# five: in JSONL. "folder": by the folder. "stray": a photo outside the folders of classes.
Kind = Literal["field", "columns", "text", "number", "list", "numbers", "object", "folder", "stray"]


class Row(NamedTuple):
    """Photo and labels as a file states them.

    Attributes:
        line: number of the line, from 1; 0 for a photo of a folder.
        file: path or URL of the photo.
        labels: names of classes.
        kind: form of the labels.
        unknown: classes of which the file does not say if the photo has them.
        values: of a regression, one an output; then there are no labels.
    """

    line: int
    file: str
    labels: tuple[str, ...]
    kind: Kind
    unknown: tuple[str, ...] = ()
    values: tuple[float, ...] = ()

    @property
    def line_prefix(self) -> str:
        """Start of a message about this row: its line, where it has one."""
        return f"line {self.line}: " if self.line else ""


# Advice of messages about labels in place of numbers, or the reverse.
FOR_CLASSES = "classes are read without regression=True (vitlib finetune without --regression)"
FOR_NUMBERS = "numbers to predict are read with regression=True (vitlib finetune --regression)"


def parse_number(text: str) -> float | None:
    """Parse a decimal number within the range of regressions.

    Args:
        text: the text of a cell.

    Returns:
        The number, or None where the text is not one.
    """
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= MAX_NUMBER and "_" not in text else None


def output_names(count: int) -> tuple[str, ...]:
    """Name the outputs of a regression whose file does not name them.

    Args:
        count: number of outputs.

    Returns:
        The names.
    """
    return ("value",) if count == 1 else tuple(f"value_{i}" for i in range(count))


def normalize_label(text: str) -> str:
    """Convert a label to Unicode's composed form (NFC), in which labels are compared.

    Args:
        text: the label as written.

    Returns:
        The label in NFC.
    """
    return text if text.isascii() else unicodedata.normalize("NFC", text)


class Rows(Protocol):
    """Source of rows, for one iteration."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes that the source declares, with or without photos; known after the last row."""

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows. Raises DataError that names a line which is not a row."""


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file that are not blank.

    Args:
        path: the file.

    Yields:
        Number of the line, from 1, and its text without the line break.

    Raises:
        DataError: for a file that cannot be read, is too large, or is not UTF-8.
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
                text = _decode(path, number, line)
                if text.strip():
                    yield number, text.rstrip("\r\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _check_size(path: Path) -> None:
    """Raise DataError for a file that is not regular or too large."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} is not a regular file: expected a .csv or .jsonl file")
    if status.st_size > MAX_FILE_BYTES:
        raise DataError(
            f"{path} has {status.st_size} bytes: expected at most {MAX_FILE_BYTES}; split it"
        )


def _decode(path: Path, number: int, line: bytes) -> str:
    """Decode a line. Raises DataError where it is not UTF-8."""
    try:
        # Excel writes a byte order mark at the start of a file.
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        form = "as CSV UTF-8" if path.suffix.lower() == ".csv" else "in UTF-8"
        raise DataError(f"{path}: line {number} is not UTF-8: save it {form}") from error
