"""All metrics, by scikit-learn with the whole list of classes.

Shapes: N photos, C classes; true, said and known are (N, C) bool: whether a photo has a class, was
said to have it, and whether the truth is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vitlib.errors import ConfigError
from vitlib.metrics.numpy_backend import TOP, Array, Floats, checked, confidences, reliability

NAN = float("nan")
SAID = 8  # names in a note, then their number


class ClassRow(NamedTuple):
    """How one class does against the rest; NaN where its photos leave a number undefined."""

    label: str
    support: int  # photos that have it
    predicted: int  # photos that were said to have it
    known: int  # photos of which it is known whether they have it
    precision: float
    recall: float
    f1_score: float
    AUC: float
    average_precision_score: float


@dataclass(frozen=True)
class Metrics:
    """The answer of every()."""

    values: dict[str, float]
    per_class: tuple[ClassRow, ...]
    notes: tuple[str, ...]  # what is undefined or was left out, and why


def every(
    targets: Array,
    scores: Floats,
    labels: Sequence[str],
    multi_label: bool,
    threshold: float | Floats = 0.5,
    positive: int | None = None,
) -> Metrics:
    """All metrics, by scikit-learn with the whole list of classes: nothing drops out unsaid.

    Those of quick(), and AUC_ and average_precision_score_{micro,macro,weighted},
    expected_calibration_error; of one label a photo also weighted_accuracy, norm_macro_recall,
    matthews_correlation. labels: (C,) names. positive: of the class of this number against the
    rest, {f1,precision,recall,average_precision}_score_binary and AUC_binary.

    Raises ConfigError as quick() does, and without scikit-learn.
    """
    sk = scikit_learn()
    targets, scores, limits = checked(targets, scores, multi_label, threshold)
    if len(labels) != scores.shape[1]:
        raise ConfigError(f"{len(labels)} labels for {scores.shape[1]} classes: expected one each")
    if multi_label:
        kept = ~np.isnan(targets).all(axis=1)
        notes = [f"{(~kept).sum()} photos are left out: nothing is known of them"] * (
            not kept.all()
        )
        targets, scores = targets[kept], scores[kept]
        known = ~np.isnan(targets)
        true, said = targets == 1, known & (scores >= limits)
        values = _several(sk, true, said, known, scores)
    else:
        notes, answers = [], scores.argmax(axis=1)
        true, said = (x[:, None] == np.arange(len(labels)) for x in (targets, answers))
        known = np.ones(true.shape, bool)
        values = _one(sk, targets, answers, scores)
    rows = _per_class(sk, true, said, known, scores, labels)
    values |= _ranking(sk, true, known, scores, rows, multi_label)
    reliable = reliability(*confidences(targets, scores, multi_label))
    values["expected_calibration_error"] = reliable.error
    if positive is not None:
        values |= _binary(sk, true, said, known, rows[positive], positive)
    return Metrics(values, rows, (*notes, *_notes(rows, values, known, multi_label)))


def scikit_learn() -> Any:
    """Its metrics. Raises ConfigError where it is not installed."""
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ConfigError(
            "the metrics of a report need scikit-learn: pip install 'vitlib[eval]'"
        ) from error
    return metrics


def _one(sk: Any, targets: Array, answers: Array, scores: Floats) -> dict[str, float]:
    """Of one label a photo."""
    classes = np.arange(scores.shape[1])
    counts = np.bincount(targets, minlength=len(classes))
    values = {"accuracy": sk.accuracy_score(targets, answers)}
    if len(classes) > TOP:
        top = sk.top_k_accuracy_score(targets, scores, k=TOP, labels=classes)
        values["top_5_accuracy"] = top
    values |= _f_scores(sk, targets, answers, None)
    chance = 1 / np.count_nonzero(counts)
    alone = len(np.union1d(targets, answers)) == 1  # of which scikit-learn warns, and says 0
    above = (values["balanced_accuracy"] - chance) / (1 - chance) if chance < 1 else NAN
    values |= {
        "weighted_accuracy": sk.accuracy_score(targets, answers, sample_weight=counts[targets]),
        "norm_macro_recall": above if np.isnan(above) else max(0.0, above),
        "matthews_correlation": 0.0 if alone else sk.matthews_corrcoef(targets, answers),
        "log_loss": sk.log_loss(targets, scores, labels=classes),
    }
    return {name: float(value) for name, value in values.items()}


def _several(sk: Any, true: Array, said: Array, known: Array, scores: Floats) -> dict[str, float]:
    """Of several labels a photo. An unknown pair is neither true nor said: nothing counts it."""
    classes = np.arange(true.shape[1])
    true_, said_ = _wide(true), _wide(said)
    values = {"accuracy": sk.accuracy_score(true_, said_)} | _f_scores(sk, true_, said_, classes)
    for average in ("samples", "micro", "macro", "weighted"):
        name = "iou" if average == "samples" else f"iou_{average}"
        values[name] = sk.jaccard_score(
            true_, said_, labels=classes, average=average, zero_division=0
        )
    values["log_loss"] = sk.log_loss(true[known], scores[known], labels=[False, True])
    return {name: float(value) for name, value in values.items()}


def _f_scores(sk: Any, true: Array, said: Array, classes: Array | None) -> dict[str, float]:
    """classes None: those that occur, as scikit-learn chooses them."""
    found = {}
    for average in ("micro", "macro", "weighted"):
        for name in ("f1", "precision", "recall"):
            score = getattr(sk, f"{name}_score")
            found[f"{name}_score_{average}"] = score(
                true, said, labels=classes, average=average, zero_division=0
            )
    return found | {"balanced_accuracy": found["recall_score_macro"]}


def _wide(pairs: Array) -> Array:
    """(N, C) bool -> int, with a column more where C is 1, which would not pass for several labels;
    the list of classes keeps it out of every average."""
    return np.pad(pairs.astype(int), ((0, 0), (0, int(pairs.shape[1] == 1))))


def _per_class(
    sk: Any, true: Array, said: Array, known: Array, scores: Floats, labels: Sequence[str]
) -> tuple[ClassRow, ...]:
    """(N, C) bool each: whether a photo has the class, was said to have it, and which is known."""
    each = sk.precision_recall_fscore_support(
        _wide(true), _wide(said), labels=np.arange(len(labels)), zero_division=np.nan
    )
    rows = []
    for index, label in enumerate(labels):
        rest = known[:, index]
        has, sure = true[rest, index], scores[rest, index]
        support = int(has.sum())
        precision, recall, f1 = (float(x[index]) for x in each[:3])
        auc = float(sk.roc_auc_score(has, sure)) if 0 < support < len(has) else NAN
        ap = float(sk.average_precision_score(has, sure)) if support else NAN
        counts = support, int(said[:, index].sum()), len(has)
        rows.append(ClassRow(label, *counts, precision, recall, f1, auc, ap))
    return tuple(rows)


def _ranking(
    sk: Any, true: Array, known: Array, scores: Floats, rows: Sequence[ClassRow], multi_label: bool
) -> dict[str, float]:
    """AUC and average precision: of all pairs pooled, and the averages of the classes' own."""
    has, sure = true[known], scores[known]
    both = 0 < has.sum() < len(has)
    values = {
        "AUC_micro": float(sk.roc_auc_score(has, sure)) if both else NAN,
        "average_precision_score_micro": (
            float(sk.average_precision_score(has, sure)) if has.any() else NAN
        ),
    }
    split = [row for row in rows if 0 < row.support < row.known]
    there = split if multi_label else [row for row in rows if row.support]
    for name, chosen in (("AUC", split), ("average_precision_score", there)):
        each = [getattr(row, name) for row in chosen]
        weights = [row.support for row in chosen]
        values[f"{name}_macro"] = float(np.mean(each)) if each else NAN
        values[f"{name}_weighted"] = float(np.average(each, weights=weights)) if each else NAN
    return values


