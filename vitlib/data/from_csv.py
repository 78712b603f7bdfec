"""Rows of a CSV: `file,labels`, or a header with a column for each class.

A row is one line, with commas and quotes by RFC 4180. Blank lines are skipped; any other line that
is not a row is an error that names it.
"""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from vitlib.data.photos import join_names, short
from vitlib.data.rows import (
    FOR_CLASSES,
    FOR_NUMBERS,
    MAX_CLASSES,
    Row,
    lines,
    output_names,
    parse_number,
)
from vitlib.errors import DataError, count_noun
from vitlib.system.csv_rows import iter_csv_rows

logger = logging.getLogger("vitlib")

MAX_CELL = 131_072  # characters
FILE_WORDS = frozenset(("filename", "file", "file_name", "image", "image_url", "path"))
LABEL_WORDS = frozenset(("label", "labels", "class"))
EXPECTED = "expected file,label on each line, with or without a header such as filename,label"
HEADER = " (if the line is a header: expected filename,age)"
_CELLS = {
    **dict.fromkeys(("1", "1.0", "true"), True),
    **dict.fromkeys(("0", "0.0", "false"), False),
    **dict.fromkeys(("", "-1", "-1.0", "nan"), None),
}


class _Header(NamedTuple):
    """Columns of a CSV: indices of file and labels (-1 for a column per class), and all names."""

    file: int
    labels: int
    names: list[str]


