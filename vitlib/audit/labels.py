"""Label suspects: photos whose label a model that has not seen them finds improbable.

Confident learning (Northcutt, Jiang and Chuang, 1911.00068): out-of-fold probabilities, a threshold
for each class (section 3.1, equation 2: the mean probability of the class among photos that are
labelled so), and the confident joint, which counts photos labelled i that are confidently j. Those
off its diagonal are suspects. Photos are ranked by the normalized margin (section 4), averaged with
the same margin among the nearest neighbours.

Shapes: N photos, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib.audit.search import find_neighbours, whiten
from vitlib.data import LabelledPhotos, folds
from vitlib.probe.logistic_head import Fitter

FOLDS = 5
NEIGHBOURS = 10  # whose labels are compared
TEMPERATURE = 0.07  # of the neighbours' weights, as in DINOv2's kNN (2304.07193)
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Suspects(NamedTuple):
    """Judgement of every label.

    Attributes:
        probability: (N, C) out-of-fold probabilities.
        neighbour_share: (N, C) weighted share of the neighbours with each class.
        thresholds: (C,) of a class; with several labels (2, C), for its absence and its presence.
        suggested: (N,) class that is most probable instead; with several labels unused.
        confident: (N,), or (N, C) with several labels: True off the diagonal of the confident
            joint.
        margin: (N,), or (N, C): -1..1, low where the label is improbable; NaN where unlabelled.
    """

    probability: Floats
    neighbour_share: Floats
    thresholds: Floats
    suggested: Ints
    confident: Bools
    margin: Floats


def make_folds(photos: LabelledPhotos, groups: Ints, seed: int) -> list[tuple[Ints, Ints]]:
    """Divide photos into folds, the photos of a group into one.

    A near duplicate of a photo in training would tell the label that is to be predicted.

    Args:
        photos: N photos.
        groups: (N,) number of each photo's group of duplicates.
        seed: of the draws.

    Returns:
        (training, validation) indices of each of 5 folds, or as many as there are groups.
    """
    _, first, members = np.unique(groups, return_index=True, return_inverse=True)
    count = min(FOLDS, len(first))
    parts = folds(photos.subset(first), count, seed)
    fold = np.empty(len(first), np.int64)
    for number, (_, validation) in enumerate(parts):
        fold[validation] = number
    photo_fold = fold[members.reshape(-1)]
    return [
        (np.flatnonzero(photo_fold != k), np.flatnonzero(photo_fold == k)) for k in range(count)
    ]


def inverse_penalty(count: int) -> float:
    """Compute scikit-learn's C of the regression on standardized features (docs/audit.md).

    Args:
        count: Number of training photos. More wrong labels among more photos could be learnt by
            heart, so the penalty grows with their square root.
    """
    return 1 / float(np.sqrt(count))


def predict_out_of_fold(
    vectors: npt.NDArray[np.float32], targets: npt.NDArray[Any], parts: Sequence[tuple[Ints, Ints]]
) -> Floats:
    """Predict each photo by a logistic regression that is fitted to the other folds.

    Args:
        vectors: (N, D).
        targets: (N,) classes, or (N, C) of 1, 0 and NaN with several labels.
        parts: as make_folds() gives them.

    Returns:
        (N, C) probabilities.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    classes = targets.shape[1] if targets.ndim == 2 else int(targets.max()) + 1
    probability = np.zeros((len(targets), classes))
    for training, validation in parts:
        mean, std = vectors[training].mean(axis=0), vectors[training].std(axis=0)
        scale = np.where(std > 1e-6 * np.abs(std).max(initial=1e-12), std, np.inf)
        x, z = (vectors[training] - mean) / scale, (vectors[validation] - mean) / scale
        # Probabilities rank photos: the digits that an early stop leaves out change no rank.
        fitter = Fitter(x, targets[training], classes, search=True)
        head = fitter.fit(inverse_penalty(len(training)))
        probability[validation] = head.scores(z)
    return probability