def _binary(
    sk: Any, true: Array, said: Array, known: Array, row: ClassRow, index: int
) -> dict[str, float]:
    """One class against the rest."""
    rest = known[:, index]
    has, answer = true[rest, index].astype(int), said[rest, index].astype(int)
    values = {
        f"{name}_score_binary": float(getattr(sk, f"{name}_score")(has, answer, zero_division=0))
        for name in ("f1", "precision", "recall")
    }
    ranking = {"AUC_binary": row.AUC, "average_precision_score_binary": row.average_precision_score}
    return values | ranking


def _notes(
    rows: Sequence[ClassRow], values: dict[str, float], known: Array, multi_label: bool
) -> list[str]:
    """What a reader of the numbers has to know."""
    notes = []
    absent = [row.label for row in rows if not row.support]
    silent = [row.label for row in rows if row.support and not row.predicted]
    full = [row.label for row in rows if row.support and row.support == row.known]
    total = len(rows)
    if absent:
        notes.append(
            f"{len(absent)} of {total} classes have no photo: {named(absent)}; their recall, AUC "
            "and average precision are undefined. F1, precision and recall average over the "
            "classes that have a photo or an answer (as scikit-learn does by default), the others "
            "over those that have a photo"
        )
    if silent:
        notes.append(f"{len(silent)} of {total} classes were never answered: {named(silent)}")
    if full:
        notes.append(f"every photo has: {named(full)}; AUC of such a class is undefined")
    if not known.all():
        notes.append(f"{(~known).sum()} of {known.size} labels are unknown and count nowhere")
    undefined = [name for name, value in values.items() if np.isnan(value)]
    if undefined:
        what = "a class that some photos have and some lack" if multi_label else "two classes"
        notes.append(f"undefined (NaN), as it takes photos of {what}: {', '.join(undefined)}")
    return notes


def named(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SAID} more" if len(names) > SAID else ""
    return ", ".join(names[:SAID]) + more
