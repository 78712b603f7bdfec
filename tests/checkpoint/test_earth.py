"""Models of earth observation: Prithvi's frames, SatMAE, and those that are refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vitlib
from fixtures import references
from paths import FIXTURES

EARTH = FIXTURES / "earth"
TINY = 2e-6
PRITHVI = "ibm-nasa-geospatial/Prithvi-EO-2.0-300M"
HEADS: dict[str, Any] = {"num_heads": 2, "pool": "cls"}
STATS = {"mean": [1087.0, 1342.0, 1433.0, 2734.0, 1958.0, 1363.0], "std": [2.0] * 6}


def make_bands(height: int, width: int) -> Tensor:
    """Return the input of make_earth.py, six bands."""
    generator = torch.Generator().manual_seed(height)
    return torch.randn(2, 6, height, width, generator=generator)


def read_weights(name: str) -> dict[str, Any]:
    return dict(torch.load(EARTH / f"{name}.pt", weights_only=True))


def save_folder(folder: Path, **pretrained: Any) -> Path:
    """Save a Prithvi as its folder on the hub."""
    folder.mkdir()
    torch.save(read_weights("prithvi"), folder / "Prithvi_EO_V2_300M.pt")
    rule = {"img_size": 16, "num_frames": 3, "patch_size": [1, 4, 4], "num_heads": 2, **STATS}
    config = {"architecture": "prithvi_eo_v2_300", "pretrained_cfg": rule | pretrained}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["prithvi", "prithvi_tl"])
def test_frame_of_prithvi_equals_its_code(name: str) -> None:
    """A model of three frames, run on one: as terratorch runs it, at each size."""
    model = vitlib.load(EARTH / f"{name}.pt", **HEADS)
    outputs = load_file(EARTH / f"{name}.tokens.safetensors")
    assert torch.equal(outputs["bands"], make_bands(16, 16))
    config = model.config
    assert (config.in_channels, config.image_size, config.norm_eps) == (6, (16, 16), 1e-5)
    for key in ("tokens", "tokens@12x20", "tokens@24x24"):
        height, width = map(int, (key.partition("@")[2] or "16x16").split("x"))
        with torch.inference_mode():
            tokens = model.forward_features(make_bands(height, width))
            assert references.distance(tokens, outputs[key]) < TINY


def test_positions_of_another_frame_give_other_tokens() -> None:
    outputs = load_file(EARTH / "prithvi.tokens.safetensors")
    model = vitlib.load(EARTH / "prithvi.pt", **HEADS)
    table = read_weights("prithvi")["encoder.pos_embed"]
    assert table.shape[1] == 1 + 3 * 16
    with torch.inference_mode():
        model.patch_embed.pos_embed[:, 1:] = table[:, 17:33]
        tokens = model.forward_features(outputs["bands"])
    assert references.distance(tokens, outputs["tokens"]) > 1000 * TINY


def test_first_prithvi_has_encoder_and_decoder_under_no_prefix(tmp_path: Path) -> None:
    state = {
        name.removeprefix("encoder.").removeprefix("decoder."): tensor
        for name, tensor in read_weights("prithvi").items()
    }
    assert "decoder_embed.weight" in state
    torch.save(state, tmp_path / "Prithvi_EO_V1_100M.pt")
    model = vitlib.load(tmp_path / "Prithvi_EO_V1_100M.pt", **HEADS)
    outputs = load_file(EARTH / "prithvi.tokens.safetensors")
    with torch.inference_mode():
        tokens = model.forward_features(outputs["bands"])
    assert references.distance(tokens, outputs["tokens"]) < TINY


def test_folder_of_prithvi_gives_heads_and_bands(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_folder(tmp_path / "m")
    with caplog.at_level(logging.WARNING, "vitlib"):
        model = vitlib.load(folder)
    assert "assumed, because no file states it: pool='cls'" in caplog.text
    assert model.config.num_heads == 2
    processor = model.image_processor
    assert isinstance(processor, vitlib.ImageProcessor)
    assert (processor.in_channels, processor.rescale_factor) == (6, None)
    bands = torch.rand(16, 16, 6).numpy() * 3000
    mean, std = torch.tensor(STATS["mean"]), torch.tensor(STATS["std"])
    expected = ((torch.from_numpy(bands) - mean) / std).permute(2, 0, 1)
    torch.testing.assert_close(processor(bands)[0], expected.float())
    vitlib.load(folder, architecture=PRITHVI, pool="mean")
    with pytest.raises(vitlib.VitlibError, match="expected 'prithvi_eo_v1_100'"):
        vitlib.load(folder, architecture="ibm-nasa-geospatial/Prithvi-EO-1.0-100M")


def test_folder_of_prithvi_with_impossible_heads_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(vitlib.VitlibError, match="num_heads 3: expected a divisor of 16"):
        vitlib.load(save_folder(tmp_path / "m", num_heads=3))


def test_file_of_prithvi_needs_its_name_for_preprocessing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = vitlib.load(EARTH / "prithvi.pt", **HEADS)
    assert model.image_processor is None
    model = vitlib.load(EARTH / "prithvi.pt", architecture=PRITHVI, **HEADS)
    assert isinstance(model.image_processor, vitlib.ImageProcessor)
    assert model.image_processor.image_std == (2248.0, 2179.0, 2178.0, 1850.0, 1242.0, 1049.0)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "vitlib"):
        vitlib.load(EARTH / "prithvi_tl.pt", **HEADS)
    assert "read as the model is without a date and a place" in caplog.text


@pytest.mark.parametrize("layout", ["timm", "hf", "meta", "vitlib"])
def test_saved_bands_are_normalised_as_before(layout: Any, tmp_path: Path) -> None:
    model = vitlib.load(EARTH / "prithvi.pt", architecture=PRITHVI, **HEADS)
    vitlib.save(model, tmp_path / "m", layout=layout)
    saved = vitlib.load(tmp_path / "m", num_heads=2).image_processor
    bands = torch.rand(16, 16, 6).numpy() * 3000
    assert isinstance(model.image_processor, vitlib.ImageProcessor)
    assert isinstance(saved, vitlib.ImageProcessor)
    assert torch.equal(saved(bands), model.image_processor(bands))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, t: t.repeat(1, 1, 2, 1, 1) if n.endswith("proj.weight") and t.ndim == 5 else t,
         "patches of 2 frames, as of a model of videos"),
        (lambda n, t: t + 0.1 if n == "encoder.pos_embed" else t, "not the fixed sines of Prithvi"),
    ],
)  # fmt: skip
def test_other_models_of_frames_are_rejected(change: Any, message: str, tmp_path: Path) -> None:
    state = {name: change(name, t) for name, t in read_weights("prithvi").items()}
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(vitlib.VitlibError, match=message):
        vitlib.load(tmp_path / "m.pt", **HEADS)


def test_satmae_of_photos_equals_its_code() -> None:
    outputs = load_file(EARTH / "satmae.tokens.safetensors")
    model = vitlib.load(EARTH / "satmae.pt", num_heads=2)
    with torch.inference_mode():
        tokens = model.forward_features(outputs["bands"])
    assert references.distance(tokens, outputs["tokens"]) < TINY
    outputs = load_file(EARTH / "satmae_finetuned.tokens.safetensors")
    model = vitlib.load(EARTH / "satmae_finetuned.pt", num_heads=2)
    assert (model.config.pool, model.config.final_norm) == ("mean", "pooled")
    with torch.inference_mode():
        assert references.distance(model(outputs["bands"]), outputs["logits"]) < TINY


def test_satmae_by_name_has_its_preprocessing(tmp_path: Path) -> None:
    config = vitlib.ViTConfig(
        embed_dim=1024, num_heads=16, depth=1, image_size=64, family="vit_mae", num_classes=0
    )
    model = vitlib.ViT(config).eval()
    vitlib.save(model, tmp_path / "m", layout="meta")
    loaded = vitlib.load(
        next((tmp_path / "m").glob("*.pth")), architecture="sustainlab-group/SatMAE"
    )
    assert isinstance(loaded.image_processor, vitlib.ImageProcessor)
    assert loaded.image_processor.image_mean == pytest.approx((0.4182007, 0.4214799, 0.3991275))
    assert loaded.image_processor.shortest_edge == 256


def make_others() -> dict[str, dict[str, Tensor]]:
    """Return the names by which DOFA, Clay and SatMAE's other models are recognised."""
    shared = {
        name.removeprefix("encoder."): tensor
        for name, tensor in read_weights("prithvi").items()
        if name.startswith(("encoder.blocks.", "encoder.cls_token", "encoder.norm."))
    }
    kernel, width = torch.zeros(16, 3, 4, 4), 16
    return {
        "DOFA": shared | {"patch_embed.weight_generator.fc_weight.weight": torch.zeros(8, 8)},
        "Clay": {
            "model.encoder.patch_embedding.weight_generator.fc_weight.weight": torch.zeros(8, 8),
            "model.encoder.transformer.layers.0.0.to_qkv.weight": torch.zeros(48, 16),
        },
        "groups of bands": shared
        | {f"patch_embed.{i}.proj.weight": kernel for i in range(3)}
        | {"channel_embed": torch.zeros(1, 3, 8), "pos_embed": torch.zeros(1, 17, 8)},
        "series of images": shared
        | {"patch_embed.proj.weight": kernel, "patch_embed.proj.bias": torch.zeros(width)}
        | {"pos_embed": torch.zeros(1, 17, 8)},
    }


