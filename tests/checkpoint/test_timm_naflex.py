"""timm's NaFlexVit: its embedding, its rules of positions, its arguments and its bare files.

timm made the files and their outputs (fixtures/make_timm_naflex.py). test_layouts.py proves logits
and tokens of each, and the files that vitlib writes; this file proves pools, that each fact
matters, and what is refused.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitlib
from fixtures import reference_towers, references
from fixtures.layout_files import make_pixels
from fixtures.timm_folders import TIMM, edit_config, save_bare
from fixtures.timm_rotary import load_model, rebuild
from vitlib.checkpoint.layouts.timm_models import get_architecture
from vitlib.errors import CheckpointError

TINY = 2e-6  # as in test_parity.py
DIFFERS = 1e-3
SIZES = ((16, 16), (12, 20), (24, 24), (28, 12))
RULES = {
    "naflex_gap": "bicubic_antialias",
    "naflex_par": "bicubic_antialias_square",
    "naflex_parfac": "bilinear_square",
    "naflex_fac": "bilinear",
    "naflex_map": "bicubic_antialias",
    "naflex_so150m": "bicubic_antialias",
    "naflex_siglip": "bilinear_antialias",
    "naflex_radio_corners": "bilinear_corners_square",
    "naflex_radio": "bilinear_square",
    "naflex_oblong": "bicubic_antialias_square",
    "naflex_norms": "bilinear_antialias",
}
Damage = Callable[[vitlib.ViT], vitlib.ViT]


@torch.inference_mode()
def compare(model: vitlib.ViT, name: str, sizes: tuple[tuple[int, int], ...] = SIZES) -> float:
    """Return the largest error of logits, pooled vectors and tokens, on and off the grid."""
    expected, errors = load_file(TIMM / f"{name}.expected.safetensors"), []
    for height, width in sizes:
        images, size = make_pixels(height, width), f"{height}x{width}"
        tokens = model.forward_features(images)
        errors.append(references.distance(model(images), expected[f"logits@{size}"]))
        errors.append(references.distance(tokens, expected[f"features@{size}"]))
        errors.append(references.distance(model.pool(tokens), expected[f"pooled@{size}"]))
    return max(errors)


def test_names_are_those_of_the_script() -> None:
    manifest = json.loads((TIMM / "manifest.json").read_text())
    assert {name for name in manifest if name.startswith("naflex")} == {*RULES}


@pytest.mark.parametrize("name", RULES)
def test_load_equals_timm_on_and_off_the_grid(name: str) -> None:
    model = load_model(name)
    assert model.config.position_resize == RULES[name]
    assert model.config.family == ("siglip" if name == "naflex_siglip" else "naflexvit")
    assert compare(model, name) < TINY


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("layout", ["timm", "vitlib"])
def test_save_keeps_every_field(name: str, layout: Any, tmp_path: Path) -> None:
    model = load_model(name)
    assert vitlib.save(model, tmp_path, layout=layout) == {}
    again = vitlib.load(tmp_path)
    assert again.config == model.config
    assert again.image_processor == model.image_processor
    assert compare(again, name) < TINY


def test_positions_of_rows_and_columns_are_summed() -> None:
    tensors = load_file(TIMM / "naflex_parfac/model.safetensors")
    rows, columns = tensors["embeds.pos_embed_y"], tensors["embeds.pos_embed_x"]
    table = load_model("naflex_parfac").patch_embed.pos_embed
    assert table is not None
    assert torch.equal(table[0, 4 * 2 + 3], rows[0, 2] + columns[0, 3])


def _other_rule(rule: Any) -> Damage:
    return lambda model: rebuild(model, position_resize=rule)


def _pool_of_registers_too(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "attention_pool", prefix_tokens=True)


def _pool_of_patches(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, "attention_pool", prefix_tokens=False)


def _norm_of_tokens(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, final_norm="tokens")


def _exact_gelu(model: vitlib.ViT) -> vitlib.ViT:
    return rebuild(model, activation="gelu")


@torch.no_grad()
def _channels_first(model: vitlib.ViT) -> vitlib.ViT:
    """Take the rows of the projection for (channels, height, width)."""
    kernel = model.patch_embed.proj.weight
    kernel.copy_(kernel.permute(0, 2, 3, 1).flatten(1).reshape(kernel.shape).clone())
    return model


@torch.no_grad()
def _turned_positions(model: vitlib.ViT) -> vitlib.ViT:
    table, (h, w) = model.patch_embed.pos_embed, model.config.grid_size
    assert table is not None
    table.copy_(table.reshape(1, w, h, -1).transpose(1, 2).flatten(1, 2).clone())
    return model


CONTROLS: list[tuple[str, Damage]] = [
    ("naflex_gap", _other_rule("bicubic_antialias_square")),
    ("naflex_par", _other_rule("bicubic_antialias")),
    ("naflex_parfac", _other_rule("bilinear")),
    ("naflex_fac", _other_rule("bilinear_square")),
    ("naflex_siglip", _other_rule("bicubic_antialias")),
    ("naflex_radio", _other_rule("bilinear_corners_square")),
    ("naflex_radio_corners", _other_rule("bilinear_square")),
    ("naflex_oblong", _other_rule("bicubic_antialias")),
    ("naflex_oblong", _turned_positions),
    ("naflex_map", _pool_of_registers_too),
    ("naflex_norms", _pool_of_patches),
    ("naflex_radio", _norm_of_tokens),
    ("naflex_gap", _norm_of_tokens),
    ("naflex_norms", _exact_gelu),
    *((name, _channels_first) for name in RULES),
]


@pytest.mark.parametrize(("name", "damage"), CONTROLS)
def test_another_fact_gives_other_numbers(name: str, damage: Damage) -> None:
    model = load_model(name)
    assert compare(damage(model), name) > DIFFERS


# --- other files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["naflex_gap", "naflex_radio"])
def test_names_of_a_plain_vit_are_read_as_timm_reads_them(name: str, tmp_path: Path) -> None:
    """timm renames and reshapes them at load; C-RADIO's own files are of this kind."""
    tensors = {}
    for key, tensor in load_file(TIMM / name / "model.safetensors").items():
        key = key.replace("embeds.proj", "patch_embed.proj").removeprefix("embeds.")
        tensor = tensor.flatten(1, 2) if key == "pos_embed" else tensor
        if key == "patch_embed.proj.weight":
            tensor = tensor.reshape(-1, 4, 4, 3).permute(0, 3, 1, 2)
        tensors[key] = tensor.contiguous()
    shutil.copytree(TIMM / name, tmp_path / "m")
    save_file(tensors, tmp_path / "m/model.safetensors")
    assert compare(vitlib.load(tmp_path / "m"), name) < TINY


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("naflexvit_base_patch16_siglip", {}),
        ("naflexvit_base_patch16_map", {}),
        ("naflexvit_so150m2_patch16_reg1_map", {}),
        ("naflexvit_so150m2_patch16_reg1_gap", {}),
        ("naflexvit_base_patch16_radio_v3", {"image_size": (64, 64)}),
    ],
)
def test_bare_file_of_published_widths_opens_as_that_model(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    cfg = replace(vitlib.ViTConfig.named(name), depth=1, **changes)
    model = vitlib.ViT(cfg)
    # Biases of a trained model. The pool of SO150M has them, and its blocks do not.
    for key, parameter in model.named_parameters():
        if key.endswith("q.bias") and not (key.startswith("blocks.") and "so150m" in name):
            torch.nn.init.normal_(parameter)
    assert vitlib.load(save_bare(model, tmp_path)).config == cfg


def test_bare_file_of_two_rules_asks(tmp_path: Path) -> None:
    cfg = replace(vitlib.ViTConfig.named("naflexvit_base_patch16_par_gap"), depth=1)
    path = save_bare(vitlib.ViT(cfg), tmp_path)
    with pytest.raises(CheckpointError, match=r"position_resize='bicubic_antialias_square' \(nafl"):
        vitlib.load(path)
    assert vitlib.load(path, architecture="naflexvit_base_patch16_par_gap").config == cfg


@pytest.mark.parametrize(
    ("name", "rule"), [("naflex_par", "bicubic_antialias"), ("naflex_fac", "bilinear_square")]
)
def test_bare_file_of_other_widths_says_the_assumed_rule(
    name: str, rule: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shutil.copy(TIMM / name / "model.safetensors", tmp_path))
    with caplog.at_level(logging.WARNING, "vitlib"):
        model = vitlib.load(path, num_heads=2)
    assert model.config.position_resize == rule
    assert f"position_resize={rule!r}" in caplog.text
    again = vitlib.load(path, config=load_model(name).config)
    assert compare(again, name) < TINY


def test_siglip2_of_transformers_becomes_timms_naflexvit(tmp_path: Path) -> None:
    """Both have the same rule of positions: nothing is lost."""
    tower = reference_towers.save_tower("siglip2", tmp_path / "hf")
    model = vitlib.load(tmp_path / "hf")
    assert vitlib.save(model, tmp_path / "timm", layout="timm") == {}
    architecture = json.loads((tmp_path / "timm/config.json").read_text())["architecture"]
    assert architecture == "naflexvit_base_patch16_siglip"
    again = vitlib.load(tmp_path / "timm")
    assert again.config == model.config
    images = torch.randn(2, 3, 40, 24)
    with torch.inference_mode():
        expected, _ = reference_towers.run_tower(reference_towers.TOWERS["siglip2"], tower, images)
        assert references.distance(again.forward_features(images), expected) < TINY


def test_trained_positions_of_rows_and_columns_are_written_as_a_grid(tmp_path: Path) -> None:
    model = load_model("naflex_parfac")
    table = model.get_parameter("patch_embed.pos_embed")
    with torch.no_grad():
        table += torch.randn_like(table)
    vitlib.save(model, tmp_path, layout="timm")
    args = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert (args["pos_embed"], args["pos_embed_interp_mode"]) == ("learned", "bilinear")
    assert torch.equal(vitlib.load(tmp_path).get_parameter("patch_embed.pos_embed"), table)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "swiglu"}, "timm's NaFlexVit cannot run .*activation='swiglu'"),
        ({"norm_eps": 1e-5}, "timm's NaFlexVit cannot run .*norm_eps=1e-05"),
        ({"dist_token": True}, "dist_head=False"),
        (
            {"rope": {"theta": 100.0}, "pos_embed": False, "key_bias": False},
            "timm's NaFlexVit cannot run .*rope=",
        ),
    ],
)
def test_save_refuses_what_the_class_does_not_compute(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    cfg = vitlib.ViTConfig(family="naflexvit", image_size=32, embed_dim=16, num_heads=2, **fields)
    with pytest.raises(vitlib.VitlibError, match=message):
        vitlib.save(vitlib.ViT(cfg), tmp_path / "out", layout="timm")
    assert not (tmp_path / "out").exists()


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("naflex_gap", {"rope_type": "axial"}, "rope_type='axial', which vitlib does not run"),
        ("naflex_gap", {"patchify_channels_last": False}, "patchify_channels_last=False, which"),
        ("naflex_gap", {"attn_type": "eva"}, "attn_type='eva', which vitlib does not run"),
        ("naflex_gap", {"swiglu_mlp": True}, "swiglu_mlp=True, which vitlib does not run"),
        ("naflex_gap", {"attn_gated": True}, "attn_gated=True, which vitlib does not run"),
        ("naflex_gap", {"dynamic_img_pad": True}, "dynamic_img_pad=True, which vitlib does not"),
        ("naflex_gap", {"pool_include_prefix": True}, "pools 'mean' with class tokens"),
        ("naflex_gap", {"pos_embed": "sincos"}, "pos_embed='sincos': expected learned, factorized"),
        ("naflex_gap", {"pos_embed": "factorized"}, r"'factorized' \(the tensors have 'learned'\)"),
        ("naflex_parfac", {"pos_embed": "learned"}, r"'learned' \(the tensors have 'factorized'\)"),
        ("naflex_gap", {"pos_embed": "none"}, r"pos_embed False \(the tensors have True\)"),
        ("naflex_gap", {"pos_embed_align_corners": True}, "resizes positions by none of its rules"),
        ("naflex_gap", {"pos_embed_grid_size": [3, 5]}, r"pos_embed_grid_size \[3, 5\] \(the ten"),
        ("naflex_gap", {"patch_size": 8}, "contradicts the tensors: patch_size 8"),
        ("naflex_gap", {"reg_tokens": 1}, r"num_registers 1 \(the tensors have 4\)"),
        ("naflex_so150m", {"qkv_bias": True}, r"qkv_bias True \(the tensors have False\)"),
        ("vit", {"pos_embed_interp_mode": "bicubic"}, "pos_embed_interp_mode='bicubic', which"),
    ],
)
def test_load_rejects_arguments_that_change_the_model(
    name: str, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = edit_config(name, tmp_path / "m", model_args=arguments)
    with pytest.raises(vitlib.VitlibError, match=message) as error:
        vitlib.load(folder)
    assert "\n" not in str(error.value)


def test_load_accepts_arguments_that_change_no_number_of_images(tmp_path: Path) -> None:
    harmless = {"pos_embed_use_grid_sample": True, "enable_patch_interpolator": True}
    harmless |= {"rope_type": "none", "rope_temperature": 100.0, "img_size": 224}
    folder = edit_config("naflex_gap", tmp_path / "m", model_args=harmless)
    assert vitlib.load(folder).config == load_model("naflex_gap").config


def test_load_rejects_tensors_of_a_naflexvit_under_another_name(tmp_path: Path) -> None:
    folder = edit_config("naflex_gap", tmp_path / "m", architecture="vit_base_patch16_224")
    with pytest.raises(
        CheckpointError, match=r"is no NaFlexVit, and the tensors .* are those of o"
    ):
        vitlib.load(folder)


def test_load_names_positions_of_another_width(tmp_path: Path) -> None:
    shutil.copytree(TIMM / "naflex_parfac", tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"embeds.pos_embed_x": torch.zeros(1, 4, 3)}, path)
    with pytest.raises(CheckpointError, match=r"pos_embed_y is 1x4x8, and .* 1x4x3: expected"):
        vitlib.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "side", "mean"),
    [("naflex_gap", 384, 0.5), ("naflex_siglip", 384, 0.5), ("naflex_radio", 512, 0.48145466)],
)
def test_photos_are_prepared_at_timms_fixed_size(name: str, side: int, mean: float) -> None:
    """Not at the size of the learned grid, which is 16 pixels here."""
    processor = load_model(name).image_processor
    assert processor is not None
    assert processor.image_mean is not None
    assert (processor.shortest_edge, processor.crop_size) == (side, (side, side))
    assert (processor.resample, processor.image_mean[0]) == (3, pytest.approx(mean))


@pytest.mark.parametrize(
    ("grid", "side", "mean"), [((256, 256), 256, 0.5), ((2048, 2048), 512, 0.48145466)]
)
def test_bare_files_have_the_transform_of_their_grid(
    grid: tuple[int, int], side: int, mean: float
) -> None:
    """C-RADIO alone has so large a grid."""
    processor = vitlib.ImageProcessor.from_profile("timm", "naflexvit", grid)
    assert processor.crop_size == (side, side)
    assert processor.image_mean is not None
    assert processor.image_mean[0] == pytest.approx(mean)


def test_table_has_the_rule_of_each_architecture() -> None:
    assert get_architecture("vit_base_patch16_224").position_resize is None
    rule = get_architecture("naflexvit_large_patch16_radio_v3.c_radio").position_resize
    assert rule == "bilinear_square"
    assert vitlib.ViTConfig.named("naflexvit_base_patch16_par_gap").position_resize == (
        "bicubic_antialias_square"
    )
