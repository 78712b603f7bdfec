"""Bounds on the structure of an image file, checked before Pillow reads it.

Pillow walks these structures in Python, or in C code of quadratic time. The bounds are many times
what cameras and editors write.

Scans of a JPEG are counted by its markers. A progressive JPEG sends its coefficients in scans, and
a decoder visits every block of a scan's components, however few bytes the scan has. libjpeg has no
bound on them.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from typing import IO, NamedTuple

from vitlib.errors import ImageError

PNG, JP2 = b"\x89PNG\r\n\x1a\n", b"\0\0\0\x0cjP  \r\n\x87\n"
PNG_TEXTS = 100  # compressed texts and profiles, each up to 1 MiB once it is decompressed
PNG_CHUNKS = 20_000  # and one more for each KiB of the file
JPEG_SEGMENTS = 2000
JPEG_EXIF = 2**20  # bytes in all; one segment has at most 64 KiB
JPEG_RECORDS = 2000
WEBP_CHUNKS = 10_000  # frames; and one more for each KiB of the file
TIFF_ENTRIES = 1000  # of the first directory
TIFF_STRIPS = 70_000  # as many lines as the tallest photos, each a strip of its own
TIFF_VALUES = 20_000  # of any other entry that is not bytes; a palette has 768, of 16 bits 196,608
TIFF_PALETTE = 3 * 2**16
TIFF_DIRECTORIES = 1000  # of one file
TIFF_SCANS = 16  # of the JPEG of one strip; libtiff itself stops after 100
BOXES = 1000  # at the top of an AVIF or JPEG 2000 file
BOX_BYTES = {b"meta": 2**16, b"moov": 4 * 2**20, b"jp2h": 2**20}  # meta: a grid of 1,400 tiles

SCANS = 1000
MARKERS = 20_000
# Visits of a block of 8x8 coefficients. Encoders visit each block 4 to 8 times in all; an image
# of 50 million pixels has 0.8 to 2.3 million blocks, a visit takes 20 to 40 nanoseconds.
VISITS_A_BLOCK = 10
VISITS_FREE = 16_000_000
ARITHMETIC_COST = 8  # visits that one of arithmetic coding is worth
_ARITHMETIC = (0xC9, 0xCA)
_SOF = (0xC0, 0xC1, 0xC2, *_ARITHMETIC)
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # the end of a scan's data


def check_head(file: IO[bytes]) -> None:
    """Check the structure of an image file, and rewind the file.

    Args:
        file: The file, of any format.

    Raises:
        ImageError: Its structure alone would keep a reader busy.
    """
    file.seek(0)
    head = file.read(16)
    if head.startswith(PNG):
        _check_png(file)
    elif head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _check_tiff(file, head)
    elif head.startswith(b"\xff\xd8"):
        _check_jpeg(file)
    elif head[:4] == b"RIFF":
        _check_webp(file)
    elif head[4:8] == b"ftyp" or head.startswith(JP2[:12]):
        _check_boxes(file)
    file.seek(0)


def _check_jpeg(file: IO[bytes]) -> None:
    """Check the segments before the first scan; LimitedFile counts other bytes between them."""
    file.seek(2)
    exif = records = 0
    for _ in range(JPEG_SEGMENTS):
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF or head[1] in (0xDA, 0xFF):
            return
        length = int.from_bytes(head[2:], "big") - 2
        if length < 0:
            return
        if head[1] in (0xE1, 0xED):
            body = file.read(length)
            exif += length if body.startswith(b"Exif") else 0
            records += body.count(b"8BIM") if head[1] == 0xED else 0
            if exif > JPEG_EXIF or records > JPEG_RECORDS:
                raise _too_many(f"{JPEG_EXIF} bytes of EXIF or {JPEG_RECORDS} Photoshop records")
        else:
            file.seek(length, io.SEEK_CUR)
    raise _too_many(f"{JPEG_SEGMENTS} segments before the scans of a JPEG")


def _check_webp(file: IO[bytes]) -> None:
    """Check the number of chunks."""
    size = file.seek(0, io.SEEK_END)
    at, chunks = 12, 0
    while at < size:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            return
        at += 8 + int.from_bytes(head[4:], "little")
        at += at % 2  # chunks are padded to even sizes
        chunks += 1
        if chunks > WEBP_CHUNKS + size // 1024:
            raise _too_many(f"{WEBP_CHUNKS} chunks")


def _check_png(file: IO[bytes]) -> None:
    """Check the number of chunks, and of those with compressed text."""
    size = file.seek(0, io.SEEK_END)
    file.seek(len(PNG))
    texts = chunks = 0
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        chunks += 1
        texts += kind in (b"zTXt", b"iTXt", b"iCCP")
        if texts > PNG_TEXTS or chunks > PNG_CHUNKS + size // 1024:
            raise _too_many(f"{PNG_TEXTS} compressed texts or {PNG_CHUNKS} chunks")
        if kind == b"IEND":
            return
        file.seek(length + 4, io.SEEK_CUR)


class Directory(NamedTuple):
    """A TIFF directory.

    Attributes:
        entries: {tag: (type, count, bytes of the value or of its offset)}.
        following: Offset of the next directory; 0 for none.
    """

    entries: dict[int, tuple[int, int, bytes]]
    following: int


class Tiff:
    """Reader of the directories of a TIFF or BigTIFF file."""

    def __init__(self, file: IO[bytes], head: bytes) -> None:
        """Read byte order, version and offset of the first directory.

        Args:
            file: The file.
            head: Its first 16 bytes.
        """
        self.file = file
        self.order = "<" if head[:2] == b"II" else ">"
        self.big = head[2:4] in (b"+\0", b"\0+")
        self.first = self._number(head[8:16] if self.big else head[4:8])

    def _number(self, data: bytes) -> int:
        kinds = {2: "H", 4: "I", 8: "Q"}
        return int(struct.unpack(self.order + kinds[len(data)], data)[0])

    def directory(self, offset: int) -> Directory | None:
        """Read the directory at an offset.

        Args:
            offset: Offset in the file.

        Returns:
            The directory; None if the file ends before it.
        """
        count_size, entry, word = (8, 20, 8) if self.big else (2, 12, 4)
        try:
            self.file.seek(offset)
            count = self._number(self.file.read(count_size))
            if count > TIFF_ENTRIES:
                raise _too_many(f"{TIFF_ENTRIES} entries in a TIFF directory")
            data = self.file.read(count * entry)
            following = self._number(self.file.read(word))
        except (KeyError, struct.error, OverflowError, ValueError, OSError):
            return None
        entries: dict[int, tuple[int, int, bytes]] = {}
        for start in range(0, len(data) - entry + 1, entry):
            tag, kind = struct.unpack(self.order + "HH", data[start : start + 4])
            number = self._number(data[start + 4 : start + 4 + word])
            entries[tag] = kind, number, data[start + 4 + word : start + entry]
        return Directory(entries, following)

    def numbers(self, directory: Directory, tag: int, limit: int) -> tuple[int, ...]:
        """Read the integers of an entry.

        Args:
            directory: The directory.
            tag: Tag of the entry.
            limit: Most integers to read.

        Returns:
            The integers; () if there is no such entry.
        """
        kind, count, value = directory.entries.get(tag, (0, 0, b""))
        letter = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
        if letter is None:
            return ()
        count = min(count, limit)
        size = struct.calcsize(letter) * count
        if size > len(value):
            self.file.seek(self._number(value))
            value = self.file.read(size)
        if len(value) < size:
            return ()
        return struct.unpack(f"{self.order}{count}{letter}", value[:size])


def _check_tiff(file: IO[bytes], head: bytes) -> None:
    """Check entries, tiles, JPEG scans and directories of a TIFF."""
    tiff = Tiff(file, head)
    first = tiff.directory(tiff.first)
    if first is None:
        return
    for tag, (kind, count, _) in first.entries.items():
        # Bytes and text, which Pillow reads in one call.
        if kind in (1, 2, 6, 7):
            continue
        strips, palette = tag in (273, 279, 324, 325), tag == 320
        limit = TIFF_STRIPS if strips else TIFF_PALETTE if palette else TIFF_VALUES
        if count > limit:
            raise _too_many(f"{limit} values in entry {tag} of a TIFF directory")
    width, height = (sum(tiff.numbers(first, tag, 1)) for tag in (256, 257))
    across, down = (sum(tiff.numbers(first, tag, 1)) for tag in (322, 323))
    # Tiles exceed the edge by less than their own size: one of four times the image is too large.
    if across * down > 4 * max(width, 1024) * max(height, 1024):
        raise ImageError(
            f"a TIFF of {width}x{height} pixels with tiles of {across}x{down}: expected tiles that "
            "fit the image; save it anew"
        )
    if tiff.numbers(first, 259, 1) == (7,):
        offsets = tiff.numbers(first, 273, TIFF_STRIPS) or tiff.numbers(first, 324, TIFF_STRIPS)
        file.seek(0)
        if file.read().count(b"\xff\xda") > TIFF_SCANS * (len({*offsets}) + 1):
            raise _too_many(f"{TIFF_SCANS} scans in each JPEG of a TIFF")
    following, number = first.following, 1
    while following and (directory := tiff.directory(following)) is not None:
        following, number = directory.following, number + 1
        if number > TIFF_DIRECTORIES:
            raise _too_many(f"{TIFF_DIRECTORIES} TIFF directories")


def _boxes(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Yield (type, length) of each top-level box of a file."""
    start = 0
    for number in range(BOXES + 1):
        file.seek(start)
        head = file.read(16)
        if len(head) < 8:
            return
        if number == BOXES:
            raise _too_many(f"{BOXES} boxes")
        length, kind = struct.unpack(">I4s", head[:8])
        # ISO 14496-12: a length of 1 says that 64 bits follow, 0 that the box is the last one.
        if length == 1 and len(head) == 16:
            (length,) = struct.unpack(">Q", head[8:])
        yield kind, length
        if length < 8 or start + length >= 2**63:
            return
        start += length


