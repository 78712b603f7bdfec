"""Gather rows into a labelled set: find each photo once, and refuse contradictory labels.

The rules, each with a test:

- A file is searched in the folder of the CSV or JSONL, then in its `images/`. A URL is never
  fetched; the last two parts of its path, then the last part, are searched in the same folders.
- Two rows of a photo with the same labels are one photo. Different labels are an error, except that
  the labels of a multi-label set without marks are joined, since one label a row is a common form.
- Photos that are absent or not images are named, all of them in one error or in `left_out`. A class
  whose photos are all left out disappears, unless a folder or column declares it.
- Rows with several labels are refused in a set of one label a photo: lists, marks, and text whose
  parts are labels of other rows, or that occurs in another order.
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

from vitlib.data.locate_photos import describe_absence, find_photo, is_url
from vitlib.data.photos import LabelledPhotos, Photo, join_names, short, short_file
from vitlib.data.rows import (
    MAX_CLASSES,
    MAX_LABEL,
    MAX_MARKS,
    MAX_ROWS,
    Kind,
    Row,
    Rows,
    normalize_label,
)
from vitlib.errors import DataError, ImageError, count_noun
from vitlib.image.decode import describe_image, open_header
from vitlib.image.prefetch import prefetch_map
from vitlib.source.locate import ALWAYS_SHOW

logger = logging.getLogger("vitlib")

OnBadImage = Literal["fail", "skip"]
Check = Literal["header", "none"]

_MAX_NAMES = 5  # photos that an error names
_KIND_NAMES: dict[Kind, str] = {
    "text": "a text",
    "number": "a number",
    "list": "a list of texts",
    "numbers": "a list of numbers",
    "object": "an object of marks",
}
MULTI = "use multi_label=True (--multi-label)"


class _Failures:
    """Photos that cannot be used; only the first are stored where they will be an error."""

    def __init__(self, store_all: bool) -> None:
        self.store_all, self.count = store_all, 0
        self.entries: list[tuple[int, int, str, str]] = []  # line, order, file, error

    def add(self, row: Row, error: str) -> None:
        """Add a photo."""
        self.count += 1
        self.entries.append((row.line, self.count, row.file, error))
        if not self.store_all and len(self.entries) > 2 * _MAX_NAMES:
            self.entries = sorted(self.entries)[:_MAX_NAMES]


class _Gatherer:
    """Collects rows into a set; files of the rows are relative to `folder`."""

    def __init__(
        self, source: str, folder: Path, multi_label: bool, on_bad: OnBadImage, regression: bool
    ) -> None:
        self.source, self.multi_label, self.regression = source, multi_label, regression
        self.folders = (folder.absolute(), folder.absolute() / "images")
        self.photo_rows: dict[str, Row] = {}  # by path
        self.failures = _Failures(store_all=on_bad == "skip")
        self.rows = self.marks = self.repeated = self.joined = self.several = 0
        self.counts: Counter[str] = Counter()  # rows with each label
        self.kinds: dict[Kind, Row] = {}  # first row of each kind
        # First row with several labels, none or unknown ones, of a single-label set.
        self.invalid: dict[str, Row] = {}
        self.urls = 0
        self._interned: dict[tuple[str, ...], tuple[str, ...]] = {}
        # Spellings of each label that is not ASCII.
        self.forms: dict[str, set[str]] = {}

    def add(self, row: Row) -> None:
        """Add a row. Raises DataError where it contradicts another or exceeds a limit."""
        self.rows += 1
        if self.rows > MAX_ROWS:
            raise DataError(f"{self.source}: over {MAX_ROWS} rows: split it")
        if row.kind == "stray":
            self.failures.add(row, "is not in the folder of a class")
            return
        self.kinds.setdefault(row.kind, row)
        row = row._replace(labels=self._normalize(row.labels), unknown=self._normalize(row.unknown))
        labels = sorted(set(row.labels))
        for label in labels:
            self._check_label(row, label)
        self.counts.update(labels)
        if not (self.multi_label or self.regression or self._is_single_label(row, labels)):
            return
        path = find_photo(row.file, self.folders)
        if path is None:
            self.failures.add(row, describe_absence(row))
            return
        self.urls += is_url(row.file)
        self._count(len(row.values))
        row = row._replace(labels=self._intern(labels), unknown=self._intern(row.unknown))
        old = self.photo_rows.get(path)
        self.photo_rows[path] = row if old is None else self._merge(old, row)

    def _normalize(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        """Convert labels to one Unicode form, and note their spellings."""
        for label in labels:
            if not label.isascii():
                self.forms.setdefault(normalize_label(label), set()).add(label)
        return tuple(map(normalize_label, labels))

    def normalize_classes(self, classes: tuple[str, ...]) -> tuple[str, ...]:
        """Convert declared classes to one Unicode form. Raises DataError where two become one."""
        names = dict.fromkeys(self._normalize(classes))
        if len(names) < len(classes) and not self.kinds.keys() & {"folder", "stray"}:
            raise DataError(f"{self.source}: a class is declared in two Unicode forms: keep one")
        return tuple(names)

    def _check_label(self, row: Row, label: str) -> None:
        """Raise DataError for a label that is too long, not text, or one too many."""
        if label in self.counts:
            return
        if not label or len(label) > MAX_LABEL:
            raise DataError(
                f"{self.source}: {row.line_prefix}a label of {len(label)} characters: expected 1 "
                "to "
                f"{MAX_LABEL}"
            )
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in label):
            raise DataError(
                f"{self.source}: {row.line_prefix}the label {short(label)!r} has characters that "
                "are "
                "not text"
            )
        if len(self.counts) >= MAX_CLASSES:
            raise DataError(
                f"{self.source}: {row.line_prefix}over {MAX_CLASSES} different labels: expected "
                "fewer. "
                "Are they labels?"
            )

    def _is_single_label(self, row: Row, labels: list[str]) -> bool:
        """Return True if a single-label row has one label; others are reported at the end."""
        if len(labels) == 1 and not row.unknown:
            return True
        problem = "several" if len(labels) > 1 else "unknown" if row.unknown else "none"
        self.several += problem == "several"
        self.invalid.setdefault(problem, row)
        return False

    def _intern(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return one tuple for all photos with these labels, to save memory."""
        key = tuple(names)
        if key not in self._interned:
            self._count(len(key))
        return self._interned.setdefault(key, key)

    def _count(self, marks: int) -> None:
        """Count labels or numbers in memory. Raises DataError for too many."""
        self.marks += marks
        if self.marks > MAX_MARKS:
            raise DataError(f"{self.source}: over {MAX_MARKS} labels in all: split it")

    def _merge(self, old: Row, new: Row) -> Row:
        """Merge two rows of one photo. Raises DataError where they contradict each other."""
        if old.file != new.file and (is_url(old.file) or is_url(new.file)):
            raise DataError(
                f"{self.source}: {short_file(old.file)} (line {old.line}) and "
                f"{short_file(new.file)} (line {new.line}) would be the same file here: "
                "write the paths that they have here"
            )
        if (old.labels, old.unknown, old.values) == (new.labels, new.unknown, new.values):
            self.repeated += 1
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
                f"{self.source}: {short_file(new.file)} has the label {join_names(old.labels)} "
                "in line "
                f"{old.line} and {join_names(new.labels)} in line {new.line}: keep one{instead}"
            )
        self.joined += 1
        return old._replace(labels=self._intern(sorted({*old.labels, *new.labels})))

    def check_rows(self) -> None:
        """Check all rows together. Raises DataError for mixed forms and wrong numbers of labels."""
        if len(self.kinds) > 1:
            forms = [f"{_KIND_NAMES[kind]} in line {row.line}" for kind, row in self.kinds.items()]
            raise DataError(f"{self.source}: labels are {' and '.join(forms)}: use one form")
        if "several" in self.invalid:
            self._refuse_several(self.several, self.invalid["several"], "")
        if "unknown" in self.invalid:
            row = self.invalid["unknown"]
            raise DataError(
                f"{self.source}: {row.line_prefix}{short_file(row.file)} has unknown labels, "
                "which only "
                f"a set of several labels a photo can have: {MULTI}"
            )
        if "none" in self.invalid:
            row = self.invalid["none"]
            raise DataError(
                f"{self.source}: {row.line_prefix}{short_file(row.file)} has no label: give it "
                "one; "
                f"where photos may have none or several, {MULTI}"
            )
        self._check_parts()

    def _check_parts(self) -> None:
        """Raise DataError for labels that look like several in one text."""
        kind: Kind = next(iter(self.kinds), "folder")
        if kind not in ("field", "text"):
            return
        # The labels of a multi-label CSV are split at spaces already.
        part = r"[^,;|]+" if kind == "field" and self.multi_label else r'"[^"]+"|[^\s,;|]+'
        split = {
            label: [text.strip(' "') for text in re.findall(part, label)]
            for label in self.counts
            if not label.isalnum()
        }
        split = {label: parts for label, parts in split.items() if len(parts) > 1 and all(parts)}
        orders = Counter(tuple(sorted(parts)) for parts in split.values())
        suspects = {  # a dict, to keep the order of reading
            label: None
            for label, parts in split.items()
            if orders[tuple(sorted(parts))] > 1 or all(text in self.counts for text in parts)
        }
        if not suspects:
            return
        first = next(iter(suspects))
        if self.multi_label:
            form = "spaces between" if kind == "field" else 'a list, ["can", "carton"]'
            raise DataError(
                f"{self.source}: {first!r} looks like several labels, as its parts are labels "
                f"in other rows: expected {form}"
            )
        rows = sum(self.counts[label] for label in suspects)
        example = next((row for row in self.photo_rows.values() if row.labels[0] in suspects), None)
        row = example or Row(0, "", (first,), kind)
        self._refuse_several(
            rows, row, "; if each is one label, rename it, as its parts are labels in other rows"
        )

    def _refuse_several(self, count: int, row: Row, instead: str) -> None:
        """Raise DataError for rows with several labels."""
        raise DataError(
            f"{self.source}: {count} of {self.rows} rows have several labels, such as "
            f"{row.line_prefix}"
            f"{join_names(row.labels)}: {MULTI}{instead}"
        )

    def check_headers(self) -> None:
        """Open the header of every photo in threads, and drop files that are not images."""
        paths = list(self.photo_rows)
        failed: dict[int, ImageError] = {}
        for _ in prefetch_map(paths, _read_header, failed.__setitem__, batch_size=64):
            pass
        for index, error in failed.items():
            message = str(error).removeprefix(describe_image(paths[index])).lstrip(" :")
            self.failures.add(self.photo_rows.pop(paths[index]), message)

    def report_failures(self, declared: tuple[str, ...]) -> None:
        """Log failed photos. Raises DataError where they are an error, or where none is left."""
        names = [
            f"line {line}: {short_file(file)} {error}"
            if line
            else f"{short_file(os.path.relpath(file, self.folders[0]))} {error}"
            for line, _, file, error in sorted(self.failures.entries)[:_MAX_NAMES]
        ]
        more = f"; … ({self.failures.count} in all)" if self.failures.count > _MAX_NAMES else ""
        if self.failures.count and not self.failures.store_all:
            if not self.kinds:  # every row is a stray photo
                raise DataError(
                    f"{self.source}: {count_noun(self.rows, 'photo')} and no folder of a class in "
                    "it: expected a folder with a folder per class, or a labels.csv"
                )
            raise DataError(
                f"{self.source}: {self.failures.count} of {self.rows} photos cannot be used: "
                f"{'; '.join(names)}{more}. Repair or remove them, or leave them out with "
                f"on_bad_image='skip' (--on-bad-image skip). Paths start at {self.folders[0]}"
            )
        if not self.photo_rows:
            if self.rows:
                problem = f"none of {self.rows} photos can be used: {'; '.join(names)}{more}"
            else:
                problem = "no photo in it"
                problem += f", nor in its folders {join_names(declared)}" if declared else ""
            raise DataError(f"{self.source}: {problem}")
        if self.failures.count:
            remaining = {label for row in self.photo_rows.values() for label in row.labels}
            empty = sorted(self.counts.keys() - remaining)
            note = (
                f"; no photo is left with the label {join_names(map(repr, empty))}" if empty else ""
            )
            logger.warning(
                "%s: %d of %d photos are left out: %s%s%s",
                *(self.source, self.failures.count, self.rows, "; ".join(names), more, note),
            )

    def finish(self, declared: tuple[str, ...]) -> LabelledPhotos:
        """Make the set; `declared` are classes with or without photos."""
        for label in declared:
            self._check_label(Row(0, "", (), "columns"), label)
        if forms := sorted(name for name, spellings in self.forms.items() if len(spellings) > 1):
            text = "%s: %s: written in two Unicode forms, read as one class"
            logger.warning(text, self.source, join_names(map(repr, forms)), extra=ALWAYS_SHOW)
        for count, rows in (
            (self.repeated, "rows that repeat an earlier one, read once"),
            (self.joined, "rows of a photo of an earlier row, their labels joined"),
            (self.urls, "rows of a URL, read from the local file of that name"),
        ):
            if count:
                logger.warning("%s: %s: %d", self.source, rows, count)
        photos = tuple(
            Photo(Path(p), row.labels, row.unknown, row.values)
            for p, row in self.photo_rows.items()
        )
        with_photos = {label for photo in photos for label in photo.labels}
        without = sorted(set(declared) - with_photos)
        if without and not self.regression:
            logger.warning("%s: no photo has the label %s", self.source, join_names(without))
        return LabelledPhotos(
            photos,
            declared if self.regression else tuple(sorted({*declared, *with_photos})),
            self.multi_label,
            self.source,
            tuple(
                (file, f"line {line}: {error}" if line else error)
                for line, _, file, error in sorted(self.failures.entries)
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
    """Gather rows into a labelled set.

    Args:
        rows: the rows of a folder or file.
        source: name of the folder or file, for messages.
        folder: folder that files of the rows are relative to.
        multi_label: True if a photo may have any number of labels.
        on_bad: "fail" raises for photos that cannot be used; "skip" leaves them out.
        check: "header" opens the header of every photo; "none" only looks for the files.
        regression: True if rows have numbers in place of labels.

    Returns:
        The set.

    Raises:
        DataError: for rows that contradict each other, exceed a limit or have the wrong number of
            labels, and for photos that cannot be used.
    """
    gatherer = _Gatherer(source, folder, multi_label, on_bad, regression)
    for row in rows:
        gatherer.add(row)
    gatherer.check_rows()
    if check == "header":
        gatherer.check_headers()
    declared = gatherer.normalize_classes(rows.classes)
    gatherer.report_failures(declared)
    return gatherer.finish(declared)


def _read_header(path: str) -> None:
    """Open the header of a file. Raises ImageError where it is not an image."""
    with suppress(OSError), Path(path).open("rb") as file:
        # Pillow opens one file at a time under a lock, so that threads wait for the disk here.
        file.read(2**16)
    with open_header(path):
        pass
