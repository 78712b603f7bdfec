"""Groups of photos that are the same, from pairs of them.

Identical files are an equivalence, so a union-find joins them without harm. Near duplicates are
not: a chain of small differences leads from any photo of a burst to any other. So a group of near
duplicates is a star: it has a centre, and each member is a near duplicate of the centre itself.

Shapes: N photos, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class UnionFind:
    """Disjoint sets of numbers, each known by its lowest one.

    Args:
        count: the numbers are 0..count - 1.
    """

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, item: int) -> int:
        """Return the lowest number of the set that has an item.

        Args:
            item: the item.
        """
        root = item
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[item] != root:
            self._parent[item], item = root, self._parent[item]
        return root

    def union(self, first: int, second: int) -> None:
        """Join the sets of two items.

        Args:
            first: an item.
            second: an item.
        """
        low, high = sorted((self.find(first), self.find(second)))
        self._parent[high] = low

    def roots(self) -> Ints:
        """Return the lowest number of each item's set, (count,)."""
        return np.array([self.find(item) for item in range(len(self._parent))], np.int64)


def group_equal(*keys: Any) -> Ints:
    """Group photos that agree in one of several keys.

    Args:
        keys: (N,) texts or numbers each; photos with an empty text agree with no other.

    Returns:
        (N,) lowest photo of each photo's group.
    """
    sets = UnionFind(len(keys[0]))
    for values in keys:
        first: dict[Any, int] = {}
        for index, value in enumerate(values):
            if value not in ("", b""):
                sets.union(first.setdefault(value, index), index)
    return sets.roots()


def group_stars(count: int, pairs: Ints, sizes: Any) -> Ints:
    """Group near duplicates around centres.

    The photo with the most near duplicates becomes a centre, of equal ones the largest, and takes
    those that no centre has yet; then the next. Nothing is joined by way of a third photo but by
    the centre.

    Args:
        count: N.
        pairs: (P, 2) near duplicates.
        sizes: (N,) pixels of each photo.

    Returns:
        (N,) centre of each photo's group; a photo without a group is its own centre.
    """
    near: dict[int, list[int]] = {}
    for first, second in pairs.tolist():
        near.setdefault(first, []).append(second)
        near.setdefault(second, []).append(first)
    centres = np.arange(count)
    assigned = np.zeros(count, np.bool_)
    for photo in sorted(near, key=lambda i: (-len(near[i]), -int(sizes[i]), i)):
        if assigned[photo]:
            continue
        members = [other for other in near[photo] if not assigned[other]]
        assigned[[photo, *members]] = True
        centres[members] = photo
    return centres


def list_groups(centres: Ints) -> list[list[int]]:
    """List the groups of two photos or more.

    Args:
        centres: (N,) centre of each photo.

    Returns:
        The photos of each group, ascending; larger groups first.
    """
    members: dict[int, list[int]] = {}
    order: Iterable[int] = np.argsort(centres, kind="stable").tolist()
    for photo in order:
        members.setdefault(int(centres[photo]), []).append(photo)
    groups = [group for group in members.values() if len(group) > 1]
    return sorted(groups, key=lambda group: (-len(group), group))
