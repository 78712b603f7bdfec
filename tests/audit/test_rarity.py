"""Outliers, coverage and typicality against definitions written out."""

from __future__ import annotations

import numpy as np
import pytest

from vitlib.audit.rarity import (
    choose_typical,
    cover,
    measure_rarity,
    measure_typicality,
    rank_next,
)

pytest.importorskip("sklearn", reason="clusters need scikit-learn: vitlib[eval]")


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_rarity_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(50, 6)).astype(np.float32) + 2
    vectors[3] = -vectors[3]
    classes = np.arange(50) % 2
    found = measure_rarity(vectors, np.arange(50), classes)
    rows = unit(vectors)
    distances = np.array(
        [
            np.mean(
                sorted(1 - rows[i] @ rows[j] for j in range(50) if j != i and (i - j) % 2 == 0)[:5]
            )
            for i in range(50)
        ]
    )
    np.testing.assert_allclose(found.distance, distances, atol=1e-5)
    own = distances[classes == 1]
    spread = 1.4826 * np.median(np.abs(own - np.median(own)))
    assert found.score[3] == pytest.approx((distances[3] - np.median(own)) / spread, rel=1e-3)
    assert found.score.argmax() == 3


def test_duplicates_do_not_hide_an_outlier() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(30, 6)).astype(np.float32) * 0.1 + np.eye(6)[0]
    vectors[[4, 5]] = -np.eye(6)[1]
    groups = np.arange(30)
    groups[5] = 4
    found = measure_rarity(vectors, groups)
    assert set(np.argsort(-found.score)[:2].tolist()) == {4, 5}
    assert found.score[4] > 3.5


def test_photos_without_neighbours_have_no_score() -> None:
    found = measure_rarity(np.eye(3, dtype=np.float32), np.zeros(3, int))
    assert np.isnan(found.score).all()
    same = measure_rarity(np.ones((12, 3), np.float32), np.arange(12))
    assert (same.score == 0).all()


def test_coverage_equals_greedy_k_center() -> None:
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(40, 5)).astype(np.float32)
    chosen, radii = cover(vectors, 8, first=3)
    rows = unit(vectors).astype(float)
    expected = [3]
    for step in range(8):
        gaps = [min(np.linalg.norm(row - rows[j]) for j in expected) for row in rows]
        assert radii[step] == pytest.approx(max(gaps), abs=1e-3)
        if step < 7:
            expected.append(int(np.argmax(gaps)))
    assert chosen.tolist() == expected
    assert (np.diff(radii) <= 1e-6).all()


def test_typicality_equals_its_definition() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(40, 5)).astype(np.float32)
    found = measure_typicality(vectors, np.arange(40))
    rows = unit(vectors).astype(float)
    for i in range(40):
        gaps = sorted(np.linalg.norm(rows[i] - rows[j]) for j in range(40) if j != i)[:20]
        assert found[i] == pytest.approx(1 / np.mean(gaps), rel=1e-3)


def test_typical_photos_are_one_of_each_cluster() -> None:
    rng = np.random.default_rng(4)
    centres = np.eye(4)[[0, 1, 2]] * 5
    vectors = np.concatenate(
        [c + 0.3 * rng.normal(size=(n, 4)) for c, n in zip(centres, (9, 30, 15), strict=True)]
    )
    vectors = vectors.astype(np.float32)
    typicality = measure_typicality(vectors, np.arange(54))
    chosen = choose_typical(vectors, typicality, 3, 0)
    parts = [range(9), range(9, 39), range(39, 54)]
    assert [next(k for k, part in enumerate(parts) if i in part) for i in chosen] == [1, 2, 0]
    for i in chosen:
        part = next(part for part in parts if i in part)
        assert typicality[i] == max(typicality[j] for j in part)


@pytest.mark.parametrize("method", ["typicality", "coverage"])
def test_next_photos_have_no_duplicates(method: str) -> None:
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(30, 6)).astype(np.float32)
    groups = np.arange(30) // 3
    chosen, values = rank_next(vectors, groups, 8, method)
    assert len(chosen) == len(values) == 8
    assert len(set(groups[chosen].tolist())) == 8
    assert len(rank_next(vectors, groups, 99, method)[0]) == 10
    assert len(rank_next(vectors, groups, 0, method)[0]) == 0
