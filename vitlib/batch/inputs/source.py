"""What a user names as the source -> its inputs, in a fixed order.

A folder is the images in it and below. A pattern (`*`, `?`, `[abc]`, `**`) is what it fits, by
name. `{000..099}` is a range of names, as WebDataset writes it. A file is by its suffix a list
(.txt, .csv, .jsonl, .parquet), a tar, or an image.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitlib.batch.inputs.items import File, Item
from vitlib.batch.inputs.lists import Needed, csv_items, jsonl_items, parquet_items, text_items
from vitlib.batch.inputs.tars import COMPRESSED, PLAIN, tar_items
from vitlib.batch.inputs.walk import Ignored, images_below, is_pattern, matches
from vitlib.errors import SourceError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST_NAMES = 1_000_000  # of a range
TEXT, CSV, JSONL = (".txt", ".lst", ".list"), (".csv",), (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Source:
    """All inputs, as they were named.

    column: of a list, the one that holds the images. root: what a list's paths are relative to
    (None: its own folder). without: a folder that is not looked into, the output's.
    """

    names: tuple[str, ...]
    column: str | None = None
    root: str | None = None
    without: str | None = None

    def check(self) -> None:
        """Raises SourceError where a name is not there."""
        if not self.names:
            raise SourceError("no source: expected folders, patterns, lists, tars or images")
        if self.root is not None and not Path(self.root).is_dir():
            raise SourceError(f"root {self.root} is no folder: expected what paths are relative to")
        lists = CSV + JSONL + PARQUET
        if self.column is not None and not any(self._may_be(name, lists) for name in self.names):
            raise SourceError(f"column {self.column!r}: the source has no list with columns")
        if self.root is not None and not any(self._may_be(n, TEXT + lists) for n in self.names):
            raise SourceError(
                f"root {self.root}: the source has no list whose paths it would be of"
            )
        for name in _ranged(self.names):
            if not is_pattern(name) and not _is_there(name):
                raise SourceError(f"{name} is not there: expected a folder, a list or a pattern")

    @staticmethod
    def _may_be(name: str, suffixes: tuple[str, ...]) -> bool:
        return name.lower().endswith(suffixes) or is_pattern(name)

    def items(self, needed: Needed, ignored: Ignored) -> Iterator[Item]:
        """Every input in order, its row counted from 0 through all of them.

        needed: whether the bytes of a row will be read; ignored: told files that are no inputs.
        Raises SourceError for a folder or a list that cannot be read.
        """
        row = 0
        seen: set[tuple[int, int]] = set()
        if self.without is not None and _is_there(self.without):
            said = Path(self.without).stat()
            seen.add((said.st_dev, said.st_ino))
        for name in _ranged(self.names):
            found = matches(name) if is_pattern(name) else [name]
            for path in found:
                before = row
                for item in self._of_path(path, lambda n, b=before: needed(b + n), ignored, seen):  # type: ignore[misc]
                    yield item._replace(row=row)
                    row += 1

    def _of_path(
        self, path: str, needed: Needed, ignored: Ignored, seen: set[tuple[int, int]]
    ) -> Iterator[Item]:
        lower = path.lower()
        if Path(path).is_dir():
            for file in images_below(path.rstrip("/") or "/", ignored, seen):
                yield Item(0, file, 0, File(file))
        elif lower.endswith(TEXT):
            yield from text_items(path, self.root)
        elif lower.endswith(CSV):
            yield from csv_items(path, self.root, self.column)
        elif lower.endswith(JSONL):
            yield from jsonl_items(path, self.root, self.column)
        elif lower.endswith(PARQUET):
            yield from parquet_items(path, self.root, self.column, needed)
        elif lower.endswith(PLAIN + COMPRESSED):
            yield from tar_items(path, ignored, needed)
        else:
            yield Item(0, path, 0, File(path))


def _is_there(name: str) -> bool:
    try:
        return os.path.lexists(name) and Path(name).exists()
    except (OSError, ValueError):  # too long, NUL
        return False


def _ranged(names: Sequence[str]) -> Iterator[str]:
    """Each name, or each of its range. Raises SourceError for a range that is too long."""
    for name in names:
        found = _RANGE.search(name)
        if found is None or _is_there(name):
            yield name
            continue
        low, high = int(found[1]), int(found[2])
        if not low <= high < low + MOST_NAMES:
            raise SourceError(f"{name}: expected a range of at most {MOST_NAMES} names, upwards")
        width = len(found[1])
        head, tail = name[: found.start()], name[found.end() :]
        yield from _ranged([f"{head}{number:0{width}d}{tail}" for number in range(low, high + 1)])
