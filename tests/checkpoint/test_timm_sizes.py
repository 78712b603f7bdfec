"""Sizes that timm's config.json states, against the tensors and against the photos prepared."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitlib
from paths import FIXTURES

TIMM = FIXTURES / "timm"


def edited(name: str, folder: Path, args: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Copy a fixture, and change model_args, pretrained_cfg and the top level of its config."""
    shutil.copytree(TIMM / name, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] |= args or {}
    config["pretrained_cfg"] |= changes.pop("pretrained_cfg", {})
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


# timm 1.0.31 resamples the kernel of the first, gives a head at random for num_classes, and refuses
# every other: vitlib guesses none.
@pytest.mark.parametrize(
    ("fixture", "name", "value", "told"),
    [
        ("vit", "patch_size", 2, "2 (the tensors have 4)"),
        ("vit", "in_chans", 1, "1 (the tensors have 3)"),
        ("vit", "embed_dim", 32, "32 (the tensors have 16)"),
        ("vit", "embed_dim", "16", "'16' (the tensors have 16)"),
        ("vit", "depth", 1, "1 (the tensors have 2)"),
        ("vit", "mlp_ratio", 8.0, "8.0 (the tensors have 1.25)"),
        ("vit", "num_classes", 7, "7 (the tensors have 5)"),
        ("vit", "num_classes", 0, "0 (the tensors have 5)"),
        ("vit", "no_embed_class", True, "True (the tensors have False)"),
        ("dinov2_giant", "mlp_ratio", 8, "8 (the tensors have 2.5)"),
        ("dinov2_giant", "mlp_ratio", 1.25, "1.25 (the tensors have 2.5)"),
        ("dinov2_giant", "num_classes", 5, "5 (the tensors have 0)"),
        ("dinov3_plus", "mlp_ratio", 8, "8 with swiglu_align_to 8 (the tensors have 1.5)"),
        ("dinov3_plus", "swiglu_align_to", 1, ""),  # of 1.25 * 16, which is 20 and not 24
    ],
)
def test_a_size_that_the_tensors_contradict_is_refused(
    fixture: str, name: str, value: object, told: str, tmp_path: Path
) -> None:
    vitlib.load(TIMM / fixture)
    with pytest.raises(vitlib.VitlibError) as error:
        vitlib.load(edited(fixture, tmp_path / "m", {name: value}))
    clash = f"{name} {told}" if told else "mlp_ratio 1.25 (the tensors have 1.5)"
    assert f"config.json contradicts the tensors: {clash}" in str(error.value)


@pytest.mark.parametrize("ratio", [1.25, 1.3, 1.5])
def test_a_gated_width_is_rounded_as_timm_rounds_it(ratio: float, tmp_path: Path) -> None:
    """int(16 * ratio) is 20 or 24, and timm's multiple of 8 is 24 for each."""
    folder = edited("dinov3_plus", tmp_path / "m", {"mlp_ratio": ratio})
    assert vitlib.load(folder).config.mlp_dim == 24


def test_num_classes_of_the_weights_is_the_top_levels(tmp_path: Path) -> None:
    """timm takes it over that of pretrained_cfg, which finetuning leaves as it was."""
    folder = edited("vit", tmp_path / "m", pretrained_cfg={"num_classes": 7})
    assert vitlib.load(folder).config.num_classes == 5
    folder = edited("vit", tmp_path / "n", num_classes=7)
    with pytest.raises(vitlib.VitlibError, match=r"tensors: num_classes 7 \(the tensors have 5\)"):
        vitlib.load(folder)


def test_a_wrapped_model_without_a_head_may_count_labels(tmp_path: Path) -> None:
    """transformers' TimmWrapperModel has no head, and its config the number of labels."""
    folder = edited("dinov2_giant", tmp_path / "m", num_classes=5)
    with pytest.raises(vitlib.VitlibError, match="num_classes 5"):
        vitlib.load(folder)
    folder = edited("dinov2_giant", tmp_path / "n", num_classes=5, model_type="timm_wrapper")
    assert vitlib.load(folder).config.num_classes == 0


