"""Table from the labels of photos to classes: synsets to names, folders to numbers.

A table is one of
- a .json: an object, {"n02123045": "tabby, tabby cat"} or {"n02123045": 281}; or ImageNet's class
  index, {"281": ["n02123045", "tabby"]};
- a .csv: two columns, the label and the class, with or without a header label,class;
- a .txt: the label, a space, the class, as ImageNet's synset_words.txt.

A class is a name or a number from 0, as a number or as text. A name of two classes of a model
("crane") is refused, unless the table lists the model's classes in its order.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitlib.data.from_csv import FILE_WORDS, LABEL_WORDS, MAX_CELL
from vitlib.data.photos import LabelledPhotos, join_names, number_duplicates, rename_labels, short
from vitlib.data.rows import MAX_CLASSES, MAX_LABEL, lines, normalize_label
from vitlib.errors import DataError
from vitlib.system.atomic import expand_home
from vitlib.system.csv_rows import iter_csv_rows

MAX_BYTES = 32 * 2**20
EXPECTED = 'expected a .json such as {"n02123045": 281}, a .csv of label,class or a .txt of both'


@dataclass(frozen=True)
class ClassMap:
    """Table of classes by label.

    Attributes:
        classes: name or number of the class by label, in the order of the table.
        source: path of the table, for messages.
    """

    classes: dict[str, str | int]
    source: str

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ClassMap:
        """Read a table.

        Args:
            path: a .json, .csv or .txt file.

        Returns:
            The table.

        Raises:
            DataError: for a file that cannot be read, is too large or has another form, and for a
                label with two classes.
        """
        file = expand_home(path)
        try:
            size = file.stat().st_size
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}: {EXPECTED}") from error
        if size > MAX_BYTES:
            raise DataError(f"{file} has {size} bytes: expected at most {MAX_BYTES}")
        readers = {".json": _read_json, ".csv": _read_csv, ".txt": _read_text}
        if file.suffix.lower() not in readers:
            raise DataError(f"{file} ends in {file.suffix or 'no suffix'}: {EXPECTED}")
        classes: dict[str, str | int] = {}
        for number, (label, value) in enumerate(readers[file.suffix.lower()](file), start=1):
            label = normalize_label(label.strip())
            value = normalize_label(value.strip()) if isinstance(value, str) else value
            if not label or value == "" or len(label) > MAX_LABEL or len(str(value)) > MAX_LABEL:
                raise DataError(f"{file}: row {number} has no label or no class: {EXPECTED}")
            if classes.get(label, value) != value:
                raise DataError(
                    f"{file}: {short(label)!r} has two classes, {short(str(classes[label]))!r} "
                    f"and {short(str(value))!r}: keep one"
                )
            classes[label] = value
            if len(classes) > MAX_CLASSES:
                raise DataError(f"{file}: over {MAX_CLASSES} rows: expected fewer")
        if not classes:
            raise DataError(f"{file} is empty: {EXPECTED}")
        return cls(classes, str(file))

    def apply(self, photos: LabelledPhotos, labels: Sequence[str] | None) -> LabelledPhotos:
        """Replace the labels of photos by the classes of the table.

        Args:
            photos: the set as it was read.
            labels: classes of a model; None takes the names of the table for classes.

        Returns:
            The set with the classes as labels.

        Raises:
            DataError: for a label that is not in the table, and for a class that is not the
                model's, or is the name of two.
        """
        if photos.regression:
            raise DataError(f"{photos.source}: numbers to predict have no classes to map")
        counts = photos.counts()
        missing = [f"{x!r} (photos: {n})" for x, n in counts.items() if n and x not in self.classes]
        if missing:
            raise DataError(
                f"{photos.source}: the labels {join_names(missing)} are not in {self.source}: "
                "add them"
            )
        used = [label for label in counts if label in self.classes]
        names = self._table_names(used) if labels is None else self._model_names(used, labels)
        mapped = tuple(rename_labels(photo, names) for photo in photos.photos)
        classes = (
            tuple(sorted(set(names.values()))) if labels is None else number_duplicates(labels)
        )
        return replace(photos, photos=mapped, labels=classes)

    def _table_names(self, used: Iterable[str]) -> dict[str, str]:
        """Return the class of each label by name. Raises DataError for a number."""
        names = {label: self.classes[label] for label in used}
        numbers = [label for label, value in names.items() if isinstance(value, int)]
        if numbers:
            raise DataError(
                f"{self.source}: {numbers[0]!r} is class {names[numbers[0]]}, a number, and no "
                "model "
                "gives the classes: write names instead"
            )
        return {label: str(value) for label, value in names.items()}

    def _model_names(self, used: Iterable[str], labels: Sequence[str]) -> dict[str, str]:
        """Return the class of each label by the model's name, made unique."""
        number: dict[str, list[int]] = {}
        synonyms: dict[str, list[int]] = {}
        for index, label in enumerate(labels):
            number.setdefault(normalize_label(label), []).append(index)
            for name in label.split(","):
                synonyms.setdefault(normalize_label(name.strip()), []).append(index)
        names = number_duplicates(labels)
        in_order = list(map(normalize_label, labels)) == [
            str(value) for value in self.classes.values()
        ]
        position = {label: index for index, label in enumerate(self.classes)}
        result = {}
        for label in used:
            value = self.classes[label]
            matches = number.get(str(value), synonyms.get(str(value), []))
            if isinstance(value, int) or (not matches and value.isascii() and value.isdecimal()):
                index = int(value) if len(str(value)) < 10 else -1
                matches = [index] if 0 <= index < len(labels) else []
            elif in_order:
                matches = [position[label]]
            if len(matches) != 1:
                problem = f"not one of the model's {len(labels)} classes"
                if matches:
                    problem = f"the name of classes {' and '.join(map(str, matches))}"
                raise DataError(
                    f"{self.source}: {label!r} is {short(str(value))!r}, {problem}: give the "
                    "number "
                    f"of the class, 0 to {len(labels) - 1}"
                )
            result[label] = names[matches[0]]
        return result


