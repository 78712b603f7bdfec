"""Tests of temperature, thresholds and intervals against direct searches."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn import metrics as sk

from vitlib.evaluate import fit
from vitlib.evaluate.intervals import bootstrap
from vitlib.evaluate.tuning import (
    apply_temperature,
    scores_to_logits,
    temperature,
    threshold,
    thresholds,
)
from vitlib.metrics import per_photo, quick


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_temperature_minimizes_loss(multi_label: bool, scale: float) -> None:
    random = np.random.default_rng(2)
    z = random.normal(size=(400, 5)) * 2
    if multi_label:
        targets = (random.random(z.shape) < 1 / (1 + np.exp(-z))).astype(np.float32)
        targets[random.random(z.shape) < 0.1] = np.nan
        scores = 1 / (1 + np.exp(-z * scale))
    else:
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        targets = np.array([random.choice(5, p=row) for row in p])
        scores = np.exp(z * scale) / np.exp(z * scale).sum(axis=1, keepdims=True)
    actual = temperature(targets, scores, multi_label)
    assert actual is not None

    def loss(log_t: float) -> float:
        return quick(targets, apply_temperature(scores, np.exp(log_t), multi_label), multi_label)[
            "log_loss"
        ]

    best = minimize_scalar(loss, bounds=(-3, 3), method="bounded")
    assert actual == pytest.approx(np.exp(best.x), rel=0.01)
    assert loss(np.log(actual)) <= best.fun + 1e-6
    assert actual == pytest.approx(scale, rel=0.25)  # targets are drawn at temperature 1


def test_temperature_acts_on_logits() -> None:
    z = np.random.default_rng(0).normal(size=(20, 4)) * 3
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    cooled = np.exp(z / 1.7) / np.exp(z / 1.7).sum(axis=1, keepdims=True)
    assert np.allclose(apply_temperature(p, 1.7, False), cooled, atol=1e-6)
    assert np.allclose(
        apply_temperature(1 / (1 + np.exp(-z)), 1.7, True), 1 / (1 + np.exp(-z / 1.7))
    )
    assert (apply_temperature(p.astype(np.float32), 1, False) == p.astype(np.float32)).all()
    for certain in (np.eye(3, dtype=np.float32), np.zeros((2, 3), np.float32)):
        for multi_label in (False, True):
            assert np.isfinite(scores_to_logits(certain, multi_label)).all()
            assert np.isfinite(apply_temperature(certain, 0.05, multi_label)).all()


def test_temperature_is_one_without_a_minimum() -> None:
    scores = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    assert temperature(np.array([0, 1]), scores, False) is None  # the loss falls to temperature 0
    assert temperature(np.array([1, 0]), scores, False) is None  # the loss falls to infinity
    assert temperature(np.array([0, 1]), np.full((2, 2), 0.5, np.float32), False) is None
    calibration = fit(np.array([0, 1]), scores, ("a", "b"), False)
    assert calibration.temperature == 1
    assert "temperature stays 1" in calibration.notes[0]


def test_threshold_maximizes_f1() -> None:
    random = np.random.default_rng(3)
    for round_ in range(60):
        count = int(random.integers(1, 30))
        y_true = random.random(count) < 0.4
        y_true[0] = True
        y_score = random.random(count).astype(np.float32)
        if round_ % 2:
            y_score = y_score.round(1)
        actual = threshold(y_true, y_score)
        grid = np.unique(np.concatenate([np.linspace(0, 1, 401), y_score.astype(float), [actual]]))
        y_pred = y_score >= grid[:, None]
        f1 = 2 * (y_pred & y_true).sum(axis=1) / (y_pred.sum(axis=1) + y_true.sum())
        best = f1.max()
        assert sk.f1_score(y_true, y_score >= actual) == pytest.approx(best)
        if f1[grid == 0.5][0] == best:
            assert actual == 0.5


def test_threshold_is_nearest_to_half_among_equals() -> None:
    y_score = np.array([0.9, 0.8, 0.2, 0.1], np.float32)
    assert threshold(np.array([True, True, False, False]), y_score) == 0.5
    assert threshold(np.array([True, False, False, False]), y_score) == pytest.approx(0.85)
    assert threshold(np.array([True, True, True, False]), y_score) == pytest.approx(0.15)
    # {0.9} and all four both give 2/3: 0.05 is farther from 0.5 than 0.85.
    assert threshold(np.array([True, False, False, True]), y_score) == pytest.approx(0.85)
    targets = np.array([[1, 0, np.nan], [0, 0, 1], [np.nan, 0, 0]], np.float32)
    scores = np.array([[0.3, 0.9, 0.1], [0.1, 0.8, 0.9], [0.99, 0.1, 0.2]], np.float32)
    assert thresholds(targets, scores).tolist() == pytest.approx([0.2, 0.5, 0.5])


def test_bootstrap_equals_resampling() -> None:
    random = np.random.default_rng(4)
    targets = random.integers(0, 3, 80)
    scores = random.dirichlet((1, 1, 1), 80).astype(np.float32)
    rows = per_photo(targets, scores, False)
    intervals = bootstrap(rows, 300, seed=5)
    random, values = np.random.default_rng(5), []
    for _ in range(300):
        sample = random.integers(0, 80, 80)
        y_pred = scores[sample].argmax(axis=1)
        values.append(sk.f1_score(targets[sample], y_pred, average="macro"))
    expected = np.percentile(values, (2.5, 97.5)).tolist()
    assert intervals["f1_score_macro"] == pytest.approx(expected)
    assert intervals.keys() == quick(targets, scores, False).keys()
    assert intervals == bootstrap(rows, 300, seed=5)
    assert intervals != bootstrap(rows, 300, seed=6)
    low, high = intervals["accuracy"]
    assert low <= quick(targets, scores, False)["accuracy"] <= high
    assert bootstrap(rows, 0) == {}
