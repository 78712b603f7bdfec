"""Write a model as timm's NaFlexVit, whose class takes the rule of positions as arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitlib.checkpoint.layouts import timm_models
from vitlib.checkpoint.layouts.equivalences import check_supported, fold_class_position
from vitlib.checkpoint.layouts.layout import Serialized
from vitlib.checkpoint.layouts.table import LINEAR_PATCHES, Slice, Table, write_state
from vitlib.checkpoint.layouts.timm_naflex import drop_zero_bias
from vitlib.checkpoint.layouts.timm_names import NAFLEX
from vitlib.checkpoint.layouts.timm_sizes import compute_mlp_ratio
from vitlib.checkpoint.layouts.timm_write import build_table, convert_to_timm, describe_model
from vitlib.config import ViTConfig
from vitlib.patch_embed import POSITION_RESIZE, ResizeRule

_LINEAR: Table = {
    "patch_embed.proj.bias": "embeds.proj.bias",
    "patch_embed.proj.weight": Slice("embeds.proj.weight", reshape=LINEAR_PATCHES),
}
_USUAL_RULE = ResizeRule("bicubic", antialias=True)
_POOLS = {"cls": "token", "mean": "avg", "map": "map"}


def write_naflex(cfg: ViTConfig, state: dict[str, Tensor]) -> Serialized:
    """Write model.safetensors and config.json, for timm.create_model("local-dir:...").

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names.

    Returns:
        The files. Positions of rows and columns are written as one grid: the same function.

    Raises:
        ConfigError: timm's NaFlexVit does not compute this model.
    """
    cfg, state = convert_to_timm(cfg, dict(state))
    cfg = fold_class_position(cfg, state)
    supported: dict[str, tuple[Any, ...]] = {
        "dist_token": (False,),
        "relative_position": (None,),
        "activation": ("gelu", "gelu_tanh", "quick_gelu"),
        "norm_eps": (1e-6,),
    }
    check_supported(cfg, supported, "timm's NaFlexVit")
    if cfg.attention_pool is not None and not cfg.biases.qkv:  # timm's pool has biases
        for name in "qkv":
            state[f"attn_pool.{name}.bias"] = state["attn_pool.probe"].new_zeros(cfg.embed_dim)
    cfg = drop_zero_bias(cfg, state)
    tensors = write_state(state, {**build_table(cfg), **NAFLEX, **_LINEAR}, cfg)
    config = describe_model(cfg, _choose_architecture(cfg), _list_args(cfg), "embeds")
    return Serialized(tensors, json={"config.json": config})


def _choose_architecture(cfg: ViTConfig) -> str:
    """Return the published NaFlexVit that differs least; the arguments state every difference."""
    columns = timm_models.describe_structure(cfg) | timm_models.describe_facts(cfg)
    columns["position_resize"] = cfg.positions.resize
    # Models of one size and rule differ in pool, registers and norms.
    weights = {"position_resize": 4, "embed_dim": 4, "depth": 2}

    def distance(model: timm_models.Architecture) -> int:
        values = {**model.structure, **model.facts, "position_resize": model.position_resize}
        return sum(
            weights.get(name, 1)
            for name, value in columns.items()
            if (values[name] or 0) != (value or 0) and name != "image_size"
        )

    models = [m for m in timm_models.list_supported() if m.position_resize is not None]
    return min(models, key=lambda model: (distance(model), model.name)).name


def _list_args(cfg: ViTConfig) -> dict[str, Any]:
    """Return model_args, with every size and choice of the model."""
    pooling = cfg.attention_pool
    rule = POSITION_RESIZE.get(cfg.positions.resize, _USUAL_RULE)
    if rule.mode == "nearest" or rule.offset:
        rule = _USUAL_RULE  # timm's class has none of these: save() reports the difference
    patch = cfg.patch_size[0] if len(set(cfg.patch_size)) == 1 else list(cfg.patch_size)
    args = {
        "patch_size": patch,
        "in_chans": cfg.in_channels,
        "embed_dim": cfg.embed_dim,
        "depth": cfg.depth,
        "num_heads": cfg.num_heads,
        "mlp_ratio": compute_mlp_ratio(cfg.mlp_dim, cfg.embed_dim),
        "num_classes": cfg.num_classes,
        "global_pool": _POOLS[cfg.pool],
        "qkv_bias": cfg.biases.qkv,
        "act_layer": cfg.activation,
        "class_token": cfg.tokens.cls,
        "reg_tokens": cfg.tokens.registers,
        "init_values": cfg.layer_scale,
        "pre_norm": cfg.pre_norm,
        "fc_norm": cfg.final_norm == "pooled",
        "final_norm": cfg.final_norm != "none",
        "pool_include_prefix": bool(
            cfg.num_prefix_tokens and pooling is not None and pooling.prefix_tokens
        ),
        "pos_embed": "learned" if cfg.positions.embed else "none",
        "pos_embed_grid_size": list(cfg.grid_size),
        "pos_embed_interp_mode": rule.mode,
        "pos_embed_antialias": rule.antialias,
        "pos_embed_align_corners": rule.align_corners,
        "pos_embed_ar_preserving": rule.square,
    }
    if pooling is not None:
        args["attn_pool_num_heads"] = pooling.num_heads or cfg.num_heads
        width = pooling.mlp_dim or cfg.mlp_dim
        args["attn_pool_mlp_ratio"] = compute_mlp_ratio(width, cfg.embed_dim)
    return args
