"""Sizes in timm's config.json, compared with the tensors and with the prepared photos."""

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
from fixtures.timm_folders import TIMM, edit_config


# timm 1.0.31 resamples the kernel of the first case, draws a random head for num_classes, and
# rejects all others. vitlib rejects every one.
@pytest.mark.parametrize(
    ("fixture", "name", "value", "detail"),
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
        ("dinov3_plus", "swiglu_align_to", 1, ""),  # 1.25 * 16 is 20, not 24
    ],
)
def test_load_rejects_size_that_contradicts_tensors(
    fixture: str, name: str, value: object, detail: str, tmp_path: Path
) -> None:
    vitlib.load(TIMM / fixture)
    with pytest.raises(vitlib.VitlibError) as error:
        vitlib.load(edit_config(fixture, tmp_path / "m", model_args={name: value}))
    clash = f"{name} {detail}" if detail else "mlp_ratio 1.25 (the tensors have 1.5)"
    assert f"config.json contradicts the tensors: {clash}" in str(error.value)


@pytest.mark.parametrize("ratio", [1.25, 1.3, 1.5])
def test_swiglu_width_is_rounded_up_to_multiple_of_8(ratio: float, tmp_path: Path) -> None:
    """For each ratio int(16 * ratio) is 20 or 24, which timm rounds up to 24."""
    folder = edit_config("dinov3_plus", tmp_path / "m", model_args={"mlp_ratio": ratio})
    assert vitlib.load(folder).config.mlp_dim == 24


def test_num_classes_is_read_from_top_level_first(tmp_path: Path) -> None:
    """In timm it overrides pretrained_cfg, which fine-tuning does not update."""
    folder = edit_config("vit", tmp_path / "m", pretrained_cfg={"num_classes": 7})
    assert vitlib.load(folder).config.num_classes == 5
    folder = edit_config("vit", tmp_path / "n", num_classes=7)
    with pytest.raises(vitlib.VitlibError, match=r"tensors: num_classes 7 \(the tensors have 5\)"):
        vitlib.load(folder)


def test_timm_wrapper_without_head_may_have_num_classes(tmp_path: Path) -> None:
    """A TimmWrapperModel of transformers has no head, but its config has num_classes."""
    folder = edit_config("dinov2_giant", tmp_path / "m", num_classes=5)
    with pytest.raises(vitlib.VitlibError, match="num_classes 5"):
        vitlib.load(folder)
    folder = edit_config("dinov2_giant", tmp_path / "n", num_classes=5, model_type="timm_wrapper")
    assert vitlib.load(folder).config.num_classes == 0


