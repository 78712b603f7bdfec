"""Every metric beside scikit-learn's, called here as its name says, on sets of every kind."""

from __future__ import annotations

import builtins
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from vitlib import metrics
from vitlib.errors import ConfigError

Single = tuple[np.ndarray, np.ndarray]
AVERAGES = ("micro", "macro", "weighted")


def single(
    count: int, classes: int, *, of: int | None = None, ties: bool = False, seed: int = 0,
    dtype: type = np.float32,
) -> Single:  # fmt: skip
    """Targets and softmax scores; of: only so many classes occur; ties: few distinct scores."""
    random = np.random.default_rng(seed)
    targets = random.integers(0, of or classes, count)
    logits = random.normal(size=(count, classes))
    logits[np.arange(count), targets] += 1.5
    if ties:
        logits = logits.round()
    scores = np.exp(logits)
    return targets, (scores / scores.sum(axis=1, keepdims=True)).astype(dtype)


def several(
    count: int, classes: int, *, of: int | None = None, ties: bool = False, seed: int = 0,
    unknown: float = 0, dtype: type = np.float32,
) -> Single:  # fmt: skip
    """Targets (N, C) and sigmoid scores."""
    random = np.random.default_rng(seed)
    targets = (random.random((count, classes)) < 0.3).astype(np.float32)
    targets[:, of or classes :] = 0
    logits = random.normal(size=(count, classes)) * 2 - 1 + 2 * targets
    scores = 1 / (1 + np.exp(-(logits.round() if ties else logits)))
    targets[random.random(targets.shape) < unknown] = np.nan
    return targets, scores.astype(dtype)


def one_label(targets: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """What scikit-learn says, called with the definitions of the reports."""
    classes, said = np.arange(scores.shape[1]), scores.argmax(axis=1)
    present = np.unique(targets)
    counts = np.bincount(targets, minlength=len(classes))
    hot = np.eye(len(classes), dtype=int)[targets]
    found = {
        "accuracy": sk.accuracy_score(targets, said),
        "balanced_accuracy": sk.recall_score(targets, said, average="macro", zero_division=0),
        "weighted_accuracy": sk.accuracy_score(targets, said, sample_weight=counts[targets]),
        "log_loss": sk.log_loss(targets, scores, labels=classes),
        "AUC_micro": sk.roc_auc_score(hot, scores, average="micro"),
        "average_precision_score_micro": sk.average_precision_score(hot, scores, average="micro"),
    }
    with warnings.catch_warnings():  # of a single class, for which it is 0
        warnings.simplefilter("ignore")
        found["matthews_correlation"] = sk.matthews_corrcoef(targets, said)
    chance, recall = 1 / len(present), found["balanced_accuracy"]
    found["norm_macro_recall"] = np.nan if chance == 1 else max(0, (recall - chance) / (1 - chance))
    if len(classes) > 5:
        found["top_5_accuracy"] = sk.top_k_accuracy_score(targets, scores, k=5, labels=classes)
    for average in AVERAGES:
        for name in ("f1", "precision", "recall"):
            score = getattr(sk, f"{name}_score")(targets, said, average=average, zero_division=0)
            found[f"{name}_score_{average}"] = score
    for average in ("macro", "weighted"):
        shown = hot[:, present], scores[:, present]
        split = len(present) > 1
        found[f"AUC_{average}"] = sk.roc_auc_score(*shown, average=average) if split else np.nan
        found[f"average_precision_score_{average}"] = sk.average_precision_score(
            *shown, average=average
        )
    return found


def many_labels(targets: np.ndarray, scores: np.ndarray, threshold: Any) -> dict[str, float]:
    """The same for a matrix of 0 and 1, of two columns or more."""
    true, said = targets.astype(int), (scores >= threshold).astype(int)
    found = {
        "accuracy": sk.accuracy_score(true, said),
        "balanced_accuracy": sk.recall_score(true, said, average="macro", zero_division=0),
        "log_loss": np.mean(
            [sk.log_loss(t, s, labels=[0, 1]) for t, s in zip(true.T, scores.T, strict=True)]
        ),
        "iou": sk.jaccard_score(true, said, average="samples", zero_division=0),
    }
    for average in AVERAGES:
        for name in ("f1", "precision", "recall", "jaccard"):
            score = getattr(sk, f"{name}_score")(true, said, average=average, zero_division=0)
            found[f"iou_{average}" if name == "jaccard" else f"{name}_score_{average}"] = score
    split = [c for c in range(true.shape[1]) if len(np.unique(true[:, c])) == 2]
    for average in AVERAGES:
        shown = (true, scores) if average == "micro" else (true[:, split], scores[:, split])
        undefined = len(np.unique(true)) < 2 if average == "micro" else not split
        for name, score in (
            ("AUC", sk.roc_auc_score),
            ("average_precision_score", sk.average_precision_score),
        ):
            value = np.nan if undefined else score(*shown, average=average)
            found[f"{name}_{average}"] = value
    if (
        true.all()
    ):  # every photo has every class: the micro average precision is defined all the same
        found["average_precision_score_micro"] = 1.0
    return found


def ece(confidence: np.ndarray, right: np.ndarray) -> float:
    """Guo et al. 1706.04599, equation 3, photo by photo."""
    total = 0.0
    for m in range(1, 16):
        inside = [
            i for i, c in enumerate(confidence) if (m - 1) / 15 < c <= m / 15 or (m == 1 and c == 0)
        ]
        if inside:
            gap = np.mean([right[i] for i in inside]) - np.mean([confidence[i] for i in inside])
            total += len(inside) / len(confidence) * abs(gap)
    return total


def same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6, rel=1e-6, nan_ok=True), name
        assert isinstance(found[name], float), name


