"""Decoding of PPM and PGM files that Pillow decodes in Python: ASCII, and those of an odd maxval.

NumPy gives the same values as Pillow; a sample above maxval is an error. Pillow's reader takes a
microsecond a sample, and time quadratic in the number of comments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vitlib.errors import ImageError

if TYPE_CHECKING:
    import numpy.typing as npt

CODECS = ("ppm", "ppm_plain")
_COMMENT = re.compile(rb"#[^\r\n]*[\r\n]?")
COMMENTS = 10_000  # one for each line of the tallest photos
_PIECE = 2**20  # bytes that are parsed in one step
_DIGITS = 10  # of a number, as in Pillow


def ppm_pixels(image: Image.Image, data: bytes) -> Image.Image:
    """Decode an opened PPM, PGM or PBM image whose decoder is one of CODECS.

    Args:
        image: Image of Pillow, not loaded.
        data: The whole file.

    Returns:
        A new image with the pixels.

    Raises:
        ValueError: The file is damaged or truncated.
        ImageError: It has too many comments.
    """
    tile: Any = image.tile[0]  # type: ignore[attr-defined]
    codec, _, offset, args = tile
    bands = len(image.getbands())
    count = image.width * image.height * bands
    if image.mode == "1":
        bits = _parse_bits(data[offset:], count)
        return Image.frombytes("L", image.size, bits.tobytes()).convert(
            "1", dither=Image.Dither.NONE
        )
    maxval = int(args[-1])
    values = numbers(data[offset:], count) if codec == "ppm_plain" else None
    if values is None:
        samples = np.frombuffer(data[offset:], "u1" if maxval < 256 else ">u2", count)
        values = samples.astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > maxval):  # Pillow would make it white
        raise ValueError(f"a sample outside 0..{maxval}")
    if values.size < count:
        raise ValueError("not enough image data")
    deep = image.mode == "I"
    # Pillow rounds each sample with Python's round(), half to even, which rint() does as well.
    table = np.rint(np.arange(maxval + 1) / maxval * (65535 if deep else 255))
    scaled: npt.NDArray[Any] = table.astype(np.int32 if deep else np.uint8)[values]
    return Image.frombytes(image.mode, image.size, scaled.tobytes())


def _without_comments(data: bytes) -> bytes:
    if data.count(b"#") > COMMENTS:
        raise ImageError(f"over {COMMENTS} comments: save it anew without them")
    return _COMMENT.sub(b"", data)


def _pieces(data: bytes) -> Iterator[bytes]:
    """Yield the text without its comments, in pieces cut at white space."""
    text = _without_comments(data)
    rest = b""
    for start in range(0, len(text), _PIECE):
        piece = rest + text[start : start + _PIECE]
        end = max(piece.rfind(space) for space in (b" ", b"\n", b"\t", b"\r")) + 1
        rest = piece[end:]
        if len(rest) > _DIGITS:
            raise ValueError("a number of too many digits")
        yield piece[:end]
    yield rest


def numbers(data: bytes, count: int) -> npt.NDArray[np.int64]:
    """Parse the first numbers of a text.

    Args:
        data: Decimal numbers and comments.
        count: Most numbers to return.

    Returns:
        int64, fewer than `count` if the text has fewer.

    Raises:
        ValueError: A word is no number, or a very long one.
    """
    parts: list[npt.NDArray[np.int64]] = []
    for piece in _pieces(data):
        if count <= 0:
            break
        words = piece.split(None, count)[:count]
        if any(len(word) > _DIGITS for word in words):
            raise ValueError("a number of too many digits")
        parts.append(np.array(words, f"S{_DIGITS}").astype(np.int64))
        count -= len(words)
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _parse_bits(data: bytes, count: int) -> npt.NDArray[np.uint8]:
    """Parse the first digits 0 (white) and 1 (black) of a text to 255 and 0."""
    digits = _without_comments(data).translate(None, b" \t\n\r\x0b\x0c")
    bits = np.frombuffer(digits, np.uint8)[:count] - ord("0")
    if bits.size and bits.max() > 1:
        raise ValueError("a bit that is neither 0 nor 1")
    if bits.size < count:
        raise ValueError("not enough image data")
    values: npt.NDArray[np.uint8] = 255 * (1 - bits)
    return values
