"""Pixio (2512.15715): several class tokens; the pooled vector is their mean."""

from __future__ import annotations

from typing import Any

from vitlib.checkpoint.families.dinov2 import NUMBERS as DINOV2_NUMBERS
from vitlib.checkpoint.families.dinov2 import find_mlp_ratio, read_mlp_dim
from vitlib.checkpoint.families.family import Config, Family, HfType, Published, State
from vitlib.checkpoint.families.vit import NAMES
from vitlib.checkpoint.layouts.equivalences import add_class_position, join_class_tokens
from vitlib.checkpoint.layouts.table import Table
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError
from vitlib.image.configs.transform import BICUBIC, CROP_PCT, IMAGENET_STATS, crop

_NUMBERS: dict[str, tuple[str, Any]] = {
    **{name: key for name, key in DINOV2_NUMBERS.items() if name != "layer_scale"},
    "image_size": ("image_size", 256),
    "patch_size": ("patch_size", 16),
    "embed_dim": ("hidden_size", 1280),
    "depth": ("num_hidden_layers", 32),
    "num_heads": ("num_attention_heads", 16),
}
_NAMES: Table = {
    **NAMES,
    "blocks.{}.norm1": "encoder.layer.{}.norm1",
    "blocks.{}.norm2": "encoder.layer.{}.norm2",
}


def _read_more(config: Config, fields: Config) -> dict[str, Any]:
    """Read the width of the MLP, a ratio, and the class tokens but the first as registers."""
    count = config.get("n_cls_tokens", 8)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise CheckpointError(f"config.json has n_cls_tokens {count!r}: expected 1 or more")
    return {**read_mlp_dim(config, fields), "num_registers": count - 1}


def _to_hf(cfg: ViTConfig, state: State) -> ViTConfig:
    """Return the config with a position of its class token, and registers joined to that token."""
    if not (cfg.tokens.cls and cfg.positions.embed):
        return cfg
    cfg = add_class_position(cfg, state)
    join_class_tokens(state)
    return cfg


FAMILY = Family(
    name="pixio",
    title="Pixio",
    hf=HfType(
        model_type="pixio",
        class_name="Pixio",
        prefix="pixio.",
        trunk="",
        names=_NAMES,
        numbers=_NUMBERS,
        fixed={"position_resize": "bicubic_fp32"},
        base={"pool": "prefix", "final_norm": "tokens"},
        head=None,
        reads_head_dim=True,
        read_more=_read_more,
        write_more=lambda cfg: {
            "mlp_ratio": find_mlp_ratio(cfg),
            "n_cls_tokens": 1 + cfg.tokens.registers,
        },
        allowed=lambda cfg: {"num_registers": (cfg.tokens.registers,)},
    ),
    hf_published=(
        Published("pixio", 768, 3072, 12, (16,), "", "facebook/pixio-vitb16"),
        Published("pixio", 1024, 4096, 16, (16,), "", "facebook/pixio-vitl16"),
        Published("pixio", 1280, 5120, 16, (16,), "", "facebook/pixio-vith16"),
    ),
    to_hf=_to_hf,
    numerics={"hf": {"norm_eps": 1e-6, "position_resize": "bicubic_fp32"}},
    libraries=("hf",),
    transforms={"hf": crop(CROP_PCT, BICUBIC, IMAGENET_STATS, "floor")},
)