SETS: dict[str, Callable[[], Single]] = {
    "two classes": lambda: single(60, 2),
    "four classes": lambda: single(134, 4, dtype=np.float64),
    "ten classes, six of which occur": lambda: single(200, 10, of=6),
    "ten classes, one of which occurs": lambda: single(30, 10, of=1),
    "one of two classes occurs": lambda: single(30, 2, of=1),
    "ties": lambda: single(300, 8, ties=True),
    "ties among absent classes": lambda: single(50, 12, of=3, ties=True, seed=3),
    "one photo": lambda: single(1, 7),
    "all scores equal": lambda: (np.arange(20) % 7, np.full((20, 7), 1 / 7, np.float32)),
    "certain": lambda: (np.array([0, 1, 2, 2]), np.eye(3, dtype=np.float32)[[0, 1, 2, 1]]),
}


@pytest.mark.parametrize("kind", SETS)
def test_one_label_equals_scikit_learn(kind: str) -> None:
    targets, scores = SETS[kind]()
    expected = one_label(targets, scores)
    labels = [f"thing {c}" for c in range(scores.shape[1])]
    found = metrics.every(targets, scores, labels, multi_label=False)
    right = scores.argmax(axis=1) == targets
    expected["expected_calibration_error"] = ece(scores.max(axis=1), right)
    same(found.values, expected)
    fast = metrics.quick(targets, scores, multi_label=False)
    assert {"accuracy", "f1_score_macro", "recall_score_weighted", "log_loss"} <= fast.keys()
    same(fast, {name: expected[name] for name in fast})
    rows(found, targets[:, None] == np.arange(len(labels)), scores.argmax(axis=1), scores)
    matrix = metrics.confusion_matrix(targets, scores, multi_label=False)
    assert (
        matrix == sk.confusion_matrix(targets, scores.argmax(axis=1), labels=np.arange(len(labels)))
    ).all()


def rows(found: metrics.Metrics, true: np.ndarray, answers: np.ndarray, scores: np.ndarray) -> None:
    """The per-class table, one class at a time against the rest."""
    for index, row in enumerate(found.per_class):
        has = true[:, index].astype(int)
        said = (answers if answers.ndim == 2 else answers[:, None] == np.arange(len(true[0])))[
            :, index
        ].astype(int)
        for name in ("precision", "recall", "f1"):
            value = getattr(sk, f"{name}_score")(has, said, zero_division=np.nan)
            ours = row.f1_score if name == "f1" else getattr(row, name)
            assert ours == pytest.approx(value, nan_ok=True), (row.label, name)
        assert (row.support, row.predicted, row.labelled) == (has.sum(), said.sum(), len(has))
        if len(np.unique(has)) == 2:
            assert pytest.approx(sk.roc_auc_score(has, scores[:, index])) == row.AUC
        else:
            assert np.isnan(row.AUC)
        if has.any():
            ap = sk.average_precision_score(has, scores[:, index])
            assert row.average_precision_score == pytest.approx(ap)
        else:
            assert np.isnan(row.average_precision_score)


