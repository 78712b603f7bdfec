"""Comparison of two photos where they overlap best: one as a part of the other, or mirrored.

A near duplicate shows the same pixels again, but for its scale, frame, brightness and compression.
Another photo of the same thing does not: the camera has moved, or something in front of it.
Embeddings and hashes ignore such differences, so they propose pairs, and this comparison decides.

The photo that is a part of the other is laid over it at every place and at several scales. The
place with the greatest correlation of brightness is taken (normalized cross-correlation; Lewis,
Fast Normalized Cross-Correlation, 1995), in copies of 16, 32 and 64 pixels a side, each of which
searches near the place of the one before. Brightness and contrast are equalized there. The score
is the largest difference in any of 8 x 8 cells: one thing that differs is enough to tell two photos
apart, however much background they share.

Shapes: N photos, P pairs, S pixels of a side of a grey copy, h w pixels of the part.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from vitlib.audit.correlation import LEAST_CONTRAST, correlate, find_corners, prepare_wholes
from vitlib.system.cores import count_cores
from vitlib.system.torch_state import num_threads

SIDE = 64  # pixels of a grey copy, whatever the photo's shape
CELLS = 8  # of each side of the overlap
BLUR = 5  # pixels of a side over which differences are averaged first
LEAST_SHARE = 1 / 3  # of a side of the whole, which a part takes at least
# A curve of brightness fits more than a line does: its differences count so much more.
CURVED = 1.5
DOUBTFUL = 0.3  # difference above which no curve makes two photos equal
PAIRS = 256  # compared at once by a thread: about 50 MiB
THREADS = 4


class _Level(NamedTuple):
    """Step of the search.

    Attributes:
        side: S of the copies.
        factors: scales to search, relative to the best of the step before.
        least: correlation at which a pair goes to the next step.
    """

    side: int
    factors: tuple[float, ...]
    least: float


# The least correlations are below those of planted duplicates: docs/audit.md.
LEVELS = (
    _Level(16, tuple(0.92**k for k in range(9)), 0.75),
    _Level(32, tuple(1 + 0.025 * k for k in range(-4, 5)), 0.85),
    _Level(64, tuple(1 + 0.01 * k for k in range(-2, 3)), 0.9),
)
Grey = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


class Alignments(NamedTuple):
    """Best overlaps of pairs.

    Attributes:
        correlation: (P,) of brightness where they overlap, -1..1.
        difference: (P,) largest mean squared difference in a cell, in units of the variance of
            brightness; infinite where the correlation is too low to look closer.
        scale: (P,) share of the whole's side that the part takes, of the shorter share, 0..1.
        mirrored: (P,) True where one is flipped horizontally.
        swapped: (P,) True where the second is the whole, and the first a part of it.
    """

    correlation: npt.NDArray[np.float32]
    difference: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    mirrored: npt.NDArray[np.bool_]
    swapped: npt.NDArray[np.bool_]


def align(grey: Any, shapes: Ints, pairs: Ints) -> Alignments:
    """Find the best overlap of each pair.

    Args:
        grey: (N, 64, 64) uint8, grey copies of the photos squeezed to squares; may be on the disk.
        shapes: (N, 2) width and height of the photos in pixels, which undo the squeezing.
        pairs: (P, 2) photos.

    Returns:
        The overlap of each pair.
    """
    if not len(pairs):
        none, no = np.empty(0, np.float32), np.empty(0, np.bool_)
        return Alignments(none, none, none, no, no)
    starts = range(0, len(pairs), PAIRS)
    # One of each thread of the pool, whose helpers would wait for one another.
    with num_threads(1), ThreadPoolExecutor(min(THREADS, count_cores())) as pool:
        align_block = partial(_align_block, grey, shapes)
        blocks = list(pool.map(align_block, (pairs[i : i + PAIRS] for i in starts)))
    return Alignments(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def _align_block(grey: Any, shapes: Ints, pairs: Ints) -> Alignments:
    """Find the best overlap of a block of pairs, either photo being the whole."""
    first, second = (_align_one_way(grey, shapes, pairs, swapped) for swapped in (False, True))
    better = second.difference < first.difference
    better |= np.isinf(first.difference) & (second.correlation > first.correlation)
    return Alignments(*(np.where(better, b, a) for a, b in zip(first, second, strict=True)))


def _align_one_way(grey: Any, shapes: Ints, pairs: Ints, swapped: bool) -> Alignments:
    """Find the best overlap of pairs of a whole and its part, from small copies to large ones."""
    search = _Search(grey, shapes, pairs)
    search.swapped[:] = swapped
    rows = np.arange(len(pairs))
    for level in LEVELS:
        start = search.scale.copy()
        search.correlation[rows] = -1  # that of a larger copy replaces that of a smaller
        for mirrored in (False, True):
            chosen = rows
            if level is not LEVELS[0]:
                chosen = rows[search.mirrored[rows] == mirrored]
            if not swapped:  # first, so that a photo of the same shape is no crop
                search.compare_squeezed(level.side, chosen, mirrored)
            scales = np.multiply.outer(np.array(level.factors), start[chosen])
            search.compare(level.side, chosen, np.minimum(scales, 1), swapped, mirrored)
        rows = rows[search.correlation[rows] >= level.least]
    search.measure_differences(rows)
    return search.result()


class _Turn(NamedTuple):
    """Comparison of parts of one size with wholes.

    Attributes:
        side: S of the copies.
        h: height of the part in the whole.
        w: its width.
        swapped: True if the second of each pair is the whole.
        mirrored: True if the part is flipped.
    """

    side: int
    h: int
    w: int
    swapped: bool
    mirrored: bool


class _Search:
    """Best overlap of each pair so far."""

    def __init__(self, grey: Any, shapes: Ints, pairs: Ints) -> None:
        self.pairs, count = pairs, len(pairs)
        photos, self.rows = np.unique(pairs, return_inverse=True)
        self.rows = self.rows.reshape(pairs.shape)
        copies = torch.from_numpy(np.array(grey[photos], np.float32))[:, None]
        self.copies = {level.side: _shrink(copies, level.side) for level in LEVELS}
        self.wholes = {side: prepare_wholes(images) for side, images in self.copies.items()}
        self.shapes = shapes[photos].astype(np.float64)
        self.correlation = np.full(count, -1, np.float32)
        self.difference = np.full(count, np.inf, np.float32)
        self.scale = np.ones(count, np.float32)
        self.mirrored, self.swapped = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        # Of the best overlap in the largest copies: height and width, top and left.
        self.size, self.corner = np.zeros((count, 2), np.int64), np.zeros((count, 2), np.float32)

    def compare(self, side: int, rows: Ints, scales: Any, swapped: bool, mirrored: bool) -> None:
        """Compare pairs at scales (F, P), and note those that are better than before."""
        whole, part = self.rows[rows, int(swapped)], self.rows[rows, 1 - int(swapped)]
        # A part of the whole's shape takes an equal share of both sides; a narrower one takes less
        # of the width. The longer share is the scale.
        narrow = self.shapes[part, 0] * self.shapes[whole, 1]
        narrow /= self.shapes[part, 1] * self.shapes[whole, 0]
        shares = np.stack([np.minimum(1, 1 / narrow), np.minimum(1, narrow)], axis=1)
        sizes = np.rint(shares * scales[:, :, None] * side).astype(int)
        # Neighbouring scales often round to one size, which is compared once.
        for h, w in np.unique(sizes.reshape(-1, 2), axis=0).tolist():
            # The whole of both is compared by compare_squeezed(), in either order the same.
            if min(h, w) < side * LEAST_SHARE or h == w == side:
                continue
            is_size = (sizes == (h, w)).all(axis=2)
            same = np.flatnonzero(is_size.any(axis=0))
            chosen = scales[is_size[:, same].argmax(axis=0), same]
            self._compare(_Turn(side, h, w, swapped, mirrored), rows[same], chosen)

    def compare_squeezed(self, side: int, rows: Ints, mirrored: bool) -> None:
        """Compare whole photos, whatever their shapes: one may be squeezed or stretched."""
        turn = _Turn(side, side, side, False, mirrored)
        self._compare(turn, rows, np.ones(len(rows), np.float32))

    def _compare(self, turn: _Turn, rows: Ints, scales: Any) -> None:
        """Compare pairs whose part has one size, and note those that are better than before."""
        if not len(rows):
            return
        side, (first, second) = turn.side, self.rows[rows].T
        whole, part = (second, first) if turn.swapped else (first, second)
        b = self.copies[side][part]
        b = _resize(b.flip(-1) if turn.mirrored else b, (turn.h, turn.w))
        scores = correlate(self.wholes[side], torch.from_numpy(whole), b)
        best = scores.flatten(1).amax(dim=1).numpy()
        better = np.flatnonzero(best > self.correlation[rows])
        chosen = rows[better]
        self.correlation[chosen], self.scale[chosen] = best[better], scales[better]
        self.mirrored[chosen] = turn.mirrored
        if side == SIDE:
            self.size[chosen] = turn.h, turn.w
            self.corner[chosen] = find_corners(scores[better]).numpy()

    def measure_differences(self, rows: Ints) -> None:
        """Compare the best overlaps of pairs cell by cell."""
        kinds = np.column_stack([self.size, self.swapped, self.mirrored])[rows]
        for h, w, swapped, mirrored in np.unique(kinds, axis=0).tolist():
            chosen = rows[(kinds == (h, w, swapped, mirrored)).all(axis=1)]
            first, second = self.rows[chosen].T
            whole, part = (second, first) if swapped else (first, second)
            a, b = self.copies[SIDE][whole], self.copies[SIDE][part]
            b = _resize(b.flip(-1) if mirrored else b, (h, w))
            difference = _compare_cells(a, b, torch.from_numpy(self.corner[chosen]))
            self.difference[chosen] = difference.numpy()

    def result(self) -> Alignments:
        """Return the best overlaps."""
        share = self.size.min(axis=1).astype(np.float32) / SIDE
        scale = np.where(share > 0, share, self.scale)
        return Alignments(self.correlation, self.difference, scale, self.mirrored, self.swapped)


def _compare_cells(whole: Tensor, part: Tensor, corners: Tensor) -> Tensor:
    """Compare parts with the windows at corners (P, 2), by the largest difference in a cell."""
    size, standard = part.shape[-2:], _standardize(part)
    # Of a copy that was made pixel by pixel, the window between pixels is a blurred one.
    places = (corners.round(), corners)
    differences = torch.stack(
        [_largest_cell(_standardize(_sample_window(whole, x, size)), standard) for x in places]
    )
    difference, nearest = differences.min(dim=0)
    # Brightness that is clipped or curved is no linear function of the other photo's, but one that
    # keeps the order of its pixels. Of a clipped photo only the way to it is known.
    doubtful = (difference < DOUBTFUL).nonzero().flatten()
    if len(doubtful):
        place = torch.stack(places)[nearest[doubtful], doubtful]
        window, part = _sample_window(whole[doubtful], place, size), part[doubtful]
        matched = torch.minimum(
            _largest_cell(_match_brightness(window, part), part),
            _largest_cell(_match_brightness(part, window), window),
        )
        difference[doubtful] = torch.minimum(difference[doubtful], CURVED * matched)
    return difference


def _standardize(image: Tensor) -> Tensor:
    """Scale brightness to mean 0 and variance 1, (P, h, w); one of little contrast to less."""
    deviation = image.std(dim=(1, 2), keepdim=True, correction=0).clamp(min=LEAST_CONTRAST)
    return (image - image.mean(dim=(1, 2), keepdim=True)) / deviation


def _match_brightness(image: Tensor, reference: Tensor) -> Tensor:
    """Give the pixels of an image the brightness of a reference, in the same order, (P, h, w)."""
    order = image.flatten(1).argsort(dim=1, stable=True)
    values = reference.flatten(1).sort(dim=1).values
    return torch.empty_like(values).scatter_(1, order, values).reshape(image.shape)


def _largest_cell(image: Tensor, reference: Tensor) -> Tensor:
    """Compute the largest mean squared difference in a cell, in variances of the reference."""
    variance = reference.var(dim=(1, 2), correction=0).clamp(min=1e-6)
    # A place that is off by half a pixel leaves a light and a dark line at each edge, whose mean
    # is nothing; another thing in the photo has another mean.
    rest = F.avg_pool2d((image - reference)[:, None], BLUR, 1)
    cells = F.adaptive_avg_pool2d(rest.pow(2), CELLS).flatten(1)
    return cells.amax(dim=1) / variance


def _sample_window(whole: Tensor, corners: Tensor, size: torch.Size) -> Tensor:
    """Sample windows of a size at corners between pixels, by bilinear weights, (P, h, w)."""
    index = torch.arange(len(whole), device="cpu")[:, None, None]
    base = corners.floor()
    rows, columns = (
        (base[:, axis, None].long() + torch.arange(size[axis], device="cpu")) for axis in range(2)
    )
    y, x = ((corners - base)[:, axis, None, None] for axis in range(2))
    last = whole.shape[-1] - 1

    def at(down: int, right: int) -> Tensor:
        return whole[
            index,
            (rows + down).clamp(max=last)[:, :, None],
            (columns + right).clamp(max=last)[:, None, :],
        ]

    top = (1 - x) * at(0, 0) + x * at(0, 1)
    return (1 - y) * top + y * ((1 - x) * at(1, 0) + x * at(1, 1))


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (P, S, S) to (P, h, w)."""
    return F.interpolate(images[:, None], size, mode="bilinear", antialias=True)[:, 0]


def _shrink(images: Tensor, side: int) -> Tensor:
    """Average (N, 1, 64, 64) to (N, side, side)."""
    return F.avg_pool2d(images, SIDE // side)[:, 0] if side < SIDE else images[:, 0]
