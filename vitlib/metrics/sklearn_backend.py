"""All metrics of a classifier, by scikit-learn with the whole list of classes.

Shapes: N photos, C classes. y_true, y_pred and labelled are (N, C) bool: the photo has the class,
the class was predicted, and the truth is available.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vitlib.errors import ConfigError
from vitlib.metrics.numpy_backend import TOP, Array, Floats, confidences, reliability, validate
from vitlib.system.requirements import import_extra

NAN = float("nan")
MAX_NAMES = 8  # names listed in a note; the others are counted


class ClassRow(NamedTuple):
    """Metrics of one class against the rest; NaN where its photos leave a number undefined.

    Attributes:
        label: name of the class.
        support: photos that have the class.
        predicted: photos for which the class was predicted.
        labelled: photos that say if they have the class.
        precision: 0..1.
        recall: 0..1.
        f1_score: 0..1.
        AUC: area under the ROC curve, 0..1.
        average_precision_score: 0..1.
    """

    label: str
    support: int
    predicted: int
    labelled: int
    precision: float
    recall: float
    f1_score: float
    AUC: float
    average_precision_score: float


@dataclass(frozen=True)
class Metrics:
    """Metrics of a classifier, as `every` computes them.

    Attributes:
        values: the value of each metric by its name.
        per_class: a row for each class, in the order of the labels.
        notes: sentences that say which values are undefined or leave photos out, and why.
    """

    values: dict[str, float]
    per_class: tuple[ClassRow, ...]
    notes: tuple[str, ...]


def every(
    targets: Array,
    scores: Floats,
    labels: Sequence[str],
    multi_label: bool,
    threshold: float | Floats = 0.5,
    positive: int | None = None,
) -> Metrics:
    """Compute all metrics by scikit-learn with the whole list of classes.

    They are those of `quick`, {AUC,average_precision_score}_{micro,macro,weighted} and
    expected_calibration_error. With one label a photo, weighted_accuracy, norm_macro_recall and
    matthews_correlation as well. Classes and photos that count nowhere are named in the notes.

    Args:
        targets: (N,) class numbers; with several labels (N, C) of 1, 0 and NaN for unlabelled.
        scores: (N, C) probabilities, 0..1.
        labels: (C,) names of the classes.
        multi_label: True if a photo may have several labels.
        threshold: with several labels, the least score of a predicted class; one number or (C,).
        positive: number of a class to measure against the rest, as
            {f1,precision,recall,average_precision}_score_binary and AUC_binary; None for no class.

    Returns:
        The values, a row for each class, and notes.

    Raises:
        ConfigError: as `quick` does, for a wrong number of labels, and without scikit-learn.
    """
    sk = import_sklearn_metrics()
    targets, scores, limits = validate(targets, scores, multi_label, threshold)
    if len(labels) != scores.shape[1]:
        raise ConfigError(f"{len(labels)} labels for {scores.shape[1]} classes: expected one each")
    notes = []
    if multi_label:
        has_labels = ~np.isnan(targets).all(axis=1)
        if not has_labels.all():
            notes.append(f"{(~has_labels).sum()} photos are left out: they have no labels")
        targets, scores = targets[has_labels], scores[has_labels]
        labelled = ~np.isnan(targets)
        y_true, y_pred = targets == 1, labelled & (scores >= limits)
        values = _multi_label_values(sk, y_true, y_pred, labelled, scores)
    else:
        answers = scores.argmax(axis=1)
        y_true, y_pred = (x[:, None] == np.arange(len(labels)) for x in (targets, answers))
        labelled = np.ones(y_true.shape, bool)
        values = _single_label_values(sk, targets, answers, scores)
    rows = _per_class(sk, y_true, y_pred, labelled, scores, labels)
    values |= _ranking(sk, y_true, labelled, scores, rows, multi_label)
    reliable = reliability(*confidences(targets, scores, multi_label))
    values["expected_calibration_error"] = reliable.error
    if positive is not None:
        values |= _binary(sk, y_true, y_pred, labelled, rows[positive], positive)
    return Metrics(values, rows, (*notes, *_notes(rows, values, labelled, multi_label)))


def import_sklearn_metrics() -> Any:
    """Import scikit-learn's metrics.

    Returns:
        The module sklearn.metrics.

    Raises:
        ConfigError: where scikit-learn is absent, too old or broken.
    """
    purpose = "the metrics of a report need scikit-learn"
    return import_extra("eval", "scikit-learn", purpose, "sklearn.metrics")


def _single_label_values(
    sk: Any, targets: Array, y_pred: Array, scores: Floats
) -> dict[str, float]:
    """Compute the metrics of one label a photo; targets and y_pred are (N,) class numbers."""
    classes = np.arange(scores.shape[1])
    counts = np.bincount(targets, minlength=len(classes))
    values = {"accuracy": sk.accuracy_score(targets, y_pred)}
    if len(classes) > TOP:
        top = sk.top_k_accuracy_score(targets, scores, k=TOP, labels=classes)
        values["top_5_accuracy"] = top
    values |= _f_scores(sk, targets, y_pred, None)
    chance = 1 / np.count_nonzero(counts)
    # With a single class scikit-learn warns and returns 0.
    single = len(np.union1d(targets, y_pred)) == 1
    above = (values["balanced_accuracy"] - chance) / (1 - chance) if chance < 1 else NAN
    values |= {
        "weighted_accuracy": sk.accuracy_score(targets, y_pred, sample_weight=counts[targets]),
        "norm_macro_recall": above if np.isnan(above) else max(0.0, above),
        "matthews_correlation": 0.0 if single else sk.matthews_corrcoef(targets, y_pred),
        "log_loss": sk.log_loss(targets, scores, labels=classes),
    }
    return {name: float(value) for name, value in values.items()}


def _multi_label_values(
    sk: Any, y_true: Array, y_pred: Array, labelled: Array, scores: Floats
) -> dict[str, float]:
    """Compute the metrics of several labels a photo.

    An unlabelled class is neither true nor predicted, so that no metric counts it.
    """
    classes = np.arange(y_true.shape[1])
    pairs = _widen(y_true), _widen(y_pred)
    values = {"accuracy": sk.accuracy_score(*pairs)} | _f_scores(sk, *pairs, classes)
    for average in ("samples", "micro", "macro", "weighted"):
        name = "iou" if average == "samples" else f"iou_{average}"
        values[name] = sk.jaccard_score(*pairs, labels=classes, average=average, zero_division=0)
    values["log_loss"] = sk.log_loss(y_true[labelled], scores[labelled], labels=[False, True])
    return {name: float(value) for name, value in values.items()}


def _f_scores(sk: Any, y_true: Array, y_pred: Array, classes: Array | None) -> dict[str, float]:
    """Compute f1, precision and recall; None averages over the classes that occur."""
    values = {}
    for average in ("micro", "macro", "weighted"):
        for name in ("f1", "precision", "recall"):
            score = getattr(sk, f"{name}_score")
            values[f"{name}_score_{average}"] = score(
                y_true, y_pred, labels=classes, average=average, zero_division=0
            )
    return values | {"balanced_accuracy": values["recall_score_macro"]}


def _widen(pairs: Array) -> Array:
    """Convert (N, C) bool to int, with an empty second column where C is 1.

    scikit-learn takes a single column for one label a photo. The list of classes keeps the empty
    column out of every average.
    """
    return np.pad(pairs.astype(int), ((0, 0), (0, int(pairs.shape[1] == 1))))


def _per_class(
    sk: Any, y_true: Array, y_pred: Array, labelled: Array, scores: Floats, labels: Sequence[str]
) -> tuple[ClassRow, ...]:
    """Compute a row for each class against the rest."""
    columns = sk.precision_recall_fscore_support(
        _widen(y_true), _widen(y_pred), labels=np.arange(len(labels)), zero_division=np.nan
    )
    rows = []
    for index, label in enumerate(labels):
        mask = labelled[:, index]
        has_class, score = y_true[mask, index], scores[mask, index]
        support = int(has_class.sum())
        precision, recall, f1 = (float(x[index]) for x in columns[:3])
        both = 0 < support < len(has_class)
        auc = float(sk.roc_auc_score(has_class, score)) if both else NAN
        ap = float(sk.average_precision_score(has_class, score)) if support else NAN
        counts = support, int(y_pred[:, index].sum()), len(has_class)
        rows.append(ClassRow(label, *counts, precision, recall, f1, auc, ap))
    return tuple(rows)


def _ranking(
    sk: Any,
    y_true: Array,
    labelled: Array,
    scores: Floats,
    rows: Sequence[ClassRow],
    multi_label: bool,
) -> dict[str, float]:
    """Compute AUC and average precision, pooled over all pairs and averaged over classes."""
    has_class, score = y_true[labelled], scores[labelled]
    both = 0 < has_class.sum() < len(has_class)
    values = {
        "AUC_micro": float(sk.roc_auc_score(has_class, score)) if both else NAN,
        "average_precision_score_micro": (
            float(sk.average_precision_score(has_class, score)) if has_class.any() else NAN
        ),
    }
    split = [row for row in rows if 0 < row.support < row.labelled]
    present = split if multi_label else [row for row in rows if row.support]
    for name, included in (("AUC", split), ("average_precision_score", present)):
        per_class = [getattr(row, name) for row in included]
        support = [row.support for row in included]
        weighted = float(np.average(per_class, weights=support)) if per_class else NAN
        values[f"{name}_macro"] = float(np.mean(per_class)) if per_class else NAN
        values[f"{name}_weighted"] = weighted
    return values


def _binary(
    sk: Any, y_true: Array, y_pred: Array, labelled: Array, row: ClassRow, index: int
) -> dict[str, float]:
    """Compute the metrics of the class of this index against the rest."""
    mask = labelled[:, index]
    has_class, predicted = y_true[mask, index].astype(int), y_pred[mask, index].astype(int)
    values = {
        f"{name}_score_binary": float(
            getattr(sk, f"{name}_score")(has_class, predicted, zero_division=0)
        )
        for name in ("f1", "precision", "recall")
    }
    ranking = {"AUC_binary": row.AUC, "average_precision_score_binary": row.average_precision_score}
    return values | ranking


def _notes(
    rows: Sequence[ClassRow], values: dict[str, float], labelled: Array, multi_label: bool
) -> list[str]:
    """Describe the classes and labels that the values leave out, a sentence each."""
    notes = []
    absent = [row.label for row in rows if not row.support]
    never = [row.label for row in rows if row.support and not row.predicted]
    full = [row.label for row in rows if row.support and row.support == row.labelled]
    total = len(rows)
    if absent:
        notes.append(
            f"{len(absent)} of {total} classes have no photo: {list_names(absent)}; their recall, "
            "AUC and average precision are undefined. F1, precision and recall average over the "
            "classes that have a photo or a prediction (as scikit-learn does by default), the "
            "others over those that have a photo"
        )
    if never:
        notes.append(f"{len(never)} of {total} classes are never predicted: {list_names(never)}")
    if full:
        notes.append(f"every photo has: {list_names(full)}; AUC of such a class is undefined")
    if not labelled.all():
        notes.append(
            f"{(~labelled).sum()} of {labelled.size} labels are unknown and are not counted"
        )
    undefined = [name for name, value in values.items() if np.isnan(value)]
    if undefined:
        needed = "a class that some photos have and some lack" if multi_label else "two classes"
        notes.append(f"undefined (NaN) without photos of {needed}: {', '.join(undefined)}")
    return notes


def list_names(names: Sequence[str]) -> str:
    """Join the first names, and count the others.

    Args:
        names: names to list.

    Returns:
        At most 8 names with commas between them, and "and N more" where there are others.
    """
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
