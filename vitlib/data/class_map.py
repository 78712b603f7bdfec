"""A table from the labels of photos to classes: synsets to names, folders to numbers.

One of
- a .json: an object, {"n02123045": "tabby, tabby cat"} or {"n02123045": 281}; or ImageNet's class
  index, {"281": ["n02123045", "tabby"]};
- a .csv: two columns, the label and the class, with or without a header label,class;
- a .txt: the label, a space, the class, as ImageNet's synset_words.txt.

A class is a name or a number from 0, as a number or as text. A name that a model has twice
("crane") is refused, but where the table lists the model's classes in its order.
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
from vitlib.data.photos import LabelledPhotos, listed, short, spelled, told_apart
from vitlib.data.rows import MAX_CLASSES, MAX_LABEL, composed, lines
from vitlib.errors import DataError
from vitlib.system.atomic import iter_csv_rows

MAX_BYTES = 32 * 2**20
EXPECTED = 'expected a .json such as {"n02123045": 281}, a .csv of label,class or a .txt of both'


@dataclass(frozen=True)
class ClassMap:
    """Labels of photos, in their order in the table, and the class of each."""

    classes: dict[str, str | int]
    source: str

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ClassMap:
        """Read a table.

        Raises:
            DataError: It is not there, too large, no such table, or gives a label two classes.
        """
        file = Path(path).expanduser()
        try:
            size = file.stat().st_size
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}: {EXPECTED}") from error
        if size > MAX_BYTES:
            raise DataError(f"{file} has {size} bytes: expected at most {MAX_BYTES}")
        readers = {".json": _json, ".csv": _csv, ".txt": _text}
        if file.suffix.lower() not in readers:
            raise DataError(f"{file} ends in {file.suffix or 'no suffix'}: {EXPECTED}")
        found: dict[str, str | int] = {}
        for number, (label, value) in enumerate(readers[file.suffix.lower()](file), start=1):
            label = composed(label.strip())
            value = composed(value.strip()) if isinstance(value, str) else value
            if not label or value == "" or len(label) > MAX_LABEL or len(str(value)) > MAX_LABEL:
                raise DataError(f"{file}: row {number} has no label or no class: {EXPECTED}")
            if found.get(label, value) != value:
                raise DataError(
                    f"{file}: {short(label)!r} is given two classes, {short(str(found[label]))!r} "
                    f"and {short(str(value))!r}: keep one"
                )
            found[label] = value
            if len(found) > MAX_CLASSES:
                raise DataError(f"{file}: over {MAX_CLASSES} rows: expected fewer")
        if not found:
            raise DataError(f"{file} is empty: {EXPECTED}")
        return cls(found, str(file))

    def apply(self, photos: LabelledPhotos, labels: Sequence[str] | None) -> LabelledPhotos:
        """The photos with the table's classes for labels.

        Args:
            photos: A set as it was read.
            labels: A model's classes; None: the names of the table are the classes.

        Raises:
            DataError: A photo's label is not in the table, or its class is none of the model's or
                two of them.
        """
        if photos.regression:
            raise DataError(f"{photos.source}: numbers to predict have no classes to map")
        counts = photos.counts()
        lost = [f"{x!r} (photos: {n})" for x, n in counts.items() if n and x not in self.classes]
        if lost:
            raise DataError(
                f"{photos.source}: the labels {listed(lost)} are not in {self.source}: add them"
            )
        used = [label for label in counts if label in self.classes]
        names = self._names(used) if labels is None else self._of_model(used, labels)
        mapped = tuple(spelled(photo, names) for photo in photos.photos)
        classes = tuple(sorted(set(names.values()))) if labels is None else told_apart(labels)
        return replace(photos, photos=mapped, labels=classes)

    def _names(self, used: Iterable[str]) -> dict[str, str]:
        names = {label: self.classes[label] for label in used}
        numbers = [label for label, value in names.items() if isinstance(value, int)]
        if numbers:
            raise DataError(
                f"{self.source}: {numbers[0]!r} is class {names[numbers[0]]}, a number of no model "
                "that is known here: give names in its place"
            )
        return {label: str(value) for label, value in names.items()}

    def _of_model(self, used: Iterable[str], labels: Sequence[str]) -> dict[str, str]:
        """Labels -> the model's names, told apart."""
        number: dict[str, list[int]] = {}
        synonyms: dict[str, list[int]] = {}
        for index, label in enumerate(labels):
            number.setdefault(composed(label), []).append(index)
            for name in label.split(","):
                synonyms.setdefault(composed(name.strip()), []).append(index)
        names = told_apart(labels)
        in_order = list(map(composed, labels)) == [str(value) for value in self.classes.values()]
        place = {label: index for index, label in enumerate(self.classes)}
        found = {}
        for label in used:
            value = self.classes[label]
            places = number.get(str(value), synonyms.get(str(value), []))
            if isinstance(value, int) or (not places and value.isascii() and value.isdecimal()):
                index = int(value) if len(str(value)) < 10 else -1
                places = [index] if 0 <= index < len(labels) else []
            elif in_order:
                places = [place[label]]
            if len(places) != 1:
                what = f"the name of classes {' and '.join(map(str, places))}" if places else (
                    f"none of the model's {len(labels)} classes"
                )  # fmt: skip
                raise DataError(
                    f"{self.source}: {label!r} is {short(str(value))!r}, {what}: give the number "
                    f"of the class, 0 to {len(labels) - 1}"
                )
            found[label] = names[places[0]]
        return found


def _json(file: Path) -> Iterable[tuple[str, str | int]]:
    def once(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        return pairs

    try:
        pairs = json.loads(file.read_bytes(), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON ({short(str(error))}): {EXPECTED}") from error
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise DataError(f"{file} holds no JSON object: {EXPECTED}")
    for key, value in pairs:
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            yield value[0], key  # {"281": ["n02123045", "tabby"]}
        elif isinstance(value, str) or (type(value) is int and value >= 0):
            yield key, value
        else:
            raise DataError(
                f"{file}: {short(key)!r} is {short(repr(value))}: expected a name or a number"
            )


def _csv(file: Path) -> Iterable[tuple[str, str]]:
    for number, line in lines(file):
        try:
            cells = next(iter_csv_rows(csv.reader([line], strict=True), MAX_CELL))
        except csv.Error as error:
            raise DataError(f"{file}: line {number} is not CSV ({error}): {EXPECTED}") from error
        if len(cells) != 2:
            raise DataError(
                f"{file}: line {number} has {len(cells)} columns: expected two, label,class; a "
                "name with a comma stands in quotes"
            )
        words = LABEL_WORDS | FILE_WORDS | {"folder", "synset", "wnid", "from"}
        if number == 1 and cells[0].strip().lower() in words:
            continue
        yield cells[0], cells[1]


def _text(file: Path) -> Iterable[tuple[str, str]]:
    for number, line in lines(file):
        label, *rest = line.split(maxsplit=1)
        name = rest[0].strip() if rest else ""
        if not name:
            raise DataError(f"{file}: line {number} has one word: {EXPECTED}")
        yield label, name
