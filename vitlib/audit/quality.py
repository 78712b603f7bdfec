"""Photos of poor or odd quality, from the facts of inspection.py alone.

Shapes: N photos.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib.audit.inspection import Facts, is_flat

Issue = Literal["unreadable", "blank", "tiny", "shape", "grey", "colour", "orientation"]
TINY, TINY_SHARE = 64, 0.5  # pixels of the shorter side; and share of the set's median
LONG, LONG_SHARE = 3.0, 1.5  # longer side over the shorter; and relative to the set's median
GREY_CHROMA = 8.0  # of 255: JPEG's chroma of a grey photo stays below
RARE = 0.1  # share of the set below which grey among colour, or the reverse, is odd
MIN_PHOTOS = 10  # of a set that can have a rare kind


class Problem(NamedTuple):
    """Problem of a photo.

    Attributes:
        photo: row of the photo.
        issue: kind of problem.
        value: what was measured, such as a side in pixels.
        reason: a sentence.
    """

    photo: int
    issue: Issue
    value: float
    reason: str


def find_problems(facts: Facts) -> list[Problem]:
    """Find photos that are blank, tiny, of an extreme shape, rarely coloured or not upright.

    Args:
        facts: (N,) FACTS of photos that can be read.

    Returns:
        The problems, by kind and then by photo; a photo may have several.
    """
    if not len(facts):
        return []
    width, height = facts["width"].astype(np.int64), facts["height"].astype(np.int64)
    blank = is_flat(facts)
    problems = [
        Problem(
            i, "blank", round(float(facts["spread"][i]), 2),
            f"one colour: no channel varies by more than {facts['spread'][i]:.1f} of 255",
        )
        for i in _rows(blank)
    ]  # fmt: skip
    problems += _find_tiny(width, height)
    problems += _find_long(width, height)
    problems += _find_rare_colour(facts["chroma"], blank)
    problems += [
        Problem(
            i, "orientation", int(facts["orientation"][i]),
            f"EXIF orientation {facts['orientation'][i]}: vitlib turns it upright, other programs "
            "may not",
        )
        for i in _rows(facts["orientation"] > 1)
    ]  # fmt: skip
    return problems


def _find_tiny(width: npt.NDArray[np.int64], height: npt.NDArray[np.int64]) -> list[Problem]:
    """Find photos that are small, and smaller than the others."""
    short = np.minimum(width, height)
    median = float(np.median(short))
    tiny = (short < TINY) & (short < TINY_SHARE * median)
    return [
        Problem(
            i, "tiny", int(short[i]),
            f"{width[i]}x{height[i]} pixels; the median of the shorter side is {median:.0f}",
        )
        for i in _rows(tiny)
    ]  # fmt: skip


def _find_long(width: npt.NDArray[np.int64], height: npt.NDArray[np.int64]) -> list[Problem]:
    """Find photos that are long, and longer than the others."""
    ratio = np.maximum(width, height) / np.minimum(width, height)
    median = float(np.median(ratio))
    extreme = (ratio > LONG) & (ratio > LONG_SHARE * median)
    return [
        Problem(
            i, "shape", round(float(ratio[i]), 2),
            f"{width[i]}x{height[i]} pixels, {ratio[i]:.1f} to 1: a centre crop loses most of it",
        )
        for i in _rows(extreme)
    ]  # fmt: skip


def _find_rare_colour(
    chroma: npt.NDArray[np.float32], blank: npt.NDArray[np.bool_]
) -> list[Problem]:
    """Find grey photos among coloured ones, or coloured ones among grey ones."""
    grey = (chroma < GREY_CHROMA) & ~blank
    total, count = int((~blank).sum()), int(grey.sum())
    if total < MIN_PHOTOS:
        return []
    problems = []
    if 0 < count < RARE * total:
        problems = [
            Problem(
                i, "grey", round(float(chroma[i]), 1),
                f"grey, as {count} of {total} photos are; the others have colour",
            )
            for i in _rows(grey)
        ]  # fmt: skip
    elif 0 < total - count < RARE * total:
        problems = [
            Problem(
                i, "colour", round(float(chroma[i]), 1),
                f"coloured, as {total - count} of {total} photos are; the others are grey",
            )
            for i in _rows(~grey & ~blank)
        ]  # fmt: skip
    return problems


def _rows(mask: npt.NDArray[np.bool_]) -> list[int]:
    """List the rows of a mask."""
    return [int(i) for i in np.flatnonzero(mask)]
