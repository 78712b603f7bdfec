"""Label suspects against definitions written out, and against scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vitlib.audit import labels
from vitlib.audit.judgement import judge_labels
from vitlib.audit.labels import (
    judge,
    make_folds,
    predict_out_of_fold,
    share_of_duplicates,
    share_of_neighbours,
)
from vitlib.audit.search import whiten
from vitlib.data import LabelledPhotos, Photo

sklearn = pytest.importorskip("sklearn", reason="labels need scikit-learn: vitlib[eval]")


def photos_of(targets: np.ndarray) -> LabelledPhotos:
    """A set whose files do not exist."""
    if targets.ndim == 2:
        names = tuple("abcdefgh"[: targets.shape[1]])
        rows = [
            Photo(Path(f"{i}.png"), tuple(names[c] for c in np.flatnonzero(row == 1)))
            for i, row in enumerate(targets)
        ]
        return LabelledPhotos(tuple(rows), names, True, "photos")
    names = tuple("abcdefgh"[: targets.max() + 1])
    rows = [Photo(Path(f"{i}.png"), (names[t],)) for i, t in enumerate(targets)]
    return LabelledPhotos(tuple(rows), names, False, "photos")


def clusters(count: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of classes that are mostly apart."""
    rng = np.random.default_rng(seed)
    targets = rng.permutation(np.arange(count) % classes)
    centres = rng.normal(size=(classes, 8)) * 3
    return (centres[targets] + rng.normal(size=(count, 8))).astype(np.float32), targets


def test_folds_keep_duplicates_together() -> None:
    _, targets = clusters(60, 3)
    groups = np.arange(60)
    groups[[5, 17, 40]] = 5
    groups[[8, 9]] = 8
    parts = make_folds(photos_of(targets), groups, 0)
    assert len(parts) == labels.FOLDS
    assert sorted(np.concatenate([validation for _, validation in parts]).tolist()) == [*range(60)]
    for training, validation in parts:
        assert not set(groups[training]) & set(groups[validation])
        assert len(training) + len(validation) == 60


def test_probabilities_equal_a_scikit_learn_pipeline() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    vectors, targets = clusters(90, 3)
    parts = make_folds(photos_of(targets), np.arange(90), 0)
    found = predict_out_of_fold(vectors, targets, parts)
    expected = np.zeros((90, 3))
    for training, validation in parts:
        model = make_pipeline(
            StandardScaler(),
            LogisticRegression(C=1 / len(training) ** 0.5, tol=1e-6, max_iter=2000),
        )
        model.fit(vectors[training].astype(float), targets[training])
        expected[validation] = model.predict_proba(vectors[validation])
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()


def test_class_that_a_fold_lacks_has_no_probability() -> None:
    vectors, targets = clusters(20, 2)
    targets[0] = 2
    parts = [(np.arange(1, 20), np.array([0])), (np.array([0]), np.arange(1, 20))]
    found = predict_out_of_fold(vectors, targets, parts)
    assert found[0, 2] == 0
    assert found[1:, 2].tolist() == [1] * 19  # one class in training


def test_neighbours_equal_loops() -> None:
    vectors, targets = clusters(40, 3, 1)
    groups = np.arange(40)
    groups[1] = groups[0]
    found = share_of_neighbours(vectors, targets, groups)
    vectors = whiten(vectors)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for i in range(40):
        others = [(float(unit[i] @ unit[j]), j) for j in range(40) if groups[j] != groups[i]]
        nearest = sorted(others, reverse=True)[: labels.NEIGHBOURS]
        expected = np.zeros(3)
        for cosine, j in nearest:
            expected[targets[j]] += np.exp(cosine / labels.TEMPERATURE)
        np.testing.assert_allclose(found[i], expected / expected.sum(), atol=1e-4)


def test_confident_joint_equals_the_papers_definition() -> None:
    rng = np.random.default_rng(2)
    probability = rng.dirichlet([0.6] * 4, 80)
    targets = rng.integers(0, 4, 80)
    found = judge(probability, probability, targets)
    for j in range(4):  # equation 2
        assert found.thresholds[j] == pytest.approx(probability[targets == j, j].mean())
    for i in range(80):  # equation 1
        above = [j for j in range(4) if probability[i, j] >= found.thresholds[j]]
        counted = max(above, key=lambda j: probability[i, j]) if above else targets[i]
        assert found.confident[i] == (counted != targets[i])
        others = np.delete(probability[i], targets[i])
        assert found.margin[i] == pytest.approx(probability[i, targets[i]] - others.max())
        assert found.suggested[i] != targets[i]
    assert found.confident.any()


