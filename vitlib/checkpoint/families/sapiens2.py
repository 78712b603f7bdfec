"""Sapiens2 (2604.21681): RMSNorm, norms of queries and keys, keys shared by heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vitlib.checkpoint.families.dinov2 import allow_layer_scale
from vitlib.checkpoint.families.family import (
    LARGE,
    Config,
    Family,
    HfType,
    Mismatch,
    Published,
    Shapes,
    State,
)
from vitlib.checkpoint.families.vit import BICUBIC_POSITIONS, NUMBERS
from vitlib.checkpoint.layouts.equivalences import (
    drop_unit_layer_scale,
    expand_key_heads,
    fill_layer_scale,
    share_key_heads,
)
from vitlib.checkpoint.layouts.table import NameMatch, Table
from vitlib.config import ViTConfig
from vitlib.config_parts import Norms, Rope
from vitlib.errors import CheckpointError, is_number
from vitlib.image.configs.transform import BILINEAR, IMAGENET_STATS, squash

# transformers saves the names of the original code, not those of its own class.
_NAMES: Table = {
    "patch_embed.cls_token": "cls_token",
    "patch_embed.reg_token": "storage_tokens",
    "patch_embed.mask_token": "embeddings.mask_token",
    "patch_embed.proj": "patch_embed.projection",
    "blocks.{}.norm1": "blocks.{}.ln1",
    "blocks.{}.norm2": "blocks.{}.ln2",
    "blocks.{}.attn.q": "blocks.{}.attn.wq",
    "blocks.{}.attn.k": "blocks.{}.attn.wk",
    "blocks.{}.attn.v": "blocks.{}.attn.wv",
    "blocks.{}.attn.q_norm": "blocks.{}.attn.q_norm",
    "blocks.{}.attn.k_norm": "blocks.{}.attn.k_norm",
    "blocks.{}.attn.proj": "blocks.{}.attn.proj",
    "blocks.{}.ls1.gamma": "blocks.{}.attn.gamma.weight",
    "blocks.{}.mlp.fc1": "blocks.{}.ffn.w12",
    "blocks.{}.mlp.fc2": "blocks.{}.ffn.w3",
    "norm": "ln1",
}
_NUMBERS: dict[str, tuple[str, Any]] = {
    **NUMBERS,
    "embed_dim": ("hidden_size", 1024),
    "depth": ("num_hidden_layers", 24),
    "num_heads": ("num_attention_heads", 16),
    "mlp_dim": ("intermediate_size", 4096),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "qkv_bias": ("query_bias", True),
    "key_bias": ("key_bias", True),
    "proj_bias": ("proj_bias", True),
    "attention_dropout": ("attention_dropout", 0.0),
    "drop_path": ("drop_path_rate", 0.0),
    "layer_scale": ("layerscale_value", 1.0),
    "num_registers": ("num_register_tokens", 8),
}
_NORMS = {True: Norms(kind="rms", qk="head"), False: Norms(kind="rms")}
_KEY_HEADS = "num_key_value_heads_per_layer"


def _read_more(config: Config, fields: Config) -> dict[str, Any]:
    """Read rope and norms; raise CheckpointError for biases or an MLP that vitlib's block lacks."""
    stated = {"value_bias": fields["qkv_bias"], "mlp_bias": fields["proj_bias"]}
    stated["use_gated_mlp"] = True
    wrong = [f"{k} {config[k]}" for k, v in stated.items() if config.get(k, True) is not v]
    if fields["key_bias"] and not fields["qkv_bias"]:
        wrong.append("key_bias True with query_bias False")
    theta = config.get("rope_theta", 100.0)
    if not is_number(theta) or theta <= 0:
        wrong.append(f"rope_theta {theta!r}")
    if wrong:
        raise CheckpointError(f"config.json has {', '.join(wrong)}: not in vitlib's block")
    return {"rope": Rope(theta=theta), "norms": _NORMS[bool(config.get("use_qk_norm", True))]}