def _read_json(file: Path) -> Iterable[tuple[str, str | int]]:
    """Yield (label, class) of a JSON object, repeated keys included."""

    def keep_pairs(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        return pairs

    try:
        pairs = json.loads(file.read_bytes(), object_pairs_hook=keep_pairs)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON ({short(str(error))}): {EXPECTED}") from error
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise DataError(f"{file} is not a JSON object: {EXPECTED}")
    for key, value in pairs:
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            yield value[0], key  # {"281": ["n02123045", "tabby"]}
        elif isinstance(value, str) or (type(value) is int and value >= 0):
            yield key, value
        else:
            raise DataError(
                f"{file}: {short(key)!r} is {short(repr(value))}: expected a name or a number"
            )


def _read_csv(file: Path) -> Iterable[tuple[str, str]]:
    """Yield (label, class) of a CSV of two columns."""
    for number, line in lines(file):
        try:
            cells = next(iter_csv_rows(csv.reader([line], strict=True), MAX_CELL))
        except csv.Error as error:
            raise DataError(f"{file}: line {number} is not CSV ({error}): {EXPECTED}") from error
        if len(cells) != 2:
            raise DataError(
                f"{file}: line {number} has {len(cells)} columns: expected two, label,class; put a "
                "name with a comma in quotes"
            )
        words = LABEL_WORDS | FILE_WORDS | {"folder", "synset", "wnid", "from"}
        if number == 1 and cells[0].strip().lower() in words:
            continue
        yield cells[0], cells[1]


def _read_text(file: Path) -> Iterable[tuple[str, str]]:
    """Yield (label, class) of lines with a space between them."""
    for number, line in lines(file):
        label, *rest = line.split(maxsplit=1)
        name = rest[0].strip() if rest else ""
        if not name:
            raise DataError(f"{file}: line {number} has one word: {EXPECTED}")
        yield label, name
