"""Logistic regression against scikit-learn, and the choice of C."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from fixtures.clusters import clusters
from vitlib.errors import ConfigError, DataError
from vitlib.probe import LogisticHead, logistic
from vitlib.probe.logistic_head import PENALTIES, STEP, Grade, divide, search_path

pytest.importorskip("sklearn", reason="logistic regression needs scikit-learn: vitlib[eval]")
from sklearn.linear_model import LogisticRegression


def fit_peer(x: np.ndarray, y: np.ndarray, c: float) -> LogisticRegression:
    """Fit scikit-learn's regression to its minimum: its default stops at a gradient of 1e-4."""
    return LogisticRegression(C=c, max_iter=100_000, tol=1e-9).fit(x.astype(np.float64), y)


def objective(head: LogisticHead, x: np.ndarray, y: np.ndarray) -> float:
    """Sum of the losses, and the squared weights over 2C; of two classes those of one logit."""
    weight = head.weight if len(head.weight) > 2 else head.weight[1:] - head.weight[:1]
    losses = -np.log(head.scores(x)[np.arange(len(y)), y])
    return float(losses.sum() + (weight**2).sum() / (2 * head.c))


def objective_of(peer: LogisticRegression, x: np.ndarray, y: np.ndarray) -> float:
    losses = -np.log(peer.predict_proba(x)[np.arange(len(y)), y])
    return float(losses.sum() + (peer.coef_**2).sum() / (2 * peer.C))


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_logistic_equals_sklearn(num_classes: int, c: float) -> None:
    (x, y), (queries, _) = clusters(120, 1, num_classes), clusters(80, 2, num_classes)
    head = logistic(x, y, c=c)
    peer = fit_peer(x, y, c)
    assert (head.scores(queries).argmax(axis=1) == peer.predict(queries)).all()
    # The weaker the penalty, the flatter the minimum.
    gap = np.abs(head.scores(queries) - peer.predict_proba(queries)).max()
    assert gap < {0.01: 1e-4, 1.0: 2e-3, 100.0: 0.05}[c]
    assert objective(head, x, y) <= 1.0001 * objective_of(peer, x, y)
    assert head.weight.shape == (num_classes, x.shape[1])


def test_logistic_of_several_labels_equals_sklearn_on_the_photos_whose_label_is_known() -> None:
    x, classes = clusters(200, 3, 3)
    y = np.eye(3)[classes]
    y[:, 1] = np.random.default_rng(0).integers(0, 2, 200)
    y[::3, 0] = np.nan
    head = logistic(x, y, c=0.1)
    for index in range(3):
        rows = ~np.isnan(y[:, index])
        peer = fit_peer(x[rows], y[rows, index], 0.1)
        np.testing.assert_allclose(head.scores(x)[:, index], peer.predict_proba(x)[:, 1], atol=2e-4)
    # A photo whose label is unknown does not change the fit of this class.
    other = y.copy()
    other[1, 0] = 1 - other[1, 0]
    assert (logistic(x, other, c=0.1).weight[0] != head.weight[0]).any()
    np.testing.assert_allclose(logistic(x, other, c=0.1).weight[2], head.weight[2], atol=1e-3)


def test_logistic_gives_a_class_without_photos_no_score() -> None:
    x, y = clusters(60, 4, 3)
    head = logistic(x, y, c=1.0, num_classes=5)
    assert head.scores(x)[:, 3:].max() == 0
    several = np.stack([y == 0, y < 0, y >= 0], axis=1).astype(float)
    scores = logistic(x, several, c=1.0).scores(x)
    assert scores[:, 1].max() == 0
    assert scores[:, 2].min() == 1


def held_out_accuracy(x: np.ndarray, y: np.ndarray, c: float) -> float:
    """Accuracy of scikit-learn on the five parts, each by a fit to the others."""
    parts, hits = divide(y, 0), 0
    for part in range(5):
        rows = parts != part
        peer = fit_peer(x[rows], y[rows], c)
        hits += int((peer.predict(x[~rows]) == y[~rows]).sum())
    return hits / len(y)