MATRICES: dict[str, Callable[[], Single]] = {
    "four classes": lambda: several(128, 4),
    "six of ten occur": lambda: several(90, 10, of=6, dtype=np.float64),
    "one of two occurs": lambda: several(40, 2, of=1),
    "ties": lambda: several(200, 5, ties=True),
    "no label at all": lambda: several(20, 3, of=-3),
    "every label": lambda: (np.ones((9, 3), np.float32), several(9, 3)[1]),
    "one photo": lambda: several(1, 6, seed=2),
    "certain": lambda: (np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[[0, 2, 2]]),
}


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("threshold", [0.5, "each"])
def test_several_labels_equal_scikit_learn(kind: str, threshold: Any) -> None:
    targets, scores = MATRICES[kind]()
    if threshold == "each":
        threshold = np.linspace(0.2, 0.8, scores.shape[1])
    expected = many_labels(targets, scores, threshold)
    labels = [f"thing {c}" for c in range(scores.shape[1])]
    found = metrics.every(targets, scores, labels, True, threshold)
    expected["expected_calibration_error"] = ece(scores.ravel(), targets.ravel())
    same(found.values, expected)
    fast = metrics.quick(targets, scores, True, threshold)
    assert {"accuracy", "iou", "iou_weighted", "f1_score_macro", "log_loss"} <= fast.keys()
    same(fast, {name: expected[name] for name in fast})
    said = scores >= threshold
    rows(found, targets == 1, said, scores)
    matrix = metrics.confusion_matrix(targets, scores, True, threshold)
    theirs = sk.multilabel_confusion_matrix(targets.astype(int), said.astype(int))
    assert (matrix == theirs).all()


def test_unknown_labels_count_nowhere() -> None:
    targets, scores = several(150, 4, unknown=0.3, seed=5)
    targets[7] = np.nan  # this photo has no labels
    known, labels = ~np.isnan(targets), list("abcd")
    found = metrics.every(targets, scores, labels, True)
    true, said = targets == 1, scores >= 0.5
    for index, row in enumerate(found.per_class):
        there = known[:, index]
        args = true[there, index].astype(int), said[there, index].astype(int)
        assert row.f1_score == pytest.approx(sk.f1_score(*args))
        assert pytest.approx(sk.roc_auc_score(args[0], scores[there, index])) == row.AUC
        assert row.labelled == there.sum()
    assert found.values["f1_score_macro"] == pytest.approx(
        np.mean([row.f1_score for row in found.per_class])
    )
    pooled = true[known].astype(int), said[known].astype(int)
    assert found.values["f1_score_micro"] == pytest.approx(sk.f1_score(*pooled))
    assert found.values["AUC_micro"] == pytest.approx(sk.roc_auc_score(pooled[0], scores[known]))
    assert found.values["log_loss"] == pytest.approx(
        sk.log_loss(pooled[0], scores[known]), rel=1e-6
    )
    photos = [i for i in range(150) if known[i].any()]
    exact = [(true[i] == said[i])[known[i]].all() for i in photos]
    assert found.values["accuracy"] == pytest.approx(np.mean(exact))
    each = [
        sk.jaccard_score(
            true[i][known[i]].astype(int), said[i][known[i]].astype(int), zero_division=0
        )
        for i in photos
    ]
    assert found.values["iou"] == pytest.approx(np.mean(each))
    fast = metrics.quick(targets, scores, True)
    same(fast, {name: found.values[name] for name in fast})
    lost = int((~known.any(axis=1)).sum())
    notes = "\n".join(found.notes)
    assert f"{lost} photos are left out: they have no labels" in notes
    assert "labels are unknown and are not counted" in notes
    matrix = metrics.confusion_matrix(targets, scores, True)
    assert (matrix.sum(axis=(1, 2)) == known.sum(axis=0)).all()


def test_a_head_of_one_class() -> None:
    targets, scores = several(60, 1)
    found = metrics.every(targets, scores, ["a"], True)
    has, said = targets[:, 0].astype(int), (scores[:, 0] >= 0.5).astype(int)
    for average in AVERAGES:
        assert found.values[f"f1_score_{average}"] == pytest.approx(sk.f1_score(has, said))
        assert found.values[f"iou_{average}"] == pytest.approx(sk.jaccard_score(has, said))
        assert found.values[f"AUC_{average}"] == pytest.approx(sk.roc_auc_score(has, scores[:, 0]))
    assert found.values["accuracy"] == pytest.approx(sk.accuracy_score(has, said))
    fast = metrics.quick(targets, scores, True)
    same(fast, {name: found.values[name] for name in fast})
    with pytest.raises(ConfigError, match="two classes or more"):
        metrics.quick(np.zeros(3, int), np.ones((3, 1)), False)


