"""Nearest neighbours among photos by cosine similarity of their embeddings: exact, in numpy.

Shapes: N photos, Q queries, D embedding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib.errors import ConfigError
from vitlib.scores import check_count

ROWS = 65_536  # photos in a step: their cosines with one query then take 256 KiB


class Neighbour(NamedTuple):
    """A photo near a query.

    Attributes:
        index: Row of the photo.
        cosine: Cosine similarity with the query, -1..1.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nothing here calls
    cosine: float


def nearest(
    queries: npt.NDArray[np.float32], vectors: npt.NDArray[np.float32], top_k: int = 5
) -> list[list[Neighbour]]:
    """Find the rows with the greatest cosine similarity to each query.

    Args:
        queries: (Q, D).
        vectors: (N, D). Rows of NaN, which stand for photos that cannot be read, are never near.
        top_k: Number of neighbours of a query, at least 1.

    Returns:
        For each query at most top_k neighbours, best first; of equal ones the lower row first.

    Raises:
        ConfigError: The shapes do not match, or top_k is below 1.
    """
    queries, vectors = np.asarray(queries, np.float32), np.asarray(vectors, np.float32)
    if queries.ndim != 2 or vectors.ndim != 2 or queries.shape[1] != vectors.shape[1]:
        raise ConfigError(
            f"vectors of shapes {queries.shape} and {vectors.shape}: expected (Q, D) and (N, D)"
        )
    check_count("top_k", top_k)
    unit_queries = unit(queries)
    neighbours: list[list[Neighbour]] = [[] for _ in queries]
    # A block of rows at a time: the cosines of millions of photos would not fit in memory.
    for start in range(0, len(vectors), ROWS):
        cosines = _cosines(unit_queries, vectors[start : start + ROWS])
        for query, row in enumerate(cosines):
            # Rounding alone takes a cosine beyond 1.
            best = [Neighbour(start + i, min(float(row[i]), 1.0)) for i in _best(row, top_k)]
            neighbours[query] = merge_neighbours(neighbours[query], best, top_k)
    return neighbours


def merge_neighbours(
    first: list[Neighbour], second: list[Neighbour], top_k: int
) -> list[Neighbour]:
    """Merge two lists of neighbours into the best of both.

    Args:
        first: Neighbours, best first.
        second: Neighbours of later rows, best first.
        top_k: Number of neighbours to return.

    Returns:
        At most top_k neighbours, best first; of equal ones the lower row first.
    """
    if len(first) == top_k and (not second or second[0].cosine <= first[-1].cosine):
        return first
    return sorted([*first, *second], key=lambda neighbour: -neighbour.cosine)[:top_k]


def _best(row: npt.NDArray[np.float32], top_k: int) -> list[int]:
    """Return the indices of the greatest numbers, greatest first, the lower of equal ones first."""
    row = np.nan_to_num(row, nan=-np.inf)
    # Partition before sorting: linear in N where a sort is not.
    least = np.partition(row, -top_k)[-top_k] if len(row) > top_k else -np.inf
    indices = np.flatnonzero((row >= least) & (row > -np.inf))
    order = np.argsort(-row[indices], kind="stable")[:top_k]
    return [int(index) for index in indices[order]]


def _cosines(queries: npt.NDArray[np.float32], rows: npt.NDArray[np.float32]) -> Any:
    """Compute cosines of unit queries (Q, D) and rows of any length (N, D), (Q, N)."""
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    # Squares of longer and shorter rows overflow float32 or vanish in it.
    in_range = (lengths > 1e-15) & (lengths < 1e15)
    cosines = queries @ rows.T
    cosines /= np.where(in_range, lengths, 1)
    if not in_range.all():
        cosines[:, ~in_range] = queries @ unit(rows[~in_range]).T
    return cosines


def unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scale rows to length 1.

    Args:
        vectors: (N, D); a row of zeros is returned unchanged.

    Returns:
        (N, D), float32.
    """
    # Scaled by its largest number first, a row's squares stay within float32.
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0)
    scaled = vectors / np.where(largest > 0, largest, 1)
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.asarray(scaled / np.where(length > 0, length, 1), np.float32)
