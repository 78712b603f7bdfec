"""Test extract(): its numbers, what comes from the store, and photos that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitlib
from fixtures.fast_models import tiny
from fixtures.references import distance
from vitlib.errors import ConfigError, SourceError
from vitlib.features import FeatureStore, extract, extraction, select_features
from vitlib.features.extraction import hash_photo


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Six photos, the last with the bytes of the first."""
    paths = []
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 40, 3), np.uint8)
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(pixels).save(paths[-1])
    paths.append(tmp_path / "copy.png")
    paths[-1].write_bytes(paths[0].read_bytes())
    return paths


def predictor(**changes: object) -> vitlib.Predictor:
    half = (0.5, 0.5, 0.5)
    processor = vitlib.ImageProcessor(size=(32, 32), image_mean=half, image_std=half)
    return vitlib.Predictor(tiny("class token", **changes), processor)


def test_features_equal_those_of_the_model(photos: list[Path]) -> None:
    vit = predictor()
    features = select_features(vit.model.config, "all", ("cls", "mean", "embed"))
    result = extract(vit, photos, features, batch_size=2)
    pixels = torch.stack([vit.image_processor(path)[0] for path in photos])
    with torch.no_grad():
        layers = vit.model.forward_intermediates(pixels, norm=True, return_prefix_tokens=True)
    for feature in features[:-1]:
        patches, prefix = layers[feature.layer - 1]
        expected = patches.mean(dim=1) if feature.pool == "mean" else prefix[:, 0]
        assert distance(torch.from_numpy(result.vectors[feature]), expected) < 5e-6
    np.testing.assert_allclose(result.vectors[features[-1]], vit.embed(photos), atol=1e-5)
    # The copy was not computed.
    assert (result.computed, result.errors) == (5, {})
    np.testing.assert_array_equal(result.vectors[features[0]][5], result.vectors[features[0]][0])
    assert result.digests[5] == result.digests[0] != result.digests[1]


def test_store_spares_the_model(photos: list[Path], tmp_path: Path) -> None:
    vit, store = predictor(), FeatureStore(tmp_path / "store")
    features = select_features(vit.model.config, "all", ("cls",))
    first = extract(vit, photos[:3], features, store=store)
    second = extract(vit, photos, features, store=store)
    third = extract(vit, photos, features, store=store)
    assert (first.computed, second.computed, third.computed) == (3, 2, 0)
    for feature in features:
        np.testing.assert_array_equal(second.vectors[feature], third.vectors[feature])
        np.testing.assert_array_equal(second.vectors[feature][:3], first.vectors[feature])
    more = extract(
        vit, photos, select_features(vit.model.config, "all", ("cls", "mean")), store=store
    )
    assert more.computed == 5
    np.testing.assert_array_equal(more.vectors[features[0]], third.vectors[features[0]])


def test_changed_photo_is_another_photo(photos: list[Path], tmp_path: Path) -> None:
    vit, store = predictor(), FeatureStore(tmp_path / "store")
    features = select_features(vit.model.config)
    before = extract(vit, photos, features, store=store)
    status = photos[1].stat()
    photos[1].write_bytes(photos[2].read_bytes())
    os.utime(photos[1], (status.st_atime, status.st_mtime))  # as some tools leave it
    after = extract(vit, photos, features, store=store)
    assert after.computed == 0
    np.testing.assert_array_equal(after.vectors[features[0]][1], before.vectors[features[0]][2])


@pytest.mark.parametrize("change", ["weights", "preprocessing", "precision"])
def test_features_of_another_model_are_not_taken(
    photos: list[Path], tmp_path: Path, change: str
) -> None:
    store, features = FeatureStore(tmp_path / "store"), select_features(tiny().config)
    extract(predictor(), photos, features, store=store)
    other = predictor()
    if change == "weights":
        with torch.no_grad():
            other.model.norm.bias += 1
    elif change == "preprocessing":
        other.image_processor = vitlib.ImageProcessor(
            size=(32, 32), image_mean=(0.4, 0.5, 0.5), image_std=(0.5, 0.5, 0.5)
        )
    else:
        other.precision = "bf16"
    result = extract(other, photos, features, store=store)
    assert result.computed == 5
    expected = extract(other, photos, features).vectors[features[0]]
    np.testing.assert_allclose(result.vectors[features[0]], expected, atol=1e-6)


def test_photo_that_cannot_be_read_is_named(photos: list[Path], tmp_path: Path) -> None:
    photos[1].write_bytes(b"no image")
    photos[2].unlink()
    photos[4].write_bytes(photos[1].read_bytes())
    vit, store = predictor(), FeatureStore(tmp_path / "store")
    features = select_features(vit.model.config)
    for _ in range(2):  # errors are not stored
        result = extract(vit, photos, features, store=store)
        assert sorted(result.errors) == [1, 2, 4]
        assert np.isnan(result.vectors[features[0]]).all(axis=1).nonzero()[0].tolist() == [1, 2, 4]
    assert result.computed == 0
    assert result.digests[2] == ""
    assert result.digests[1] == result.digests[4] != ""


def test_file_that_changes_while_it_is_read_is_not_stored(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit, store = predictor(), FeatureStore(tmp_path / "store")
    features = select_features(vit.model.config)
    old = hash_photo(photos[1])
    compute = extraction._compute

    def change_and_compute(*arguments: object) -> object:
        photos[1].write_bytes(photos[3].read_bytes() + b"more")
        return compute(*arguments)

    monkeypatch.setattr(extraction, "_compute", change_and_compute)
    extract(vit, photos, features, store=store)
    (key,) = store.folder.glob("*-embed")
    stored = "".join(path.read_bytes().hex() for path in key.glob("part-*"))
    assert old not in stored
    assert hash_photo(photos[2]) in stored


def test_bytes_are_photos_too(photos: list[Path], tmp_path: Path) -> None:
    vit, store = predictor(), FeatureStore(tmp_path / "store")
    features = select_features(vit.model.config)
    by_path = extract(vit, photos, features, store=store)
    by_bytes = extract(vit, [path.read_bytes() for path in photos], features, store=store)
    assert by_bytes.computed == 0
    assert by_bytes.digests == by_path.digests


def test_extract_without_photos_or_features(tmp_path: Path) -> None:
    vit = predictor()
    result = extract(vit, [], select_features(vit.model.config), store=FeatureStore(tmp_path / "s"))
    assert result.vectors[select_features(vit.model.config)[0]].shape == (0, 48)
    with pytest.raises(ConfigError, match="no features: expected one or more"):
        extract(vit, [], ())


def test_pipe_is_no_photo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert hash_photo(tmp_path / "pipe") == ""


def test_store_in_a_folder_of_photos_is_refused(photos: list[Path]) -> None:
    with pytest.raises(SourceError, match="is no store of features"):
        FeatureStore(photos[0].parent)