def _check_boxes(file: IO[bytes]) -> None:
    """Check number and size of the boxes of an AVIF or JPEG 2000 file."""
    for kind, length in _boxes(file):
        limit = BOX_BYTES.get(kind)
        if limit is not None and length > limit:
            raise _too_many(f"{limit} bytes in box {kind.decode()!r}")


def _too_many(items: str) -> ImageError:
    return ImageError(f"over {items}: expected a photo's; save it anew with an ordinary encoder")


class _Frame(NamedTuple):
    blocks: dict[int, int]  # component -> its blocks
    progressive: bool  # may have several scans
    cost: int  # of a visit


def check_scans(data: bytes) -> int:
    """Count the visits of blocks in all scans of a JPEG.

    Args:
        data: The file.

    Returns:
        Number of visits; 0 for a single scan.

    Raises:
        ImageError: They are far more than any encoder makes.
    """
    frame: _Frame | None = None
    at, visits, scans = 2, 0, 0
    for _ in range(MARKERS):
        match = _MARKER.search(data, at)
        if match is None or len(data) < match.end() + 2:
            return visits
        marker = data[match.start() + 1]
        if marker == 0xD9:
            return visits
        length = int.from_bytes(data[match.end() : match.end() + 2], "big")
        body = data[match.end() + 2 : match.end() + length]
        at = match.end() + max(length, 2)
        if marker in _SOF and frame is None:
            frame = _frame(marker, body)
        elif marker == 0xDA and frame is not None and body:
            components = body[1 : 1 + 2 * body[0] : 2]
            scans += 1
            visits += frame.cost * sum(frame.blocks.get(component, 0) for component in components)
            if not frame.progressive and len(components) == len(frame.blocks):
                # Sequential: the decoder stops after this scan.
                return 0
            block_limit = VISITS_A_BLOCK * frame.cost
            limit = block_limit * sum(frame.blocks.values()) + VISITS_FREE
            if visits > limit or scans > SCANS:
                raise ImageError(
                    f"a JPEG with {scans} scans or more, which repeat its blocks more often than "
                    "any encoder does: save it anew"
                )
    raise ImageError(f"a JPEG with over {MARKERS} markers: save it anew")


def _frame(marker: int, body: bytes) -> _Frame | None:
    """Parse the components of a frame header; None if it is truncated."""
    if len(body) < 6 or len(body) < 6 + 3 * body[5]:
        return None
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    parts = [body[6 + 3 * i : 9 + 3 * i] for i in range(body[5])]
    across = max((part[1] >> 4 for part in parts), default=1) or 1
    down = max((part[1] & 15 for part in parts), default=1) or 1
    blocks = {
        part[0]: -(-width * (part[1] >> 4) // (8 * across))
        * -(-height * (part[1] & 15) // (8 * down))
        for part in parts
    }
    cost = ARITHMETIC_COST if marker in _ARITHMETIC else 1
    return _Frame(blocks, marker in (0xC2, 0xCA), cost)