@pytest.mark.parametrize("name", make_others())
def test_others_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    torch.save(make_others()[name], tmp_path / "m.pth")
    with pytest.raises(vitlib.VitlibError, match=name) as error:
        vitlib.load(tmp_path / "m.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["zhu-xlab/DOFA", "made-with-clay/clay"])
def test_others_are_refused_by_id(name: str) -> None:
    with pytest.raises(vitlib.VitlibError, match="is not read: its patch kernel is made for"):
        vitlib.load(EARTH / "prithvi.pt", architecture=name)


@pytest.mark.parametrize(
    ("name", "channels", "bands"),
    [
        ("ibm-nasa-geospatial/Prithvi-EO-2.0-300M", 3, r"6 bands \(blue, green, red, narrow NIR"),
        ("paige-ai/Virchow2", 4, r"3 bands \(red, green, blue\), got 4"),
    ],
)
def test_architecture_of_other_bands_is_refused(
    name: str, channels: int, bands: str, tmp_path: Path
) -> None:
    config = vitlib.ViTConfig(
        image_size=8, patch_size=4, in_channels=channels, embed_dim=8, depth=1, num_heads=2
    )
    vitlib.save(vitlib.ViT(config), tmp_path, layout="timm")
    file = tmp_path / "model.safetensors"
    (tmp_path / "config.json").unlink()
    with pytest.raises(vitlib.VitlibError, match=bands):
        vitlib.load(file, architecture=name)
    assert vitlib.load(file, num_heads=2).config.in_channels == channels
