"""Test that embeddings of earlier runs enter a store as the model's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import vitlib
from fixtures.synthetic_photos import write_photos
from vitlib.batch import run
from vitlib.batch.embedding_file import write_embeddings
from vitlib.batch.store_embeddings import store_embeddings
from vitlib.errors import BatchError
from vitlib.features import FeatureStore, extract, select_features


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    return write_photos(tmp_path / "photos", 9)


@pytest.fixture
def demo() -> vitlib.Predictor:
    return vitlib.Predictor.load("demo")


@pytest.mark.parametrize("form", ["embed", "npy", "jsonl", "csv"])
def test_copied_embeddings_spare_the_model(
    photos: list[Path], demo: vitlib.Predictor, tmp_path: Path, form: str
) -> None:
    (photos[0].parent / "bad.png").write_bytes(b"no image")
    if form == "embed":
        source = tmp_path / "v.npy"
        write_embeddings(source, demo.embed(photos), [str(path) for path in photos], demo)
    else:
        source = tmp_path / "run"
        run(tmp_path / "photos", model=demo, out=source, task="embed", format=form)  # type: ignore[arg-type]
    store, features = FeatureStore(tmp_path / "store"), select_features(demo.model.config)
    assert store_embeddings(source, demo, store) == (9, 0)
    result = extract(demo, photos, features, store=store)
    assert result.computed == 0
    np.testing.assert_allclose(result.vectors[features[0]], demo.embed(photos), atol=2e-5)


def test_photos_that_are_gone_are_counted(
    photos: list[Path], demo: vitlib.Predictor, tmp_path: Path
) -> None:
    source = tmp_path / "v.npy"
    write_embeddings(source, demo.embed(photos), [str(path) for path in photos], demo)
    photos[3].unlink()
    assert store_embeddings(source, demo, FeatureStore(tmp_path / "store")) == (8, 1)


def test_embeddings_of_another_model_are_refused(
    photos: list[Path], demo: vitlib.Predictor, tmp_path: Path
) -> None:
    run(photos[0].parent, model=demo, out=tmp_path / "run", task="embed")
    write_embeddings(tmp_path / "v.npy", demo.embed(photos), [str(path) for path in photos], demo)
    other = vitlib.Predictor.load("demo")
    other.model.blocks[0].mlp.fc1.bias.data += 1
    store = FeatureStore(tmp_path / "store")
    for source in (tmp_path / "run", tmp_path / "v.npy"):
        with pytest.raises(BatchError, match=r"made by another model \(demo\) than demo"):
            store_embeddings(source, other, store)
    bf16 = vitlib.Predictor.load("demo")
    bf16.precision = "bf16"
    for source in (tmp_path / "run", tmp_path / "v.npy"):
        with pytest.raises(BatchError, match="was made in fp32, the model runs in bf16: give"):
            store_embeddings(source, bf16, store)
    names = tmp_path / "v.json"
    names.write_text(names.read_text().replace('"precision": "fp32",', ""))
    with pytest.raises(BatchError, match="does not state its precision: write it"):
        store_embeddings(tmp_path / "v.npy", demo, store)
    assert not store.folder.exists()


def test_folder_without_a_run_is_refused(demo: vitlib.Predictor, tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="has no run of vitlib batch"):
        store_embeddings(tmp_path, demo, FeatureStore(tmp_path / "store"))