def _read_key_heads(config: Config) -> list[Any]:
    """Return the number of heads of keys and values of each block, as the class counts them."""
    depth, heads = (config.get(*_NUMBERS[name]) for name in ("depth", "num_heads"))
    if isinstance(config.get(_KEY_HEADS), list):
        return list(config[_KEY_HEADS])
    first, last = (config.get(f"num_{x}_full_attention_layers", 8) for x in ("first", "last"))
    shared = config.get("num_key_value_attention_heads", 8)
    return [heads if i < first or i >= depth - last else shared for i in range(depth)]


def _count_key_heads(depth: int, head_dim: int, shapes: Shapes) -> list[int]:
    """Return the number of heads of keys and values that tensors have in each block."""
    names = [f"blocks.{index}.attn.k.weight" for index in range(depth)]
    return [(shapes.get(name) or (0,))[0] // head_dim for name in names]


def _list_mismatches(_: Config, tower: Config, shapes: Shapes, __: NameMatch) -> list[Mismatch]:
    """Return the numbers of heads that share keys where the tensors have others."""
    width, depth, heads = (
        tower.get(*_NUMBERS[name]) for name in ("embed_dim", "depth", "num_heads")
    )
    stated, actual = (
        _read_key_heads(tower),
        _count_key_heads(depth, max(width // heads, 1), shapes),
    )
    return [(_KEY_HEADS, stated, actual)] if stated != actual else []


def _write_more(cfg: ViTConfig) -> dict[str, Any]:
    """Return the keys of config.json that are Sapiens2's own."""
    return {
        "hidden_act": "silu",
        "use_gated_mlp": True,
        "value_bias": cfg.biases.qkv,
        "key_bias": cfg.biases.qkv and cfg.biases.key,
        "mlp_bias": cfg.biases.proj,
        "use_qk_norm": cfg.norms.qk is not None,
        "use_mask_token": cfg.tokens.mask,
        "rope_theta": (cfg.rope or Rope()).theta,
    }


def _allow(cfg: ViTConfig) -> dict[str, tuple[Any, ...]]:
    """Return the values that Sapiens2's class computes."""
    return {
        **allow_layer_scale(cfg),
        "activation": ("swiglu",),
        "norms": tuple(_NORMS.values()),
        "proj_bias": (True, False),
        "rope": (Rope(theta=(cfg.rope or Rope()).theta),),
    }


def _absorb(cfg: ViTConfig, state: State, _: Config) -> None:
    """Give each head its keys and values, and each MLP a LayerScale of ones."""
    expand_key_heads(cfg, state)
    fill_layer_scale(cfg, state)


def _to_hf(cfg: ViTConfig, state: State) -> ViTConfig:
    """Return the config with transformers' pooler_output; equal keys of heads are written once."""
    share_key_heads(cfg, state)
    drop_unit_layer_scale(cfg, state)
    if not cfg.num_classes and cfg.final_norm == "tokens":
        return replace(cfg, pool="cls")
    return cfg


# timm's config.json of each model states its transform: this is that of most.
_TRANSFORM = squash(BILINEAR, IMAGENET_STATS)

FAMILY = Family(
    name="sapiens2",
    title="Sapiens2",
    hf=HfType(
        model_type="sapiens2",
        class_name="Sapiens2",
        prefix="",
        trunk="",
        names=_NAMES,
        numbers=_NUMBERS,
        fixed={**BICUBIC_POSITIONS, "pos_embed": False},
        head=None,
        activation="silu",
        gated=True,
        bare_fields={"rope": Rope()},
        read_more=_read_more,
        write_more=_write_more,
        write_shapes=lambda cfg, shapes: {
            _KEY_HEADS: _count_key_heads(cfg.depth, cfg.head_dim, shapes)
        },
        list_mismatches=_list_mismatches,
        allowed=_allow,
        absorb=_absorb,
    ),
    # Most names are timm's and the original codes' too, with another meaning or none.
    hf_starts=("blocks.0.attn.wq.",),
    hf_published=(
        Published("sapiens2", *LARGE, (16,), "swiglu", "facebook/sapiens2-pretrain-0.4b"),
    ),
    to_hf=_to_hf,
    numerics={"hf": {"norm_eps": 1e-06}, "timm": {"norm_eps": 1e-06}},
    timm_architecture="vit_base_patch16_sapiens2",
    timm_only=True,
    timm_word="sapiens2",
    libraries=("hf", "timm"),
    transforms={"hf": _TRANSFORM, "timm": _TRANSFORM},
)