# The size of photos is what resolve_data_config(model=model) of timm 1.0.31 returns.
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
def test_photos_are_prepared_at_the_size_of_timm(
    args: dict[str, Any],
    pretrained: dict[str, Any],
    size: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A warning is logged where timm would reject photos of the prepared size."""
    pretrained = {**pretrained, "input_size": [3, *[pretrained.get("side", 16)] * 2]}
    folder = edit_config("vit", tmp_path / "m", model_args=args, pretrained_cfg=pretrained)
    with caplog.at_level(logging.WARNING, "vitlib"):
        model = vitlib.load(folder)
    assert model.image_processor is not None
    assert model.image_processor.crop_size == (size, size)
    rejected = not (args["dynamic_img_size"] or pretrained["fixed_input_size"])
    warning = "prepares photos at 32x32 for a model of img_size 16, which timm refuses unless"
    assert (warning in caplog.text) == rejected


@pytest.mark.parametrize(
    ("name", "is_logged"), [("test_vit", False), ("vit_base_patch16_224", True)]
)
def test_photo_size_is_free_for_dynamic_architecture(
    name: str, is_logged: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = edit_config("vit", tmp_path / "m", pretrained_cfg={"input_size": [3, 32, 32]})
    config = json.loads((folder / "config.json").read_text())
    del config["model_args"]["dynamic_img_size"]
    (folder / "config.json").write_text(json.dumps(config | {"architecture": name}))
    with caplog.at_level(logging.WARNING, "vitlib"):
        vitlib.load(folder)
    assert ("which timm refuses unless" in caplog.text) == is_logged


def test_photo_channels_follow_in_chans(tmp_path: Path) -> None:
    """In timm, in_chans of model_args overrides the first number of input_size."""
    folder = edit_config("vit", tmp_path / "m", pretrained_cfg={"input_size": [4, 16, 16]})
    processor = vitlib.load(folder).image_processor
    assert processor is not None
    assert processor.in_channels == 3


def test_invalid_input_size_fails_only_in_preprocessing(tmp_path: Path) -> None:
    """A model loads without preprocessing; ImageProcessor.load reports the error."""
    folder = edit_config(
        "vit", tmp_path / "m", model_args={"img_size": None}, pretrained_cfg={"input_size": 224}
    )
    assert vitlib.load(folder).image_processor is None
    with pytest.raises(vitlib.VitlibError, match="input_size=224: expected a list"):
        vitlib.ImageProcessor.load(folder)


@pytest.mark.parametrize("dynamic", [True, False])
def test_load_rejects_positions_that_timm_resamples_twice(dynamic: bool, tmp_path: Path) -> None:
    """Positions of 16 pixels go to img_size at load, then to the size of the photos."""
    folder = edit_config(
        "vit", tmp_path / "m", model_args={"img_size": 32, "dynamic_img_size": dynamic}
    )
    with pytest.raises(vitlib.VitlibError, match="set img_size of its model_args to 16"):
        vitlib.load(folder)
    shutil.rmtree(folder)
    vitlib.load(
        edit_config("vit", folder, model_args={"img_size": 16, "dynamic_img_size": dynamic})
    )


def test_image_size_of_vitlib_json_overrides_config(tmp_path: Path) -> None:
    """The offsets are those of 16 pixels, as the vitlib.json of the remedy states."""
    folder = edit_config("beit", tmp_path / "m", model_args={"img_size": 32})
    with pytest.raises(vitlib.VitlibError, match=r"write a vitlib\.json beside the file"):
        vitlib.load(folder)
    (folder / "vitlib.json").write_text('{"image_size": [16, 16]}')
    assert vitlib.load(folder).config.image_size == (16, 16)


def tiny_model(**fields: Any) -> vitlib.ViT:
    defaults: dict[str, Any] = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1}
    return vitlib.ViT(
        vitlib.ViTConfig(**defaults | {"num_heads": 2, "num_classes": 3} | fields)
    ).eval()


@pytest.mark.parametrize(("side", "dynamic"), [(16, True), (32, None)])
def test_save_writes_dynamic_img_size_for_other_photo_size(
    side: int, dynamic: bool | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without it, timm's model rejects the photos that its own config prepares."""
    processor = vitlib.ImageProcessor(size=(side, side))
    vitlib.save(tiny_model(), tmp_path / "m", layout="timm", image_processor=processor)
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["model_args"].get("dynamic_img_size") == dynamic
    caplog.clear()
    assert vitlib.load(tmp_path / "m").image_processor.size == (side, side)
    assert "prepares photos" not in caplog.text


@pytest.mark.parametrize("mlp_dim", [24, 20, 17])
def test_save_keeps_swiglu_width(mlp_dim: int, tmp_path: Path) -> None:
    """In timm the width is a multiple of 8, unless swiglu_align_to changes that."""
    gated = {
        "family": "dinov3_vit",
        "activation": "swiglu",
        "rope": {"theta": 100.0},
        "pool": "mean",
    }
    gated |= {"pos_embed": False, "layer_scale": 1.0, "key_bias": False}
    model = tiny_model(**gated, mlp_dim=mlp_dim, norm_eps=1e-5)
    vitlib.save(model, tmp_path / "m", layout="timm")
    args = json.loads((tmp_path / "m/config.json").read_text())["model_args"]
    align, hidden = args["swiglu_align_to"], int(args["embed_dim"] * args["mlp_ratio"])
    assert hidden + -hidden % align == mlp_dim
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(vitlib.load(tmp_path / "m")(images), model(images))


def test_load_rejects_packed_swiglu_of_other_width(tmp_path: Path) -> None:
    """In timm's packed MLP, mlp_ratio counts both parts of the gate."""
    folder = edit_config("dinov2_giant", tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if ".mlp.fc1." in name]:
        tensors[name] = tensors[name][: len(tensors[name]) // 2].contiguous()
    for name in [name for name in tensors if name.endswith(".mlp.fc2.weight")]:
        tensors[name] = tensors[name][:, : tensors[name].shape[1] // 2].contiguous()
    save_file(tensors, path)
    with pytest.raises(vitlib.VitlibError, match=r"mlp_ratio 2.5 \(the tensors have 1.25\)"):
        vitlib.load(folder)
