"""A labelled set -> training and validation, or folds: the same for the same seed, anywhere.

Draws come from numpy's RandomState, whose numbers are frozen; those of its newer generators may
change with numpy's version, and with them who was held out.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from vitlib.data.photos import LabelledPhotos, listed
from vitlib.errors import ConfigError, DataError

logger = logging.getLogger("vitlib")

How = Literal["stratified", "fifth"]
Indices: TypeAlias = npt.NDArray[np.int64]


def split(
    photos: LabelledPhotos, fraction: float = 0.2, seed: int = 42, how: How = "stratified"
) -> tuple[LabelledPhotos, LabelledPhotos]:
    """(training, validation), in the set's order, both with all its classes.

    how="stratified": about `fraction` of each class is validation; a class of two photos or more
    has one at least on each side, a class of one is for training. Of a multi-label set as far as
    that can be: iterative stratification; a class that is on one side only is logged.
    Of a regression any `fraction` of the photos.
    how="fifth": photos 0, 5, 10, ... are validation, whatever their class; fraction and seed are
    not used. Classes that no training photo has are logged.

    fraction: between 0 and 1. seed: 0..2**32-1. Raises ConfigError for others, DataError where one
    side would have no photo.
    """
    if how not in get_args(How):
        raise ConfigError(f"how={how!r}: expected one of {', '.join(map(repr, get_args(How)))}")
    if not 0 < fraction < 1:
        raise ConfigError(f"fraction={fraction!r}: expected a number between 0 and 1")
    random = _random(seed)
    if how == "fifth":
        held = np.arange(len(photos)) % 5 == 0
    elif photos.regression:
        held = np.zeros(len(photos), np.bool_)
        held[random.permutation(len(photos))[: max(1, round(fraction * len(photos)))]] = True
    elif photos.multi_label:
        where = _iterative(photos, (1 - fraction, fraction), random)
        held = _on_both_sides(photos, where == 1, random)
    else:
        held = _by_class(photos, fraction, random)
    if held.all() or not held.any():
        raise DataError(
            f"{photos.source}: {len(photos)} photos cannot be split into training and validation: "
            f"expected {'two photos' if photos.regression else 'a class of two photos'} or more"
        )
    training, validation = photos.subset(np.flatnonzero(~held)), photos.subset(np.flatnonzero(held))
    _tell_missing(photos, training, validation if how == "stratified" else None)
    return training, validation


def folds(photos: LabelledPhotos, count: int, seed: int) -> list[tuple[Indices, Indices]]:
    """`count` folds: of each (indices to train on, indices held out), int64, ascending.

    Every photo is held out in exactly one. Single-label: a class differs by one photo at most
    between folds, and so do the folds. Multi-label: iterative stratification.
    count: 2 or more. seed: 0..2**32-1. Raises ConfigError for others, DataError where there are
    fewer photos than folds. Classes with fewer photos than folds are logged.
    """
    if not isinstance(count, int) or count < 2:
        raise ConfigError(f"count={count!r}: expected a whole number of at least 2")
    random = _random(seed)
    if len(photos) < count:
        raise DataError(f"{photos.source}: {len(photos)} photos for {count} folds: expected more")
    rare = [label for label, n in photos.counts().items() if 0 < n < count]
    if rare:
        logger.warning(
            "%s: not in each of %d folds, for want of photos: %s",
            *(photos.source, count, listed(rare)),
        )
    if photos.multi_label:
        # No fold stays empty: with equal shares it would want most of any label, and most photos.
        where = _iterative(photos, (1 / count,) * count, random)
    elif photos.regression:
        where = np.empty(len(photos), np.int64)
        where[random.permutation(len(photos))] = np.arange(len(photos)) % count
    else:
        # Dealt like cards: sorted by class, shuffled within.
        where = np.empty(len(photos), np.int64)
        where[np.concatenate(_members(photos, random))] = np.arange(len(photos)) % count
    return [(np.flatnonzero(where != k), np.flatnonzero(where == k)) for k in range(count)]


def _random(seed: int) -> np.random.RandomState:
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed!r}: expected a whole number in 0..2**32-1")
    return np.random.RandomState(seed)


def _members(photos: LabelledPhotos, random: np.random.RandomState) -> list[Indices]:
    """Single-label: the photos of each class that has any, shuffled."""
    targets = photos.targets()
    order = random.permutation(len(photos))
    order = order[np.argsort(targets[order], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(targets[order])) + 1)


def _by_class(
    photos: LabelledPhotos, fraction: float, random: np.random.RandomState
) -> npt.NDArray[np.bool_]:
    """Single-label: who is held out, (N,)."""
    held = np.zeros(len(photos), np.bool_)
    if not len(photos):
        return held
    members = _members(photos, random)
    sizes = np.array([len(m) for m in members])
    shares = fraction * sizes
    most = np.maximum(sizes - 1, 0)
    takes = np.clip(np.floor(shares).astype(int), np.minimum(1, most), most)
    # The rest of the whole's share goes to those whose own was cut most (largest remainder).
    left = round(fraction * len(photos)) - int(takes.sum())
    for index in np.argsort(takes - shares, kind="stable"):
        if left > 0 and takes[index] < min(most[index], shares[index]):
            takes[index] += 1
            left -= 1
    for member, take in zip(members, takes, strict=True):
        held[member[:take]] = True
    return held


def _iterative(
    photos: LabelledPhotos, shares: Sequence[float], random: np.random.RandomState
) -> Indices:
    """Which of the parts each photo goes to, (N,): iterative stratification (Sechidis, Tsoumakas
    and Vlahavas, On the Stratification of Multi-Label Data, 2011, algorithm 1).

    The label with the fewest photos left is given out first; each of its photos goes to the part
    that wants most of this label, of those to the one that wants most photos, of those to any.
    """
    order = [int(index) for index in random.permutation(len(photos))]
    having: dict[str, list[int]] = {}
    for index in order:
        for label in photos.photos[index].labels:
            having.setdefault(label, []).append(index)
    wants = {label: [share * len(there) for share in shares] for label, there in having.items()}
    wants_any = [share * len(photos) for share in shares]
    left = {label: len(there) for label, there in having.items()}
    heap = [(count, label) for label, count in left.items()]
    heapq.heapify(heap)
    where = np.full(len(photos), -1, np.int64)

    def give(index: int, wanted: Sequence[float]) -> None:
        best = max(zip(wanted, wants_any, strict=True))
        parts = [k for k, w in enumerate(zip(wanted, wants_any, strict=True)) if w == best]
        part = parts[random.randint(len(parts)) if len(parts) > 1 else 0]
        where[index] = part
        wants_any[part] -= 1
        for label in photos.photos[index].labels:
            wants[label][part] -= 1
            left[label] -= 1
            heapq.heappush(heap, (left[label], label))

    while heap:
        count, label = heapq.heappop(heap)
        if not count or count != left[label]:  # given out, or counted again since
            continue
        for index in having[label]:
            if where[index] < 0:
                give(index, wants[label])
    for index in order:  # those without a label
        if where[index] < 0:
            give(index, wants_any)
    return where


def _on_both_sides(
    photos: LabelledPhotos, held: npt.NDArray[np.bool_], random: np.random.RandomState
) -> npt.NDArray[np.bool_]:
    """Move single photos so that a class of two or more is on both sides, where one can be moved
    without taking the last photo of another class from its side. Where none can, and it is training
    that lacks the class, one is moved all the same."""
    held = held.copy()
    having: dict[str, list[int]] = {}
    on: dict[str, list[int]] = {}  # of each label, how many are on each side
    for index in map(int, random.permutation(len(photos))):
        for label in photos.photos[index].labels:
            having.setdefault(label, []).append(index)
            on.setdefault(label, [0, 0])[int(held[index])] += 1
    for label in sorted(having, key=lambda name: (len(having[name]), name)):
        lacking = on[label].index(min(on[label]))
        if on[label][lacking] or (len(having[label]) == 1 and lacking == 1):
            continue
        few = sorted(having[label], key=lambda i: len(photos.photos[i].labels))
        # One photo alone of its class may go to training, not from there.
        free = (
            index
            for index in few
            if all(
                on[name][1 - lacking] > 1 or sum(on[name]) + lacking == 1
                for name in photos.photos[index].labels
            )
        )
        index = next(free, few[0] if lacking == 0 else -1)
        if index >= 0 and (lacking == 1 or held.sum() > 1):
            held[index] = lacking == 1
            for name in photos.photos[index].labels:
                on[name][lacking] += 1
                on[name][1 - lacking] -= 1
    return held


def _tell_missing(
    photos: LabelledPhotos, training: LabelledPhotos, validation: LabelledPhotos | None
) -> None:
    there = {label for label, count in photos.counts().items() if count}
    for name, part in (("training", training), ("validation", validation)):
        if part is None:
            continue
        lacks = sorted(there - {label for label, count in part.counts().items() if count})
        if lacks:
            logger.warning("%s: no %s photo has the label %s", photos.source, name, listed(lacks))
