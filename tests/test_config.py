from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from vitlib import ViTConfig
from vitlib.config_parts import Norms, Pooling, Rope
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
        ({"position_resize": "lanczos"}, "position_resize='lanczos'"),
        (
            {"position_resize": "sincos", "embed_dim": 18, "num_heads": 3},
            "embed_dim=18: expected a multiple of 4",
        ),
        ({"norm_eps": 0}, "norm_eps=0"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
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
        names = {"ViTConfig": ViTConfig, "Rope": Rope, "Norms": Norms, "Pooling": Pooling}
        for config in (cfg, replace(cfg, labels=("a", "b"))):
            assert eval(repr(config), names) == config


def test_unknown_field_of_a_group_suggests_the_group() -> None:
    with pytest.raises(ConfigError, match="no field 'rope_theta': did you mean rope"):
        ViTConfig(rope_theta=100.0)
    for values, message in (
        ({"rope": {"teta": 1}}, r"rope=\{'teta': 1\}: expected Rope\(axes, class_token, coords"),
        ({"norms": {"kind": "group"}}, r"Norms\(kind='group'\): expected one of layer, rms"),
        ({"attention_pool": 3}, "attention_pool=3: expected Pooling"),
        ({"rope": {"theta": -1.0}}, "expected a positive number"),
        ({"rope": True, "embed_dim": 36}, "heads of a multiple of 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            ViTConfig(**values)
