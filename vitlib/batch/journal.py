"""Journal: the results of an incomplete shard, appended batch by batch.

A kill leaves at most one incomplete record, at the end, which its length or checksum reveals. It is
cut off, and the work continues after the others.

A record has 4 bytes of magic, 8 of length, 4 of CRC-32, and the packed Results.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vitlib.batch.results import Results

_HEAD = struct.Struct("<4sQI")
_MAGIC = b"vitj"


def append(path: Path, results: Results) -> None:
    """Append a record.

    Args:
        path: the journal.
        results: content of the record.

    Raises:
        OSError: where the disk is full or cannot be written to.
    """
    data = results.pack()
    with path.open("ab", buffering=0) as file:
        _write(file, _HEAD.pack(_MAGIC, len(data), zlib.crc32(data)) + data)


def _write(file: IO[bytes], data: bytes) -> None:
    """Write all bytes, since an unbuffered file may write a part of them."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def read_records(path: Path) -> Iterator[Results]:
    """Yield the complete records of a journal.

    Args:
        path: the journal, which may be absent.

    Yields:
        The results of each record.
    """
    try:
        with path.open("rb") as file:
            while (data := _read_record(file)) is not None:
                yield Results.unpack(data)
    except FileNotFoundError:
        return


def truncate_incomplete(path: Path) -> int:
    """Cut off an incomplete record at the end of a journal.

    Args:
        path: the journal, which may be absent.

    Returns:
        Number of rows in the complete records.
    """
    if not path.exists():
        return 0
    rows = 0
    with path.open("r+b") as file:
        whole = 0
        while (data := _read_record(file)) is not None:
            rows += len(Results.unpack(data))
            whole = file.tell()
        file.truncate(whole)
    return rows


def _read_record(file: IO[bytes]) -> bytes | None:
    """Read the content of the next record; None at the end or for an incomplete one."""
    remaining = os.fstat(file.fileno()).st_size - file.tell()
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    magic, length, checksum = _HEAD.unpack(head)
    if magic != _MAGIC or length > remaining - _HEAD.size:
        return None
    data = file.read(length)
    return data if zlib.crc32(data) == checksum else None
