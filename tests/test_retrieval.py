"""Nearest neighbours equal those of a full sort, for any number of rows in a step."""

from __future__ import annotations

import numpy as np
import pytest

from vitlib import retrieval
from vitlib.errors import ConfigError


@pytest.mark.parametrize("rows", [3, 7, 1000])
def test_nearest_equals_full_sort(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "ROWS", rows)
    random = np.random.default_rng(0)
    queries, vectors = (random.normal(size=(n, 8)).astype(np.float32) for n in (4, 50))
    cosines = (queries @ vectors.T) / np.outer(
        np.linalg.norm(queries, axis=1), np.linalg.norm(vectors, axis=1)
    )
    for result, row in zip(retrieval.nearest(queries, vectors, 6), cosines, strict=True):
        assert [n.index for n in result] == np.argsort(-row)[:6].tolist()
        assert np.allclose([n.cosine for n in result], np.sort(row)[::-1][:6], atol=1e-6)


def test_nearest_ignores_nan_rows() -> None:
    vectors = np.eye(4, dtype=np.float32)
    vectors[1] = np.nan
    (result,) = retrieval.nearest(vectors[:1], vectors, 4)
    assert [n.index for n in result] == [0, 2, 3]


def test_nearest_orders_ties_by_row() -> None:
    (result,) = retrieval.nearest(np.ones((1, 2), np.float32), np.ones((5, 2), np.float32), 3)
    assert [n.index for n in result] == [0, 1, 2]


@pytest.mark.parametrize(
    ("query", "vectors", "top_k"), [((1, 3), (4, 2), 1), ((3,), (4, 3), 1), ((1, 3), (4, 3), 0)]
)
def test_nearest_rejects_wrong_arguments(
    query: tuple[int, ...], vectors: tuple[int, ...], top_k: int
) -> None:
    with pytest.raises(ConfigError, match="expected"):
        retrieval.nearest(np.ones(query, np.float32), np.ones(vectors, np.float32), top_k)


def test_vectors_of_any_length_and_kind() -> None:
    vectors = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    for size in (1e30, 1e-30, 1.0):
        (result,) = retrieval.nearest(vectors[:1] * size, vectors * size, 1)
        assert result[0].cosine == pytest.approx(1)
    assert retrieval.nearest([[1.0, 0.0]], [[0.0, 1.0], [2.0, 0.0]], 1)[0][0].index == 1  # type: ignore[arg-type]
