"""Nearest neighbours of all photos, by blocks."""

from __future__ import annotations

import numpy as np
import pytest

from vitlib.audit import search
from vitlib.audit.search import find_neighbours, near_pairs, unique_pairs, whiten


@pytest.mark.parametrize(("rows", "columns"), [(1024, 16_384), (7, 5)])
def test_neighbours_equal_brute_force(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int
) -> None:
    monkeypatch.setattr(search, "ROWS", rows)
    monkeypatch.setattr(search, "COLUMNS", columns)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 8)).astype(np.float32)
    groups = rng.integers(0, 12, 60)
    found = find_neighbours(vectors, vectors, 4, query_groups=groups, groups=groups)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = unit @ unit.T
    cosines[groups[:, None] == groups[None]] = -np.inf
    expected = np.argsort(-cosines, axis=1)[:, :4]
    np.testing.assert_array_equal(found.photos, expected)
    np.testing.assert_allclose(found.cosine, np.take_along_axis(cosines, expected, 1), atol=1e-6)


def test_missing_neighbours_are_marked() -> None:
    vectors = np.eye(3, dtype=np.float32)
    groups = np.array([0, 0, 1])
    found = find_neighbours(vectors, vectors, 2, query_groups=groups, groups=groups)
    assert found.photos.tolist() == [[2, -1], [2, -1], [0, 1]]
    assert np.isneginf(found.cosine[0, 1])
    more = find_neighbours(vectors, vectors, 5, query_groups=groups, groups=groups)
    assert more.photos.shape == (3, 5)


def test_white_vectors_have_similar_variances() -> None:
    rng = np.random.default_rng(1)
    scales = np.array([10, 5, 1, 1])
    vectors = (rng.normal(size=(500, 4)) * scales + 30).astype(np.float32)
    variances = np.linalg.eigvalsh(np.cov(search.unit(vectors).T))
    white = np.linalg.eigvalsh(np.cov(whiten(vectors).T))
    assert variances[-1] / variances[1] > 10
    assert white[-1] / white[1] < 4
    assert np.abs(whiten(vectors).mean(axis=0)).max() < 1e-3


def test_white_vectors_of_equal_photos() -> None:
    same = np.ones((4, 3), np.float32)
    assert np.isfinite(whiten(same)).all()
    assert np.isfinite(whiten(same[:1])).all()


def test_pairs_are_listed_once() -> None:
    assert unique_pairs([[2, 1], [1, 2], [0, 3]]).tolist() == [[0, 3], [1, 2]]
    assert unique_pairs(np.empty((0, 2))).shape == (0, 2)
    vectors = np.array([[1, 0], [1, 0.1], [0, 1]], np.float32)
    own = np.arange(3)
    found = find_neighbours(vectors, vectors, 2, query_groups=own, groups=own)
    assert near_pairs(found).tolist() == [[0, 1], [0, 2], [1, 2]]
    assert near_pairs(found, 0.9).tolist() == [[0, 1]]
