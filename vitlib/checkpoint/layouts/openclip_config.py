"""Read and write open_clip_config.json of open_clip's own towers: every key of vision_cfg.

A key sets a field, changes no number, or raises an error if vitlib does not compute its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitlib.checkpoint.layouts.infer import compact_size
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError, ConfigError, is_number

FILE = "open_clip_config.json"
_EPS = 1e-5  # torch's default for LayerNorm, which open_clip uses
_MODEL_KEYS = {
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "quick_gelu",
    "custom_text",
    "multimodal_cfg",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
    "cast_dtype",
    "output_dict",
    "pad_id",
}
_READ = {
    "image_size",
    "layers",
    "width",
    "head_width",
    "patch_size",
    "mlp_ratio",
    "ls_init_value",
    "pool_type",
    "no_ln_pre",
    "final_ln_after_pool",
    "act_kwargs",
    "norm_kwargs",
}
TIMM_KEYS = {"timm_model_name", "timm_pool", "timm_proj", "timm_proj_bias"}
# Keys of training, or of the initial positions; the file has the trained ones.
_HARMLESS = {
    "patch_dropout",
    "output_tokens",
    "pos_embed_type",
    "attn_pooler_queries",
    "attn_pooler_heads",
    "timm_model_pretrained",
    "timm_drop",
    "timm_drop_path",
}
# Key -> the values with which open_clip's block computes what vitlib's does.
_OFF: Mapping[str, tuple[Any, ...]] = {
    "attentional_pool": (False, None),
    "block_type": (None, "default", "custom"),
    "qk_norm": (False,),
    "scaled_cosine_attn": (False,),
    "scale_heads": (False,),
    "scale_attn_inner": (False,),
    "scale_attn": (False,),
    "scale_fc": (False,),
}


def parse_model_config(json: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return model_cfg and its vision_cfg, and check every key.

    Args:
        json: Reads a JSON file of the checkpoint by its name.

    Returns:
        model_cfg and vision_cfg; empty if there is no config.

    Raises:
        CheckpointError: A key is unknown, or has a value that vitlib does not compute.
    """
    model = (json(FILE) or {}).get("model_cfg") or {}
    vision = (model.get("vision_cfg") or {}) if isinstance(model, dict) else None
    if not isinstance(vision, dict):
        raise CheckpointError(
            f"{FILE}: expected model_cfg and its vision_cfg to be objects; save it again"
        )
    unknown = [key for key in model if key not in _MODEL_KEYS]
    unknown += [
        f"vision_cfg.{key}"
        for key in vision
        if key not in _READ | TIMM_KEYS | _HARMLESS | set(_OFF)
    ]
    if unknown:
        raise CheckpointError(
            f"{FILE} has {', '.join(map(repr, unknown[:8]))}, which open_clip 3.3 does not know: "
            "expected its keys; take out what changes no number, or give config=ViTConfig(...)"
        )
    wrong = [f"{key} {vision[key]!r}" for key in _OFF if vision.get(key) not in (*_OFF[key], None)]
    if isinstance(vision.get("layers"), list):
        wrong.append(f"layers {vision['layers']!r}, a residual network")
    if wrong:
        raise CheckpointError(
            f"{FILE} has {', '.join(wrong)}: vitlib computes no such tower: expected the defaults"
        )
    return model, vision


def get_timm_name(json: Any) -> object:
    """Return the name of timm's model in open_clip_config.json.

    Args:
        json: Reads a JSON file of the checkpoint by its name.

    Returns:
        The value of timm_model_name; None if there is none.

    Raises:
        CheckpointError: The config has a key or a value that vitlib does not compute.
    """
    return parse_model_config(json)[1].get("timm_model_name")


