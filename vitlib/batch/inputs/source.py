"""Source of a batch as a user names it, and its inputs in a fixed order.

A folder means the images in and below it. A pattern (`*`, `?`, `[abc]`, `**`) means the paths that
match it, by name. `{000..099}` is a range of names, as WebDataset writes it. A file is a list
(.txt, .csv, .jsonl, .parquet), a tar or an image by its suffix.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitlib.batch.inputs.items import File, Item
from vitlib.batch.inputs.lists import (
    IsNeeded,
    iter_csv_items,
    iter_jsonl_items,
    iter_parquet_items,
    iter_text_items,
)
from vitlib.batch.inputs.tars import COMPRESSED, UNCOMPRESSED, iter_tar_items
from vitlib.batch.inputs.walk import OnIgnored, expand_pattern, is_pattern, walk_images
from vitlib.errors import SourceError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_NAMES = 1_000_000  # of a range
TEXT, CSV, JSONL = (".txt", ".lst", ".list"), (".csv",), (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Source:
    """Source of a batch.

    Attributes:
        names: folders, patterns, lists, tars and images.
        column: column of lists that contains the images; None detects it.
        root: folder that paths of lists are relative to; None for the list's own.
        exclude: a folder that is not searched: the output's.
    """

    names: tuple[str, ...]
    column: str | None = None
    root: str | None = None
    exclude: str | None = None

    def check(self) -> None:
        """Check the names and options.

        Raises:
            SourceError: for a name that does not exist, and for options without a list.
        """
        if not self.names:
            raise SourceError("no source: expected folders, patterns, lists, tars or images")
        if self.root is not None and not Path(self.root).is_dir():
            raise SourceError(
                f"root {self.root} is not a folder: expected the folder that paths are relative to"
            )
        lists = CSV + JSONL + PARQUET
        if self.column is not None and not any(
            self._may_have_suffix(name, lists) for name in self.names
        ):
            raise SourceError(f"column {self.column!r}: the source has no list with columns")
        if self.root is not None and not any(
            self._may_have_suffix(n, TEXT + lists) for n in self.names
        ):
            raise SourceError(f"root {self.root}: the source has no list with paths")
        for name in _expand_ranges(self.names):
            if not is_pattern(name) and not _exists(name):
                raise SourceError(f"{name} is not there: expected a folder, a list or a pattern")

    @staticmethod
    def _may_have_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
        """Return True if a name has one of the suffixes, or is a pattern."""
        return name.lower().endswith(suffixes) or is_pattern(name)

    def iter_items(self, is_needed: IsNeeded, on_ignored: OnIgnored) -> Iterator[Item]:
        """Yield every input in order.

        Args:
            is_needed: function of a row, True if its bytes will be read.
            on_ignored: receives each file that is not an input.

        Yields:
            The items, whose rows count from 0.

        Raises:
            SourceError: for a folder or a list that cannot be read.
        """
        row = 0
        visited: set[tuple[int, int]] = set()
        if self.exclude is not None and _exists(self.exclude):
            status = Path(self.exclude).stat()
            visited.add((status.st_dev, status.st_ino))
        for name in _expand_ranges(self.names):
            for path in expand_pattern(name) if is_pattern(name) else [name]:
                # Rows of a file count from 0; the source's rows go on from those before it.
                first = row

                def is_row_needed(number: int, first: int = first) -> bool:
                    return is_needed(first + number)

                for item in self._iter_path(path, is_row_needed, on_ignored, visited):
                    yield item._replace(row=row)
                    row += 1

    def _iter_path(
        self, path: str, is_needed: IsNeeded, on_ignored: OnIgnored, visited: set[tuple[int, int]]
    ) -> Iterator[Item]:
        """Yield the inputs of a folder or file."""
        lower = path.lower()
        if Path(path).is_dir():
            for file in walk_images(path.rstrip("/") or "/", on_ignored, visited):
                yield Item(0, file, 0, File(file))
        elif lower.endswith(TEXT):
            yield from iter_text_items(path, self.root)
        elif lower.endswith(CSV):
            yield from iter_csv_items(path, self.root, self.column)
        elif lower.endswith(JSONL):
            yield from iter_jsonl_items(path, self.root, self.column)
        elif lower.endswith(PARQUET):
            yield from iter_parquet_items(path, self.root, self.column, is_needed)
        elif lower.endswith(UNCOMPRESSED + COMPRESSED):
            yield from iter_tar_items(path, on_ignored, is_needed)
        else:
            yield Item(0, path, 0, File(path))


def _exists(name: str) -> bool:
    """Return True if a file or folder has this name."""
    try:
        return os.path.lexists(name) and Path(name).exists()
    except (OSError, ValueError):  # too long, NUL
        return False


def _expand_ranges(names: Sequence[str]) -> Iterator[str]:
    """Yield each name, or the names of its range. Raises SourceError for a range too long."""
    for name in names:
        match = _RANGE.search(name)
        if match is None or _exists(name):
            yield name
            continue
        low, high = int(match[1]), int(match[2])
        if not low <= high < low + MAX_NAMES:
            raise SourceError(f"{name}: expected a range of at most {MAX_NAMES} names, upwards")
        width = len(match[1])
        head, tail = name[: match.start()], name[match.end() :]
        yield from _expand_ranges(
            [f"{head}{number:0{width}d}{tail}" for number in range(low, high + 1)]
        )