class CsvRows:
    """Rows of a CSV.

    Args:
        path: the file.
        multi_label: True to read several labels in a field, with spaces between them.
        regression: True to read numbers in every column but the file's.
    """

    def __init__(self, path: Path, multi_label: bool, regression: bool = False) -> None:
        self.path, self.multi_label, self.regression = path, multi_label, regression
        self.classes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows. Raises DataError that names a line which is not a row."""
        numbered = lines(self.path)
        first = next(numbered, None)
        if first is None:
            raise DataError(f"{self.path} is empty: {EXPECTED}")
        header = self._parse_header(*first)
        if header is None:
            [name] = output_names(1)
            header, numbered = _Header(0, 1, ["file", name]), chain([first], numbered)
        if header.labels < 0:
            self._set_classes(first[0], header)
        elif self.regression:
            self.classes = (header.names[header.labels],)
        for number, line in numbered:
            cells = self._parse_cells(number, line, len(header.names))
            if not cells[header.file]:
                raise self._error(number, "names no file")
            if self.regression:
                yield self._values_row(number, cells, header)
            elif header.labels < 0:
                yield self._marks_row(number, cells, header)
            else:
                labels = self._split_labels(number, cells[header.labels])
                yield Row(number, cells[header.file], labels, "field")

    def _parse_header(self, number: int, line: str) -> _Header | None:
        """Parse the first line; None where it is a row."""
        names = self._parse_cells(number, line)
        lower = [name.lower() for name in names]
        file = next((i for i, name in enumerate(lower) if name in FILE_WORDS), -1)
        labels = [i for i, name in enumerate(lower) if name in LABEL_WORDS and i != file]
        if len(names) == 2:
            if file == 0 or (
                file == 1 and (labels or self.regression)
            ):  # else "image" is the label of a first row
                return _Header(file, 1 - file, names)
            return None
        if file < 0 or len(labels) > 1 or len(names) == 1:
            separators = [name for name, c in (("semicolons", ";"), ("tabs", "\t")) if c in line]
            columns = count_noun(len(names), "column")
            between = f" and {separators[0]}" if separators else ""
            raise self._error(
                number,
                f"has {columns}{between}, and no names of a column of files and one of labels: "
                f"{EXPECTED}, or one column a class below a header filename,can,carton. A name "
                "with a comma stands in quotes; several labels have spaces between",
            )
        if labels:
            rest = [name for i, name in enumerate(names) if i not in (file, labels[0])]
            logger.warning(
                "%s: the columns %s are not read", self.path, join_names(map(repr, rest))
            )
        return _Header(file, labels[0] if labels else -1, names)

    def _set_classes(self, number: int, header: _Header) -> None:
        """Take the classes of a header. Raises DataError for repeated names."""
        classes = [name for i, name in enumerate(header.names) if i != header.file]
        repeated = [name for name, count in Counter(classes).items() if count > 1]
        if repeated or "" in classes:
            unnamed = "" in classes
            problem = "a column without a name" if unnamed else f"{short(repeated[0])!r} twice"
            raise self._error(number, f"has {problem}: expected the name of a class in each column")
        if len(classes) > MAX_CLASSES:
            raise self._error(number, f"has {len(classes)} classes: expected at most {MAX_CLASSES}")
        self.classes = tuple(classes)

    def _parse_cells(self, number: int, line: str, columns: int = 0) -> list[str]:
        """Parse the cells of a line; columns is their expected number, 0 for any."""
        try:
            # Lines are parsed one by one, so that an open quote cannot swallow those below it.
            cells = next(iter_csv_rows(csv.reader([line], strict=True), MAX_CELL))
        except csv.Error as error:
            raise self._error(
                number,
                f"is not CSV ({error}): expected text, and quotes that are closed on the same line",
            ) from error
        if columns and len(cells) != columns:
            raise self._error(
                number,
                f"has {count_noun(len(cells), 'column')}: expected {columns}. "
                "A name with a comma stands in quotes; several labels have spaces between",
            )
        return [cell.strip() for cell in cells]

    def _split_labels(self, number: int, field: str) -> tuple[str, ...]:
        """Split a field into labels; with one label a photo the field is the label."""
        if not field:
            return ()
        if not self.multi_label and not (field[0] == field[-1] == '"'):
            return (field,)
        try:
            parts = next(csv.reader([field], delimiter=" ", skipinitialspace=True, strict=True))
        except csv.Error as error:
            if not self.multi_label:
                return (field,)
            raise self._error(
                number,
                f"has the labels {short(field)!r}, which cannot be read ({error}): expected spaces "
                'between, and quotes around one that has spaces itself ("milk bottle")',
            ) from error
        labels = tuple(part.strip() for part in parts if part.strip())
        if not self.multi_label and len(labels) != 1:
            return (field,)
        # With one label a photo: the text within its own quotes.
        return labels

    def _values_row(self, number: int, cells: list[str], header: _Header) -> Row:
        """Make a row of a number for each output."""
        columns = [header.labels]
        if header.labels < 0:
            columns = [i for i in range(len(cells)) if i != header.file]
        values = []
        for i in columns:
            value = parse_number(cells[i])
            if value is None:
                raise self._error(
                    number,
                    f"has {short(cells[i])!r} in the column {short(header.names[i])!r}: expected a "
                    f"number, such as 3.5, for regression{HEADER * (number == 1)}; {FOR_CLASSES}",
                )
            values.append(value)
        return Row(number, cells[header.file], (), "columns", (), tuple(values))

    def _marks_row(self, number: int, cells: list[str], header: _Header) -> Row:
        """Make a row of a mark for each class."""
        labels, unknown = [], []
        for index, cell in enumerate(cells):
            if index == header.file:
                continue
            mark = _CELLS.get(cell.lower(), cell)
            if mark is True:
                labels.append(header.names[index])
            elif mark is None:
                unknown.append(header.names[index])
            elif mark is not False:
                raise self._error(
                    number,
                    f"has {short(cell)!r} in the column {short(header.names[index])!r}: expected 1 "
                    f"(in the photo), 0 (not), empty or -1 (unknown); a column of labels is named "
                    f"label in the header; {FOR_NUMBERS}",
                )
        return Row(number, cells[header.file], tuple(labels), "columns", tuple(unknown))

    def _error(self, number: int, problem: str) -> DataError:
        """Make an error that names the line."""
        return DataError(f"{self.path}: line {number} {problem}")
