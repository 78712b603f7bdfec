"""DINOv2 (2304.07193): layer scale, and in the giant a gated MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vitlib.checkpoint.families.family import (
    BASE,
    LARGE,
    SMALL,
    Config,
    Container,
    Family,
    HfType,
    Published,
    State,
)
from vitlib.checkpoint.families.internvl import FAMILY as INTERNVL
from vitlib.checkpoint.families.vit import ATTENTION, DROP_PATH, EMBEDDING, VIT_NUMBERS
from vitlib.checkpoint.layouts.table import ROWS, Slice, Table
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError, ConfigError, is_number
from vitlib.image.configs.transform import BICUBIC, CROP_PCT, IMAGENET_STATS, crop

NUMBERS: dict[str, tuple[str, Any]] = {
    **{name: key for name, key in {**VIT_NUMBERS, **DROP_PATH}.items() if name != "mlp_dim"},
    "patch_size": ("patch_size", 14),
    "norm_eps": ("layer_norm_eps", 1e-6),
    "layer_scale": ("layerscale_value", 1.0),
}
NAMES: Table = {
    **EMBEDDING,
    **ATTENTION,
    "patch_embed.mask_token": Slice("embeddings.mask_token", reshape=ROWS),
    "patch_embed.reg_token": "embeddings.register_tokens",
    "blocks.{}.norm1": "encoder.layer.{}.norm1",
    "blocks.{}.norm2": "encoder.layer.{}.norm2",
    "blocks.{}.ls1.gamma": "encoder.layer.{}.layer_scale1.lambda1",
    "blocks.{}.ls2.gamma": "encoder.layer.{}.layer_scale2.lambda1",
    "blocks.{}.mlp.fc1": "encoder.layer.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.fc2",
}
# A gated MLP is one tensor of gate and up in files, and two in transformers' memory.
_GATED: Table = {
    "blocks.{}.mlp.fc1": "encoder.layer.{}.mlp.weights_in",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.weights_out",
}
IN_MEMORY: Table = {
    "blocks.{}.attn.q": "encoder.layer.{}.attention.q_proj",
    "blocks.{}.attn.k": "encoder.layer.{}.attention.k_proj",
    "blocks.{}.attn.v": "encoder.layer.{}.attention.v_proj",
    "blocks.{}.attn.proj": "encoder.layer.{}.attention.o_proj",
    "blocks.{}.mlp.fc1": ("encoder.layer.{}.mlp.gate_proj", "encoder.layer.{}.mlp.up_proj"),
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.down_proj",
}


def _mlp_dim(embed_dim: Any, ratio: Any, gated: bool) -> int:
    """Return the width of the MLP; of a SwiGLU two thirds, rounded up to a multiple of 8."""
    if not is_number(embed_dim) or not is_number(ratio) or not 0 < ratio < 10_000:
        raise CheckpointError(
            f"config.json has hidden_size {embed_dim!r}, mlp_ratio {ratio!r}: expected two numbers"
        )
    width = int(embed_dim * ratio)
    return (int(width * 2 / 3) + 7) // 8 * 8 if gated else width


def read_mlp_dim(config: Config, fields: Config) -> dict[str, Any]:
    """Read mlp_dim, which the config says as a ratio.

    Args:
        config: The ViT's own config.
        fields: The fields that are read already: embed_dim and activation.

    Returns:
        mlp_dim.

    Raises:
        CheckpointError: The ratio or the width is no number.
    """
    gated = fields["activation"] == "swiglu"
    return {"mlp_dim": _mlp_dim(fields["embed_dim"], config.get("mlp_ratio", 4), gated)}


def find_mlp_ratio(cfg: ViTConfig, *, whole: bool = True) -> float:
    """Find a ratio that gives a width of MLP, a whole one where there is one.

    Args:
        cfg: The model.
        whole: The model's class in transformers takes no other.

    Returns:
        mlp_ratio.

    Raises:
        ConfigError: There is no such ratio.
    """
    gated = cfg.activation == "swiglu"
    half = 0.5 / cfg.embed_dim  # within the range of ratios that round to the width
    exact = (cfg.mlp_dim * 1.5 if gated else cfg.mlp_dim) / cfg.embed_dim
    ratio: float
    for ratio in (4, *range(1, 100), *(() if whole else (exact, exact + half, exact - half))):
        if _mlp_dim(cfg.embed_dim, ratio, gated) == cfg.mlp_dim:
            return ratio
    needed = "a whole mlp_ratio" if whole else "an mlp_ratio, of a gated MLP a multiple of 8"
    raise ConfigError(f"mlp_dim={cfg.mlp_dim}: Hugging Face's class has {needed}")


def _write_more(cfg: ViTConfig) -> dict[str, Any]:
    """Return the keys of config.json that are DINOv2's own."""
    return {
        "mlp_ratio": find_mlp_ratio(cfg),
        "use_swiglu_ffn": cfg.activation == "swiglu",
        "use_mask_token": cfg.tokens.mask,
    }


