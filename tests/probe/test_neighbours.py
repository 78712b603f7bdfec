"""Weighted neighbours against the paper's formula, scikit-learn, and blocks of other sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fixtures.clusters import clusters
from vitlib.errors import ConfigError
from vitlib.probe import knn, neighbours


def by_the_formula(x: np.ndarray, y: np.ndarray, query: np.ndarray, k: int, top: int) -> np.ndarray:
    """2304.07193: softmax of cosine / 0.07 over the nearest `top`, of which k vote; one query."""
    cosines = [row @ query / np.linalg.norm(row) / np.linalg.norm(query) for row in x.astype(float)]
    order = sorted(range(len(x)), key=lambda i: -cosines[i])[:top]
    powers = [np.exp(cosines[i] / 0.07) for i in order]
    votes = np.zeros(y.max() + 1)
    for i, power in list(zip(order, powers, strict=True))[:k]:
        votes[y[i]] += power / sum(powers)
    return votes


def test_knn_equals_the_formula_of_the_paper() -> None:
    (x, y), (queries, _) = clusters(300, 1), clusters(40, 2)
    scores = knn(x, y, queries)
    assert list(scores) == [10, 20, 100, 200]
    for k, rows in scores.items():
        expected = np.stack([by_the_formula(x, y, query, k, 200) for query in queries])
        assert (rows.argmax(axis=1) == expected.argmax(axis=1)).all()
        # The protocol's votes sum to the share of the k among the 200.
        shares = expected / expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(rows, shares, atol=1e-5)


def test_knn_needs_the_temperature_and_the_weights() -> None:
    (x, y), (queries, _) = clusters(300, 1), clusters(200, 2)
    usual = knn(x, y, queries, k=[200])[200].argmax(axis=1)
    flat = knn(x, y, queries, k=[200], temperature=1e6)[200].argmax(axis=1)
    assert (usual != flat).any()


@pytest.mark.parametrize("weighted", [False, True])
def test_knn_equals_sklearn(weighted: bool) -> None:
    pytest.importorskip("sklearn", reason="the oracle")
    from sklearn.neighbors import KNeighborsClassifier

    (x, y), (queries, truth) = clusters(400, 3), clusters(300, 4)

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07) if weighted else np.ones_like(distances)

    temperature = 0.07 if weighted else 1e9
    for k, scores in knn(x, y, queries, k=[1, 10, 20], temperature=temperature).items():
        peer = KNeighborsClassifier(k, metric="cosine", weights=weights).fit(x, y)
        np.testing.assert_allclose(scores, peer.predict_proba(queries), atol=1e-5)
        mine = (scores.argmax(axis=1) == truth).mean()
        assert mine == peer.score(queries, truth)
        assert 0.5 < mine < 1


def test_search_is_exact_over_blocks_and_releases_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (x, _), (queries, _) = clusters(3000, 5), clusters(70, 6)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ unit.T
    expected = np.argsort(-cosines, axis=1, kind="stable")[:, :12]
    monkeypatch.setattr(neighbours, "QUERIES", 32)
    monkeypatch.setattr(neighbours, "MAX_QUERIES", 64)
    for rows in (1024, 700, 5000):  # blocks that end in a part of a group, and one block
        monkeypatch.setattr(neighbours, "ROWS", rows)
        result = neighbours.search(mapped, queries, 12)
        assert (result.indices == expected).all()
        np.testing.assert_allclose(
            result.cosines, np.take_along_axis(cosines, expected, 1), atol=1e-5
        )


def test_search_excludes_a_photo_itself_and_takes_the_lower_of_equal_rows() -> None:
    x = np.tile(np.eye(4, dtype=np.float32), (3, 1))  # every row three times
    result = neighbours.search(x, x, 2, exclude=np.arange(12))
    assert result.indices[0].tolist() == [4, 8]
    assert result.indices[5].tolist() == [1, 9]
    assert neighbours.search(x, x[:1], 3).indices.tolist() == [[0, 4, 8]]


def test_knn_leaves_larger_k_out() -> None:
    x, y = clusters(15, 7)
    assert list(knn(x, y, x)) == [10]
    assert list(knn(x[:6], y[:6], x)) == [6]


def test_knn_of_several_labels_ignores_unknown_ones() -> None:
    x = np.eye(3, dtype=np.float32)[[0, 0, 1]]
    y = np.array([[1, 0, np.nan], [0, np.nan, np.nan], [0, 1, 1]])
    scores = knn(x, y, x[:1], k=[2])[2]
    np.testing.assert_allclose(scores, [[0.5, 0, 0]])
    assert knn(x, y, x[:1], k=[3])[3][0, 2] == 1  # the far photo alone knows of class 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": [0]}, "k=0: expected a whole number of at least 1"),
        ({"temperature": 0}, "temperature=0: expected a number above 0"),
    ],
)
def test_knn_refuses_numbers_out_of_range(settings: dict, message: str) -> None:
    x, y = clusters(15, 7)
    with pytest.raises(ConfigError, match=message):
        knn(x, y, x, **settings)


def test_knn_refuses_other_shapes() -> None:
    x, y = clusters(15, 7)
    with pytest.raises(ConfigError, match="14 targets for 15 training photos"):
        knn(x, y[:14], x)
    with pytest.raises(ConfigError, match=r"expected \(N, D\) and \(Q, D\)"):
        knn(x, y, x[:, :3])
