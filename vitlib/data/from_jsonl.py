"""Rows of a JSONL: an object a line, such as `{"image_url": "a.jpg", "label": "can"}`.

A label is a text, a list of texts, or an object with true, false or null (unknown) for each class;
whole numbers are labels too. For regression it is a number, a list of numbers, or an object with a
number for each output. Other keys (Azure's `image_details`) are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitlib.data.photos import join_names, short
from vitlib.data.rows import FOR_CLASSES, FOR_NUMBERS, MAX_NUMBER, Kind, Row, lines, output_names
from vitlib.errors import DataError, first_line

FILE_KEYS = ("image_url", "image", "file_name", "path", "filename", "file")
LABEL_KEYS = ("label", "labels")
NUMBER_KEYS = (*LABEL_KEYS, "value", "values", "target", "targets")  # of a regression
EXPECTED = 'expected {"image_url": "a.jpg", "label": "can"} on each line'
_UNKNOWN: Any = object()


class JsonlRows:
    """Rows of a JSONL.

    Args:
        path: the file.
        regression: True to read numbers in place of labels.
    """

    def __init__(self, path: Path, regression: bool = False) -> None:
        self.path, self.regression = path, regression
        self.classes: tuple[str, ...] = ()
        # Line of the first object of marks, which names the classes.
        self._first = 0

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows. Raises DataError that names a line which is not a row."""
        number = 0
        for number, line in lines(self.path):
            value = self._parse(number, line)
            file = self._single_value(number, value, FILE_KEYS)
            if not isinstance(file, str) or not file:
                raise self._error(number, f"has no text for {', '.join(FILE_KEYS)}: {EXPECTED}")
            if self.regression:
                yield self._values_row(number, file, self._single_value(number, value, NUMBER_KEYS))
            else:
                yield self._label_row(number, file, self._single_value(number, value, LABEL_KEYS))
        if not number:
            raise DataError(f"{self.path} is empty: {EXPECTED}")

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        """Parse a line as an object."""
        try:
            value = json.loads(line, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            reason = short(first_line(error))
            raise self._error(number, f"is not JSON ({reason}): {EXPECTED}") from error
        if not isinstance(value, dict):
            raise self._error(number, f"is not an object: {EXPECTED}")
        return value

    def _single_value(self, number: int, value: dict[str, Any], keys: tuple[str, ...]) -> Any:
        """Return the value of the single key that is present, or None."""
        present = [key for key in keys if value.get(key) is not None]
        if len(present) > 1:
            raise self._error(number, f"has {' and '.join(present)}: expected one of them")
        return value[present[0]] if present else None

    def _label_row(self, number: int, file: str, label: Any) -> Row:
        """Make a row of a label of any form."""
        if isinstance(label, str):
            return Row(number, file, (label.strip(),) if label.strip() else (), "text")
        if isinstance(label, int) and not isinstance(label, bool):
            return Row(number, file, (str(label),), "number")
        if isinstance(label, list):
            return self._list_row(number, file, label)
        if isinstance(label, dict):
            return self._marks_row(number, file, label)
        raise self._error(
            number,
            f"has {_kind(label)} for a label: expected a text, a list of texts, or an object of "
            f"true, false and null; {FOR_NUMBERS}",
        )

    def _values_row(self, number: int, file: str, label: Any) -> Row:
        """Make a row of a number for each output, which the first line names."""
        kind: Kind = "number"
        if isinstance(label, dict) and label:
            kind, names, values = "object", tuple(label), list(label.values())
        elif isinstance(label, list) and label:
            kind, names, values = "numbers", output_names(len(label)), label
        else:
            names, values = output_names(1), [label]
        for value in values:
            if type(value) not in (int, float) or not abs(value) <= MAX_NUMBER:
                raise self._error(
                    number,
                    f"has {_kind(value)} in place of a number: expected a number, a list of "
                    f"numbers or an object of them for regression; {FOR_CLASSES}",
                )
        if not self._first:
            self._first, self.classes = number, names
        if set(names) != set(self.classes):
            raise self._error(
                number,
                f"and line {self._first} give other outputs ({join_names(names)}; "
                f"{join_names(self.classes)}): expected the same on each line",
            )
        by_name = dict(zip(names, values, strict=True))
        ordered = tuple(float(by_name[name]) for name in self.classes)
        return Row(number, file, (), kind, (), ordered)

    def _list_row(self, number: int, file: str, label: list[Any]) -> Row:
        """Make a row of a list of labels."""
        if label and all(type(item) is int for item in label):
            return Row(number, file, tuple(map(str, label)), "numbers")
        for item in label:
            if not isinstance(item, str) or not item.strip():
                kind = "an empty text" if isinstance(item, str) else _kind(item)
                raise self._error(
                    number,
                    f"has {kind} among its labels: expected a list of texts; {FOR_NUMBERS}",
                )
        return Row(number, file, tuple(item.strip() for item in label), "list")

    def _marks_row(self, number: int, file: str, label: dict[str, Any]) -> Row:
        """Make a row of an object with a mark for each class, the same classes on each line."""
        if not self._first:
            self._first, self.classes = number, tuple(label)
        different = sorted(label.keys() ^ set(self.classes))
        if different:
            raise self._error(
                number,
                f"and line {self._first} name other classes "
                f"({join_names(map(repr, different))}): expected "
                "true, false or null (unknown) for each class on each line",
            )
        marks = [_mark(value) for value in label.values()]
        for name, value, mark in zip(label, label.values(), marks, strict=True):
            if mark is None:
                raise self._error(
                    number,
                    f"has {_kind(value)} for {short(name)!r}: expected true, false or null "
                    f"(unknown); {FOR_NUMBERS}",
                )
        labels = tuple(name for name, mark in zip(label, marks, strict=True) if mark is True)
        unknown = tuple(name for name, mark in zip(label, marks, strict=True) if mark is _UNKNOWN)
        return Row(number, file, labels, "object", unknown)

    def _error(self, number: int, problem: str) -> DataError:
        """Make an error that names the line."""
        return DataError(f"{self.path}: line {number} {problem}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict, and raise ValueError for a repeated key, of which json keeps the last."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is repeated")
    return value


def _mark(value: Any) -> Any:
    """Convert a mark to True, False or _UNKNOWN; None for any other value."""
    if value is None or value == -1:
        return _UNKNOWN
    if isinstance(value, bool | int | float):
        return _UNKNOWN if value != value else {1.0: True, 0.0: False}.get(value)
    return None


def _kind(value: Any) -> str:
    """Describe a JSON value for a message."""
    if value is None:
        return "nothing"
    names = {str: "a text", bool: "true or false", list: "a list", dict: "an object"}
    return names.get(type(value), f"the number {short(repr(value))}")
