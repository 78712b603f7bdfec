"""Journal: the answers of a shard that is not whole yet, appended batch by batch.

A kill at any moment leaves at most a last record that is not whole, which its length or its
checksum tells; it is cut off, and the work goes on behind the others.

A record: 4 bytes of magic, 8 of length, 4 of CRC-32, the packed Answer.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vitlib.batch.results import Answer

_HEAD = struct.Struct("<4sQI")
_MAGIC = b"vitj"


def append(path: Path, answer: Answer) -> None:
    """One more record. Raises OSError where the disk is full or not to be written to."""
    data = answer.pack()
    with path.open("ab", buffering=0) as file:
        _write(file, _HEAD.pack(_MAGIC, len(data), zlib.crc32(data)) + data)


def _write(file: IO[bytes], data: bytes) -> None:
    """All of it: an unbuffered file may take a part."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def records(path: Path) -> Iterator[Answer]:
    """The whole records of a journal; none where there is no journal."""
    try:
        with path.open("rb") as file:
            while (data := _record(file)) is not None:
                yield Answer.unpack(data)
    except FileNotFoundError:
        return


def mend(path: Path) -> int:
    """Cut off what is not whole -> how many rows are there."""
    if not path.exists():
        return 0
    rows = 0
    with path.open("r+b") as file:
        whole = 0
        while (data := _record(file)) is not None:
            rows += len(Answer.unpack(data))
            whole = file.tell()
        file.truncate(whole)
    return rows


def _record(file: IO[bytes]) -> bytes | None:
    """The next record's content; None: the end, or one that is not whole."""
    left = os.fstat(file.fileno()).st_size - file.tell()
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    magic, length, checksum = _HEAD.unpack(head)
    if magic != _MAGIC or length > left - _HEAD.size:
        return None
    data = file.read(length)
    return data if zlib.crc32(data) == checksum else None