def test_several_labels_equal_the_definition_for_each_class() -> None:
    rng = np.random.default_rng(3)
    probability = rng.uniform(size=(60, 3))
    targets = (rng.uniform(size=(60, 3)) < 0.5).astype(np.float32)
    targets[:5, 1] = np.nan
    found = judge(probability, probability, targets)
    for c in range(3):
        marked = np.flatnonzero(~np.isnan(targets[:, c]))
        # A class is a set of two classes of its own: absent 0, present 1.
        two = np.stack([1 - probability[marked, c], probability[marked, c]], axis=1)
        alone = judge(two, two, targets[marked, c].astype(int))
        np.testing.assert_allclose(found.thresholds[:, c], alone.thresholds, rtol=1e-6)
        np.testing.assert_array_equal(found.confident[marked, c], alone.confident)
        np.testing.assert_allclose(found.margin[marked, c], alone.margin, atol=1e-6)
    assert np.isnan(found.margin[:5, 1]).all()
    assert not found.confident[:5, 1].any()


def test_duplicates_outvote_a_label() -> None:
    targets = np.array([0, 0, 1, 1, 0, 1])
    groups = np.array([0, 0, 0, 3, 3, 5])
    shares = share_of_duplicates(targets, groups, 2)
    assert shares.tolist() == [[0.5, 0.5], [0.5, 0.5], [1, 0], [1, 0], [0, 1], [0, 0]]
    even = np.full((6, 2), 0.5)
    found = judge(even, even, targets, groups)
    assert found.margin[2] == found.margin.min() < found.margin[0]
    assert found.confident[2]


def test_swapped_labels_come_first() -> None:
    vectors, targets = clusters(200, 4, 4)
    rng = np.random.default_rng(0)
    swapped = rng.choice(200, 10, replace=False)
    wrong = targets.copy()
    wrong[swapped] = (wrong[swapped] + rng.integers(1, 4, 10)) % 4
    found = judge_labels(photos_of(wrong), vectors, np.arange(200), 0)
    first = {int(Path(row.filename).stem) for row in found.rows[:20]}
    assert len(first & set(swapped.tolist())) >= 9
    assert found.accuracy > 0.9
    assert [row.rank for row in found.rows] == list(range(1, len(found.rows) + 1))
    margins = [row.margin for row in found.rows]
    assert margins == sorted(margins)


def test_swapped_labels_of_several_come_first() -> None:
    vectors, classes = clusters(160, 4, 5)
    targets = np.eye(4, dtype=np.float32)[classes]
    targets[7] = 1 - targets[7]
    found = judge_labels(photos_of(targets), vectors, np.arange(160), 0)
    assert {row.filename for row in found.rows[:4]} == {"7.png"}
    assert {row.suggested for row in found.rows[:4]} == {"absent", "present"}


def test_class_with_one_photo_is_not_judged_but_told() -> None:
    vectors, targets = clusters(40, 2)
    targets[0] = 2
    groups = np.arange(40)
    found = judge_labels(photos_of(targets), vectors, groups, 0)
    assert "'c': too few photos to judge" in found.notes[0]
    assert all(row.filename != "0.png" and row.suggested != "c" for row in found.rows)
    # Two photos that are duplicates are one.
    targets[1], groups[1] = 2, 0
    again = judge_labels(photos_of(targets), vectors, groups, 0)
    assert "'c': too few" in again.notes[0]
    alone = judge_labels(photos_of(np.arange(3)), vectors[:3], np.arange(3), 0)
    assert alone.rows == ()
    assert "no two classes" in alone.notes[-1]


def test_features_that_tell_nothing_are_told() -> None:
    rng = np.random.default_rng(6)
    vectors = rng.normal(size=(80, 4)).astype(np.float32)
    found = judge_labels(photos_of(rng.integers(0, 4, 80)), vectors, np.arange(80), 0)
    assert found.accuracy < 0.5
    assert "model's mistakes" in found.notes[-1]