def allow_layer_scale(cfg: ViTConfig) -> dict[str, tuple[Any, ...]]:
    """Return what DINO's blocks compute and other families' do not: a gated MLP, layer scale.

    Args:
        cfg: The model.

    Returns:
        Field -> values that are allowed.
    """
    scale = cfg.layer_scale if cfg.layer_scale is not None else "a number"
    return {"activation": (cfg.activation,), "layer_scale": (scale,)}


def _to_hf(cfg: ViTConfig, state: State) -> ViTConfig:
    """Return the config as InternViT's, whose class has LayerScale and no final norm."""
    if cfg.final_norm == "none":
        return INTERNVL.to_hf(replace(cfg, family=INTERNVL.name), state)
    return cfg


DINOV2 = HfType(
    model_type="dinov2",
    class_name="Dinov2",
    prefix="dinov2.",
    names=NAMES,
    more_names=lambda cfg: _GATED if cfg.activation == "swiglu" else {},
    numbers=NUMBERS,
    fixed={"position_resize": "bicubic_fp32"},
    head={"pool": "cls+mean", "final_norm": "tokens"},
    head_pools={"cls": "tokens"},
    reads_head_dim=True,
    read_more=read_mlp_dim,
    write_more=_write_more,
    allowed=allow_layer_scale,
)
_SMALL_BACKBONE = {"image_size": 518, "hidden_size": 384, "num_attention_heads": 6}
_DEPTH_ANYTHING = Container(key="backbone_config", model_type="dinov2", absent=_SMALL_BACKBONE)
# Models are evaluated at 224 pixels, though their positions are those of 518.
TRANSFORMS = {
    "hf": replace(crop(CROP_PCT, BICUBIC, IMAGENET_STATS, "floor"), image_size=224),
    "timm": crop(1.0, BICUBIC, IMAGENET_STATS),
    "original": replace(crop(CROP_PCT, BICUBIC, IMAGENET_STATS), image_size=224),
}

FAMILY = Family(
    name="dinov2",
    title="DINOv2",
    hf=DINOV2,
    hf_containers={"depth_anything": _DEPTH_ANYTHING, "prompt_depth_anything": _DEPTH_ANYTHING},
    hf_names=(_GATED, IN_MEMORY),
    hf_published=(
        Published("dinov2", *SMALL, (14,), "", "facebook/dinov2-small"),
        Published("dinov2", *BASE, (14,), "", "facebook/dinov2-base"),
        Published("dinov2", *LARGE, (14,), "", "facebook/dinov2-large"),
        Published("dinov2", 1536, 4096, 24, (14,), "swiglu", "facebook/dinov2-giant"),
    ),
    to_hf=_to_hf,
    numerics={"hf": {"norm_eps": 1e-6, "position_resize": "bicubic_fp32"}},
    timm_architecture="vit_base_patch14_dinov2",
    transforms=TRANSFORMS,
    uniform_libraries=("original", "timm"),
)
