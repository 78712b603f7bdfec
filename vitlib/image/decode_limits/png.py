"""Detection of PNG files that lack rows, which Pillow reads as black without an error.

Pillow accepts a compressed stream that ends before the last row. So a pixel that is decoded last
gets a rare colour before the decode. If it still has it afterwards, the stream is inflated again
and its bytes are counted.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

from PIL import Image, ImageFile

_MARK = (91, 23, 187, 146)  # a rare colour
_PIECE = 2**20  # bytes that are inflated in one step
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a colour type
# Adam7: first column and row, and steps, of the passes of an interlaced image.
_PASSES = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # fmt: skip


def load_png(image: Any) -> None:
    """Decode an opened PNG, and check that its stream holds all rows.

    Args:
        image: Image of Pillow, not loaded. Its file is a LimitedFile, which is closed as Pillow
            closes it.

    Raises:
        ValueError: The stream ends too early.
        Exception: Any that Pillow raises for a damaged file.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        image.load()
        return
    file, exclusive = image.fp, image._exclusive_fp
    bands, at = Image.getmodebands(image.mode), _last_written(image)
    image.im = Image.new(image.mode, image.size, None).im  # as Pillow makes it
    image.im.putpixel(at, _MARK[0] if bands == 1 else _MARK[:bands])
    mark = image.im.getpixel(at)
    # Else load() would close the file, which may be read again below.
    image._exclusive_fp = False
    try:
        image.load()
        if image.im.getpixel(at) == mark and _lacks_rows(file.contents()):
            raise ValueError("not enough image data")
    finally:
        image._exclusive_fp = exclusive
        if exclusive and image._close_exclusive_fp_after_loading:
            file.close()


def _last_written(image: Image.Image) -> tuple[int, int]:
    """Return column and row of a pixel of the row that is decoded last."""
    width, height = image.size
    if not image.info.get("interlace"):
        return 0, height - 1
    if height == 1:
        return min(1, width - 1), 0
    return 0, height - height % 2 - 1


def _lacks_rows(data: bytes) -> bool:
    """Return True if the compressed stream of a PNG holds fewer bytes than its rows need."""
    at, need, size = 8, 0, 0
    stream = zlib.decompressobj()
    while len(data) - at >= 8:
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body, at = data[at + 8 : at + 8 + length], at + 12 + length
        if kind == b"IHDR":
            need = _count_row_bytes(body)
        elif kind == b"IDAT":
            while body and size < need and not stream.eof:
                size += len(stream.decompress(body, min(need - size, _PIECE)))
                body = stream.unconsumed_tail
        if stream.eof or (size and kind != b"IDAT"):
            break  # Pillow reads no further
    return size < need


def _count_row_bytes(header: bytes) -> int:
    """Return the bytes of all rows before compression, by the header of a PNG."""
    width, height, depth, colour, _, _, interlace = struct.unpack(">IIBBBBB", header[:13])
    need = 0
    for left, top, across, down in _PASSES if interlace else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            need += rows * (1 + -(-columns * depth * _CHANNELS[colour] // 8))
    return need
