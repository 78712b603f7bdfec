"""Towers of open_clip itself: every key of the config, and files without a config."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitlib
from paths import FIXTURES
from vitlib.checkpoint.layouts import openclip, openclip_config, openclip_models, timm_models
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.layout import ParsedConfig
from vitlib.checkpoint.layouts.table import NameMatch
from vitlib.errors import CheckpointError, ConfigError

OPENCLIP = FIXTURES / "openclip"


def build_shapes(
    width: int, patch: int, *, mlp: int = 0, pre_norm: bool = True, scale: bool = False
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a tower for 224 pixels with one block, by vitlib's names."""
    tensors: dict[str, tuple[int, ...]] = {
        "patch_embed.cls_token": (1, 1, width),
        "patch_embed.pos_embed": (1, (224 // patch) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "blocks.0.attn.q.bias": (width,),
        "blocks.0.attn.k.bias": (width,),
        "blocks.0.mlp.fc1.weight": (mlp or 4 * width, width),
        "blocks.0.mlp.fc2.weight": (width, mlp or 4 * width),
        "projection.weight": (512, width),
    }
    tensors |= {"norm_pre.weight": (width,)} if pre_norm else {}
    return tensors | ({"blocks.0.ls1.gamma": (width,)} if scale else {})


def read_bare(
    facts: Facts | None = None, ignored: tuple[str, ...] = (), **tower: Any
) -> ParsedConfig:
    shapes = build_shapes(**tower)
    return openclip.LAYOUT.read(
        lambda _: None, shapes, NameMatch(ignored=[*ignored]), facts or Facts()
    )


@pytest.mark.parametrize(
    ("tower", "expected"),
    [
        ({"width": 384, "patch": 16}, (6, "gelu", "cls", "tokens")),  # ViT-S-16
        ({"width": 512, "patch": 16, "scale": True}, (8, "gelu", "cls", "tokens")),  # ViT-M-16-alt
        ({"width": 1408, "patch": 14, "mlp": 6144}, (16, "gelu", "cls", "tokens")),  # ViT-g-14
        ({"width": 1792, "patch": 14, "mlp": 15360}, (16, "gelu", "cls", "tokens")),  # ViT-e-14
        (
            {"width": 1024, "patch": 14, "pre_norm": False},
            (16, "gelu", "mean", "pooled"),
        ),  # ViT-L-14-CLIPA
    ],
)
def test_bare_tower_takes_facts_that_all_configs_share(
    tower: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    cfg, assumed, doubtful, _ = read_bare(**tower)
    assert (cfg.num_heads, cfg.activation, cfg.pool, cfg.final_norm) == expected
    assert doubtful == ()
    assert {"num_heads", "activation", "pool", "norm_eps"} <= set(assumed)


@pytest.mark.parametrize(
    ("width", "patch", "mlp", "name"),
    [
        (768, 32, 3072, "ViT-B-32"),
        (768, 16, 3072, "ViT-B-16"),
        (1024, 14, 4096, "ViT-L-14"),
        (1280, 14, 5120, "ViT-H-14"),
        (1664, 14, 8192, "ViT-bigG-14"),
    ],
)
def test_bare_tower_with_two_possible_gelus_needs_a_fact(
    width: int, patch: int, mlp: int, name: str
) -> None:
    tower = {"width": width, "patch": patch, "mlp": mlp}
    with pytest.raises(CheckpointError) as error:
        read_bare(**tower)
    assert f"activation='gelu' or architecture='{name}' (--activation, --arch" in str(error.value)
    assert f"{name}-quickgelu" in str(error.value)
    for facts, expected in (
        (Facts(activation="gelu"), "gelu"),
        (Facts(activation="quick_gelu"), "quick_gelu"),
        (Facts(architecture=name), "gelu"),
        (Facts(architecture=f"{name}-quickgelu"), "quick_gelu"),
    ):
        reading = read_bare(facts, **tower)
        assert reading.config.activation == expected
        assert reading.doubtful == ()
    archive = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's archives only
    assert read_bare(ignored=archive, **tower).config.activation == "quick_gelu"
    assert "activation" not in read_bare(ignored=archive, **tower).assumed


def test_bare_tower_of_unpublished_width_is_doubtful() -> None:
    assert read_bare(width=192, patch=16).doubtful == ("num_heads", "activation", "pool")
    assert read_bare(width=768, patch=8).doubtful == ("num_heads", "activation", "pool")


def test_read_rejects_architecture_with_other_tensors() -> None:
    for name, message in (
        ("ViT-L-14", r"embed_dim 1024 \(the tensors have 768\)"),
        ("ViT-B-16", r"patch_size 16 \(the tensors have 32\)"),
        ("ViT-B-16-SigLIP", "its tower has other tensors"),
        ("coca_ViT-B-32", "its tower has other tensors"),
        ("ViT-B-32-quickgelo", "the nearest are ViT-B-32-quickgelu"),
        ("RN50", "no config of open_clip 3.3 with a ViT tower"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_bare(Facts(architecture=name), width=768, patch=32)


def test_table_has_every_config_once() -> None:
    rows = openclip_models.load_rows()
    assert len(rows) == 134
    assert sum(bool(row["timm_model_name"]) for row in rows.values()) == 78
    assert {row["activation"] for row in rows.values()} == {"", "gelu", "quick_gelu"}


def edit_config(tmp_path: Path, name: str = "erf", **model: Any) -> Path:
    """Copy a fixture and change its model_cfg; `vision` has changes of vision_cfg."""
    folder = tmp_path / "changed"
    shutil.copytree(OPENCLIP / name, folder, dirs_exist_ok=True)
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"] |= model.pop("vision", {})
    config["model_cfg"] |= model
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": {"qk_norm": True}}, "qk_norm True: vitlib computes no such tower"),
        ({"vision": {"attentional_pool": "parallel"}}, "attentional_pool 'parallel'"),
        ({"vision": {"scale_fc": True, "scale_heads": True}}, "scale_heads True, scale_fc True"),
        ({"vision": {"block_type": "parallel"}}, "block_type 'parallel'"),
        ({"vision": {"layers": [3, 4, 6, 3]}}, "a residual network"),
        ({"vision": {"rope": True}}, r"'vision_cfg.rope', which open_clip 3.3 does not know"),
        ({"activation": "relu"}, "'activation', which open_clip"),
        ({"vision": {"pool_type": "none"}}, "pool_type 'none': expected tok or avg"),
        ({"vision": {"act_kwargs": {"beta": 2}}}, "act_kwargs"),
        ({"vision": {"norm_kwargs": {"bias": False}}}, "norm_kwargs"),
        ({"vision": {"head_width": 0}}, "head_width 0: expected a whole number from 1 to the wi"),
        ({"vision": {"head_width": "8"}}, "head_width '8': expected a whole number .* width, 16"),
        ({"vision": {"head_width": 5}}, "head_width 5, 3 heads: expected a number of heads that"),
        ({"vision": {"mlp_ratio": "2"}}, "mlp_ratio '2': expected a number"),
        ({"vision": {"mlp_ratio": None}}, "mlp_ratio None: expected a number"),
        ({"vision": {"mlp_ratio": 8.0}}, r"mlp_ratio 8.0 \(the tensors have 1.25\)"),
        ({"vision": {"ls_init_value": "0.1"}}, "ls_init_value '0.1': expected a number"),
        ({"vision": {"ls_init_value": True}}, "ls_init_value True: expected a number"),
        ({"vision": {"width": 32}}, r"contradicts the tensors: width 32 \(the tensors have 16\)"),
        ({"vision": {"layers": 2}}, r"layers 2 \(the tensors have 1\)"),
        ({"vision": {"no_ln_pre": True}}, "no_ln_pre True"),
        (
            {"vision": {"ls_init_value": 0.1}},
            r"ls_init_value 0.1 \(the tensors have no layer scale\)",
        ),
        ({"embed_dim": 13}, "embed_dim"),
        ({"vision": {"timm_model_name": "vit_base_patch16_224"}}, "tower of open_clip's own"),
        ({"vision": 3}, "objects"),
    ],
)
def test_load_rejects_config_key_that_vitlib_does_not_compute(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if change.get("vision") == 3:
        folder = edit_config(tmp_path, vision_cfg=3)
    else:
        folder = edit_config(tmp_path, **change)
    with pytest.raises(CheckpointError, match=message):
        vitlib.load(folder)


def test_load_ignores_keys_that_change_no_number(tmp_path: Path) -> None:
    harmless = {
        "patch_dropout": 0.5,
        "output_tokens": True,
        "pos_embed_type": "sin_cos_2d",
        "attn_pooler_heads": 8,
        "timm_drop": 0.0,
        "qk_norm": False,
        "block_type": "custom",
    }
    folder = edit_config(tmp_path, vision=harmless, custom_text=True, init_logit_bias=-10)
    assert vitlib.load(folder).config == vitlib.load(OPENCLIP / "erf").config


def test_read_rejects_architecture_that_contradicts_config() -> None:
    name = "ViT-B-32-quickgelu"
    with pytest.raises(CheckpointError, match=r"embed_dim 768 \(the tensors have 16\)"):
        vitlib.load(OPENCLIP / "erf", architecture=name)
    shapes = build_shapes(768, 32)
    vision = {"layers": 1, "patch_size": 32}
    config = {"model_cfg": {"embed_dim": 512, "vision_cfg": vision}}
    with pytest.raises(ConfigError, match="activation 'quick_gelu', the config 'gelu'"):
        openclip.LAYOUT.read(lambda _: config, shapes, NameMatch(), Facts(architecture=name))


def test_load_rejects_attentional_pool_of_coca(tmp_path: Path) -> None:
    tensors = load_file(OPENCLIP / "erf" / "open_clip_model.safetensors")
    tensors |= {"visual.attn_pool.query": torch.zeros(256, 12)}
    tensors |= {"text_decoder.resblocks.0.ln_1.weight": torch.zeros(8)}
    save_file(tensors, tmp_path / "coca.safetensors")
    with pytest.raises(CheckpointError, match="CoCa's attentional pool"):
        vitlib.load(tmp_path / "coca.safetensors")
    del tensors["visual.attn_pool.query"]  # coca_base has a class token and a decoder
    shutil.copytree(OPENCLIP / "erf", tmp_path / "base")
    save_file(tensors, tmp_path / "base" / "open_clip_model.safetensors")
    assert vitlib.load(tmp_path / "base").config == vitlib.load(OPENCLIP / "erf").config


def test_load_rejects_projection_of_two_layers(tmp_path: Path) -> None:
    tensors = load_file(OPENCLIP / "timm_vit" / "open_clip_model.safetensors")
    tensors["visual.head.mlp.fc1.weight"] = tensors.pop("visual.head.proj.weight")
    save_file(tensors, tmp_path / "mlp.safetensors")
    with pytest.raises(CheckpointError, match=r"projection visual\.head\.mlp"):
        vitlib.load(tmp_path / "mlp.safetensors", num_heads=2)


@pytest.mark.parametrize("mlp_dim", [1, 63, 6144, 8192, 15360, 4097])
def test_written_mlp_ratio_gives_exact_mlp_dim(mlp_dim: int) -> None:
    for width in (16, 384, 768, 1408, 1664, 1792):
        cfg = vitlib.ViTConfig(
            family="clip", embed_dim=width, num_heads=2, mlp_dim=mlp_dim, projection_dim=4
        )
        written = openclip_config.write_tower(cfg)["vision_cfg"]["mlp_ratio"]
        assert int(width * json.loads(json.dumps(written))) == mlp_dim


def test_save_rejects_towers_that_open_clip_cannot_build(tmp_path: Path) -> None:
    model = vitlib.load(OPENCLIP / "erf", in_channels=4)
    with pytest.raises(ConfigError, match="in_channels=4"):
        vitlib.save(model, tmp_path / "four", layout="openclip")
    tower = vitlib.load(OPENCLIP / "timm_vit", in_channels=1)
    with pytest.raises(ConfigError, match="in_channels=1"):
        vitlib.save(tower, tmp_path / "one", layout="openclip")
    with pytest.raises(ConfigError, match=r"no model of timm's has embed_dim=16, depth=1"):
        vitlib.save(vitlib.load(OPENCLIP / "timm_vit"), tmp_path / "tiny", layout="openclip")
    assert [*tmp_path.iterdir()] == []


def build_tower(name: str, **changes: Any) -> vitlib.ViT:
    """Return an architecture of timm as a ViT on the meta device."""
    cfg = replace(vitlib.ViTConfig.named(name), **changes)
    with torch.device("meta"):
        return vitlib.ViT(cfg)


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch32_siglip_256",
        "vit_large_patch16_siglip_512",
        "vit_base_patch16_siglip_224",
        "vit_base_patch16_siglip_512",
        "vit_giantopt_patch16_siglip_384",
        "vit_so400m_patch14_siglip_378",
        "vit_so400m_patch16_siglip_256",
        "vit_base_patch32_siglip_gap_256",
        "vit_base_patch16_224",
        "vit_medium_patch16_gap_256",
    ],
)
def test_save_writes_timm_tower_by_name_of_its_sizes(name: str) -> None:
    model = build_tower(name)
    written = openclip.LAYOUT.write(model.config, dict(model.state_dict()))
    vision = written.json["open_clip_config.json"]["model_cfg"]["vision_cfg"]
    actual = timm_models.get_architecture(vision["timm_model_name"])
    expected = timm_models.get_architecture(name)
    assert (actual.structure, actual.facts) == (expected.structure, expected.facts)
    for change in ({"depth": 3}, {"num_heads": 1}, {"image_size": 32}):
        other = build_tower(name, **change)
        with pytest.raises(ConfigError, match="builds a timm tower by its name alone"):
            openclip.LAYOUT.write(other.config, dict(other.state_dict()))
