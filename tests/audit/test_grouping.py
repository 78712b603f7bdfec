"""Groups of photos from pairs."""

from __future__ import annotations

import numpy as np

from vitlib.audit.grouping import UnionFind, group_equal, group_stars, list_groups


def test_union_find_equals_connected_components() -> None:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 60, (35, 2))
    sets = UnionFind(60)
    for first, second in pairs.tolist():
        sets.union(first, second)
    graph = coo_matrix((np.ones(35), pairs.T), (60, 60))
    labels = connected_components(graph, directed=False)[1]
    roots = sets.roots()
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        assert (roots[members] == members.min()).all()


def test_photos_equal_in_one_key_or_another() -> None:
    assert group_equal(["a", "b", "a", "", ""], ["x", "y", "z", "y", ""]).tolist() == [
        0,
        1,
        0,
        1,
        4,
    ]


def test_chain_is_not_one_group() -> None:
    # 0-1-2-3-4: each photo is near the next one alone.
    pairs = np.array([[i, i + 1] for i in range(4)])
    centres = group_stars(5, pairs, np.ones(5))
    near = {frozenset(pair) for pair in pairs.tolist()}
    for photo, centre in enumerate(centres.tolist()):
        assert photo == centre or frozenset((photo, centre)) in near
    assert sorted(map(len, list_groups(centres)), reverse=True) == [3, 2]


def test_centre_is_the_photo_with_most_duplicates_then_the_largest() -> None:
    pairs = np.array([[0, 1], [1, 2], [1, 3], [4, 5]])
    centres = group_stars(7, pairs, np.array([9, 1, 9, 9, 1, 2, 1]))
    assert centres.tolist() == [1, 1, 1, 1, 5, 5, 6]
    assert list_groups(centres) == [[0, 1, 2, 3], [4, 5]]
