"""Splits and folds of labelled sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitlib.data import LabelledPhotos, Photo, folds, split
from vitlib.errors import ConfigError, DataError


def make_single_label_set(counts: dict[str, int]) -> LabelledPhotos:
    """Make a single-label set from the number of photos of each class."""
    photos = [Photo(Path(f"{n}{i}"), (n,)) for n, count in counts.items() for i in range(count)]
    return LabelledPhotos(tuple(photos), tuple(sorted(counts)), False, "made")


def make_multi_label_set(seed: int, count: int, shares: list[float]) -> LabelledPhotos:
    """Draw a multi-label set from the expected share of photos of each class."""
    has_label = np.random.RandomState(seed).rand(count, len(shares)) < shares
    names = tuple(f"class{i}" for i in range(len(shares)))
    photos = [
        Photo(Path(f"{i}.png"), tuple(n for n, on in zip(names, row, strict=True) if on))
        for i, row in enumerate(has_label)
    ]
    return LabelledPhotos(tuple(photos), names, True, "made")


def all_paths(training: LabelledPhotos, validation: LabelledPhotos) -> list[Path]:
    return sorted(photo.path for part in (training, validation) for photo in part.photos)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.2, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("counts", [{"a": 40, "b": 25, "c": 3, "d": 2}, {"a": 7, "b": 7, "c": 7}])
def test_split_keeps_class_shares(counts: dict[str, int], fraction: float) -> None:
    photos = make_single_label_set(counts)
    training, validation = split(photos, fraction, seed=3)
    assert all_paths(training, validation) == sorted(photo.path for photo in photos.photos)
    for label, count in counts.items():
        num_validation = validation.counts()[label]
        assert 1 <= num_validation <= count - 1
        assert abs(num_validation - fraction * count) < 1 or num_validation in (1, count - 1)
    assert training.labels == validation.labels == photos.labels
    if fraction in (0.2, 0.25, 0.5):
        assert abs(len(validation) - fraction * len(photos)) < 2
    index = {photo.path: i for i, photo in enumerate(photos.photos)}
    order = [index[photo.path] for photo in training.photos]
    assert order == sorted(order)


def test_split_is_determined_by_seed() -> None:
    photos = make_single_label_set({"a": 50, "b": 50})
    assert split(photos, seed=1) == split(photos, seed=1)
    assert split(photos, seed=1) != split(photos, seed=2)
    # Other versions of numpy or vitlib must make the same split.
    names = [
        photo.path.name
        for photo in split(make_single_label_set({"a": 5, "b": 5}), 0.4, seed=0)[1].photos
    ]
    assert names == ["a2", "a4", "b3", "b4"]
    held_out = [
        indices.tolist() for _, indices in folds(make_single_label_set({"a": 5, "b": 5}), 2, seed=0)
    ]
    assert held_out == [[0, 1, 2, 7, 9], [3, 4, 5, 6, 8]]
    many = [
        indices.tolist() for _, indices in folds(make_multi_label_set(0, 10, [0.5, 0.3]), 2, seed=0)
    ]
    assert many == [[0, 1, 3, 4, 7], [2, 5, 6, 8, 9]]


def test_split_trains_on_class_of_one_photo(caplog: pytest.LogCaptureFixture) -> None:
    training, validation = split(make_single_label_set({"a": 9, "b": 1}), 0.5)
    assert training.counts()["b"] == 1
    assert validation.counts()["b"] == 0
    assert "no validation photo has the label b" in caplog.text


def test_split_takes_every_fifth(caplog: pytest.LogCaptureFixture) -> None:
    photos = make_single_label_set({"a": 6, "b": 6})
    training, validation = split(photos, how="fifth")
    assert validation == photos.subset([0, 5, 10])
    assert training == photos.subset([1, 2, 3, 4, 6, 7, 8, 9, 11])
    assert not caplog.text
    split(make_single_label_set({"a": 1, "b": 4}), how="fifth")
    assert "no training photo has the label a" in caplog.text


@pytest.mark.parametrize("how", ["stratified", "fifth"])
@pytest.mark.parametrize("count", [0, 1])
def test_split_rejects_too_few_photos(how: Any, count: int) -> None:
    for photos in (make_single_label_set({"a": count}), make_multi_label_set(0, count, [1.0])):
        with pytest.raises(DataError, match=rf"made: {count} photos? cannot be split"):
            split(photos, how=how)
        with pytest.raises(DataError, match=rf"made: {count} photos? for 2 folds: expected more"):
            folds(photos, 2, 0)
    with pytest.raises(DataError, match=r"3 photos cannot be split.*a class of two photos or more"):
        split(make_single_label_set({"a": 1, "b": 1, "c": 1}))


def test_split_rejects_bad_arguments() -> None:
    photos = make_single_label_set({"a": 4, "b": 4})
    for fraction in (0, 1, -0.2, float("nan")):
        with pytest.raises(ConfigError, match=r"fraction=.*expected a number between 0 and 1"):
            split(photos, fraction)
    with pytest.raises(ConfigError, match=r"how='sorted': expected one of 'stratified', 'fifth'"):
        split(photos, how="sorted")  # type: ignore[arg-type]
    for seed in (-1, 2**32, 0.5):
        with pytest.raises(ConfigError, match=r"seed=.*expected a whole number in 0..2"):
            split(photos, seed=seed)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"seed="):
            folds(photos, 2, seed)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"count=1: expected a whole number of at least 2"):
        folds(photos, 1, 0)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", [0, 1])
def test_folds_validate_each_photo_once(count: int, seed: int) -> None:
    small = make_multi_label_set(seed, count, [0.5, 0.5])
    assert [len(validation_indices) for _, validation_indices in folds(small, count, seed)] == [
        1
    ] * count
    for photos in (
        make_single_label_set({"a": 23, "b": 11, "c": 4}),
        make_multi_label_set(0, 38, [0.5, 0.3, 0.1]),
    ):
        parts = folds(photos, count, seed)
        assert len(parts) == count
        assert np.sort(
            np.concatenate([validation_indices for _, validation_indices in parts])
        ).tolist() == list(range(38))
        for train, validation_indices in parts:
            assert validation_indices.dtype == train.dtype == np.int64
            assert len(validation_indices)
            assert np.sort(np.concatenate([train, validation_indices])).tolist() == list(range(38))
            assert (np.diff(validation_indices) > 0).all()
            assert (np.diff(train) > 0).all()
        repeated = folds(photos, count, seed)
        assert all(np.array_equal(a[1], b[1]) for a, b in zip(parts, repeated, strict=True))
        if not photos.multi_label:
            sizes = [len(validation_indices) for _, validation_indices in parts]
            assert max(sizes) - min(sizes) <= 1
            for label in photos.labels:
                fold_counts = [
                    photos.subset(validation_indices).counts()[label]
                    for _, validation_indices in parts
                ]
                assert max(fold_counts) - min(fold_counts) <= 1


def test_folds_log_rare_classes(caplog: pytest.LogCaptureFixture) -> None:
    folds(make_single_label_set({"a": 20, "b": 3, "c": 0}), 5, 0)
    assert "classes with fewer photos than the 5 folds: b" in caplog.text


def test_multi_label_split_beats_chance() -> None:
    """Folds spread rare classes evenly, and a random split does not."""
    photos = make_multi_label_set(1, 400, [0.6, 0.2, 0.05, 0.03])
    targets = photos.targets()
    stratified = folds(photos, 5, 0)
    expected_counts = targets.sum(0) / 5
    error = max(
        np.abs(targets[validation_indices].sum(0) - expected_counts).max()
        for _, validation_indices in stratified
    )
    chance = np.random.RandomState(0).permutation(400).reshape(5, 80)
    chance_error = max(
        np.abs(targets[validation_indices].sum(0) - expected_counts).max()
        for validation_indices in chance
    )
    assert error < 2 < chance_error
    assert all(abs(len(validation_indices) - 80) <= 6 for _, validation_indices in stratified)


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_multi_label_split_covers_both_sides(fraction: float, seed: int) -> None:
    photos = make_multi_label_set(seed, 60, [0.5, 0.1, 0.06, 0.04, 0.04])
    training, validation = split(photos, fraction, seed)
    assert all_paths(training, validation) == sorted(photo.path for photo in photos.photos)
    for label, count in photos.counts().items():
        if count > 1:
            assert training.counts()[label], label
            assert validation.counts()[label], label
    assert split(photos, fraction, seed) == (training, validation)


def test_split_logs_classes_on_one_side(caplog: pytest.LogCaptureFixture) -> None:
    """Any two of the three photos share a class. Training must have all classes."""
    pairs = (("a", "b"), ("b", "c"), ("a", "c"))
    photos = LabelledPhotos(
        tuple(Photo(Path(str(i)), pair) for i, pair in enumerate(pairs)), ("a", "b", "c"), True, "s"
    )
    training, validation = split(photos, 0.34)
    assert len(training) + len(validation) == 3
    assert len(validation)
    assert all(training.counts().values())
    assert "no validation photo has the label" in caplog.text


def test_split_spreads_photos_without_label() -> None:
    photos = LabelledPhotos(tuple(Photo(Path(str(i)), ()) for i in range(10)), ("a",), True, "s")
    assert [len(validation_indices) for _, validation_indices in folds(photos, 5, 0)] == [2] * 5
    assert len(split(photos, 0.2)[1]) == 2


def test_with_labels_rejects_joined_labels_with_hint(tmp_path: Path) -> None:
    """The error hints at --multi-label if the labels of a photo are names of several classes."""
    photos = LabelledPhotos(
        (Photo(tmp_path / "a.png", ("can carton",)),),
        ("can carton",),
        multi_label=False,
        source="set",
    )
    with pytest.raises(DataError, match="read them as several \\(--multi-label\\)"):
        photos.with_labels(("can", "carton"))
    with pytest.raises(DataError, match="rename them"):
        photos.with_labels(("can", "bottle"))
