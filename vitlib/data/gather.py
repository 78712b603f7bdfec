"""Rows -> a labelled set: each photo is found, once, with labels that do not contradict each other.

What is decided here, each held by a test:

- A file is looked for in the folder of the CSV or JSONL, then in `images/` there. Of a URL, which
  is never fetched, the last two parts of its path, then the last, are looked for likewise.
- The same photo in two rows with the same labels is one photo. With other labels it is an error;
  of a multi-label set without marks (one label a row is a common form) the labels are joined.
- A photo that is not there, or whose header is no image's, is named: all of them in one error, or
  in `left_out`. A class all of whose photos are left out is no class, unless its folder or column
  says so.
- A file of several labels a photo is not read as one of one: lists, marks, and text whose parts
  are labels in other rows, or that stands there in another order.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from vitlib.data.photos import LabelledPhotos, Photo, listed, short, short_file
from vitlib.data.rows import MAX_CLASSES, MAX_LABEL, MAX_MARKS, MAX_ROWS, Kind, Row, Rows, composed
from vitlib.errors import DataError, ImageError
from vitlib.image.decode import describe_image, open_header
from vitlib.image.prefetch import prefetch_map
from vitlib.source.locate import ALWAYS_SHOW

logger = logging.getLogger("vitlib")

OnBadImage = Literal["fail", "skip"]
Check = Literal["header", "none"]

_TOLD = 5  # bad photos that an error names
_WRITTEN: dict[Kind, str] = {
    "text": "a text",
    "number": "a number",
    "list": "a list of texts",
    "numbers": "a list of numbers",
    "object": "an object of marks",
}
MULTI = "use multi_label=True (--multi-label)"


class _Bad:
    """Photos that cannot be used. Where they are an error only the first are kept."""

    def __init__(self, keep: bool) -> None:
        self.keep, self.count = keep, 0
        self.told: list[tuple[int, int, str, str]] = []  # line, order, file, why

    def add(self, row: Row, why: str) -> None:
        self.count += 1
        self.told.append((row.line, self.count, row.file, why))
        if not self.keep and len(self.told) > 2 * _TOLD:
            self.told = sorted(self.told)[:_TOLD]


class Gathering:
    """A set that is being put together. folder: what files of the rows are relative to."""

    def __init__(
        self, source: str, folder: Path, multi_label: bool, on_bad: OnBadImage, regression: bool
    ) -> None:
        self.source, self.multi_label, self.regression = source, multi_label, regression
        self.folders = (folder.absolute(), folder.absolute() / "images")
        self.kept: dict[str, Row] = {}  # by path
        self.bad = _Bad(keep=on_bad == "skip")
        self.rows = self.marks = self.again = self.joined = self.several = 0
        self.counts: Counter[str] = Counter()  # rows with each label
        self.kinds: dict[Kind, Row] = {}  # the first row of each
        self.not_one: dict[str, Row] = {}  # single-label: the first row with several, none, unknown
        self.urls = 0
        self._same: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.forms: dict[str, set[str]] = {}  # how each label that is not ASCII is written

    def add(self, row: Row) -> None:
        """One more row. Raises DataError where it contradicts another or a bound."""
        self.rows += 1
        if self.rows > MAX_ROWS:
            raise DataError(f"{self.source}: over {MAX_ROWS} rows: split it")
        if row.kind == "stray":
            self.bad.add(row, "lies in no class's folder")
            return
        self.kinds.setdefault(row.kind, row)
        row = row._replace(labels=self.composed(row.labels), unknown=self.composed(row.unknown))
        labels = sorted(set(row.labels))
        for label in labels:
            self._check_label(row, label)
        self.counts.update(labels)
        if not (self.multi_label or self.regression or self._has_one(row, labels)):
            return
        path = self._find(row)
        if path is None:
            self.bad.add(row, _not_there(row))
            return
        self._count(len(row.values))
        row = row._replace(labels=self._shared(labels), unknown=self._shared(row.unknown))
        old = self.kept.get(path)
        self.kept[path] = row if old is None else self._together(old, row)

    def composed(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Labels in one Unicode form; how they were written is noted."""
        for label in labels:
            if not label.isascii():
                self.forms.setdefault(composed(label), set()).add(label)
        return tuple(map(composed, labels))

    def declared(self, classes: tuple[str, ...]) -> tuple[str, ...]:
        """The declared classes in one Unicode form. Raises DataError where columns are then one."""
        names = dict.fromkeys(self.composed(classes))
        if len(names) < len(classes) and not self.kinds.keys() & {"folder", "stray"}:
            raise DataError(f"{self.source}: a class stands there in two Unicode forms: keep one")
        return tuple(names)

    def _check_label(self, row: Row, label: str) -> None:
        if label in self.counts:
            return
        if not label or len(label) > MAX_LABEL:
            raise DataError(
                f"{self.source}: {row.where}a label of {len(label)} characters: expected 1 to "
                f"{MAX_LABEL}"
            )
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in label):
            raise DataError(
                f"{self.source}: {row.where}the label {short(label)!r} has characters that are no "
                "text"
            )
        if len(self.counts) >= MAX_CLASSES:
            raise DataError(
                f"{self.source}: {row.where}over {MAX_CLASSES} different labels: expected fewer. "
                "Are they labels?"
            )

    def _has_one(self, row: Row, labels: list[str]) -> bool:
        """Whether a single-label row has one label; what it has else is told at the end."""
        if len(labels) == 1 and not row.unknown:
            return True
        what = "several" if len(labels) > 1 else "unknown" if row.unknown else "none"
        self.several += what == "several"
        self.not_one.setdefault(what, row)
        return False

    def _find(self, row: Row) -> str | None:
        """The absolute path of a row's photo, or None where it is not there."""
        names = [row.file]
        if is_url(row.file):
            names = _ends(row.file)
        elif "\\" in row.file:  # written on Windows
            names.append(row.file.replace("\\", "/"))
        for name in names:
            for base in self.folders:
                with suppress(OSError, ValueError):  # too long, NUL, no Unicode
                    path = Path(os.path.normpath(base / name))
                    if path.is_file():
                        self.urls += is_url(row.file)
                        return str(path)
        return None

    def _shared(self, names: Iterable[str]) -> tuple[str, ...]:
        """The tuple that every photo with these labels shares."""
        key = tuple(names)
        if key not in self._same:
            self._count(len(key))
        return self._same.setdefault(key, key)

    def _count(self, marks: int) -> None:
        """So many labels or numbers more are held."""
        self.marks += marks
        if self.marks > MAX_MARKS:
            raise DataError(f"{self.source}: over {MAX_MARKS} labels in all: split it")

    def _together(self, old: Row, new: Row) -> Row:
        """Two rows of one photo."""
        if old.file != new.file and (is_url(old.file) or is_url(new.file)):
            raise DataError(
                f"{self.source}: {short_file(old.file)} (line {old.line}) and "
                f"{short_file(new.file)} (line {new.line}) would be the same file here: "
                "write the paths that they have here"
            )
        if (old.labels, old.unknown, old.values) == (new.labels, new.unknown, new.values):
            self.again += 1
            return old
        if self.regression:
            first, second = (", ".join(f"{v:g}" for v in row.values[:5]) for row in (old, new))
            raise DataError(
                f"{self.source}: {short_file(new.file)} has the numbers {first} in line {old.line} "
                f"and {second} in line {new.line}: keep one"
            )
        if not self.multi_label or new.kind in ("columns", "object"):
            instead = "" if self.multi_label else f"; if each is right, {MULTI}"
            raise DataError(
                f"{self.source}: {short_file(new.file)} has the label {listed(old.labels)} in line "
                f"{old.line} and {listed(new.labels)} in line {new.line}: keep one{instead}"
            )
        self.joined += 1
        return old._replace(labels=self._shared(sorted({*old.labels, *new.labels})))

    def check_rows(self) -> None:
        """Raises DataError for what only all rows together show."""
        if len(self.kinds) > 1:
            found = [f"{_WRITTEN[kind]} in line {row.line}" for kind, row in self.kinds.items()]
            raise DataError(f"{self.source}: labels are {' and '.join(found)}: write all alike")
        if "several" in self.not_one:
            self._refuse_several(self.several, self.not_one["several"], "")
        if "unknown" in self.not_one:
            row = self.not_one["unknown"]
            raise DataError(
                f"{self.source}: {row.where}{short_file(row.file)} has unknown labels, which only "
                f"a set of several labels a photo can have: {MULTI}"
            )
        if "none" in self.not_one:
            row = self.not_one["none"]
            raise DataError(
                f"{self.source}: {row.where}{short_file(row.file)} has no label: give it one; "
                f"where photos may have none or several, {MULTI}"
            )
        self._check_parts()

    def _check_parts(self) -> None:
        """Refuse labels that look like several in one text."""
        kind: Kind = next(iter(self.kinds), "folder")
        if kind not in ("field", "text"):
            return
        # In the field of a multi-label CSV spaces have separated the labels already.
        part = r"[^,;|]+" if kind == "field" and self.multi_label else r'"[^"]+"|[^\s,;|]+'
        split = {
            label: [text.strip(' "') for text in re.findall(part, label)]
            for label in self.counts
            if not label.isalnum()
        }
        split = {label: parts for label, parts in split.items() if len(parts) > 1 and all(parts)}
        orders = Counter(tuple(sorted(parts)) for parts in split.values())
        looks = {  # in the order they were read
            label: None
            for label, parts in split.items()
            if orders[tuple(sorted(parts))] > 1 or all(text in self.counts for text in parts)
        }
        if not looks:
            return
        first = next(iter(looks))
        if self.multi_label:
            form = "spaces between" if kind == "field" else 'a list, ["can", "carton"]'
            raise DataError(
                f"{self.source}: {first!r} looks like several labels, as its parts are labels "
                f"in other rows: expected {form}"
            )
        rows = sum(self.counts[label] for label in looks)
        example = next((row for row in self.kept.values() if row.labels[0] in looks), None)
        row = example or Row(0, "", (first,), kind)
        self._refuse_several(
            rows, row, "; if each is one label, rename it, as its parts are labels in other rows"
        )

    def _refuse_several(self, count: int, row: Row, instead: str) -> None:
        raise DataError(
            f"{self.source}: {count} of {self.rows} rows have several labels, such as {row.where}"
            f"{listed(row.labels)}: {MULTI}{instead}"
        )

    def check_headers(self) -> None:
        """Open every photo's header, by threads; what is no image goes to the bad ones."""
        kept = list(self.kept)
        failed: dict[int, ImageError] = {}
        for _ in prefetch_map(kept, _read_header, failed.__setitem__, at_once=64):
            pass
        for index, error in failed.items():
            why = str(error).removeprefix(describe_image(kept[index])).lstrip(" :")
            self.bad.add(self.kept.pop(kept[index]), why)

    def tell_bad(self, declared: tuple[str, ...]) -> None:
        """Raises DataError where bad photos are an error or all that there is; else logs them."""
        told = [
            f"line {line}: {short_file(file)} {why}"
            if line
            else f"{short_file(os.path.relpath(file, self.folders[0]))} {why}"
            for line, _, file, why in sorted(self.bad.told)[:_TOLD]
        ]
        more = f"; … ({self.bad.count} in all)" if self.bad.count > _TOLD else ""
        if self.bad.count and not self.bad.keep:
            raise DataError(
                f"{self.source}: {self.bad.count} of {self.rows} photos cannot be used: "
                f"{'; '.join(told)}{more}. Mend them or take them out, or leave them out with "
                "on_bad_image='skip' (--on-bad-image skip)"
            )
        if not self.kept:
            if self.rows:
                what = f"none of {self.rows} photos can be used: {'; '.join(told)}{more}"
            else:
                what = "no photo in it"
                what += f", nor in its folders {listed(declared)}" if declared else ""
            raise DataError(f"{self.source}: {what}")
        if self.bad.count:
            left = {label for row in self.kept.values() for label in row.labels}
            gone = sorted(self.counts.keys() - left)
            lost = f"; no photo is left with the label {listed(map(repr, gone))}" if gone else ""
            logger.warning(
                "%s: %d of %d photos are left out: %s%s%s",
                *(self.source, self.bad.count, self.rows, "; ".join(told), more, lost),
            )

    def photos(self, declared: tuple[str, ...]) -> LabelledPhotos:
        """The set. declared: classes that are there with or without photos."""
        for label in declared:
            self._check_label(Row(0, "", (), "columns"), label)
        if forms := sorted(name for name, written in self.forms.items() if len(written) > 1):
            text = "%s: %s: written in two Unicode forms, read as one class"
            logger.warning(text, self.source, listed(map(repr, forms)), extra=ALWAYS_SHOW)
        for count, what in (
            (self.again, "rows that repeat an earlier one, read once"),
            (self.joined, "rows of a photo that an earlier one names, their labels joined"),
            (self.urls, "rows of a URL, whose file of that name here is read"),
        ):
            if count:
                logger.warning("%s: %s: %d", self.source, what, count)
        photos = tuple(
            Photo(Path(p), row.labels, row.unknown, row.values) for p, row in self.kept.items()
        )
        with_photos = {label for photo in photos for label in photo.labels}
        without = sorted(set(declared) - with_photos)
        if without and not self.regression:
            logger.warning("%s: no photo has the label %s", self.source, listed(without))
        return LabelledPhotos(
            photos,
            declared if self.regression else tuple(sorted({*declared, *with_photos})),
            self.multi_label,
            self.source,
            tuple(
                (file, f"line {line}: {why}" if line else why)
                for line, _, file, why in sorted(self.bad.told)
            ),
            self.regression,
        )


