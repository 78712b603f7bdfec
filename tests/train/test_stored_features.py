"""Test finetune with a store of features, and with a list of photos to leave out."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import vitlib
from vitlib.errors import DataError
from vitlib.features import FeatureStore, extract, select_features
from vitlib.train import TrainConfig, finetune
from vitlib.train.feature_cache import FeatureCache
from vitlib.train.loader.loader import PhotoLoader

HEAD = {"linear_probe": True, "num_train_epochs": 0, "validation_split": 0.25}
STEPS = {"head_only": True, "augment": "none", "num_train_epochs": 2, "validation_split": 0.25}


def head_of(out: Path) -> torch.Tensor:
    weights = load_file(out / "model.safetensors")
    return next(value for name, value in weights.items() if name == "classifier.weight")


def count_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the photos that pass through the model for features."""
    counts: list[int] = []
    original = PhotoLoader.evaluation_batches

    def counted(self: PhotoLoader, size: int, samples: object = None) -> object:
        if len(self) > 6:  # the loader of the training set
            counts.append(len(self) if samples is None else len(samples))  # type: ignore[arg-type]
        return original(self, size, samples)  # type: ignore[arg-type]

    monkeypatch.setattr(PhotoLoader, "evaluation_batches", counted)
    return counts


@pytest.mark.parametrize("settings", [HEAD, STEPS])
def test_head_is_fitted_to_stored_features(
    photos: Path, source: Path, tmp_path: Path, settings: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config, store = TrainConfig.from_dict(settings), tmp_path / "store"
    plain = finetune(photos, source, tmp_path / "plain", config=config)
    counts = count_read(monkeypatch)
    first = finetune(photos, source, tmp_path / "a", config=config, features=store)
    second = finetune(photos, source, tmp_path / "b", config=config, features=store)
    assert counts[0] == 18
    assert counts[1:] == []
    assert torch.equal(head_of(first.out), head_of(plain.out))
    assert torch.equal(head_of(second.out), head_of(plain.out))
    assert not torch.equal(head_of(plain.out), torch.zeros_like(head_of(plain.out)))


def test_other_verbs_fill_the_store_of_a_run(
    photos: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backbone alone counts: the checkpoint has another head than the run."""
    predictor, store = vitlib.Predictor.load(source), FeatureStore(tmp_path / "store")
    paths = sorted(photos.rglob("*.png"))[:20]
    extract(predictor, paths, select_features(predictor.model.config), store=store)
    counts = count_read(monkeypatch)
    config = TrainConfig.from_dict({**HEAD, "validation_split": 0})
    result = finetune(photos, source, tmp_path / "a", config=config, features=store.folder)
    assert counts == [4]
    plain = finetune(photos, source, tmp_path / "b", config=config)
    # Optimized and plain kernels round differently.
    torch.testing.assert_close(head_of(result.out), head_of(plain.out), atol=1e-3, rtol=1e-3)


def test_trained_backbone_has_features_of_its_own(
    photos: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, store = TrainConfig.from_dict(HEAD), tmp_path / "store"
    finetune(photos, source, tmp_path / "a", config=config, features=store)
    other = vitlib.load(source)
    with torch.no_grad():
        other.blocks[0].mlp.fc2.bias += 1
    vitlib.save(other, tmp_path / "other")
    counts = count_read(monkeypatch)
    finetune(photos, tmp_path / "other", tmp_path / "b", config=config, features=store)
    assert counts == [18]


def test_unreadable_photo_is_left_out_with_a_store(
    photos: Path, source: Path, tmp_path: Path
) -> None:
    bad = photos / "dark" / "00.png"
    bad.write_bytes(bad.read_bytes()[:-40])
    settings = {**HEAD, "validation_split": 0, "on_bad_image": "skip"}
    for name in ("a", "b"):
        result = finetune(
            photos, source, tmp_path / name, config=TrainConfig.from_dict(settings),
            features=tmp_path / "store",
        )  # fmt: skip
        assert [Path(file).name for file, _ in result.left_out] == ["00.png"]


def test_feature_cache_returns_photos_in_their_order(
    photos: Path, source: Path, tmp_path: Path
) -> None:
    """A part from the store and a part from the model."""
    from vitlib.data import read_photos
    from vitlib.train.feature_cache import StoredFeatures, head_input

    data, model = read_photos(photos), vitlib.load(source)
    processor = model.image_processor
    assert processor is not None
    paths = [photo.path for photo in data.photos]

    def compute(stored: StoredFeatures | None) -> dict[int, torch.Tensor]:
        with PhotoLoader(paths, processor) as loader:
            cache = FeatureCache(model, loader, lambda pixels: head_input(model, pixels))
            cache.stored = stored
            return cache.compute_all()

    expected = compute(None)
    some = StoredFeatures.open(
        tmp_path / "s", model, processor, "fp32", data.subset(range(5, 24, 3))
    )
    assert some is not None
    some.read(32)
    some.write({i: expected[n] for i, n in enumerate(range(5, 24, 3))})
    actual = compute(StoredFeatures.open(tmp_path / "s", model, processor, "fp32", data))
    assert list(actual) == list(range(24))
    np.testing.assert_allclose(
        torch.stack([*actual.values()]), torch.stack([*expected.values()]), atol=1e-6
    )


def test_excluded_photos_do_not_train(
    photos: Path, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "filename,label,reason\n"
    rows += f"{photos / 'dark' / '03.png'},dark,near duplicate\nphotos/light/05.png,light,blank\n"
    rows += "photos/light/99.png,light,gone\n"
    (tmp_path / "fix.csv").write_text(rows)
    config = TrainConfig.from_dict(HEAD)
    with caplog.at_level(logging.WARNING, "vitlib"):
        result = finetune(
            photos, source, tmp_path / "a", config=config, exclude=tmp_path / "fix.csv"
        )
    assert sum(result.counts.values()) == 22
    listed = (result.out / "training.csv").read_text() + (result.out / "validation.csv").read_text()
    assert "dark/03.png" not in listed
    assert "light/05.png" not in listed
    assert "dark/04.png" in listed
    assert "2 photos left out by" in caplog.text
    assert "1 name of photos that are in no set: photos/light/99.png" in caplog.text
    run = json.loads((result.out / "run.json").read_text())
    assert run["arguments"]["exclude"] == str(tmp_path / "fix.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "whose header has the column filename, got nothing"),
        ("photo,why\na.png,x\n", "whose header has the column filename, got 'photo', 'why'"),
        ('filename\n"a', "cannot be read: unexpected end of data"),
        ("filename\n" + "".join(f"photos/{c}/{i:02}.png\n" for c in ("dark", "light")
                                for i in range(12)), "leaves out all 24 photos"),
    ],
)  # fmt: skip
def test_bad_list_is_refused_before_the_run(
    photos: Path, source: Path, tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "fix.csv").write_text(content)
    with pytest.raises(DataError) as caught:
        finetune(photos, source, tmp_path / "a", exclude=tmp_path / "fix.csv")
    assert message in str(caught.value)
    assert not (tmp_path / "a").exists()
