"""Nearest neighbours among photos, by the cosine of their embeddings: exact, in numpy.

Shapes: N photos, Q queries, D embedding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib.errors import ConfigError
from vitlib.scores import check_count

ROWS = 65_536  # of the photos at a time: their cosines with one query are then 256 KiB


class Neighbour(NamedTuple):
    """One photo near a query."""

    index: int  # type: ignore[assignment]  # its row; hides tuple.index, which none needs
    cosine: float  # -1..1


def nearest(
    queries: npt.NDArray[np.float32], vectors: npt.NDArray[np.float32], top_k: int = 5
) -> list[list[Neighbour]]:
    """(Q, D) and (N, D) -> for each query the `top_k` rows with the greatest cosine, best first.

    Rows that are NaN (photos that could not be read) are never near; of equal ones the first is.
    Raises ConfigError for other shapes, or top_k below 1.
    """
    queries, vectors = np.asarray(queries, np.float32), np.asarray(vectors, np.float32)
    if queries.ndim != 2 or vectors.ndim != 2 or queries.shape[1] != vectors.shape[1]:
        raise ConfigError(
            f"vectors of shapes {queries.shape} and {vectors.shape}: expected (Q, D) and (N, D)"
        )
    check_count("top_k", top_k)
    asked = unit(queries)
    found: list[list[Neighbour]] = [[] for _ in queries]
    for start in range(0, len(vectors), ROWS):
        some = _cosines(asked, vectors[start : start + ROWS])
        for query, row in enumerate(some):
            best = [Neighbour(start + i, float(row[i])) for i in _best(row, top_k)]
            found[query] = merge_neighbours(found[query], best, top_k)
    return found


def merge_neighbours(some: list[Neighbour], later: list[Neighbour], top_k: int) -> list[Neighbour]:
    """The best of two lists, each best first, the second of rows behind those of the first."""
    if len(some) == top_k and (not later or later[0].cosine <= some[-1].cosine):
        return some
    return sorted([*some, *later], key=lambda one: -one.cosine)[:top_k]


def _best(row: npt.NDArray[np.float32], top_k: int) -> list[int]:
    """The places of the greatest numbers, greatest first, of equal ones the first; no NaN."""
    row = np.nan_to_num(row, nan=-np.inf)
    least = np.partition(row, -top_k)[-top_k] if len(row) > top_k else -np.inf
    places = np.flatnonzero((row >= least) & (row > -np.inf))
    order = np.argsort(-row[places], kind="stable")[:top_k]
    return [int(place) for place in places[order]]


def _cosines(asked: npt.NDArray[np.float32], rows: npt.NDArray[np.float32]) -> Any:
    """(Q, D) of length 1 and (N, D) of any -> (Q, N)."""
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    held = (lengths > 1e-15) & (lengths < 1e15)  # whose squares float32 holds
    found = asked @ rows.T
    found /= np.where(held, lengths, 1)
    if not held.all():
        found[:, ~held] = asked @ unit(rows[~held]).T
    return found


def unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows of length 1; a row of zeros stays."""
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0)  # whose square may not be held
    scaled = vectors / np.where(largest > 0, largest, 1)
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.asarray(scaled / np.where(length > 0, length, 1), np.float32)
