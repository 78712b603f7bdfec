"""Architectures by name: the list, and the config that a checkpoint of a name would have."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch

from vitlib import ViT, ViTConfig
from vitlib.checkpoint.architectures import TIMM, TRANSFORMERS, list_architectures
from vitlib.checkpoint.layouts import (
    openclip,
    openclip_models,
    timm,
    timm_models,
    timm_names,
    timm_write,
)
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.hf_types import list_published, list_types
from vitlib.checkpoint.layouts.layout import Layout
from vitlib.checkpoint.layouts.table import Slice, read_state, write_state
from vitlib.checkpoint.named_config import explain_openclip_refusal, read_openclip
from vitlib.errors import ConfigError

State = dict[str, torch.Tensor]
SUPPORTED = [model.name for model in timm_models.list_architectures() if not model.reason]
TOWERS = {
    name: row
    for name, row in openclip_models.load_rows().items()
    if not explain_openclip_refusal(row)
}


def build_state(cfg: ViTConfig) -> State:
    with torch.device("meta"):
        return ViT(cfg).state_dict()


def write_timm(state: State, cfg: ViTConfig) -> State:
    """Name the tensors of a model as timm does, without the changes that save() makes."""
    table = timm_write.build_table(cfg)
    if not cfg.key_bias and "blocks.{}.attn.q.bias" not in table:  # EVA-01
        table = {
            name: row for name, row in table.items() if name not in timm_names.QKV
        } | timm_names.Q_AND_V
        table["blocks.{}.attn.k.weight"] = Slice("blocks.{}.attn.qkv.weight", 1, 3)
    if cfg.final_norm == "none":  # timm has no norm that it does not apply
        state = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    return write_state(state, table, cfg)


def write_naflex(state: State, cfg: ViTConfig, name: str) -> State:
    """Name the tensors of a NaFlexVit as timm does, with the positions that vitlib sums."""
    structure = timm_models.get_architecture(name).structure
    is_factorized = "factorized" in structure["spelling"]
    names = timm_names.NAFLEX | (timm_names.FACTORIZED if is_factorized else {})
    if not structure["qkv_bias"]:  # the pool has such biases, and vitlib's blocks zeros
        state = {n: t for n, t in state.items() if not re.match(r"blocks.*attn\.[qkv]\.bias", n)}
    if cfg.final_norm == "none":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    return write_state(state, timm_write.build_table(cfg) | names, cfg)


def read_config(layout: Layout, tensors: State, config: dict[str, Any], facts: Facts) -> ViTConfig:
    """Read the config of a file with these tensors, as load() does."""
    name_match = layout.find(tensors)
    assert not name_match.unexpected
    state = layout.finish(read_state(tensors, name_match), layout.read_image_size(config.get))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return layout.read(config.get, shapes, name_match, facts).config


def test_named_config_of_timm_is_that_of_a_checkpoint() -> None:
    """Build every supported architecture, and read its tensors and its name as load() does."""
    assert len(SUPPORTED) >= 272
    for name in SUPPORTED:
        # Without its two heads, a distilled model needs a stated pool.
        cfg = ViTConfig.named(name, num_classes=3)
        is_naflex = timm_models.is_naflex_name(name)
        state = build_state(cfg)
        tensors = write_naflex(state, cfg, name) if is_naflex else write_timm(state, cfg)
        size = {"pretrained_cfg": {"input_size": [3, *cfg.image_size]}}
        config = {"config.json": {"architecture": name, **size}}
        assert read_config(timm.LAYOUT, tensors, config, Facts()) == cfg, name


def test_named_config_of_openclip_is_that_of_a_checkpoint() -> None:
    assert len(TOWERS) >= 86
    for name, row in TOWERS.items():
        cfg = read_openclip(row)
        state = build_state(cfg)
        if row["timm_model_name"]:
            projection = state.pop("projection.weight", None)
            tensors = {f"visual.trunk.{n}": t for n, t in write_timm(state, cfg).items()}
            tensors |= {} if projection is None else {"visual.head.proj.weight": projection}
        else:
            tensors = openclip.LAYOUT.write(cfg, state).tensors
        vision = {"image_size": list(cfg.image_size)}
        sidecar = {"vitlib.json": vision}
        facts = Facts(architecture=name)
        assert read_config(openclip.LAYOUT, tensors, sidecar, facts) == cfg, name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "vit_base_patch16_siglip_256",
            {"family": "siglip", "image_size": (256, 256), "pool": "map", "num_classes": 0}
            | {"position_resize": "bicubic_antialias", "activation": "gelu", "norm_eps": 1e-6},
        ),
        ("vit_base_patch16_224.mae", {"family": "vit_mae"}),
        ("vit_base_patch16_224_in21k", {"family": "vit", "embed_dim": 768}),  # an old name
        ("beit_large_patch16_512", {"relative_resize": "geometric", "image_size": (512, 512)}),
        ("deit_base_distilled_patch16_224", {"dist_token": True, "dist_head": False}),
        ("ViT-B-32", {"projection_dim": 512, "num_classes": 0, "activation": "gelu"}),
        ("ViT-B-32-quickgelu", {"activation": "quick_gelu", "norm_eps": 1e-5}),
        ("ViT-L-14-336", {"image_size": (336, 336), "depth": 24, "projection_dim": 768}),
        ("ViT-M-16-alt", {"layer_scale": 1.0}),
        # open_clip pools the class token, and projects by timm's head.
        ("EVA01-g-14", {"pool": "cls", "final_norm": "tokens", "num_classes": 1024}),
    ],
)
def test_named_config_has_published_facts(name: str, expected: dict[str, Any]) -> None:
    cfg = ViTConfig.named(name)
    assert {field: getattr(cfg, field) for field in expected} == expected


def test_named_config_overrides_only_stated_sizes() -> None:
    name = "vit_base_patch16_siglip_384"
    assert ViTConfig.named(name).image_size == (384, 384)
    cfg = ViTConfig.named(name, image_size=(64, 96), in_channels=5, num_classes=7)
    assert (cfg.image_size, cfg.in_channels, cfg.num_classes) == ((64, 96), 5, 7)
    assert ViTConfig.named("EVA01-g-14", num_classes=0).num_classes == 0
    assert ViTConfig.named("deit_tiny_distilled_patch16_224", num_classes=2).dist_head
    small = ViTConfig.named("S/16")
    assert (small.image_size, small.in_channels, small.num_classes) == ((224, 224), 3, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_base_patch16_225", "'vit_base_patch16_225'.* the nearest are vit_base_patch16_224,"),
        ("VIT-B-23", "the nearest are ViT-B-32"),
        ("zzz", r"no ViT is called 'zzz': .* that `vitlib list` prints$"),
        (
            "vit_base_patch16_xp_224",
            "'vit_base_patch16_xp_224' is not read: attention and MLP in parallel",
        ),
        ("coca_ViT-B-32", "'coca_ViT-B-32' is not read: CoCa's attentional pool"),
        ("convnext_base_w", "is not read: timm's 'convnext_base', which is no plain ViT"),
        ("swin_tiny_patch4_window7_224", "is no plain ViT, and not read: its attention is within"),
        ("swim_tiny_patch4_window7_224", "the nearest are vit_tiny_patch16_224"),  # not Swin's
        ("MobileCLIP-B", "timm's 'vit_base_mci_224': a stem of convolutions"),
        ("dinov2", "'dinov2' is a model_type of transformers, of models of any size"),
        ("facebook/dinov2-base", r"vitlib.load\('facebook/dinov2-base'\).config"),
    ],
)
def test_named_rejects_unknown_and_refused_names(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        ViTConfig.named(name)
    assert "\n" not in str(error.value)


def test_list_has_every_row_of_the_tables_once() -> None:
    entries = list_architectures()
    names = Counter((entry.library, entry.name) for entry in entries)
    assert max(names.values()) == 1
    by_library = Counter(entry.library for entry in entries)
    old = timm_models.list_old_names()
    assert by_library[TIMM] == len(timm_models.list_architectures()) + len(old)
    assert by_library["open_clip"] == len(openclip_models.load_rows())
    hf = {entry.name for entry in entries if entry.library == TRANSFORMERS}
    assert hf >= {*list_types(), "llava", "swin", *(row.repository for row in list_published())}
    loading = {entry.name for entry in entries if entry.library == TIMM and entry.loads}
    assert loading == {*SUPPORTED, *(name for name, new in old.items() if new in SUPPORTED)}


def test_listed_architecture_has_sizes_and_verdict() -> None:
    (entry,) = list_architectures("vit_base_patch14_dinov2")
    assert (entry.family, entry.loads, entry.status) == ("dinov2", True, "loads")
    assert entry.size == "768 wide, 12 blocks, 12 heads, patch 14, 518 pixels"
    entries = {entry.name: entry for entry in list_architectures()}
    assert entries["vit_base_patch16_224_in21k"].status == "now vit_base_patch16_224; loads"
    assert entries["swin"].status == "refused: its attention is within windows"
    assert entries["samvit_base_patch16"].reason == "windowed attention and a neck of convolutions"
    published = entries["facebook/dino-vits16"]
    assert (published.hub_id, published.model_type) == ("facebook/dino-vits16", "vit")
    assert published.size == "384 wide, 6 heads, patch 8/16/32"
    assert (entries["llava"].family, entries["llava"].size) == ("clip", "any")
    refused = entries["coca_ViT-B-32"]
    assert (refused.depth, refused.patch_sizes, refused.loads) == (12, (32,), False)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("EVA01", ["EVA01-g-14", "EVA01-g-14-plus"]),
        ("vit-b-32*siglip2*", ["ViT-B-32-SigLIP2-256"]),
        ("vit_medium_patch16_gap_25[67]", ["vit_medium_patch16_gap_256"] * 2),  # of two libraries
    ],
)
def test_pattern_is_part_of_name_or_wildcards(pattern: str, names: list[str]) -> None:
    assert [entry.name for entry in list_architectures(pattern)] == names


def test_pattern_without_match_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'siiglip': .*; the nearest are siglip"):
        list_architectures("siiglip")


def test_page_of_architectures_is_what_the_code_makes() -> None:
    from architectures_page import PAGE, make_page

    assert PAGE.read_text(encoding="utf-8") == make_page(), "run tests/architectures_page.py"