def read_tower(
    model: Mapping[str, Any], vision: Mapping[str, Any], inferred: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields of an own tower that its tensors do not determine.

    Args:
        model: model_cfg.
        vision: Its vision_cfg.
        inferred: Fields of ViTConfig that the tensors determine.

    Returns:
        num_heads, activation, norm_eps, pool and final_norm.

    Raises:
        CheckpointError: The config contradicts the tensors, or vitlib does not compute its tower.
    """
    _check_sizes(model, vision, inferred)
    pool = vision.get("pool_type", "tok")
    if pool not in ("tok", "avg"):
        raise CheckpointError(f"{FILE} has pool_type {pool!r}: expected tok or avg")
    return {
        "num_heads": _compute_num_heads(vision, inferred["embed_dim"]),
        "activation": _parse_activation(model, vision),
        "norm_eps": _parse_norm_eps(vision),
        "pool": "cls" if pool == "tok" else "mean",
        "final_norm": "pooled" if vision.get("final_ln_after_pool") else "tokens",
    }


def write_tower(cfg: ViTConfig) -> dict[str, Any]:
    """Return model_cfg of an own tower of open_clip.

    Args:
        cfg: The tower's config.

    Returns:
        model_cfg with its vision_cfg.

    Raises:
        ConfigError: No mlp_ratio gives the width of the MLP.
    """
    vision: dict[str, Any] = {
        "image_size": compact_size(cfg.image_size),
        "layers": cfg.depth,
        "width": cfg.embed_dim,
        "head_width": cfg.head_dim,
        "patch_size": compact_size(cfg.patch_size),
        "mlp_ratio": _compute_mlp_ratio(cfg),
    }
    if cfg.layer_scale is not None:
        vision["ls_init_value"] = cfg.layer_scale
    if not cfg.pre_norm:
        vision["no_ln_pre"] = True
    if cfg.pool == "mean":
        vision["pool_type"] = "avg"
    if cfg.final_norm == "pooled":
        vision["final_ln_after_pool"] = True
    if cfg.norm_eps != _EPS:
        vision["norm_kwargs"] = {"eps": cfg.norm_eps}
    if cfg.activation == "gelu_tanh":
        vision["act_kwargs"] = {"approximate": "tanh"}
    model = {"embed_dim": cfg.outputs.projection_dim, "vision_cfg": vision}
    return model | ({"quick_gelu": True} if cfg.activation == "quick_gelu" else {})


def _compute_num_heads(vision: Mapping[str, Any], embed_dim: int) -> int:
    """Return open_clip's number of heads: the width by head_width, rounded down."""
    width = vision.get("head_width", 64)
    if not isinstance(width, int) or isinstance(width, bool) or not 0 < width <= embed_dim:
        raise CheckpointError(
            f"{FILE} has head_width {width!r}: expected a whole number from 1 to the width, "
            f"{embed_dim}"
        )
    heads = embed_dim // width
    if embed_dim % heads:
        raise CheckpointError(
            f"{FILE} has head_width {width!r}, {heads} heads: expected a number of heads that "
            f"divides the width, {embed_dim}"
        )
    return heads


def _parse_activation(model: Mapping[str, Any], vision: Mapping[str, Any]) -> str:
    """Return the GELU of quick_gelu and act_kwargs."""
    arguments = vision.get("act_kwargs") or {}
    is_quick = bool(model.get("quick_gelu", False))
    form = arguments.get("approximate", "none") if isinstance(arguments, dict) else None
    if (
        form not in ("none", "tanh")
        or arguments.keys() - {"approximate"}
        or (is_quick and arguments)
    ):
        raise CheckpointError(
            f"{FILE} has act_kwargs {arguments!r}: expected a form of GELU, approximate none or "
            "tanh"
        )
    return "quick_gelu" if is_quick else "gelu_tanh" if form == "tanh" else "gelu"


def _parse_norm_eps(vision: Mapping[str, Any]) -> float:
    """Return the eps of norm_kwargs, or open_clip's default."""
    arguments = vision.get("norm_kwargs") or {}
    eps = arguments.get("eps", _EPS) if isinstance(arguments, dict) else None
    if eps is None or not is_number(eps) or arguments.keys() - {"eps"}:
        raise CheckpointError(f"{FILE} has norm_kwargs {arguments!r}: expected eps only")
    return float(eps)


def _check_sizes(
    model: Mapping[str, Any], vision: Mapping[str, Any], inferred: Mapping[str, Any]
) -> None:
    """Raise CheckpointError if the config states other sizes than the tensors have."""
    embed_dim = inferred["embed_dim"]
    ratio, scale = vision.get("mlp_ratio", 4.0), vision.get("ls_init_value")
    for key, value in (("mlp_ratio", ratio), ("ls_init_value", scale)):
        if not is_number(value) and (key, value) != ("ls_init_value", None):
            raise CheckpointError(f"{FILE} has {key} {value!r}: expected a number")
    has_scales = inferred["layer_scale"] is not None
    pairs = {
        "width": (vision.get("width", 768), embed_dim),
        "layers": (vision.get("layers", 12), inferred["depth"]),
        "patch_size": (vision.get("patch_size", 16), compact_size(inferred["patch_size"])),
        "mlp_ratio": (int(embed_dim * ratio), inferred["mlp_dim"]),
        "no_ln_pre": (bool(vision.get("no_ln_pre")), not inferred["pre_norm"]),
        "ls_init_value": (scale is not None, has_scales),
        "embed_dim": (
            model.get("embed_dim", inferred["projection_dim"]),
            inferred["projection_dim"],
        ),
    }
    written = {"mlp_ratio": ratio, "ls_init_value": scale, **vision}
    shown = {
        "mlp_ratio": f"{inferred['mlp_dim'] / embed_dim:g}",
        "ls_init_value": "layer scales" if has_scales else "no layer scale",
    }
    clashes = [
        f"{key} {written.get(key, stated)!r} (the tensors have {shown.get(key, actual)})"
        for key, (stated, actual) in pairs.items()
        if stated not in (actual, [actual, actual])
    ]
    if clashes:
        raise CheckpointError(f"{FILE} contradicts the tensors: {'; '.join(clashes)}")


def _compute_mlp_ratio(cfg: ViTConfig) -> float:
    """Return the mlp_ratio for which open_clip's int(width * ratio) is exactly mlp_dim.

    Raises:
        ConfigError: No float has this product.
    """
    # The plain quotient may round down to mlp_dim - 1 in open_clip, so larger ones are tried.
    ratio = cfg.mlp_dim / cfg.embed_dim
    for candidate in (ratio, round(ratio, 4) + 1e-4, ratio * (1 + 1e-12)):
        if int(cfg.embed_dim * candidate) == cfg.mlp_dim:
            return candidate
    raise ConfigError(
        f"mlp_dim={cfg.mlp_dim}: expected a width with an mlp_ratio in open_clip; choose another "
        "layout"
    )
