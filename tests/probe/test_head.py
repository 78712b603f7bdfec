"""The best probe as a checkpoint: its logits, in vitlib and in transformers, for every pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from fixtures.tiny_probes import draw_folders, tiny_predictor
from vitlib import Predictor, load
from vitlib.data import read_photos
from vitlib.features import Feature, extract
from vitlib.probe import LogisticHead, head

DINO: dict[str, Any] = {
    "family": "dinov2", "layer_scale": 1.0, "position_resize": "bicubic_fp32",
}  # fmt: skip
CLIP: dict[str, Any] = {
    "family": "clip", "pre_norm": True, "patch_bias": False, "activation": "quick_gelu",
    "final_norm": "pooled", "projection_dim": 20,
}  # fmt: skip


def random_head(width: int, multi_label: bool = False) -> LogisticHead:
    random = np.random.default_rng(3)
    return LogisticHead(random.standard_normal((3, width)), np.array([0.5, -1, 0]), 1, multi_label)


def save(
    tmp_path: Path, predictor: Predictor, feature: Feature, multi_label: bool = False
) -> tuple[head.SavedProbe, np.ndarray, Any]:
    """Save a random head; return the outcome, the probe's logits, and the photos."""
    photos = read_photos(draw_folders(tmp_path / "data", 3))
    paths = [photo.path for photo in photos.photos]
    vectors = extract(predictor, paths, [feature]).vectors[feature]
    fitted = random_head(vectors.shape[1], multi_label)
    saved = head.save_probe(predictor, feature, fitted, photos, vectors, tmp_path / "out" / "model")
    return saved, fitted.logits(vectors), photos


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize(
    ("fields", "feature", "layout"),
    [
        ({}, Feature(3, "cls"), "hf"),
        ({}, Feature(2, "cls"), "hf"),
        ({}, Feature(1, "mean"), "vitlib"),
        ({}, Feature(3, "cls+mean"), "vitlib"),
        (DINO, Feature(3, "cls"), "hf"),
        (DINO, Feature(2, "mean"), "hf"),
        (DINO, Feature(2, "cls+mean"), "hf"),
        ({"family": "deit", "dist_token": True, "dist_head": True, "num_classes": 5},
         Feature(3, "embed"), "hf"),
        (CLIP, Feature(3, "embed"), "vitlib"),
        (CLIP, Feature(2, "cls"), "vitlib"),
    ],
)  # fmt: skip
def test_saved_probe_has_the_logits_of_the_probe(
    tmp_path: Path, fields: dict[str, Any], feature: Feature, layout: str, multi_label: bool
) -> None:
    predictor = tiny_predictor(**fields)
    saved, expected, photos = save(tmp_path, predictor, feature, multi_label)
    assert (saved.folder, saved.layout) == (tmp_path / "out" / "model", layout)
    assert bool(saved.note) == (layout == "vitlib")
    pixels = torch.cat([predictor.image_processor(str(photo.path)) for photo in photos.photos])
    with torch.inference_mode():
        model = load(saved.folder)
        logits = model(pixels).double().numpy()
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(expected - expected[0]).max() > 1e-2  # photos differ
    assert (len(model.blocks), model.config.labels) == (feature.layer, photos.labels)
    assert Predictor.load(saved.folder).multi_label == multi_label
    assert (saved.folder / "training.csv").read_text().count("\n") == 1 + len(photos)
    if layout == "hf":
        theirs = AutoModelForImageClassification.from_pretrained(saved.folder).eval()
        with torch.inference_mode():
            other = theirs(pixel_values=pixels).logits.double().numpy()
        assert np.abs(other - expected).max() < 1e-4 * np.abs(expected).max()
        assert theirs.config.id2label == dict(enumerate(photos.labels))
        assert (theirs.config.problem_type == "multi_label_classification") == multi_label


def test_a_checkpoint_with_other_logits_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = head.build_model

    def broken(*arguments: Any) -> Any:
        model = original(*arguments)
        with torch.no_grad():
            model.head.weight[0, 0] += 1
        return model

    monkeypatch.setattr(head, "build_model", broken)
    saved, _, _ = save(tmp_path, tiny_predictor(), Feature(3, "cls"))
    assert saved.folder is None
    assert "would differ from the probe's" in saved.note
    assert not (tmp_path / "out" / "model").exists()


def test_a_new_checkpoint_replaces_an_earlier_one(tmp_path: Path) -> None:
    predictor = tiny_predictor()
    first, _, photos = save(tmp_path, predictor, Feature(3, "mean"))
    assert (first.layout, len(load(first.folder).blocks)) == ("vitlib", 3)
    feature = Feature(1, "cls")
    paths = [photo.path for photo in photos.photos]
    vectors = extract(predictor, paths, [feature]).vectors[feature]
    again = head.save_probe(predictor, feature, random_head(24), photos, vectors, first.folder)
    assert again.layout == "hf"
    assert len(load(first.folder).blocks) == 1
    assert not list((tmp_path / "out").glob(".vitlib-*"))


def test_an_optimized_file_says_that_it_cannot_be_saved(tmp_path: Path) -> None:
    import vitlib

    predictor = tiny_predictor()
    vitlib.optimize(predictor.model).save(tmp_path / "fast")
    opened = Predictor.load(tmp_path / "fast", image_processor=predictor.image_processor)
    saved, _, _ = save(tmp_path, opened, Feature(3, "embed"))
    assert saved.folder is None
    assert "cannot get another head" in saved.note
