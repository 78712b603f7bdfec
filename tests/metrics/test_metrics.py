"""Tests of all metrics against scikit-learn, on sets of many kinds."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from fixtures.metric_sets import (
    TargetsAndScores,
    make_multi_label_set,
    make_single_label_set,
)
from vitlib import metrics
from vitlib.errors import ConfigError

AVERAGES = ("micro", "macro", "weighted")


def single_label_metrics(y_true: np.ndarray, y_score: np.ndarray) -> dict[str, float]:
    """Compute the metrics by scikit-learn, by the definitions that reports use."""
    classes, y_pred = np.arange(y_score.shape[1]), y_score.argmax(axis=1)
    present = np.unique(y_true)
    counts = np.bincount(y_true, minlength=len(classes))
    one_hot = np.eye(len(classes), dtype=int)[y_true]
    average_precision = sk.average_precision_score
    expected = {
        "accuracy": sk.accuracy_score(y_true, y_pred),
        "balanced_accuracy": sk.recall_score(y_true, y_pred, average="macro", zero_division=0),
        "weighted_accuracy": sk.accuracy_score(y_true, y_pred, sample_weight=counts[y_true]),
        "log_loss": sk.log_loss(y_true, y_score, labels=classes),
        "AUC_micro": sk.roc_auc_score(one_hot, y_score, average="micro"),
        "average_precision_score_micro": average_precision(one_hot, y_score, average="micro"),
    }
    with warnings.catch_warnings():  # scikit-learn warns of a single class and returns 0
        warnings.simplefilter("ignore")
        expected["matthews_correlation"] = sk.matthews_corrcoef(y_true, y_pred)
    chance, recall = 1 / len(present), expected["balanced_accuracy"]
    expected["norm_macro_recall"] = (
        np.nan if chance == 1 else max(0, (recall - chance) / (1 - chance))
    )
    if len(classes) > 5:
        expected["top_5_accuracy"] = sk.top_k_accuracy_score(y_true, y_score, k=5, labels=classes)
    for average in AVERAGES:
        for name in ("f1", "precision", "recall"):
            score = getattr(sk, f"{name}_score")(y_true, y_pred, average=average, zero_division=0)
            expected[f"{name}_score_{average}"] = score
    for average in ("macro", "weighted"):
        pair = one_hot[:, present], y_score[:, present]
        auc = sk.roc_auc_score(*pair, average=average) if len(present) > 1 else np.nan
        expected[f"AUC_{average}"] = auc
        expected[f"average_precision_score_{average}"] = average_precision(*pair, average=average)
    return expected


def multi_label_metrics(
    y_true: np.ndarray, y_score: np.ndarray, threshold: Any
) -> dict[str, float]:
    """Compute the metrics of two labels or more by scikit-learn, without unknown labels."""
    y_true, y_pred = y_true.astype(int), (y_score >= threshold).astype(int)
    columns = zip(y_true.T, y_score.T, strict=True)
    expected = {
        "accuracy": sk.accuracy_score(y_true, y_pred),
        "balanced_accuracy": sk.recall_score(y_true, y_pred, average="macro", zero_division=0),
        "log_loss": np.mean([sk.log_loss(*column, labels=[0, 1]) for column in columns]),
        "iou": sk.jaccard_score(y_true, y_pred, average="samples", zero_division=0),
    }
    for average in AVERAGES:
        for name in ("f1", "precision", "recall", "jaccard"):
            score = getattr(sk, f"{name}_score")(y_true, y_pred, average=average, zero_division=0)
            expected[f"iou_{average}" if name == "jaccard" else f"{name}_score_{average}"] = score
    # Both curves of a class need photos with it and photos without it.
    defined = [c for c in range(y_true.shape[1]) if len(np.unique(y_true[:, c])) == 2]
    for average in AVERAGES:
        is_micro = average == "micro"
        pair = (y_true, y_score) if is_micro else (y_true[:, defined], y_score[:, defined])
        is_undefined = len(np.unique(y_true)) < 2 if is_micro else not defined
        for name, score in (
            ("AUC", sk.roc_auc_score),
            ("average_precision_score", sk.average_precision_score),
        ):
            expected[f"{name}_{average}"] = (
                np.nan if is_undefined else score(*pair, average=average)
            )
    if y_true.all():  # The micro average precision needs no photo without a class.
        expected["average_precision_score_micro"] = 1.0
    return expected


def calibration_error(confidence: np.ndarray, is_correct: np.ndarray) -> float:
    """Compute equation 3 of Guo et al. (1706.04599), photo by photo."""
    total = 0.0
    for m in range(1, 16):
        photos = [
            i for i, c in enumerate(confidence) if (m - 1) / 15 < c <= m / 15 or (m == 1 and c == 0)
        ]
        if photos:
            accuracy = np.mean([is_correct[i] for i in photos])
            gap = accuracy - np.mean([confidence[i] for i in photos])
            total += len(photos) / len(confidence) * abs(gap)
    return total


def assert_close(actual: dict[str, float], expected: dict[str, float]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, abs=1e-6, rel=1e-6, nan_ok=True), name
        assert isinstance(actual[name], float), name


SINGLE_LABEL_SETS: dict[str, Callable[[], TargetsAndScores]] = {
    "two classes": lambda: make_single_label_set(60, 2),
    "four classes": lambda: make_single_label_set(134, 4, dtype=np.float64),
    "ten classes, six of which occur": lambda: make_single_label_set(200, 10, occurring=6),
    "ten classes, one of which occurs": lambda: make_single_label_set(30, 10, occurring=1),
    "one of two classes occurs": lambda: make_single_label_set(30, 2, occurring=1),
    "ties": lambda: make_single_label_set(300, 8, ties=True),
    "ties among absent classes": lambda: make_single_label_set(
        50, 12, occurring=3, ties=True, seed=3
    ),
    "one photo": lambda: make_single_label_set(1, 7),
    "all scores equal": lambda: (np.arange(20) % 7, np.full((20, 7), 1 / 7, np.float32)),
    "certain": lambda: (np.array([0, 1, 2, 2]), np.eye(3, dtype=np.float32)[[0, 1, 2, 1]]),
}


@pytest.mark.parametrize("kind", SINGLE_LABEL_SETS)
def test_single_label_metrics_equal_scikit_learn(kind: str) -> None:
    y_true, y_score = SINGLE_LABEL_SETS[kind]()
    y_pred, classes = y_score.argmax(axis=1), np.arange(y_score.shape[1])
    expected = single_label_metrics(y_true, y_score)
    error = calibration_error(y_score.max(axis=1), y_pred == y_true)
    expected["expected_calibration_error"] = error
    labels = [f"thing {c}" for c in classes]
    result = metrics.every(y_true, y_score, labels, multi_label=False)
    assert_close(result.values, expected)
    quick = metrics.quick(y_true, y_score, multi_label=False)
    assert {"accuracy", "f1_score_macro", "recall_score_weighted", "log_loss"} <= quick.keys()
    assert_close(quick, {name: expected[name] for name in quick})
    check_class_rows(result, y_true[:, None] == classes, y_pred[:, None] == classes, y_score)
    matrix = metrics.confusion_matrix(y_true, y_score, multi_label=False)
    assert (matrix == sk.confusion_matrix(y_true, y_pred, labels=classes)).all()


def check_class_rows(
    result: metrics.Metrics, y_true: np.ndarray, y_pred: np.ndarray, y_score: np.ndarray
) -> None:
    """Check the table of classes against scikit-learn, each class against the rest."""
    for index, row in enumerate(result.per_class):
        has_class, is_predicted = y_true[:, index].astype(int), y_pred[:, index].astype(int)
        for name in ("precision", "recall", "f1"):
            expected = getattr(sk, f"{name}_score")(has_class, is_predicted, zero_division=np.nan)
            actual = row.f1_score if name == "f1" else getattr(row, name)
            assert actual == pytest.approx(expected, nan_ok=True), (row.label, name)
        counts = has_class.sum(), is_predicted.sum(), len(has_class)
        assert (row.support, row.predicted, row.labelled) == counts
        if len(np.unique(has_class)) == 2:
            assert pytest.approx(sk.roc_auc_score(has_class, y_score[:, index])) == row.AUC
        else:
            assert np.isnan(row.AUC)
        if has_class.any():
            expected = sk.average_precision_score(has_class, y_score[:, index])
            assert row.average_precision_score == pytest.approx(expected)
        else:
            assert np.isnan(row.average_precision_score)


MULTI_LABEL_SETS: dict[str, Callable[[], TargetsAndScores]] = {
    "four classes": lambda: make_multi_label_set(128, 4),
    "six of ten occur": lambda: make_multi_label_set(90, 10, occurring=6, dtype=np.float64),
    "one of two occurs": lambda: make_multi_label_set(40, 2, occurring=1),
    "ties": lambda: make_multi_label_set(200, 5, ties=True),
    "no label at all": lambda: make_multi_label_set(20, 3, occurring=-3),
    "every label": lambda: (np.ones((9, 3), np.float32), make_multi_label_set(9, 3)[1]),
    "one photo": lambda: make_multi_label_set(1, 6, seed=2),
    "certain": lambda: (np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[[0, 2, 2]]),
}


@pytest.mark.parametrize("kind", MULTI_LABEL_SETS)
@pytest.mark.parametrize("threshold", [0.5, "each"])
def test_multi_label_metrics_equal_scikit_learn(kind: str, threshold: Any) -> None:
    y_true, y_score = MULTI_LABEL_SETS[kind]()
    if threshold == "each":
        threshold = np.linspace(0.2, 0.8, y_score.shape[1])
    expected = multi_label_metrics(y_true, y_score, threshold)
    expected["expected_calibration_error"] = calibration_error(y_score.ravel(), y_true.ravel())
    labels = [f"thing {c}" for c in range(y_score.shape[1])]
    result = metrics.every(y_true, y_score, labels, True, threshold)
    assert_close(result.values, expected)
    quick = metrics.quick(y_true, y_score, True, threshold)
    assert {"accuracy", "iou", "iou_weighted", "f1_score_macro", "log_loss"} <= quick.keys()
    assert_close(quick, {name: expected[name] for name in quick})
    y_pred = y_score >= threshold
    check_class_rows(result, y_true == 1, y_pred, y_score)
    matrix = metrics.confusion_matrix(y_true, y_score, True, threshold)
    assert (matrix == sk.multilabel_confusion_matrix(y_true.astype(int), y_pred.astype(int))).all()


def test_metrics_exclude_unknown_labels() -> None:
    targets, y_score = make_multi_label_set(150, 4, unknown=0.3, seed=5)
    targets[7] = np.nan  # this photo has no labels
    is_labelled, labels = ~np.isnan(targets), list("abcd")
    result = metrics.every(targets, y_score, labels, True)
    y_true, y_pred = (targets == 1).astype(int), (y_score >= 0.5).astype(int)
    for index, row in enumerate(result.per_class):
        mask = is_labelled[:, index]
        pair = y_true[mask, index], y_pred[mask, index]
        assert row.f1_score == pytest.approx(sk.f1_score(*pair))
        assert pytest.approx(sk.roc_auc_score(pair[0], y_score[mask, index])) == row.AUC
        assert row.labelled == mask.sum()
    pooled, pooled_score = (y_true[is_labelled], y_pred[is_labelled]), y_score[is_labelled]
    photos = [i for i in range(150) if is_labelled[i].any()]
    pairs = [(y_true[i][is_labelled[i]], y_pred[i][is_labelled[i]]) for i in photos]
    expected = {
        "f1_score_macro": np.mean([row.f1_score for row in result.per_class]),
        "f1_score_micro": sk.f1_score(*pooled),
        "AUC_micro": sk.roc_auc_score(pooled[0], pooled_score),
        "log_loss": sk.log_loss(pooled[0], pooled_score),
        "accuracy": np.mean([(true == predicted).all() for true, predicted in pairs]),
        "iou": np.mean([sk.jaccard_score(*pair, zero_division=0) for pair in pairs]),
    }
    for name, value in expected.items():
        assert result.values[name] == pytest.approx(value, rel=1e-6), name
    quick = metrics.quick(targets, y_score, True)
    assert_close(quick, {name: result.values[name] for name in quick})
    num_unlabelled = int((~is_labelled.any(axis=1)).sum())
    notes = "\n".join(result.notes)
    assert f"{num_unlabelled} photos are left out: they have no labels" in notes
    assert "labels are unknown and are not counted" in notes
    matrix = metrics.confusion_matrix(targets, y_score, True)
    assert (matrix.sum(axis=(1, 2)) == is_labelled.sum(axis=0)).all()


def test_multi_label_metrics_of_single_class_equal_scikit_learn() -> None:
    targets, scores = make_multi_label_set(60, 1)
    result = metrics.every(targets, scores, ["a"], True)
    y_true, y_score = targets[:, 0].astype(int), scores[:, 0]
    y_pred = (y_score >= 0.5).astype(int)
    for average in AVERAGES:
        assert result.values[f"f1_score_{average}"] == pytest.approx(sk.f1_score(y_true, y_pred))
        assert result.values[f"iou_{average}"] == pytest.approx(sk.jaccard_score(y_true, y_pred))
        assert result.values[f"AUC_{average}"] == pytest.approx(sk.roc_auc_score(y_true, y_score))
    assert result.values["accuracy"] == pytest.approx(sk.accuracy_score(y_true, y_pred))
    quick = metrics.quick(targets, scores, True)
    assert_close(quick, {name: result.values[name] for name in quick})
    with pytest.raises(ConfigError, match="two classes or more"):
        metrics.quick(np.zeros(3, int), np.ones((3, 1)), False)


@pytest.mark.parametrize("multi_label", [False, True])
def test_binary_metrics_of_positive_class_equal_scikit_learn(multi_label: bool) -> None:
    make_set = make_multi_label_set if multi_label else make_single_label_set
    targets, scores = make_set(80, 3)
    values = metrics.every(targets, scores, list("abc"), multi_label, positive=1).values
    y_true = (targets[:, 1] if multi_label else targets == 1).astype(int)
    y_pred = (scores[:, 1] >= 0.5 if multi_label else scores.argmax(axis=1) == 1).astype(int)
    for name in ("f1", "precision", "recall"):
        expected = getattr(sk, f"{name}_score")(y_true, y_pred)
        assert values[f"{name}_score_binary"] == pytest.approx(expected)
    assert values["AUC_binary"] == pytest.approx(sk.roc_auc_score(y_true, scores[:, 1]))
    expected = sk.average_precision_score(y_true, scores[:, 1])
    assert values["average_precision_score_binary"] == pytest.approx(expected)


def test_notes_name_undefined_metrics_and_classes() -> None:
    targets, scores = make_single_label_set(30, 10, occurring=1)
    labels = [f"thing {c}" for c in range(10)]
    result = metrics.every(targets, scores, labels, False)
    notes = "\n".join(result.notes)
    assert np.isnan(result.values["AUC_macro"])
    assert "AUC_macro, AUC_weighted" in notes
    assert "norm_macro_recall" in notes
    assert "9 of 10 classes have no photo: thing 1, thing 2" in notes
    assert "and 1 more" in notes
    assert "every photo has: thing 0" in notes
    complete = metrics.every(*make_single_label_set(200, 3), list("abc"), False)
    assert complete.notes == ()
    result = metrics.every(
        np.array([0, 1]), np.array([[0.9, 0.1], [0.9, 0.1]], np.float32), list("ab"), False
    )
    assert "1 of 2 classes are never predicted: b" in "\n".join(result.notes)
    assert np.isnan(result.per_class[1].precision)


@pytest.mark.parametrize("multi_label", [False, True])
def test_weights_equal_repeated_photos(multi_label: bool) -> None:
    make_set = make_multi_label_set if multi_label else make_single_label_set
    targets, scores = make_set(50, 4 if multi_label else 7)
    sample = np.random.default_rng(1).integers(0, 50, 50)
    counts = np.bincount(sample, minlength=50).astype(float)
    actual = metrics.summary(metrics.per_photo(targets, scores, multi_label), counts)
    assert_close(actual, metrics.quick(targets[sample], scores[sample], multi_label))


def test_reliability_bins_include_their_upper_end() -> None:
    result = metrics.reliability(np.array([0.0, 0.1, 0.2, 0.5, 1.0]), np.array([0, 0, 1, 1, 1]), 5)
    assert result.counts.tolist() == [3, 0, 1, 0, 1]
    assert result.confidence[0] == pytest.approx(0.1)
    assert np.isnan(result.accuracy[1])
    assert result.error == pytest.approx(3 / 5 * abs(1 / 3 - 0.1) + 1 / 5 * 0.5)


@pytest.mark.parametrize("multi_label", [False, True])
def test_accuracy_table_counts_true_and_false_positives(multi_label: bool) -> None:
    targets, scores = (
        make_multi_label_set(40, 3, ties=True, unknown=0.2)
        if multi_label
        else make_single_label_set(40, 3)
    )
    table = metrics.accuracy_table(targets, scores, list("abc"), multi_label)
    assert (table["schema_type"], table["schema_version"]) == ("accuracy_table", "1.0.1")
    data = table["data"]
    assert data["class_labels"] == list("abc")
    assert np.allclose(data["probability_thresholds"], np.linspace(0, 1, 100))
    assert np.allclose(
        data["percentile_thresholds"], np.percentile(scores, np.linspace(0, 100, 100))
    )
    for kind in ("probability", "percentile"):
        for c in range(3):
            y_true = targets[:, c] if multi_label else (targets == c)
            for k, threshold in enumerate(data[f"{kind}_thresholds"]):
                y_pred = scores[:, c].astype(float) >= threshold
                expected = [
                    (y_pred & (y_true == 1)).sum(), (y_pred & (y_true == 0)).sum(),
                    (~y_pred & (y_true == 0)).sum(), (~y_pred & (y_true == 1)).sum(),
                ]  # fmt: skip
                assert data[f"{kind}_tables"][c][k] == expected


@pytest.mark.parametrize(
    ("targets", "scores", "multi_label", "match"),
    [
        (np.zeros(0, int), np.zeros((0, 3)), False, "N, C > 0"),
        (np.zeros(2, int), np.zeros(2), False, r"expected \(N, C\) floats"),
        (np.zeros(2, int), np.zeros((2, 3), int), False, "floats"),
        (np.zeros(3, int), np.ones((2, 3)), False, r"targets \(3,\) for scores \(2, 3\)"),
        (np.zeros(2, int), np.ones((2, 3)), True, r"expected \(2, 3\)"),
        (np.array([0, 3]), np.ones((2, 3)), False, "beyond the 3 classes"),
        (np.array([0, -1]), np.ones((2, 3)), False, "beyond the 3 classes"),
        (np.full((2, 3), 2.0), np.ones((2, 3)), True, "expected 0, 1, or NaN"),
        (np.full((2, 3), np.nan), np.ones((2, 3)), True, "no target is labelled"),
        (
            np.array([0, 1]),
            np.array([[0.5, 0.5], [np.nan, 0.5]]),
            False,
            "1 of 2 rows .* the first at 1",
        ),
        (np.array([0, 1]), np.array([[0.5, 0.5], [3.0, 0.5]]), False, "not probabilities"),
    ],
)
def test_metrics_reject_invalid_targets_and_scores(
    targets: np.ndarray, scores: np.ndarray, multi_label: bool, match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        metrics.quick(targets, scores, multi_label)
    with pytest.raises(ConfigError, match=match):
        metrics.every(targets, scores, list("abc"), multi_label)


def test_metrics_reject_wrong_number_of_labels() -> None:
    with pytest.raises(ConfigError, match="2 labels for 4 classes"):
        metrics.every(*make_single_label_set(9, 4), list("ab"), False)


def test_quick_metrics_need_no_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sklearn", "sklearn.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'vitlib\[eval\]'"):
        metrics.every(*make_single_label_set(9, 4), list("abcd"), False)
    assert metrics.quick(*make_single_label_set(9, 4), False)["accuracy"] >= 0
