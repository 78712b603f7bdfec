"""Nearest neighbours of every photo among all: exact, block by block, in bounded memory.

Shapes: N photos, Q queries, D features, k neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitlib.retrieval import unit

ROWS, COLUMNS = 1024, 16_384  # cosines computed at once: 64 MiB
# Directions of little variance are mostly noise: this share of the greatest variance is added to
# that of each. docs/audit.md has the measurement.
WHITENING = 0.03
SAMPLE = 20_000  # photos whose covariance is taken
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Neighbours(NamedTuple):
    """Nearest photos of each query, best first.

    Attributes:
        photos: (Q, k) rows; -1 where there are fewer.
        cosine: (Q, k); -inf where there are fewer.
    """

    photos: Ints
    cosine: Floats


def find_neighbours(
    queries: Floats,
    vectors: Floats,
    k: int,
    *,
    query_groups: Ints | None = None,
    groups: Ints | None = None,
) -> Neighbours:
    """Find the k nearest photos of each query by the cosine.

    Args:
        queries: (Q, D).
        vectors: (N, D).
        k: number of neighbours, at least 1.
        query_groups: (Q,) number of a group; photos of the same group are no neighbours. A photo
            is kept from being its own neighbour so.
        groups: (N,) group of each photo; given with query_groups.

    Returns:
        The neighbours; of equal ones any.
    """
    index = np.full((len(queries), k), -1, np.int64)
    cosine = np.full((len(queries), k), -np.inf, np.float32)
    if not len(queries) or not len(vectors):
        return Neighbours(index, cosine)
    for start in range(0, len(queries), ROWS):
        rows = slice(start, start + ROWS)
        block = torch.from_numpy(unit(queries[rows]))
        own = None if query_groups is None else torch.from_numpy(query_groups[rows])
        best, nearest = _search_block(block, vectors, k, own, groups)
        index[rows, : best.shape[1]] = nearest.numpy()
        cosine[rows, : best.shape[1]] = best.numpy()
    index[np.isneginf(cosine)] = -1
    return Neighbours(index, cosine)


def _search_block(
    block: Tensor, vectors: Floats, k: int, own: Tensor | None, groups: Ints | None
) -> tuple[Tensor, Tensor]:
    """Find the neighbours of a block of unit queries, in blocks of vectors."""
    best = torch.empty(len(block), 0, dtype=torch.float32, device="cpu")
    nearest = torch.empty(len(block), 0, dtype=torch.int64, device="cpu")
    for first in range(0, len(vectors), COLUMNS):
        columns = slice(first, first + COLUMNS)
        cosines = block @ torch.from_numpy(unit(vectors[columns])).T
        if own is not None and groups is not None:
            others = torch.from_numpy(groups[columns])
            cosines.masked_fill_(own[:, None] == others[None], -torch.inf)
        values, indices = cosines.topk(min(k, cosines.shape[1]), dim=1)
        values = torch.cat([best, values.clamp(max=1)], dim=1)
        indices = torch.cat([nearest, indices + first], dim=1)
        best, order = values.topk(min(k, values.shape[1]), dim=1)
        nearest = indices.gather(1, order)
    return best, nearest


def whiten(vectors: Floats, *, seed: int = 0) -> Floats:
    """Scale the directions of embeddings to similar variances.

    All photos of a set have much in common, so that the cosines of unequal photos may be 0.9 and
    more. What they share is subtracted, and directions in which all of them differ count less.

    Args:
        vectors: (N, D), not NaN.
        seed: of the photos whose covariance is taken, in a large set.

    Returns:
        (N, D) float32.
    """
    rows = unit(vectors)
    sample = rows
    if len(rows) > SAMPLE:
        sample = rows[np.sort(np.random.default_rng(seed).choice(len(rows), SAMPLE, replace=False))]
    mean = sample.mean(axis=0, dtype=np.float64)
    if len(sample) < 2:
        return rows
    centred = sample - mean
    variances, directions = np.linalg.eigh(centred.T @ centred / len(sample))
    variances = variances.clip(0)
    if not variances[-1] > 0:
        return rows
    scales = directions / np.sqrt(variances + WHITENING * variances[-1])
    # In float32, and in place of the unit rows: a million photos take no third copy.
    rows -= mean.astype(np.float32)
    return np.asarray(rows @ scales.astype(np.float32))


def near_pairs(neighbours: Neighbours, least: float = -np.inf) -> Ints:
    """List the pairs of photos and their neighbours once each.

    Args:
        neighbours: of all photos among themselves.
        least: least cosine of a pair.

    Returns:
        (P, 2) pairs i < j, sorted.
    """
    rows = np.repeat(np.arange(len(neighbours.photos)), neighbours.photos.shape[1])
    others = neighbours.photos.ravel()
    valid = (others >= 0) & (others != rows) & (neighbours.cosine.ravel() >= least)
    pairs = np.stack([rows[valid], others[valid]], axis=1)
    return unique_pairs(pairs)


def unique_pairs(pairs: Any) -> Ints:
    """Sort pairs, and drop repeated ones.

    Args:
        pairs: (P, 2) photos, in any order.

    Returns:
        (P', 2) pairs i < j, sorted.
    """
    both: Ints = np.sort(np.asarray(pairs, np.int64).reshape(-1, 2), axis=1)
    if not len(both):
        return both
    count = int(both.max()) + 1
    keys = np.unique(both[:, 0] * count + both[:, 1])
    unique: Ints = np.stack([keys // count, keys % count], axis=1)
    return unique
