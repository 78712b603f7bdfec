"""Division of labelled photos into those that heads are fitted to and those that measure them.

Two levels: in each round some photos are held out and measure the result. Of the others, parts are
held out in turn to choose C, k, rate, layer and pooling, so that no choice sees what measures it.

Shapes: N photos, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib.data import LabelledPhotos, folds
from vitlib.probe.logistic_head import FEW, FOLDS, divide, measured_parts

Array = npt.NDArray[Any]
TEST = -1  # part of the photos of val/ or test/
TRIES = 5  # draws of few photos, where a set has test photos


class Round(NamedTuple):
    """A training set, and the photos that measure what is fitted to it.

    Attributes:
        excluded: Parts that the training set lacks, beside TEST.
        measured: Parts of the training set that are held out in turn to choose by; may be empty.
        test: Part that measures the result; None where nothing does.
    """

    excluded: frozenset[int]
    measured: tuple[int, ...]
    test: int | None


@dataclass(frozen=True)
class Division:
    """Parts of a set of photos, and the rounds of a probe.

    Attributes:
        parts: (N,) number of the part of each photo; TEST for photos that only measure.
        rounds: The rounds, which together hold out every measured photo once.
        final: Training set of the best probe: all photos but those of TEST.
        kind: "folds" or "split".
    """

    parts: npt.NDArray[np.int64]
    rounds: tuple[Round, ...]
    final: Round
    kind: str

    @property
    def held_out(self) -> npt.NDArray[np.int64]:
        """Indices of the photos that measure a result, ascending."""
        return np.flatnonzero(
            np.isin(self.parts, [r.test for r in self.rounds if r.test is not None])
        )

    def training(self, excluded: frozenset[int]) -> npt.NDArray[np.int64]:
        """Return the indices of the photos of a training set.

        Args:
            excluded: Parts that it lacks.

        Returns:
            The indices, ascending.
        """
        return np.flatnonzero(~np.isin(self.parts, [TEST, *excluded]))


def divide_photos(training: LabelledPhotos, test: LabelledPhotos | None, seed: int) -> Division:
    """Divide photos: by their own test photos where there are some, else into 5 folds.

    Args:
        training: The photos, or those of train/.
        test: The photos of val/ or test/, which follow them; None where there are none.
        seed: Seed of the folds.

    Returns:
        The division of the training photos and, after them, the test photos.

    Raises:
        DataError: There are fewer photos than folds, and no test photos.
    """
    count = len(training)
    is_few = count <= FEW
    if test is None or (is_few and count >= 2 * FOLDS):
        parts = np.empty(count, np.int64)
        for number, (_, members) in enumerate(folds(training, FOLDS, seed)):
            parts[members] = number
    else:
        parts = divide(training.targets(), seed)
    if test is None:
        rounds = tuple(
            Round(frozenset({i}), _others(i) if is_few else (_others(i)[0],), i)
            for i in range(FOLDS)
        )
        # The best probe is fitted to all photos; its choice is measured by the same folds.
        final = Round(frozenset(), measured_parts(parts, count), None)
        return Division(parts, rounds, final, "folds")
    measured = measured_parts(parts, count) if count >= 2 * FOLDS else ()
    whole = Round(frozenset(), measured, TEST)
    parts = np.concatenate([parts, np.full(len(test), TEST, np.int64)])
    return Division(parts, (whole,), whole, "split")


def _others(number: int) -> tuple[int, ...]:
    """List the other folds, the next one first."""
    return tuple((number + step) % FOLDS for step in range(1, FOLDS))


def draw_few(targets: Array, per_class: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw some photos of each class.

    Args:
        targets: (N,) class numbers, or (N, C) of 1, 0 and NaN.
        per_class: Photos of a class; all of a class that has fewer. With several labels at least
            so many, since a photo of one class may show another.
        seed: Seed of the draw.

    Returns:
        Indices of the photos, ascending.
    """
    random = np.random.RandomState(seed)
    has_class = targets == 1 if targets.ndim == 2 else None
    classes = range(targets.shape[1]) if targets.ndim == 2 else np.unique(targets).tolist()
    drawn = np.zeros(len(targets), np.bool_)
    # A photo that an earlier class drew counts for every class that it shows.
    for number in classes:
        members = targets == number if has_class is None else has_class[:, number]
        rest = random.permutation(np.flatnonzero(members & ~drawn))
        drawn[rest[: max(per_class - int((members & drawn).sum()), 0)]] = True
    return np.flatnonzero(drawn)


def draws_of(division: Division) -> tuple[tuple[Round, int], ...]:
    """List the draws of few photos as (round, seed): one a fold, or several of train/.

    Args:
        division: The division.

    Returns:
        The draws.
    """
    if division.kind == "folds":
        return tuple((r, seed) for seed, r in enumerate(division.rounds))
    return tuple((division.rounds[0], seed) for seed in range(TRIES))
