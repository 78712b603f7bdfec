"""Load a checkpoint for another image size, head, number of channels, dtype or device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

import vitlib
from fixtures import references
from fixtures.checkpoints import edit_tensors
from vitlib.errors import CheckpointError, ConfigError


def test_load_resizes_positions(vit: Path, caplog: pytest.LogCaptureFixture) -> None:
    default, resized = vitlib.load(vit), vitlib.load(vit, image_size=(40, 24))
    assert resized.config.image_size == (40, 24)
    assert [r.message for r in caplog.records if r.name == "vitlib"] == [
        f"{vit}: positions resampled from 4x4 to 5x3 patches (bicubic)"
    ]
    images = torch.randn(1, 3, 40, 24)
    with torch.inference_mode():
        assert torch.equal(default(images), resized(images))
    assert vitlib.load(vit, image_size=32).config == default.config
    with pytest.raises(ConfigError, match=r"image_size=\(7, 7\) is smaller than"):
        vitlib.load(vit, image_size=7)


def test_load_replaces_head(vit: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = vitlib.load(vit, num_classes=7)
    assert [r.message for r in caplog.records] == [f"{vit}: a new, untrained head of 7 classes"]
    assert model.head.weight.shape == (7, 48)
    assert model.config.labels == ()
    assert 0.01 < model.head.weight.std() < 0.03
    assert not model.head.bias.any()
    vitlib.save(model, tmp_path / "seven")
    opened = hf.ViTForImageClassification.from_pretrained(tmp_path / "seven").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert references.distance(model(images), opened(images).logits) < 2e-6
    caplog.clear()
    assert vitlib.load(vit, num_classes=5).config.labels  # the checkpoint's own
    assert vitlib.load(vit, num_classes=0).num_classes == 0
    assert not caplog.records


def test_new_dinov2_head_pools_as_transformers(tmp_path: Path) -> None:
    references.save_model("dinov2 base", tmp_path / "base")
    loaded = vitlib.load(tmp_path / "base", num_classes=3)
    assert loaded.config.pool == "cls+mean"
    reset = vitlib.load(tmp_path / "base")
    reset.reset_classifier(3)
    assert reset.config.pool == "cls"
    images = torch.randn(2, 3, 32, 32)
    for name, model in (("loaded", loaded), ("reset", reset)):
        vitlib.save(model, tmp_path / name)
        opened = hf.Dinov2ForImageClassification.from_pretrained(tmp_path / name).eval()
        with torch.inference_mode():
            assert references.distance(model(images), opened(images).logits) < 2e-6


def test_new_heads_of_distilled_model(tmp_path: Path) -> None:
    references.save_model("deit two heads", tmp_path)
    model = vitlib.load(tmp_path, num_classes=3)
    assert model.head.weight.shape == model.head_dist.weight.shape == (3, 48)
    assert not torch.equal(model.head.weight, model.head_dist.weight)


def test_missing_head_is_refused_unless_replaced(vit: Path) -> None:
    edit_tensors(
        vit, lambda tensors: [tensors.pop(f"classifier.{leaf}") for leaf in ("weight", "bias")]
    )
    with pytest.raises(CheckpointError, match=r"missing: classifier\.weight, classifier\.bias"):
        vitlib.load(vit)
    assert vitlib.load(vit, num_classes=5).head.weight.shape == (5, 48)
    assert vitlib.load(vit, num_classes=0)(torch.zeros(1, 3, 32, 32)).shape == (1, 48)


def test_one_channel_equals_three_equal_channels(
    vit: Path, caplog: pytest.LogCaptureFixture
) -> None:
    three, single = vitlib.load(vit), vitlib.load(vit, in_channels=1)
    assert "patch kernel summed over its 3 channels" in caplog.text
    gray = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        assert references.distance(single(gray), three(gray.expand(-1, 3, -1, -1))) < 2e-6


def test_load_repeats_channels(vit: Path) -> None:
    three, six = vitlib.load(vit), vitlib.load(vit, in_channels=6)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert references.distance(six(images.repeat(1, 2, 1, 1)), three(images)) < 2e-6
        mapped = vitlib.load(vit, in_channels=4, band_map=(2, None, 0, 1))
        bands = torch.stack([images[:, 2], torch.randn(2, 32, 32), images[:, 0], images[:, 1]], 1)
        assert references.distance(mapped(bands), three(images)) < 2e-6
    for band_map in ((0, 1), (0, 1, 2, 3)):
        with pytest.raises(ConfigError, match=r"band_map=.*expected 4 entries"):
            vitlib.load(vit, in_channels=4, band_map=band_map)


def test_preprocessing_follows_adapted_model(
    deit_tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    single = vitlib.load(deit_tiny, in_channels=1, image_size=(256, 320))
    assert "one channel is normalised with the mean of image_mean and of image_std" in caplog.text
    processor = single.image_processor
    assert processor.in_channels == 1
    assert processor.crop_size == (256, 320)
    assert processor.shortest_edge == round(256 * 320 / 224)
    assert processor.image_mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    four = vitlib.load(deit_tiny, band_map=(0, 1, 2, None)).image_processor
    assert four.image_std[:3] == (0.229, 0.224, 0.225)
    assert len(four.image_std) == 4


def test_load_converts_dtype_and_device(vit: Path) -> None:
    model = vitlib.load(vit, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    edit_tensors(vit, lambda t: t.update({k: v.half() for k, v in t.items()}))
    assert {p.dtype for p in vitlib.load(vit).parameters()} == {torch.float16}
    with pytest.raises(ConfigError, match="cannot be had"):
        vitlib.load(vit, device="cuda:99")
    with pytest.raises(ConfigError, match="cannot be had"):
        vitlib.load(vit, dtype=torch.int8)


@pytest.mark.parametrize(
    ("body", "norms", "widest"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_mixed_dtypes_become_widest(
    body: torch.dtype,
    norms: torch.dtype,
    widest: torch.dtype,
    vit: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    edit_tensors(
        vit,
        lambda t: t.update({k: v.to(norms if "layernorm" in k else body) for k, v in t.items()}),
    )
    model = vitlib.load(vit)
    assert {p.dtype for p in model.parameters()} == {widest}
    [line] = caplog.messages
    for dtype in {body, norms, widest}:
        assert str(dtype).removeprefix("torch.") in line
    reference_image = hf.ViTForImageClassification.from_pretrained(vit, dtype=widest).eval()
    torch.manual_seed(5)
    pixels = torch.randn(2, 3, 32, 32).to(widest)
    with torch.inference_mode():
        expected = reference_image(pixels).logits
        assert model(pixels) == pytest.approx(expected.numpy(), rel=1e-5, abs=1e-6)
    caplog.clear()
    narrow = vitlib.load(vit, dtype=torch.bfloat16)  # asked for: nothing is widened or told
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert not caplog.messages


def test_unread_norm_has_dtype_of_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = hf.BeitConfig(**references.TINY_CONFIG, intermediate_size=96)
    hf.BeitModel(config, add_pooling_layer=False).bfloat16().save_pretrained(tmp_path)
    model = vitlib.load(tmp_path)
    assert model.config.final_norm == "none"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert "are loaded as" not in caplog.text
