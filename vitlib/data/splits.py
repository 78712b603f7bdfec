"""Split a labelled set into training and validation photos, or into folds.

The same seed gives the same split on every machine. Random numbers come from numpy's RandomState,
whose stream is frozen; that of its newer generators may change with numpy's version.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from vitlib.data.photos import LabelledPhotos, join_names
from vitlib.errors import ConfigError, DataError, count_noun

logger = logging.getLogger("vitlib")

Method = Literal["stratified", "fifth"]
Indices: TypeAlias = npt.NDArray[np.int64]


def split(
    photos: LabelledPhotos, fraction: float = 0.2, seed: int = 42, how: Method = "stratified"
) -> tuple[LabelledPhotos, LabelledPhotos]:
    """Split a set into training and validation photos, both with all its classes.

    "stratified" takes about `fraction` of each class for validation. A class of two photos or more
    has at least one on each side, and the photo of a class of one is for training. Multi-label sets
    follow this as far as possible, by iterative stratification; a class that is on one side only is
    logged. Of a regression, `fraction` of the photos are drawn. "fifth" takes photos 0, 5, 10, ...
    for validation, without fraction and seed; classes without a training photo are logged.

    Args:
        photos: the set.
        fraction: share of the validation photos, between 0 and 1.
        seed: of the draws, 0..2**32-1.
        how: "stratified" or "fifth".

    Returns:
        Training and validation photos, each in the order of the set.

    Raises:
        ConfigError: for arguments out of range.
        DataError: where one side would have no photo.
    """
    if how not in get_args(Method):
        raise ConfigError(f"how={how!r}: expected one of {', '.join(map(repr, get_args(Method)))}")
    if not 0 < fraction < 1:
        raise ConfigError(f"fraction={fraction!r}: expected a number between 0 and 1")
    random = _random(seed)
    if how == "fifth":
        validation_mask = np.arange(len(photos)) % 5 == 0
    elif photos.regression:
        count = max(1, round(fraction * len(photos)))
        validation_mask = np.zeros(len(photos), np.bool_)
        validation_mask[random.permutation(len(photos))[:count]] = True
    elif photos.multi_label:
        parts = _stratify(photos, (1 - fraction, fraction), random)
        validation_mask = _cover_classes(photos, parts == 1, random)
    else:
        validation_mask = _sample_classes(photos, fraction, random)
    if validation_mask.all() or not validation_mask.any():
        raise DataError(
            f"{photos.source}: {count_noun(len(photos), 'photo')} cannot be split for training and "
            "validation: "
            f"expected {'two photos' if photos.regression else 'a class of two photos'} or more"
        )
    training = photos.subset(np.flatnonzero(~validation_mask))
    validation = photos.subset(np.flatnonzero(validation_mask))
    _log_missing(photos, training, validation if how == "stratified" else None)
    return training, validation


def folds(photos: LabelledPhotos, count: int, seed: int) -> list[tuple[Indices, Indices]]:
    """Divide a set into folds for cross-validation.

    Every photo is validation in exactly one fold. With one label a photo, folds differ by one photo
    of a class at most, and by one photo in all. Multi-label sets are divided by iterative
    stratification. Classes with fewer photos than folds are logged.

    Args:
        photos: the set.
        count: number of folds, 2 or more.
        seed: of the draws, 0..2**32-1.

    Returns:
        (training indices, validation indices) of each fold, int64, ascending.

    Raises:
        ConfigError: for arguments out of range.
        DataError: for fewer photos than folds.
    """
    if not isinstance(count, int) or count < 2:
        raise ConfigError(f"count={count!r}: expected a whole number of at least 2")
    random = _random(seed)
    if len(photos) < count:
        raise DataError(
            f"{photos.source}: {count_noun(len(photos), 'photo')} for {count} folds: expected more"
        )
    rare = [label for label, n in photos.counts().items() if 0 < n < count]
    if rare:
        logger.warning(
            "%s: classes with fewer photos than the %d folds: %s",
            *(photos.source, count, join_names(rare)),
        )
    if photos.multi_label:
        # No fold stays empty: with equal shares, an empty fold demands most of any label.
        parts = _stratify(photos, (1 / count,) * count, random)
    elif photos.regression:
        parts = np.empty(len(photos), np.int64)
        parts[random.permutation(len(photos))] = np.arange(len(photos)) % count
    else:
        # Photos sorted by class, shuffled within, go to the folds in turn.
        parts = np.empty(len(photos), np.int64)
        parts[np.concatenate(_group_by_class(photos, random))] = np.arange(len(photos)) % count
    return [(np.flatnonzero(parts != k), np.flatnonzero(parts == k)) for k in range(count)]


def _random(seed: int) -> np.random.RandomState:
    """Make the generator. Raises ConfigError for a seed out of range."""
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed!r}: expected a whole number in 0..2**32-1")
    return np.random.RandomState(seed)


def _group_by_class(photos: LabelledPhotos, random: np.random.RandomState) -> list[Indices]:
    """Group the photos of a single-label set by class, shuffled within each class."""
    targets = photos.targets()
    order = random.permutation(len(photos))
    order = order[np.argsort(targets[order], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(targets[order])) + 1)


def _sample_classes(
    photos: LabelledPhotos, fraction: float, random: np.random.RandomState
) -> npt.NDArray[np.bool_]:
    """Draw validation photos from each class of a single-label set, as a mask (N,)."""
    mask = np.zeros(len(photos), np.bool_)
    if not len(photos):
        return mask
    groups = _group_by_class(photos, random)
    sizes = np.array([len(group) for group in groups])
    shares = fraction * sizes
    limits = np.maximum(sizes - 1, 0)
    counts = np.clip(np.floor(shares).astype(int), np.minimum(1, limits), limits)
    # The rest of the total goes to the classes that were rounded down most (largest remainder).
    rest = round(fraction * len(photos)) - int(counts.sum())
    for index in np.argsort(counts - shares, kind="stable"):
        if rest > 0 and counts[index] < min(limits[index], shares[index]):
            counts[index] += 1
            rest -= 1
    for group, count in zip(groups, counts, strict=True):
        mask[group[:count]] = True
    return mask


def _stratify(
    photos: LabelledPhotos, shares: Sequence[float], random: np.random.RandomState
) -> Indices:
    """Assign each photo to a part, (N,), by iterative stratification.

    Sechidis, Tsoumakas and Vlahavas, On the Stratification of Multi-Label Data, 2011, algorithm 1:
    the label with the fewest photos left comes first. Each of its photos goes to the part with the
    greatest demand for this label, of those to the part with the greatest demand for photos, of
    those to a random one.
    """
    order = [int(index) for index in random.permutation(len(photos))]
    members = _group_by_label(photos, order)
    demand = {
        label: [share * len(indices) for share in shares] for label, indices in members.items()
    }
    total_demand = [share * len(photos) for share in shares]
    rest = {label: len(indices) for label, indices in members.items()}
    heap = [(count, label) for label, count in rest.items()]
    heapq.heapify(heap)
    parts = np.full(len(photos), -1, np.int64)

    def assign(index: int, label_demand: Sequence[float]) -> None:
        demands = list(zip(label_demand, total_demand, strict=True))
        greatest = max(demands)
        best = [k for k, value in enumerate(demands) if value == greatest]
        part = best[random.randint(len(best)) if len(best) > 1 else 0]
        parts[index] = part
        total_demand[part] -= 1
        for label in photos.photos[index].labels:
            demand[label][part] -= 1
            rest[label] -= 1
            heapq.heappush(heap, (rest[label], label))

    while heap:
        count, label = heapq.heappop(heap)
        # Assigned already, or an outdated count.
        if not count or count != rest[label]:
            continue
        for index in members[label]:
            if parts[index] < 0:
                assign(index, demand[label])
    for index in order:  # photos without a label
        if parts[index] < 0:
            assign(index, total_demand)
    return parts


def _group_by_label(photos: LabelledPhotos, order: Sequence[int]) -> dict[str, list[int]]:
    """Group the photos of a multi-label set by label, in this order."""
    members: dict[str, list[int]] = {}
    for index in order:
        for label in photos.photos[index].labels:
            members.setdefault(label, []).append(index)
    return members


def _cover_classes(
    photos: LabelledPhotos, validation: npt.NDArray[np.bool_], random: np.random.RandomState
) -> npt.NDArray[np.bool_]:
    """Move single photos so that each class of two or more is on both sides.

    A photo is moved where that does not take the last photo of another class from its side. Where
    every photo does, and training lacks the class, one is moved nevertheless.
    """
    mask = validation.copy()
    members = _group_by_label(photos, [int(i) for i in random.permutation(len(photos))])
    sides = {  # photos of each label in training and in validation
        label: [sum(not mask[i] for i in indices), sum(bool(mask[i]) for i in indices)]
        for label, indices in members.items()
    }
    for label in sorted(members, key=lambda name: (len(members[name]), name)):
        lacking = sides[label].index(min(sides[label]))
        if sides[label][lacking] or (len(members[label]) == 1 and lacking == 1):
            continue
        candidates = sorted(members[label], key=lambda i: len(photos.photos[i].labels))
        # The single photo of a class may move to training, but not away from it.
        movable = (
            index
            for index in candidates
            if all(
                sides[name][1 - lacking] > 1 or sum(sides[name]) + lacking == 1
                for name in photos.photos[index].labels
            )
        )
        index = next(movable, candidates[0] if lacking == 0 else -1)
        if index >= 0 and (lacking == 1 or mask.sum() > 1):
            mask[index] = lacking == 1
            for name in photos.photos[index].labels:
                sides[name][lacking] += 1
                sides[name][1 - lacking] -= 1
    return mask


def _log_missing(
    photos: LabelledPhotos, training: LabelledPhotos, validation: LabelledPhotos | None
) -> None:
    """Log the classes that a side lacks."""
    present = {label for label, count in photos.counts().items() if count}
    for name, part in (("training", training), ("validation", validation)):
        if part is None:
            continue
        missing = sorted(present - {label for label, count in part.counts().items() if count})
        if missing:
            names = join_names(missing)
            logger.warning("%s: no %s photo has the label %s", photos.source, name, names)
