"""A JSONL -> rows: one object a line, `{"image_url": "a.jpg", "label": "can"}`.

A label is a text, a list of texts, or an object of one true, false or null (unknown) a class;
whole numbers are labels too. For regression it is a number, a list of numbers, or an object of a
number an output. Other keys (Azure's `image_details`) are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitlib.data.photos import listed, short
from vitlib.data.rows import FOR_CLASSES, FOR_NUMBERS, MAX_NUMBER, Kind, Row, lines, output_names
from vitlib.errors import DataError, first_line

FILE_KEYS = ("image_url", "image", "file_name", "path", "filename", "file")
LABEL_KEYS = ("label", "labels")
NUMBER_KEYS = (*LABEL_KEYS, "value", "values", "target", "targets")  # of a regression
EXPECTED = 'expected {"image_url": "a.jpg", "label": "can"} on each line'
_UNKNOWN: Any = object()


class JsonlRows:
    """The rows of a JSONL. regression: numbers in place of labels."""

    def __init__(self, path: Path, regression: bool = False) -> None:
        self.path, self.regression = path, regression
        self.classes: tuple[str, ...] = ()
        self._first = 0  # the line whose object says which classes there are

    def __iter__(self) -> Iterator[Row]:
        """Raises DataError naming the line that is no row."""
        number = 0
        for number, line in lines(self.path):
            value = self._object(number, line)
            file = self._only(number, value, FILE_KEYS)
            if not isinstance(file, str) or not file:
                raise self._wrong(number, f"has no text for {', '.join(FILE_KEYS)}: {EXPECTED}")
            if self.regression:
                yield self._measured(number, file, self._only(number, value, NUMBER_KEYS))
            else:
                yield self._row(number, file, self._only(number, value, LABEL_KEYS))
        if not number:
            raise DataError(f"{self.path} is empty: {EXPECTED}")

    def _object(self, number: int, line: str) -> dict[str, Any]:
        try:
            value = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            reason = short(first_line(error))
            raise self._wrong(number, f"is not JSON ({reason}): {EXPECTED}") from error
        if not isinstance(value, dict):
            raise self._wrong(number, f"holds no object: {EXPECTED}")
        return value

    def _only(self, number: int, value: dict[str, Any], keys: tuple[str, ...]) -> Any:
        """The value of the one key that is there; None: none is."""
        there = [key for key in keys if value.get(key) is not None]
        if len(there) > 1:
            raise self._wrong(number, f"has {' and '.join(there)}: expected one of them")
        return value[there[0]] if there else None

    def _row(self, number: int, file: str, label: Any) -> Row:
        if isinstance(label, str):
            return Row(number, file, (label.strip(),) if label.strip() else (), "text")
        if isinstance(label, int) and not isinstance(label, bool):
            return Row(number, file, (str(label),), "number")
        if isinstance(label, list):
            return self._list(number, file, label)
        if isinstance(label, dict):
            return self._marked(number, file, label)
        raise self._wrong(
            number,
            f"has {_kind(label)} for a label: expected a text, a list of texts, or an object of "
            f"true, false and null; {FOR_NUMBERS}",
        )

    def _measured(self, number: int, file: str, label: Any) -> Row:
        """A line of one number an output, by the names that the first line gives."""
        kind: Kind = "number"
        if isinstance(label, dict) and label:
            kind, names, found = "object", tuple(label), list(label.values())
        elif isinstance(label, list) and label:
            kind, names, found = "numbers", output_names(len(label)), label
        else:
            names, found = output_names(1), [label]
        for value in found:
            if type(value) not in (int, float) or not abs(value) <= MAX_NUMBER:
                raise self._wrong(
                    number,
                    f"has {_kind(value)} in place of a number: expected a number, a list of "
                    f"numbers or an object of them for regression; {FOR_CLASSES}",
                )
        if not self._first:
            self._first, self.classes = number, names
        if set(names) != set(self.classes):
            raise self._wrong(
                number,
                f"and line {self._first} give other outputs ({listed(names)}; "
                f"{listed(self.classes)}): expected the same on each line",
            )
        given = dict(zip(names, found, strict=True))
        return Row(number, file, (), kind, (), tuple(float(given[n]) for n in self.classes))

    def _list(self, number: int, file: str, label: list[Any]) -> Row:
        if label and all(type(item) is int for item in label):
            return Row(number, file, tuple(map(str, label)), "numbers")
        for item in label:
            if not isinstance(item, str) or not item.strip():
                what = "an empty text" if isinstance(item, str) else _kind(item)
                raise self._wrong(
                    number,
                    f"has {what} among its labels: expected a list of texts; {FOR_NUMBERS}",
                )
        return Row(number, file, tuple(item.strip() for item in label), "list")

    def _marked(self, number: int, file: str, label: dict[str, Any]) -> Row:
        """An object of one mark a class; each line says something of each class."""
        if not self._first:
            self._first, self.classes = number, tuple(label)
        other = sorted(label.keys() ^ set(self.classes))
        if other:
            raise self._wrong(
                number,
                f"and line {self._first} name other classes ({listed(map(repr, other))}): expected "
                "true, false or null (unknown) for each class on each line",
            )
        marks = [_mark(value) for value in label.values()]
        for name, value, mark in zip(label, label.values(), marks, strict=True):
            if mark is None:
                raise self._wrong(
                    number,
                    f"has {_kind(value)} for {short(name)!r}: expected true, false or null "
                    f"(unknown); {FOR_NUMBERS}",
                )
        labels = tuple(name for name, mark in zip(label, marks, strict=True) if mark is True)
        unknown = tuple(name for name, mark in zip(label, marks, strict=True) if mark is _UNKNOWN)
        return Row(number, file, labels, "object", unknown)

    def _wrong(self, number: int, what: str) -> DataError:
        return DataError(f"{self.path}: line {number} {what}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values; json alone would keep the last of two."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands there twice")
    return value


def _mark(value: Any) -> Any:
    """True, False or _UNKNOWN; None for what is no mark."""
    if value is None or value == -1:
        return _UNKNOWN
    if isinstance(value, bool | int | float):
        return _UNKNOWN if value != value else {1.0: True, 0.0: False}.get(value)
    return None


def _kind(value: Any) -> str:
    """How a message calls a JSON value."""
    if value is None:
        return "nothing"
    names = {str: "a text", bool: "true or false", list: "a list", dict: "an object"}
    return names.get(type(value), f"the number {short(repr(value))}")
