"""C-RADIO and TIPSv2 in transformers: class tokens, normalisation, files without a config.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import vitlib
from fixtures import references
from fixtures.parity import TINY
from vitlib.checks import verify
from vitlib.testing.images import seeded_images

CLIP_STATS = {"norm_mean": hf.RadioConfig().norm_mean, "norm_std": hf.RadioConfig().norm_std}
UNNORMED = {"image_processor_type": "CLIPImageProcessor", "do_normalize": False}
UNNORMED |= {"do_center_crop": False, "size": {"height": 32, "width": 32}, "resample": 3}


def save_radio(folder: Path, **changes: Any) -> hf.RadioModel:
    torch.manual_seed(0)
    model = references.randomise(hf.RadioModel(references.radio_config(**changes)))
    model.save_pretrained(folder)
    return model


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@torch.inference_mode()
def summary_error(model: vitlib.ViT, reference: Any, size: tuple[int, int] = (32, 32)) -> float:
    images = torch.randn(2, 3, *size)
    return references.distance(model(images), reference(images).summary)


@pytest.mark.parametrize("size", [(64, 64), (64, 24), (24, 64), (96, 80), (128, 8)])
def test_radio_equals_transformers_on_and_beyond_the_learned_grid(
    size: tuple[int, int], tmp_path: Path
) -> None:
    reference = save_radio(tmp_path)
    assert summary_error(vitlib.load(tmp_path), reference, size) < TINY


@pytest.mark.parametrize("chosen", [[2, 0], [1], [1, 2], [2, 1, 0]])
def test_radio_joins_the_chosen_class_tokens(chosen: list[int], tmp_path: Path) -> None:
    reference = save_radio(tmp_path / "theirs", summary_idxs=chosen)
    model = vitlib.load(tmp_path / "theirs")
    assert model.num_features == 48 * len(chosen)
    assert summary_error(model, reference) < TINY
    assert vitlib.save(model, tmp_path / "ours") == {}
    opened = hf.RadioModel.from_pretrained(tmp_path / "ours").eval()
    assert summary_error(model, opened) < TINY
    assert summary_error(vitlib.load(tmp_path / "ours"), reference) < TINY


def test_radio_of_four_class_tokens_equals_transformers(tmp_path: Path) -> None:
    reference = save_radio(tmp_path, num_cls_tokens=4, summary_idxs=[0, 1, 2, 3], num_registers=0)
    model = vitlib.load(tmp_path)
    assert (model.config.pool, model.num_prefix_tokens) == ("cls+3reg", 4)
    assert summary_error(model, reference) < TINY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"summary_idxs": [1, 0]}, r"summary_idxs is \[1, 0\] in config.json and \[0, 1\]"),
        ({"summary_idxs": [0]}, r"contradicts the tensors: summary_idxs \[0\]"),
        ({"num_registers": 4}, "contradicts the tensors: num_registers 6"),
        ({"num_cls_tokens": 0}, "num_cls_tokens 0, num_registers 2: expected 1 or more"),
        ({"norm_mean": [0.5] * 3}, r"norm_mean is \[0.0, 0.0, 0.0\] in the tensors"),
        ({"norm_mean": ["a"] * 3}, "norm_mean .*: expected a list of numbers"),
        ({"norm_std": 1.0}, "norm_std 1.0: expected a list of numbers"),
        ({"norm_std": [0.5] * 3}, r"norm_std is \[1.0, 1.0, 1.0\] in the tensors"),
    ],
)
def test_radio_config_against_its_tensors_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_radio(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(vitlib.VitlibError, match=message):
        vitlib.load(tmp_path)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([1, 1], "different numbers from 0 to 2"),
        ([0, 3], "different numbers from 0 to 2"),
        ([0, 1, 2, 0, 1], "joins 1 to 4 class tokens"),
    ],
)
def test_radio_choice_of_other_tokens_is_refused(
    chosen: list[int], message: str, tmp_path: Path
) -> None:
    save_radio(tmp_path, summary_idxs=chosen)
    with pytest.raises(vitlib.VitlibError, match=message):
        vitlib.load(tmp_path)


def test_radio_without_layer_scale_equals_transformers(tmp_path: Path) -> None:
    """C-RADIOv4 has none: transformers then has ones, of which its config must not say others."""
    save_radio(tmp_path)
    edit(tmp_path, lambda t: [t.pop(name) for name in list(t) if "layer_scale" in name])
    reference = hf.RadioModel.from_pretrained(tmp_path).eval()
    model = vitlib.load(tmp_path)
    assert model.config.layer_scale is None
    assert summary_error(model, reference) < TINY
    vitlib.save(model, tmp_path / "ours")
    opened, report = hf.RadioModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"]
    assert summary_error(model, opened.eval()) < TINY
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layerscale_value": 0.5}))
    with pytest.raises(vitlib.VitlibError, match=r"layerscale_value 0\.5"):
        vitlib.load(tmp_path)


def test_radio_without_its_tokens_is_refused(tmp_path: Path) -> None:
    save_radio(tmp_path)
    edit(tmp_path, lambda t: t.pop("radio_model.model.patch_generator.cls_token.token"))
    with pytest.raises(vitlib.VitlibError, match=r"cls_token\.token|num_registers"):
        vitlib.load(tmp_path)


def test_radio_without_its_buffers_has_those_of_its_config(tmp_path: Path) -> None:
    reference = save_radio(tmp_path, summary_idxs=[2, 1])
    buffers = ("radio_model.summary_idxs", "radio_model.input_conditioner.norm_mean")
    edit(tmp_path, lambda t: [t.pop(name) for name in buffers])
    edit(tmp_path, lambda t: [t.pop(name) for name in list(t) if "layer_scale" in name])
    opened = hf.RadioModel.from_pretrained(tmp_path).eval()
    assert opened.summary_idxs.tolist() == reference.summary_idxs.tolist()
    assert summary_error(vitlib.load(tmp_path), opened) < TINY


def test_radio_patches_of_videos_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = save_radio(tmp_path, video_temporal_patch_size=2)
    with caplog.at_level(logging.WARNING, "vitlib"):
        model = vitlib.load(tmp_path)
    assert "not loaded: radio_model.model.patch_generator (1 tensor)" in caplog.text
    assert summary_error(model, reference) < TINY


@pytest.mark.parametrize("own", [{}, {"do_normalize": True, "image_mean": [0.2, 0.3, 0.4]}])
def test_radio_normalisation_is_a_part_of_the_preprocessing(
    own: dict[str, Any], tmp_path: Path
) -> None:
    """The model of transformers normalises what its processor gives, normalised or not."""
    stats = {"norm_mean": [0.48, 0.45, 0.4], "norm_std": [0.26, 0.27, 0.28]}
    reference = save_radio(tmp_path / "theirs", **stats)
    rule = UNNORMED | own | ({"image_std": [0.5, 0.6, 0.7]} if own else {})
    (tmp_path / "theirs/preprocessor_config.json").write_text(json.dumps(rule))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8))
    raw = hf.CLIPImageProcessor.from_pretrained(tmp_path / "theirs")(photo, return_tensors="pt")
    processor = vitlib.ImageProcessor.load(tmp_path / "theirs")
    with torch.inference_mode():
        expected = reference(**raw).summary
        normalised = reference.input_conditioner(raw["pixel_values"])
    if own:
        assert references.distance(processor(photo), normalised) < 1e-6
    else:
        assert torch.equal(processor(photo), normalised)
    predictor = vitlib.Predictor.load(tmp_path / "theirs")
    assert references.distance(torch.from_numpy(predictor.embed([photo])), expected) < 5e-6
    # What is written has no normalisation in the model: all of it is in the preprocessing.
    predictor.save(tmp_path / "ours")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert (config["norm_mean"], config["norm_std"]) == ([0.0] * 3, [1.0] * 3)
    again = vitlib.ImageProcessor.load(tmp_path / "ours")
    assert torch.equal(again(photo), processor(photo))
    opened = hf.RadioModel.from_pretrained(tmp_path / "ours").eval()
    with torch.inference_mode():
        assert references.distance(opened(processor(photo)).summary, expected) < 5e-6


def test_radio_normalisation_in_half_precision_is_read(tmp_path: Path) -> None:
    save_radio(tmp_path, norm_mean=[0.48, 0.45, 0.4], norm_std=[0.26, 0.27, 0.28])

    def halve(tensors: dict[str, Tensor]) -> None:
        floats = {name: t.bfloat16() for name, t in tensors.items() if t.is_floating_point()}
        tensors.update(floats)

    edit(tmp_path, halve)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(UNNORMED))
    assert vitlib.load(tmp_path).dtype == torch.bfloat16
    assert vitlib.ImageProcessor.load(tmp_path).image_mean == (0.48, 0.45, 0.4)


def test_verify_runs_radio_on_normalised_pixels(tmp_path: Path) -> None:
    save_radio(tmp_path, norm_mean=[0.48, 0.45, 0.4], norm_std=[0.26, 0.27, 0.28])
    assert verify(tmp_path, against="transformers").verdict == "equal"


def test_checks_run_radio_on_a_part_of_its_positions() -> None:
    fields = {"position_resize": "bilinear_square", "embed_dim": 8, "num_heads": 1, "depth": 1}
    config = vitlib.ViTConfig(image_size=2048, **fields)  # type: ignore[arg-type]
    assert seeded_images(config).shape == (2, 3, 512, 512)


def test_radio_with_another_pool_is_written_with_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_radio(tmp_path / "theirs")
    model = vitlib.load(tmp_path / "theirs")
    model.reset_classifier(0, pool="mean")
    with caplog.at_level(logging.WARNING, "vitlib"):
        assert vitlib.save(model, tmp_path / "ours") == {"pool": ("mean", "cls")}
    assert "pool mean becomes cls" in caplog.text


def test_radio_of_four_channels_is_not_written_for_transformers(tmp_path: Path) -> None:
    save_radio(tmp_path / "theirs")
    model = vitlib.load(tmp_path / "theirs", in_channels=4)
    with pytest.raises(vitlib.VitlibError, match="in_channels=4"):
        vitlib.save(model, tmp_path / "ours")


def test_radio_of_positions_that_are_no_square_is_not_written_for_transformers(
    tmp_path: Path,
) -> None:
    save_radio(tmp_path / "theirs")
    model = vitlib.load(tmp_path / "theirs", image_size=(32, 64))
    with pytest.raises(vitlib.VitlibError, match=r"image_size=\(32, 64\)"):
        vitlib.save(model, tmp_path / "ours")
    assert vitlib.save(model, tmp_path / "ours", layout="vitlib") == {}


def test_pool_of_more_tokens_than_there_are_is_refused() -> None:
    with pytest.raises(vitlib.VitlibError, match=r"pool='cls\+2reg' needs as many registers"):
        vitlib.ViTConfig(pool="cls+2reg", num_registers=1)
    with pytest.raises(vitlib.VitlibError, match="no dist_token"):
        vitlib.ViTConfig(pool="cls+reg", num_registers=4, dist_token=True)


# --- files without a config.json ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["radio", "tipsv2"])
def test_bare_file_is_read_as_the_published_model_of_its_shape(name: str, tmp_path: Path) -> None:
    if name == "radio":
        sizes = {"hidden_size": 1280, "num_attention_heads": 16, "patch_size": 16}
        reference = save_radio(tmp_path, **sizes, num_hidden_layers=1, num_registers=7)
        edit(tmp_path, lambda t: t.update(clip_stats()))
    else:
        config = hf.Tipsv2VisionConfig(num_hidden_layers=1, image_size=56)
        reference = references.randomise(hf.Tipsv2VisionModel(config))
        reference.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    model = vitlib.load(tmp_path)
    assert model.config.family == name
    assert model.config.num_heads == reference.config.num_attention_heads
    side = model.config.patch_size[0]
    with torch.inference_mode():
        images = torch.randn(1, 3, 3 * side, 2 * side)
        output = reference(images)
        expected = output.summary if name == "radio" else output.pooler_output
        assert references.distance(model(images), expected) < TINY


def clip_stats() -> dict[str, Tensor]:
    """Return the normalisation of the published files."""
    prefix = "radio_model.input_conditioner"
    return {f"{prefix}.{key}": torch.tensor(v).view(3, 1, 1) for key, v in CLIP_STATS.items()}


def test_bare_file_of_an_older_radio_is_refused(tmp_path: Path) -> None:
    """Some of C-RADIOv3 align the corners of both grids, and no tensor says so."""
    reference = save_radio(tmp_path, num_cls_tokens=4, num_registers=4)
    path = tmp_path / "config.json"
    text, config = path.read_text(), vitlib.load(tmp_path).config
    path.unlink()
    with pytest.raises(vitlib.VitlibError, match="RADIO with 8 class tokens and registers"):
        vitlib.load(tmp_path, num_heads=4)
    edit(tmp_path, lambda t: t.update(clip_stats()))
    reference.make_preprocessor_external()
    assert summary_error(vitlib.load(tmp_path, config=config), reference) < TINY
    path.write_text(json.dumps({**json.loads(text), **CLIP_STATS}))
    assert summary_error(vitlib.load(tmp_path), reference) < TINY


def test_bare_file_of_another_normalisation_is_refused(tmp_path: Path) -> None:
    save_radio(tmp_path, num_registers=7)
    path = tmp_path / "config.json"
    path.unlink()
    with pytest.raises(vitlib.VitlibError, match="write those of the tensors into config"):
        vitlib.load(tmp_path, num_heads=4)
    path.write_text(json.dumps({"norm_mean": [0.0] * 3, "norm_std": [1.0] * 3}))
    assert vitlib.load(tmp_path, num_heads=4).config.family == "radio"


def test_bare_tipsv2_giant_is_not_read_as_dinov2(tmp_path: Path) -> None:
    """Its names are those of DINOv2's own code; the one register tells it from DINOv2's four."""
    sizes = {"hidden_size": 1536, "num_attention_heads": 24, "num_hidden_layers": 1}
    config = hf.Tipsv2VisionConfig(**sizes, use_swiglu_ffn=True, image_size=28)
    reference = references.randomise(hf.Tipsv2VisionModel(config))
    reference.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    images = torch.randn(1, 3, 42, 28)
    for layout in (None, "hf"):
        model = vitlib.load(tmp_path, layout=layout)
        assert (model.config.family, model.config.num_heads) == ("tipsv2", 24)
        with torch.inference_mode():
            assert references.distance(model(images), reference(images).pooler_output) < TINY


def test_bare_gated_tipsv2_of_no_published_shape_asks_for_its_layout(tmp_path: Path) -> None:
    reference = references.save_model("tipsv2 swiglu", tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(vitlib.VitlibError, match="and layout='hf'"):
        vitlib.load(tmp_path)
    model = vitlib.load(tmp_path, num_heads=4, layout="hf")
    images = references.make_pixels(reference, size=(40, 24))
    with torch.inference_mode():
        assert references.distance(model(images), reference(images).pooler_output) < TINY
    assert vitlib.load(tmp_path, num_heads=4).config.family == "dinov2_with_registers"


def test_tipsv2_of_timm_is_written_as_tipsv2(tmp_path: Path) -> None:
    config = vitlib.ViTConfig.named("vit_base_patch14_reg1_tipsv2", image_size=28)
    assert config.family == "tipsv2"
    model = vitlib.ViT(config).eval()
    lost = vitlib.save(model, tmp_path)
    assert lost.keys() <= {"position_resize"}
    opened = hf.AutoModel.from_pretrained(tmp_path).eval()
    assert type(opened).__name__ == "Tipsv2VisionModel"
    images = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        assert references.distance(model(images), opened(images).pooler_output) < TINY


@pytest.mark.parametrize("ratio", [3.7361111111111112, 4304 / 1152, 2.66667])
@pytest.mark.parametrize("gated", [False, True])
def test_ratio_of_any_mlp_is_written(ratio: float, gated: bool, tmp_path: Path) -> None:
    config = {"hidden_size": 48, "num_attention_heads": 4, "mlp_ratio": ratio}
    config |= {"use_swiglu_ffn": gated, "num_hidden_layers": 1, "image_size": 28}
    reference = references.randomise(hf.Tipsv2VisionModel(hf.Tipsv2VisionConfig(**config)))
    reference.save_pretrained(tmp_path / "theirs")
    vitlib.save(vitlib.load(tmp_path / "theirs"), tmp_path / "ours")
    _, report = hf.Tipsv2VisionModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["mismatched_keys"]
    assert not report["missing_keys"]