def gather(
    rows: Rows,
    source: str,
    folder: Path,
    multi_label: bool,
    on_bad: OnBadImage,
    check: Check,
    regression: bool = False,
) -> LabelledPhotos:
    """Rows -> the set. folder: what their files are relative to. Raises DataError as above."""
    gathering = Gathering(source, folder, multi_label, on_bad, regression)
    for row in rows:
        gathering.add(row)
    gathering.check_rows()
    if check == "header":
        gathering.check_headers()
    gathering.tell_bad(declared := gathering.declared(rows.classes))
    return gathering.photos(declared)


def is_url(file: str) -> bool:
    """Whether it is where a file is in a cloud, and not a path."""
    return "://" in file


def _ends(url: str) -> list[str]:
    """What the file of a URL may be called here: with its folder's name, and alone."""
    with suppress(ValueError):
        parts = unquote(urlsplit(url).path).split("/")
        parts = [part for part in parts if part not in ("", ".", "..")]
        return list(dict.fromkeys(["/".join(parts[-2:]), *parts[-1:]]))
    return []


def _not_there(row: Row) -> str:
    if is_url(row.file):
        return "is a URL, and no file of that name is here: download the photos first"
    if row.line == 1 and row.kind == "field":
        return "is not there (if the line is a header: expected filename,labels)"
    return "is not there"


def _read_header(path: str) -> None:
    """Raises ImageError where a file is no image."""
    with suppress(OSError), Path(path).open("rb") as file:
        file.read(2**16)  # Pillow opens one file at a time: let threads wait for the disk here
    with open_header(path):
        pass