@pytest.mark.parametrize("multi_label", [False, True])
def test_one_class_against_the_rest(multi_label: bool) -> None:
    targets, scores = several(80, 3) if multi_label else single(80, 3)
    found = metrics.every(targets, scores, list("abc"), multi_label, positive=1).values
    has = (targets[:, 1] if multi_label else targets == 1).astype(int)
    said = (scores[:, 1] >= 0.5 if multi_label else scores.argmax(axis=1) == 1).astype(int)
    for name in ("f1", "precision", "recall"):
        expected = getattr(sk, f"{name}_score")(has, said)
        assert found[f"{name}_score_binary"] == pytest.approx(expected)
    assert found["AUC_binary"] == pytest.approx(sk.roc_auc_score(has, scores[:, 1]))
    assert found["average_precision_score_binary"] == pytest.approx(
        sk.average_precision_score(has, scores[:, 1])
    )


def test_what_is_undefined_is_said() -> None:
    targets, scores = single(30, 10, of=1)
    labels = [f"thing {c}" for c in range(10)]
    found = metrics.every(targets, scores, labels, False)
    notes = "\n".join(found.notes)
    assert np.isnan(found.values["AUC_macro"])
    assert "AUC_macro, AUC_weighted" in notes
    assert "norm_macro_recall" in notes
    assert "9 of 10 classes have no photo: thing 1, thing 2" in notes
    assert "and 1 more" in notes
    assert "every photo has: thing 0" in notes
    full = metrics.every(*single(200, 3), list("abc"), False)
    assert full.notes == ()
    never = metrics.every(
        np.array([0, 1]), np.array([[0.9, 0.1], [0.9, 0.1]], np.float32), list("ab"), False
    )
    assert "1 of 2 classes are never predicted: b" in "\n".join(never.notes)
    assert np.isnan(never.per_class[1].precision)


def test_weights_are_photos_taken_again() -> None:
    random = np.random.default_rng(1)
    for multi_label, (targets, scores) in ((False, single(50, 7)), (True, several(50, 4))):
        taken = random.integers(0, 50, 50)
        rows_ = metrics.per_photo(targets, scores, multi_label)
        weighed = metrics.summary(rows_, np.bincount(taken, minlength=50).astype(float))
        same(weighed, metrics.quick(targets[taken], scores[taken], multi_label))


def test_reliability_bins() -> None:
    found = metrics.reliability(np.array([0.0, 0.1, 0.2, 0.5, 1.0]), np.array([0, 0, 1, 1, 1]), 5)
    assert found.counts.tolist() == [3, 0, 1, 0, 1]  # a bin holds its upper end
    assert found.confidence[0] == pytest.approx(0.1)
    assert np.isnan(found.accuracy[1])
    assert found.error == pytest.approx(3 / 5 * abs(1 / 3 - 0.1) + 1 / 5 * 0.5)


@pytest.mark.parametrize("multi_label", [False, True])
def test_accuracy_table(multi_label: bool) -> None:
    targets, scores = several(40, 3, ties=True, unknown=0.2) if multi_label else single(40, 3)
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
            has = targets[:, c] if multi_label else (targets == c)
            for k, limit in enumerate(data[f"{kind}_thresholds"]):
                over = scores[:, c].astype(float) >= limit
                expected = [
                    (over & (has == 1)).sum(), (over & (has == 0)).sum(),
                    (~over & (has == 0)).sum(), (~over & (has == 1)).sum(),
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
def test_what_cannot_be_measured(
    targets: np.ndarray, scores: np.ndarray, multi_label: bool, match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        metrics.quick(targets, scores, multi_label)
    with pytest.raises(ConfigError, match=match):
        metrics.every(targets, scores, list("abc"), multi_label)


def test_labels_must_fit() -> None:
    with pytest.raises(ConfigError, match="2 labels for 4 classes"):
        metrics.every(*single(9, 4), list("ab"), False)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **rest: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"pip install 'vitlib\[eval\]'"):
        metrics.every(*single(9, 4), list("abcd"), False)
    assert metrics.quick(*single(9, 4), False)["accuracy"] >= 0