# What resolve_data_config(model=model) of timm 1.0.31 gives for these: the size of the photos.
@pytest.mark.parametrize(
    ("args", "pretrained", "size"),
    [
        ({"img_size": 32, "dynamic_img_size": False}, {"fixed_input_size": True}, 32),
        ({"img_size": 16, "dynamic_img_size": False}, {"fixed_input_size": True, "side": 32}, 16),
        ({"img_size": 16, "dynamic_img_size": True}, {"fixed_input_size": True, "side": 32}, 32),
        ({"img_size": 16, "dynamic_img_size": True}, {"fixed_input_size": False, "side": 32}, 32),
        ({"img_size": 16, "dynamic_img_size": False}, {"fixed_input_size": False, "side": 32}, 32),
    ],
)
def test_photos_are_prepared_at_timms_size(
    args: dict[str, Any],
    pretrained: dict[str, Any],
    size: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A model of one size takes photos of that alone; a warning says where timm refuses them."""
    pretrained = {**pretrained, "input_size": [3, *[pretrained.get("side", 16)] * 2]}
    folder = edited("vit", tmp_path / "m", args, pretrained_cfg=pretrained)
    with caplog.at_level(logging.WARNING, "vitlib"):
        model = vitlib.load(folder)
    assert model.image_processor is not None
    assert model.image_processor.crop_size == (size, size)
    refused = not (args["dynamic_img_size"] or pretrained["fixed_input_size"])
    told = "prepares photos at 32x32 for a model of img_size 16, which timm refuses unless"
    assert (told in caplog.text) == refused


@pytest.mark.parametrize(("name", "told"), [("test_vit", False), ("vit_base_patch16_224", True)])
def test_a_model_that_timm_builds_dynamic_takes_any_photos(
    name: str, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = edited("vit", tmp_path / "m", pretrained_cfg={"input_size": [3, 32, 32]})
    config = json.loads((folder / "config.json").read_text())
    del config["model_args"]["dynamic_img_size"]
    (folder / "config.json").write_text(json.dumps(config | {"architecture": name}))
    with caplog.at_level(logging.WARNING, "vitlib"):
        vitlib.load(folder)
    assert ("which timm refuses unless" in caplog.text) == told


def test_channels_of_the_photos_are_the_models(tmp_path: Path) -> None:
    """timm takes in_chans of model_args over the first number of input_size."""
    folder = edited("vit", tmp_path / "m", pretrained_cfg={"input_size": [4, 16, 16]})
    processor = vitlib.load(folder).image_processor
    assert processor is not None
    assert processor.in_channels == 3


def test_photos_of_no_size_leave_the_model_readable(tmp_path: Path) -> None:
    """A model needs no preprocessing: whoever asks for pixels gets the error."""
    folder = edited("vit", tmp_path / "m", {"img_size": None}, pretrained_cfg={"input_size": 224})
    assert vitlib.load(folder).image_processor is None
    with pytest.raises(vitlib.VitlibError, match="input_size=224: expected a list"):
        vitlib.ImageProcessor.load(folder)


@pytest.mark.parametrize("dynamic", [True, False])
def test_positions_that_timm_resamples_twice_are_refused(dynamic: bool, tmp_path: Path) -> None:
    """Positions of 16 go to img_size at load and to the photos' size again; the remedy works."""
    folder = edited("vit", tmp_path / "m", {"img_size": 32, "dynamic_img_size": dynamic})
    with pytest.raises(vitlib.VitlibError, match="set img_size of its model_args to 16"):
        vitlib.load(folder)
    shutil.rmtree(folder)
    vitlib.load(edited("vit", folder, {"img_size": 16, "dynamic_img_size": dynamic}))


def test_the_size_beside_a_config_comes_first(tmp_path: Path) -> None:
    """BEiT's offsets are those of 16 pixels: the vitlib.json of the message says so."""
    folder = edited("beit", tmp_path / "m", {"img_size": 32})
    with pytest.raises(vitlib.VitlibError, match=r"write a vitlib\.json beside the file"):
        vitlib.load(folder)
    (folder / "vitlib.json").write_text('{"image_size": [16, 16]}')
    assert vitlib.load(folder).config.image_size == (16, 16)


# --- written back ---------------------------------------------------------------------------------


def tiny(**fields: Any) -> vitlib.ViT:
    usual: dict[str, Any] = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1}
    return vitlib.ViT(
        vitlib.ViTConfig(**usual | {"num_heads": 2, "num_classes": 3} | fields)
    ).eval()


@pytest.mark.parametrize(("side", "dynamic"), [(16, True), (32, None)])
def test_photos_of_another_size_are_written_for_a_dynamic_model(
    side: int, dynamic: bool | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without it timm's model refuses the photos that its own config prepares."""
    processor = vitlib.ImageProcessor(size=(side, side))
    vitlib.save(tiny(), tmp_path / "m", layout="timm", image_processor=processor)
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["model_args"].get("dynamic_img_size") == dynamic
    caplog.clear()
    assert vitlib.load(tmp_path / "m").image_processor.size == (side, side)
    assert "prepares photos" not in caplog.text


@pytest.mark.parametrize("mlp_dim", [24, 20, 17])
def test_a_gated_width_is_written_as_it_is(mlp_dim: int, tmp_path: Path) -> None:
    """timm rounds up to a multiple of 8 unless swiglu_align_to says another."""
    gated = {"family": "dinov3_vit", "activation": "swiglu", "rope_theta": 100.0, "pool": "mean"}
    gated |= {"pos_embed": False, "layer_scale": 1.0, "key_bias": False}
    model = tiny(**gated, mlp_dim=mlp_dim, norm_eps=1e-5)
    vitlib.save(model, tmp_path / "m", layout="timm")
    args = json.loads((tmp_path / "m/config.json").read_text())["model_args"]
    align, hidden = args["swiglu_align_to"], int(args["embed_dim"] * args["mlp_ratio"])
    assert hidden + -hidden % align == mlp_dim
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(vitlib.load(tmp_path / "m")(images), model(images))


def test_a_packed_gate_of_other_tensors_is_refused(tmp_path: Path) -> None:
    """The width is that of both parts of the gate, as timm's packed MLP counts it."""
    folder = edited("dinov2_giant", tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if ".mlp.fc1." in name]:
        tensors[name] = tensors[name][: len(tensors[name]) // 2].contiguous()
    for name in [name for name in tensors if name.endswith(".mlp.fc2.weight")]:
        tensors[name] = tensors[name][:, : tensors[name].shape[1] // 2].contiguous()
    save_file(tensors, path)
    with pytest.raises(vitlib.VitlibError, match=r"mlp_ratio 2.5 \(the tensors have 1.25\)"):
        vitlib.load(folder)
