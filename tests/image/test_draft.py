"""Tests of drafts: JPEGs decoded at a fraction of their size, by name alone and within bounds."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitlib
from fixtures.hostile_files import jpeg_of_scans
from paths import SHARED
from vitlib import ImageProcessor
from vitlib.errors import ConfigError, ImageError
from vitlib.image import decode, open_files
from vitlib.predict.model_digest import compute_model_digest

RULE = ImageProcessor(shortest_edge=64, crop_size=(56, 56), resample=3)


def smooth_jpeg(height: int, width: int, orientation: int = 1) -> bytes:
    """Encode waves of several lengths, with an EXIF orientation."""
    y, x = np.mgrid[:height, :width] / 40
    waves = np.stack([np.sin(x), np.cos(y + x), np.sin(2 * y)], axis=2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image = Image.fromarray((waves * 100 + 128).astype(np.uint8))
    image.save(file, "JPEG", quality=95, exif=exif)
    return file.getvalue()


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sizes at which files are decoded."""
    decoded: list[tuple[int, int]] = []
    upright = decode._upright

    def note(image: Image.Image) -> Image.Image:
        decoded.append(image.size)
        return upright(image)

    monkeypatch.setattr(decode, "_upright", note)
    return decoded


def test_default_decodes_the_whole_file(sizes: list[tuple[int, int]]) -> None:
    assert RULE.draft is None
    RULE.to_float(smooth_jpeg(600, 800))
    assert sizes == [(800, 600)]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_draft_is_near_the_whole_decode(orientation: int, sizes: list[tuple[int, int]]) -> None:
    data = smooth_jpeg(600, 801, orientation)
    whole = RULE.resize_crop(data)
    draft = RULE.with_draft().resize_crop(data)
    assert sizes == [(801, 600), (201, 150)]  # a quarter: at least twice 64
    assert draft.shape == whole.shape
    difference = np.abs(draft.astype(int) - whole)
    assert 0 < difference.max() <= 12
    assert difference.mean() < 2


def test_margin_bounds_the_fraction(sizes: list[tuple[int, int]]) -> None:
    for margin in (2, 4.6, 5, 8):
        RULE.with_draft(margin).to_float(smooth_jpeg(600, 800))
    assert sizes == [(200, 150), (400, 300), (800, 600), (800, 600)]


def test_sides_are_those_of_the_whole_image() -> None:
    """A fraction of an odd side is rounded, which changes no size."""
    rule = replace(RULE, crop_size=None)
    for height, width in ((401, 599), (599, 401), (1023, 517)):
        data = smooth_jpeg(height, width)
        assert rule.with_draft().to_float(data).shape == rule.to_float(data).shape


def test_draft_leaves_other_images_as_they_are() -> None:
    image = Image.open(io.BytesIO(smooth_jpeg(600, 800)))
    assert torch.equal(RULE.with_draft().to_float(image), RULE.to_float(image))
    assert image.size == (800, 600)
    file = io.BytesIO()
    image.save(file, "PNG")
    for same in (file.getvalue(), np.asarray(image), smooth_jpeg(100, 120)):
        assert torch.equal(RULE.with_draft().to_float(same), RULE.to_float(same))


def test_draft_keeps_the_bounds_of_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="scans"):
        RULE.with_draft().to_float(jpeg_of_scans(2000, 300))
    monkeypatch.setattr(open_files, "MAX_PIXELS", 400_000)
    with pytest.raises(ImageError, match="expected at most 400000"):
        RULE.with_draft().to_float(smooth_jpeg(600, 800))


@pytest.mark.parametrize("margin", [0, 1, 1.9, 9, float("nan"), True, "2"])
def test_margin_out_of_range_is_refused(margin: object) -> None:
    with pytest.raises(ConfigError, match=r"^draft=.*expected a number in 2\.\.8, or None"):
        RULE.with_draft(margin)  # type: ignore[arg-type]


def test_draft_is_described_and_never_written(tmp_path: Path) -> None:
    draft = RULE.with_draft()
    assert draft.describe() == f"JPEG drafts of 2 times the size; {RULE.describe()}"
    assert draft != RULE
    for form in ("to_dict", "to_timm", "to_openclip"):
        assert getattr(draft, form)() == getattr(RULE, form)()
    predictor = vitlib.Predictor.load("demo")
    plain = predictor.image_processor
    predictor.image_processor = plain.with_draft()
    predictor.save(tmp_path / "hf")
    predictor.fast().save(tmp_path / "fast", image_processor=predictor.image_processor)
    for folder in ("hf", "fast"):
        assert vitlib.Predictor.load(tmp_path / folder).image_processor == plain


def test_batch_does_not_continue_a_run_of_another_draft() -> None:
    predictor = vitlib.Predictor.load("demo")
    digests = {compute_model_digest(predictor)}
    for margin in (2, 3):
        predictor.image_processor = predictor.image_processor.with_draft(margin)
        digests.add(compute_model_digest(predictor))
    assert len(digests) == 3


def test_draft_of_real_photos_is_as_documented() -> None:
    """docs/performance.md has these bounds."""
    photos = sorted((SHARED / "data/fridge_multilabel").rglob("*.jpg"))[:16]
    if not photos:
        pytest.skip("the real photos are absent")
    rule = replace(RULE, shortest_edge=112, crop_size=(112, 112))
    pairs = [(rule.resize_crop(p), rule.with_draft().resize_crop(p)) for p in photos]
    differences = np.stack([np.abs(a.astype(int) - b) for a, b in pairs])
    assert differences.any()
    assert differences.mean() < 2
    assert np.percentile(differences, 99) < 16
