"""Labels of a set against its features: suspects, and why some labels are not judged.

Shapes: N photos, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib.audit.findings import list_several_suspects, list_suspects
from vitlib.audit.labels import (
    Suspects,
    judge,
    make_folds,
    predict_out_of_fold,
    share_of_neighbours,
)
from vitlib.audit.report import SuspectRow
from vitlib.data import LabelledPhotos
from vitlib.data.photos import join_names

# Of the suspects at least as many as the model's own mistakes are wrong suspicions.
LEAST_ACCURACY = 0.8
Ints = npt.NDArray[np.int64]


class Judgement(NamedTuple):
    """Suspects of a set.

    Attributes:
        rows: the suspects, ranked.
        classes: by class: photos, threshold, suspects.
        notes: sentences about classes that are not judged.
        accuracy: share of labels that the regression predicts out of fold, of several labels a
            photo the mean over classes and answers; NaN where nothing is judged.
    """

    rows: tuple[SuspectRow, ...]
    classes: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    accuracy: float = float("nan")


def judge_labels(
    photos: LabelledPhotos, vectors: npt.NDArray[np.float32], groups: Ints, seed: int
) -> Judgement:
    """Judge the labels of photos that can be read.

    Args:
        photos: N photos.
        vectors: (N, D) embeddings.
        groups: (N,) number of each photo's group of duplicates.
        seed: of the folds.

    Returns:
        The suspects.
    """
    if photos.multi_label:
        return _judge_several(photos, vectors, groups, seed)
    targets = photos.targets()
    pairs = np.unique(np.stack([targets, groups], axis=1), axis=0)
    distinct = np.bincount(pairs[:, 0], minlength=len(photos.labels))
    counts = np.bincount(targets, minlength=len(photos.labels))
    notes = _explain_rare([photos.labels[c] for c in np.flatnonzero((counts > 0) & (distinct < 2))])
    judged = np.flatnonzero(distinct >= 2)
    if len(judged) < 2:
        return Judgement((), (), (*notes, "labels are not judged: no two classes can be compared"))
    rows = np.flatnonzero(np.isin(targets, judged))
    part = photos.subset(rows)
    y = np.searchsorted(judged, targets[rows])
    names = [photos.labels[c] for c in judged]
    suspects = _judge(part, vectors[rows], y, groups[rows], seed)
    files = [str(photo.path) for photo in part.photos]
    listed = list_suspects(suspects, y, names, files)
    confident = np.bincount(y[suspects.confident], minlength=len(names))
    classes = tuple(
        {
            "label": name,
            "photos": int((y == index).sum()),
            "threshold": round(float(suspects.thresholds[index]), 4),
            "confident_suspects": int(confident[index]),
        }
        for index, name in enumerate(names)
    )
    accuracy = float((suspects.probability.argmax(axis=1) == y).mean())
    return Judgement(tuple(listed), classes, (*notes, *_explain_accuracy(accuracy)), accuracy)


def _judge_several(
    photos: LabelledPhotos, vectors: npt.NDArray[np.float32], groups: Ints, seed: int
) -> Judgement:
    """Judge labels of photos with several each."""
    targets = photos.targets()
    distinct = [
        min(len(np.unique(groups[targets[:, c] == value])) for value in (0, 1))
        for c in range(targets.shape[1])
    ]
    judged = np.array(distinct) >= 2
    notes = _explain_rare([photos.labels[c] for c in np.flatnonzero(~judged)])
    if not judged.any():
        return Judgement((), (), (*notes, "labels are not judged: no class can be compared"))
    suspects = _judge(photos, vectors, targets, groups, seed)
    files = [str(photo.path) for photo in photos.photos]
    listed = list_several_suspects(suspects, targets, photos.labels, judged, files)
    classes = tuple(
        {
            "label": label,
            "photos": int((targets[:, c] == 1).sum()),
            "threshold": round(float(suspects.thresholds[1, c]), 4),
            "confident_suspects": int(suspects.confident[:, c].sum()),
        }
        for c, label in enumerate(photos.labels)
        if judged[c]
    )
    right = (suspects.probability >= 0.5) == (targets == 1)
    shares = [right[targets == value].mean() for value in (0, 1) if (targets == value).any()]
    accuracy = float(np.mean(shares))
    return Judgement(tuple(listed), classes, (*notes, *_explain_accuracy(accuracy)), accuracy)


def _judge(
    photos: LabelledPhotos,
    vectors: npt.NDArray[np.float32],
    targets: npt.NDArray[Any],
    groups: Ints,
    seed: int,
) -> Suspects:
    """Judge labels by regression and neighbours."""
    parts = make_folds(photos, groups, seed)
    probability = predict_out_of_fold(vectors, targets, parts)
    share = share_of_neighbours(vectors, targets, groups)
    return judge(probability, share, targets, groups)


def _explain_accuracy(accuracy: float) -> list[str]:
    """Say that the features do not tell the classes apart; empty where they do."""
    if accuracy >= LEAST_ACCURACY:
        return []
    return [
        f"the features of this model predict {accuracy:.0%} of the labels out of fold: most "
        "doubtful labels may be the model's mistakes, so the fix list has none of them; choose a "
        "better model (vitlib probe compares)"
    ]


def _explain_rare(labels: Sequence[str]) -> list[str]:
    """Say which classes are too rare to judge; empty without any."""
    if not labels:
        return []
    return [
        f"{join_names(map(repr, labels))}: too few photos to judge the label, "
        "which takes two photos with it, and two without, that are not duplicates"
    ]
