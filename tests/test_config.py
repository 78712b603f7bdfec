from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from inspect import signature

import pytest

from vitlib import ViTConfig
from vitlib.config_parts import PARTS, SHORT_NAMES, Tokens
from vitlib.errors import ConfigError


def test_named_sizes_equal_papers() -> None:
    """Parameters of the trunk and a 1000-class head, in millions, as the papers count them."""
    import torch

    from vitlib import ViT

    counts = {"Ti/16": 5.7, "S/16": 22.1, "B/16": 86.6, "B/32": 88.2, "L/16": 304.3, "H/14": 632.0}
    for name, millions in counts.items():
        with torch.device("meta"):
            model = ViT(ViTConfig.named(name, num_classes=1000))
        total = sum(p.numel() for p in model.parameters())
        assert total / 1e6 == pytest.approx(millions, abs=0.06), name
    g = ViTConfig.named("g/14")  # Zhai 2106.04560, table 2
    assert (g.embed_dim, g.depth, g.mlp_dim, g.num_heads) == (1408, 40, 6144, 16)


@pytest.mark.parametrize("name", ["B", "B/", "X/16", "B/0", "B/-4", "b/16", "B/16/2", "B/99999"])
def test_named_rejects_unknown_sizes(name: str) -> None:
    with pytest.raises(ConfigError):
        ViTConfig.named(name)


def test_derived_fields() -> None:
    cfg = ViTConfig(image_size=(64, 96), patch_size=(16, 8), dist_token=True, num_registers=4)
    assert cfg.grid_size == (4, 12)
    assert cfg.num_prefix_tokens == 6
    assert cfg.mlp_dim == 4 * cfg.embed_dim
    assert replace(cfg, image_size=32).grid_size == (2, 4)
    with pytest.raises(FrozenInstanceError):
        cfg.depth = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 100, "num_heads": 3}, "not a multiple of num_heads=3"),
        ({"image_size": 15}, "smaller than patch_size"),
        ({"depth": 0}, "depth=0: expected a whole number of at least 1"),
        ({"depth": 2.0}, "depth=2.0"),
        ({"depth": True}, "depth=True"),
        ({"num_classes": 10**30}, "expected less than 2**31"),
        ({"patch_size": (16, 16, 16)}, "one whole number or"),
        ({"activation": "relu"}, "activation='relu': expected one of gelu"),
        ({"pool": "max"}, "pool='max'"),
        ({"position_resize": "lanczos"}, "Positions(resize='lanczos'): expected one of bicubic"),
        (
            {"position_resize": "sincos", "embed_dim": 18, "num_heads": 3},
            "embed_dim=18: expected a multiple of 4",
        ),
        ({"norm_eps": 0}, "norm_eps=0"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"drop_path": 1.0}, "Regularization(drop_path=1.0): expected a number from 0"),
        ({"layer_scale": "1"}, "layer_scale='1'"),
        ({"class_token": False}, "without a class token"),
        ({"dist_head": True}, "dist_head needs"),
        ({"num_classes": 3, "labels": ("a",)}, "1 labels for num_classes=3"),
    ],
)
def test_config_rejects_impossible_values(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        ViTConfig(**changes)
    assert message in str(error.value)


def test_repr_makes_the_config_again_and_shows_what_is_not_usual() -> None:
    shown = repr(ViTConfig.named("B/16"))
    assert shown.count("=") <= 10
    for name in ("B/16", "vit_pe_core_base_patch16_224", "aimv2_large_patch14_224"):
        cfg = ViTConfig.named(name, num_classes=2)
        names = {"ViTConfig": ViTConfig} | {kind.__name__: kind for kind, _ in PARTS.values()}
        for config in (cfg, replace(cfg, labels=("a", "b"))):
            assert eval(repr(config), names) == config


def test_config_shows_at_most_25_fields() -> None:
    assert len(fields(ViTConfig)) <= 25
    assert [*signature(ViTConfig).parameters] == [field.name for field in fields(ViTConfig)]


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_short_name_sets_and_reads_the_field_of_its_group(name: str) -> None:
    usual = {"dist_head": {"dist_token": True, "num_classes": 2}, "class_token": {"pool": "mean"}}
    cfg = ViTConfig(**usual.get(name, {}))
    group, entry = SHORT_NAMES[name]
    old = getattr(cfg, name)
    assert old is getattr(getattr(cfg, group), entry)
    resize = {"position_resize": "nearest", "relative_resize": "geometric"}
    changes = {bool: not old, int: 8, float: 0.5, type(None): "block"}
    new = resize.get(name, changes.get(type(old)))
    for changed in (replace(cfg, **{name: new}), ViTConfig(**usual.get(name, {}), **{name: new})):
        assert getattr(changed, name) == getattr(getattr(changed, group), entry) == new != old
        assert replace(changed, **{group: getattr(cfg, group)}) == cfg
    with pytest.raises(FrozenInstanceError, match=f"ViTConfig.{name} cannot be set"):
        setattr(cfg, name, new)


def test_short_name_overrides_its_group_and_leaves_the_rest() -> None:
    cfg = ViTConfig(tokens=Tokens(registers=4, mask=True), num_registers=2)
    assert cfg.tokens == Tokens(registers=2, mask=True)
    assert ViTConfig(tokens={"registers": 2, "mask": True}) == cfg
    assert ViTConfig(tokens=None) == ViTConfig(tokens=True) == ViTConfig()
    with pytest.raises(ConfigError, match="no field 'num_register': did you mean num_registers"):
        ViTConfig(num_register=4)
    with pytest.raises(AttributeError, match="no attribute 'num_register'"):
        _ = cfg.num_register


def test_copies_keep_fields_and_derived_numbers() -> None:
    cfg = ViTConfig(image_size=64, num_registers=4, labels=("a",), num_classes=1)
    for again in (copy.copy(cfg), copy.deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert again == cfg
        assert hash(again) == hash(cfg)
        assert (again.grid_size, again.num_prefix_tokens) == ((4, 4), 5)


def test_unknown_field_of_a_group_suggests_the_group() -> None:
    with pytest.raises(ConfigError, match="no field 'rope_theta': did you mean rope"):
        ViTConfig(rope_theta=100.0)
    for values, message in (
        ({"pool": "cls+mean", "final_norm": "pooled"}, "expected a pool of embed_dim values"),
        ({"rope": {"teta": 1}}, r"rope=\{'teta': 1\}: expected Rope\(axes, class_token, coords"),
        ({"norms": {"kind": "group"}}, r"Norms\(kind='group'\): expected one of layer, rms"),
        ({"attention_pool": 3}, "attention_pool=3: expected Pooling"),
        ({"rope": {"theta": -1.0}}, "expected a positive number"),
        ({"rope": True, "embed_dim": 36}, "heads of a multiple of 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            ViTConfig(**values)
