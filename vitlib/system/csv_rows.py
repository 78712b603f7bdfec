"""Rows of CSV files with a bound on the length of a cell, without changing the user's bound."""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator

_LIMIT_LOCK = threading.RLock()


def iter_csv_rows(reader: Iterator[list[str]], limit: int) -> Iterator[list[str]]:
    """Yield the rows of a csv.reader, whose cells have at most `limit` characters.

    Args:
        reader: A csv.reader.
        limit: Most characters of a cell.

    Yields:
        The cells of each row.

    Raises:
        csv.Error: As the reader raises, also for a longer cell.
    """
    while True:
        # csv has one limit for the whole process, and it belongs to the user of vitlib. It is set
        # while a row is read, in one thread at a time, then restored.
        with _LIMIT_LOCK:
            previous = csv.field_size_limit(limit)
            try:
                row = next(reader, None)
            finally:
                csv.field_size_limit(previous)
        if row is None:
            return
        yield row
