"""Nearest neighbours among photos, by the cosine of their embeddings: exact, in numpy.

Shapes: N photos, Q queries, D embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib.errors import ConfigError

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
    if top_k < 1:
        raise ConfigError(f"top_k={top_k}: expected at least 1")
    asked = unit(queries)
    near = np.empty((len(queries), 0), np.float32)
    where = np.empty((len(queries), 0), np.int64)
    for start in range(0, len(vectors), ROWS):
        some = asked @ unit(vectors[start : start + ROWS]).T
        near = np.concatenate([near, np.nan_to_num(some, nan=-np.inf)], axis=1)
        rows = np.arange(start, start + some.shape[1])
        where = np.concatenate([where, np.broadcast_to(rows, some.shape)], axis=1)
        order = np.argsort(-near, axis=1, kind="stable")[:, :top_k]
        near = np.take_along_axis(near, order, axis=1)
        where = np.take_along_axis(where, order, axis=1)
    return [
        [
            Neighbour(int(row), float(cosine))
            for row, cosine in zip(rows, cosines, strict=True)
            if cosine > -np.inf
        ]
        for rows, cosines in zip(where, near, strict=True)
    ]


def unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows of length 1; a row of zeros stays."""
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0)  # whose square may not be held
    scaled = vectors / np.where(largest > 0, largest, 1)
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.asarray(scaled / np.where(length > 0, length, 1), np.float32)
