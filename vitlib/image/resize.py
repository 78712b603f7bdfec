"""Resize of planes by Pillow, without the pixels that a crop drops.

Pillow resizes in two passes, the width and then the height, and rounds 8-bit planes after each.
So the passes can be called one by one with the same bits, and a crop can be taken between them. A
pass is itself cut short where Pillow's `box` states the part exactly: its edges are float32, and
the weights of a pixel depend on them.

Pillow 13 begins with the height where that shrinks by over twice as many pixels as the width.

Shapes: H W height and width in pixels.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

# Pixels of the source on each side of a pixel's centre, where an image grows; else times the scale.
_SUPPORT = {
    Image.Resampling.BOX: 0.5,
    Image.Resampling.BILINEAR: 1.0,
    Image.Resampling.HAMMING: 1.0,
    Image.Resampling.BICUBIC: 2.0,
    Image.Resampling.LANCZOS: 3.0,
}


class Span(NamedTuple):
    """Part of a resized axis.

    Attributes:
        source: Pixels of the axis before the resize.
        resized: Pixels of the whole axis after it.
        start: First pixel of the part, after the resize.
        length: Pixels of the part.
    """

    source: int
    resized: int
    start: int
    length: int

    @property
    def is_whole(self) -> bool:
        """True if the part is the whole axis."""
        return self.length == self.resized

    def exact_box(self) -> tuple[float, float] | None:
        """Return the part before the resize, if Pillow then computes the same weights.

        Returns:
            (start, end) in pixels of the source; None where binary fractions do not state them.
        """
        if self.is_whole:
            return 0.0, float(self.source)
        # With a power of two below the line, Pillow's doubles round nothing: centres and scale of
        # the part are those of the whole.
        below = self.resized // math.gcd(self.source, self.resized)
        if below & (below - 1):
            return None
        scale = self.source / self.resized
        start, end = self.start * scale, (self.start + self.length) * scale
        # Python's floats: NumPy would compare both sides as float32.
        is_exact = all(float(np.float32(edge)) == edge for edge in (start, end))
        return (start, end) if is_exact else None

    def read_rows(self, resample: Image.Resampling) -> tuple[int, int]:
        """Return the pixels of the source that the part is computed from.

        Args:
            resample: The filter.

        Returns:
            (start, end), one or two pixels more than needed.
        """
        scale = self.source / self.resized
        reach = _SUPPORT[resample] * max(scale, 1.0) + 1.5
        start = math.floor((self.start + 0.5) * scale - reach)
        end = math.ceil((self.start + self.length - 0.5) * scale + reach)
        return max(start, 0), min(end, self.source)


def resize_part(
    plane: Image.Image,
    sides: tuple[int, int],
    part: tuple[int, int, int, int],
    resample: Image.Resampling,
) -> Image.Image:
    """Resize an image and crop it, to the bit as plane.resize(...).crop(...).

    Args:
        plane: Image of mode RGB, L or F.
        sides: (height, width) of the resized image.
        part: (top, left, height, width) of the crop, within the resized image.
        resample: The filter.

    Returns:
        The cropped image.
    """
    top, left, height, width = part
    rows = Span(plane.height, sides[0], top, height)
    columns = Span(plane.width, sides[1], left, width)
    is_cropped = not (rows.is_whole and columns.is_whole)
    if is_cropped and _is_width_first(rows, columns, resample) and _checked_passes():
        return _resize_needed(plane, rows, columns, resample)
    if plane.size != (sides[1], sides[0]):
        plane = plane.resize((sides[1], sides[0]), resample)
    return _crop(plane, columns, rows)


def _is_width_first(rows: Span, columns: Span, resample: Image.Resampling) -> bool:
    """Return True if Pillow resizes in two passes and begins with the width, in any version."""
    shrink = rows.source - rows.resized, columns.source - columns.resized
    return resample in _SUPPORT and (shrink[0] <= 0 or 2 * shrink[0] <= 3 * shrink[1])


@lru_cache(maxsize=1)
def _checked_passes() -> bool:
    """Compare the passes with Pillow's own once a process: another version may order them anew."""
    levels = (np.arange(3072, dtype=np.uint32) ** 2 * 2654435761 >> 24).astype(np.uint8)
    for height, width in ((48, 64), (64, 48)):
        plane = Image.fromarray(levels.reshape(height, width))
        rows, columns = Span(height, height // 2 + 1, 3, 17), Span(width, width // 2 + 1, 3, 17)
        whole = plane.resize((columns.resized, rows.resized), Image.Resampling.BICUBIC)
        part = _resize_needed(plane, rows, columns, Image.Resampling.BICUBIC)
        if _crop(whole, columns, rows).tobytes() != part.tobytes():
            return False
    return True


def _resize_needed(
    plane: Image.Image, rows: Span, columns: Span, resample: Image.Resampling
) -> Image.Image:
    """Resize by the two passes, each only as far as the part needs it."""
    if rows.source == rows.resized:  # Pillow leaves the second pass out
        first, last = rows.start, rows.start + rows.length
    else:
        first, last = rows.read_rows(resample)
    strip = plane.crop((0, first, plane.width, last))
    return _resize_rows(_resize_columns(strip, columns, resample), plane, rows, first, resample)


def _crop(plane: Image.Image, columns: Span, rows: Span) -> Image.Image:
    """Crop a resized image; the image itself if it is whole."""
    if rows.is_whole and columns.is_whole:
        return plane
    right, bottom = columns.start + columns.length, rows.start + rows.length
    return plane.crop((columns.start, rows.start, right, bottom))


def _resize_columns(strip: Image.Image, span: Span, resample: Image.Resampling) -> Image.Image:
    """Do Pillow's first pass, which changes the width, and crop the width."""
    everything = Span(strip.height, strip.height, 0, strip.height)
    if span.source == span.resized:
        return _crop(strip, span, everything)
    box = span.exact_box()
    if box is not None:
        return strip.resize(
            (span.length, strip.height), resample, (box[0], 0, box[1], strip.height)
        )
    return _crop(strip.resize((span.resized, strip.height), resample), span, everything)


def _resize_rows(
    strip: Image.Image, plane: Image.Image, span: Span, first: int, resample: Image.Resampling
) -> Image.Image:
    """Do Pillow's second pass, which changes the height, on rows `first` and below; crop it."""
    if span.source == span.resized:
        return strip
    box = span.exact_box()
    if box is not None:
        # An offset of whole pixels changes no weight.
        edges = (0, box[0] - first, strip.width, box[1] - first)
        return strip.resize((strip.width, span.length), resample, edges)
    # The pass then computes rows that are cropped, from black where the strip does not reach.
    tall = Image.new(plane.mode, (strip.width, span.source))
    tall.paste(strip, (0, first))
    resized = tall.resize((strip.width, span.resized), resample)
    return _crop(resized, Span(strip.width, strip.width, 0, strip.width), span)