def test_logistic_chooses_c_on_photos_that_the_fit_does_not_see() -> None:
    # Labels are noise but for one feature: a weak penalty fits the noise.
    random = np.random.default_rng(0)
    x = random.standard_normal((200, 150)).astype(np.float32)
    y = (x[:, 0] + 0.5 * random.standard_normal(200) > 0).astype(np.int64)
    head = logistic(x, y)
    chosen = held_out_accuracy(x, y, head.c)
    others = {c: held_out_accuracy(x, y, c) for c in PENALTIES[::4]}
    assert chosen >= max(others.values())
    assert chosen > min(others.values()) + 0.1
    # Of equal ones the first: no stronger penalty of the coarse grid is as good.
    assert all(value < chosen for c, value in others.items() if c < head.c)
    assert (logistic(x, y).weight == head.weight).all()


def test_many_photos_choose_c_by_a_tenth() -> None:
    x, y = clusters(3000, 5)
    parts = divide(y, seed=0)
    assert np.bincount(parts).tolist() == [300, 2700]
    for number in range(5):
        assert abs((y[parts == 0] == number).mean() - (y == number).mean()) < 0.01
    queries, truth = clusters(1000, 6)
    mine = logistic(x, y)
    grid = [LogisticRegression(C=c, max_iter=1000).fit(x, y) for c in PENALTIES[::8]]
    best = max(peer.score(queries, truth) for peer in grid)
    assert (mine.scores(queries).argmax(axis=1) == truth).mean() > best - 0.02


def test_search_path_finds_the_best_point_and_the_first_of_equal_ones() -> None:
    def peak(point: int) -> Grade:
        return Grade(-abs(point - 21), 0.0)

    assert search_path(peak)[0] == 21
    assert search_path(lambda point: Grade(min(point, 9) / 9, 0.0))[0] == 9
    assert search_path(lambda _: Grade(0.25, 0.0))[0] == 0
    # Weak penalties, which take most of the time, are not fitted after the best one.
    assert max(search_path(peak)[1]) <= 21 + 4 * STEP


def test_log_loss_decides_between_points_of_equal_accuracy() -> None:
    assert search_path(lambda point: Grade(float(point >= 8), -abs(point - 18)))[0] == 18
    # A lower loss never outweighs an accuracy.
    assert search_path(lambda point: Grade(float(8 <= point < 12), float(point)))[0] == 11


def test_search_path_goes_on_while_all_points_are_equal() -> None:
    assert search_path(lambda point: Grade(float(point >= 36), -point))[0] == 36


def test_too_few_photos_choose_the_usual_c() -> None:
    x, y = clusters(6, 8, 2)
    assert logistic(x, y).c == 1.0


def test_logistic_refuses_what_it_cannot_fit() -> None:
    x, y = clusters(20, 9)
    with pytest.raises(ConfigError, match="c=0: expected a number above 0"):
        logistic(x, y, c=0)
    with pytest.raises(ConfigError, match=r"features \(20, 24\) and targets \(19,\)"):
        logistic(x, y[:19])
    x[3, 3] = np.nan
    with pytest.raises(DataError, match="finite numbers"):
        logistic(x, y)


def test_logistic_warns_of_nothing() -> None:
    x, y = clusters(40, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logistic(x * 1000, y, c=PENALTIES[-1])


def test_a_fit_computes_on_one_blas_thread_and_restores_their_number() -> None:
    from threadpoolctl import threadpool_info, threadpool_limits

    from vitlib.probe.solver import one_blas_thread

    def counts() -> list[int]:
        libraries = [i for i in threadpool_info() if i["internal_api"] == "openblas"]
        return [i["num_threads"] for i in libraries if "torch" not in i["filepath"]]

    with threadpool_limits(2, user_api="blas"):
        before = counts()
        if not before:
            pytest.skip("numpy and scipy do not use OpenBLAS here")
        with one_blas_thread():
            assert set(counts()) == {1}
        assert counts() == before
        logistic(*clusters(40, 1), c=1.0)
        assert counts() == before