def share_of_neighbours(
    vectors: npt.NDArray[np.float32], targets: npt.NDArray[Any], groups: Ints
) -> Floats:
    """Weigh the labels of the photos that are nearest by whitened vectors, duplicates left out.

    Args:
        vectors: (N, D).
        targets: (N,) classes, or (N, C) of 1, 0 and NaN.
        groups: (N,) number of each photo's group of duplicates.

    Returns:
        (N, C) shares 0..1; with one label they sum to 1. Weights are exp(cosine / 0.07).
    """
    classes = targets.shape[1] if targets.ndim == 2 else int(targets.max()) + 1
    one_hot = targets if targets.ndim == 2 else np.eye(classes, dtype=np.float32)[targets]
    rows = whiten(vectors)
    near = find_neighbours(rows, rows, NEIGHBOURS, query_groups=groups, groups=groups)
    absent = near.photos < 0
    top = near.cosine.max(axis=1, keepdims=True, initial=-1)
    weights = np.where(absent, 0, np.exp((np.where(absent, -1, near.cosine) - top) / TEMPERATURE))
    shares = np.zeros((len(targets), classes))
    total = np.zeros((len(targets), classes))
    for k in range(near.photos.shape[1]):
        values = one_hot[near.photos[:, k]]
        marked = ~np.isnan(values) & ~absent[:, k, None]
        shares += np.where(marked, weights[:, k, None] * np.nan_to_num(values), 0)
        total += np.where(marked, weights[:, k, None], 0)
    return np.asarray(shares / np.where(total > 0, total, 1))


def share_of_duplicates(targets: npt.NDArray[Any], groups: Ints, classes: int) -> Floats:
    """Compute the labels of the duplicates of each photo, without its own.

    Args:
        targets: (N,) classes.
        groups: (N,) number of each photo's group of duplicates.
        classes: C.

    Returns:
        (N, C) shares 0..1; all 0 for a photo without duplicates.
    """
    _, members = np.unique(groups, return_inverse=True)
    members = members.reshape(-1)
    counts = np.zeros((members.max(initial=-1) + 1, classes))
    np.add.at(counts, (members, targets), 1)
    others = counts[members]
    others[np.arange(len(targets)), targets] -= 1
    return np.asarray(others / np.maximum(others.sum(axis=1, keepdims=True), 1))


def judge(
    probability: Floats,
    neighbour_share: Floats,
    targets: npt.NDArray[Any],
    groups: Ints | None = None,
) -> Suspects:
    """Judge every label.

    Args:
        probability: (N, C), as predict_out_of_fold() gives them.
        neighbour_share: (N, C), as share_of_neighbours() gives them.
        targets: (N,) classes, or (N, C) of 1, 0 and NaN.
        groups: (N,) number of each photo's group of duplicates. With one label a photo, the labels
            of duplicates weigh as much as regression and neighbours together: they show the same.

    Returns:
        The judgement.
    """
    if targets.ndim == 2:
        return _judge_several(probability, neighbour_share, targets)
    rows, classes = np.arange(len(targets)), probability.shape[1]
    own = probability[rows, targets]
    sums = np.bincount(targets, own, minlength=classes)
    counts = np.bincount(targets, minlength=classes)
    # A class without photos is never confident.
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    above = probability >= thresholds
    joint = np.where(above, probability, -1).argmax(axis=1)
    confident = above.any(axis=1) & (joint != targets)
    evidence = (probability + neighbour_share) / 2
    if groups is not None:
        copies = share_of_duplicates(targets, groups, classes)
        has_copies = copies.any(axis=1)
        evidence[has_copies] = (evidence[has_copies] + copies[has_copies]) / 2
        # More than half of the duplicates agree on another label.
        copies[rows, targets] = 0
        confident |= copies.max(axis=1, initial=0) > 0.5
    others = evidence.copy()
    others[rows, targets] = -1
    margin = evidence[rows, targets] - others.max(axis=1)
    return Suspects(
        probability, neighbour_share, thresholds, others.argmax(axis=1), confident, margin
    )


def _judge_several(
    probability: Floats, neighbour_share: Floats, targets: npt.NDArray[Any]
) -> Suspects:
    """Judge every label of photos with several: each class is a question of yes or no."""
    present, absent = targets == 1, targets == 0
    thresholds = np.stack([_mean(1 - probability, absent), _mean(probability, present)])
    is_present, is_absent = probability >= thresholds[1], 1 - probability >= thresholds[0]
    # Above both thresholds, the more probable answer counts (section 3.1).
    answer = np.where(is_present & is_absent, probability >= 0.5, is_present)
    confident = (is_present | is_absent) & (answer != present) & (present | absent)
    evidence = probability + neighbour_share - 1
    margin = np.where(present, evidence, -evidence)
    margin = np.where(present | absent, margin, np.nan)
    suggested = np.zeros(len(targets), np.int64)
    return Suspects(probability, neighbour_share, thresholds, suggested, confident, margin)


def _mean(values: Floats, mask: Bools) -> Floats:
    """Average the masked values of each column; infinite where there are none."""
    counts = mask.sum(axis=0)
    return np.where(counts > 0, (values * mask).sum(axis=0) / np.maximum(counts, 1), np.inf)
