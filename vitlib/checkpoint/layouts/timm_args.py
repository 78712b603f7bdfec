"""Read timm's model_args; an argument that is unknown or not computed raises an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vitlib.checkpoint.layouts.computed import DINOV3_ROPE
from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.timm_models import Architecture
from vitlib.config_parts import Norms
from vitlib.errors import CheckpointError

POOLS = {"token": "cls", "avg": "mean", "map": "map"}
_GELUS = {None: "gelu", "": "gelu", "gelu": "gelu", "gelu_tanh": "gelu_tanh"}
_GELUS |= {"quick_gelu": "quick_gelu"}
_NORM_LAYERS = (None, "", "layernorm")  # each with an eps of 1e-6
_NORM_EPS = 1e-6
# Sizes that the tensors determine, settings of training, and initialisations.
_HARMLESS = {
    *("img_size", "patch_size", "in_chans", "num_classes", "depth", "mlp_ratio"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "weight_init", "fix_init", "head_init_scale", "dynamic_img_size"),
    *("strict_img_size", "no_embed_class", "qkv_fused", "device", "dtype", "scriptable"),
    *("exportable", "no_jit", "rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"),
    *("swiglu_align_to", "pretrained", "checkpoint_path", "cache_dir"),
    # Which of timm's spellings of attention a file has; the tensors show it, and grouped heads too.
    *("attn_type", "num_kv_heads", "attn_only_layer_scale", "attn_pool_mlp_ratio"),
}
# Arguments that tensors determine: the column of the table, and the conversion to its type.
_FROM_TENSORS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "embed_dim": ("embed_dim", int),
    "class_token": ("class_token", bool),
    "reg_tokens": ("num_registers", int),
    "num_reg_tokens": ("num_registers", int),
    "init_values": ("layer_scale", bool),
    "pre_norm": ("pre_norm", bool),
    "use_pre_transformer_norm": ("pre_norm", bool),
    "pos_embed": ("pos_embed", lambda value: value not in (None, "", "none")),
    "use_abs_pos_emb": ("pos_embed", bool),
    "qkv_bias": ("qkv_bias", bool),
    "proj_bias": ("proj_bias", bool),
}
# Arguments that tensors determine: the field of Norms, and its value where the argument is true.
_NORMS: Mapping[str, tuple[str, Any]] = {
    "qk_norm": ("qk", "head"),
    "scale_attn_norm": ("attn", True),
    "scale_attn_inner": ("attn", True),
    "scale_mlp_norm": ("mlp", True),
    "scale_mlp": ("mlp", True),
    "embed_norm_layer": ("patch", True),
}
# Arguments for which vitlib computes these values only.
_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "dynamic_img_pad": (False,),
    "use_naflex": (False, None),
    "features_only": (False,),
    "rope_mrope_section": (None,),
}
# Arguments of the rotary embedding -> the field of Rope.
_ROPE: Mapping[str, str] = {
    "rope_type": "coords",
    "rope_temperature": "theta",
    "rope_grid_offset": "offset",
    "rope_grid_indexing": "axes",
    "ref_feat_shape": "reference_grid",
}
_ROPE_TYPES: Mapping[Any, dict[str, Any]] = {
    "cat": {"coords": "index", "learned": False},
    "mixed": {"coords": "index", "learned": True},
    "dinov3": {"coords": "centers", "learned": False},
}


def read_args(
    model: Architecture, config: Mapping[str, Any], inferred: Mapping[str, Any], facts: Facts
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Apply model_args to a published architecture.

    Args:
        model: The architecture.
        config: timm's config.json.
        inferred: Fields of ViTConfig that the tensors determine.
        facts: Facts that the caller states.

    Returns:
        The fields of ViTConfig that no tensor determines, and the columns of the table that the
        tensors must have.

    Raises:
        CheckpointError: An argument is unknown, or has a value that vitlib does not compute.
    """
    args = config.get("model_args") or {}
    if not isinstance(args, dict):
        raise CheckpointError(f"config.json has model_args {args!r:.80}: expected an object")
    fields = {**model.facts, "num_heads": inferred.get("num_heads", model.facts["num_heads"])}
    expected = {name: value for name, value in model.structure.items() if name not in _NOT_COMPARED}
    for name, value in args.items():
        if name in _FROM_TENSORS:
            column, meaning = _FROM_TENSORS[name]
            expected[column] = _convert(meaning, name, value)
        elif name in _NORMS:
            part, norm = _NORMS[name]
            usual = getattr(Norms(), part)
            expected["norms"] = replace(expected["norms"], **{part: norm if value else usual})
        elif name in _READERS:
            _READERS[name](name, value, fields, expected, inferred)
        elif not _is_harmless(name, value, model):
            raise CheckpointError(
                f"config.json has model_args {name}={value!r}, which vitlib does not run: "
                "it changes the numbers; expected timm's default"
            )
    if "embed_dim" in args or "mlp_ratio" in args:
        del expected["mlp_dim"]
    widths = ("embed_dim", "mlp_dim")
    if "attn_pool_mlp_ratio" in args or any(inferred[n] != model.structure[n] for n in widths):
        del expected["pool_mlp_dim"]
    if not {"pre_norm", "use_pre_transformer_norm"}.isdisjoint(args):
        expected["patch_bias"] = not expected["pre_norm"]
    if "qkv_bias" in args:
        del expected["key_bias"]
    _read_pool(model, config, args, inferred, facts, fields, expected)
    _check_label_offset(config)
    return fields, expected


# Columns that are not compared: timm resamples patches and positions, and depth may be cut.
_NOT_COMPARED = ("patch_size", "depth", "image_size", "pos_embed_cls", "spelling")
_Reader = Callable[[str, Any, dict[str, Any], dict[str, Any], Mapping[str, Any]], None]


def _read_num_heads(
    name: str, value: Any, fields: dict[str, Any], _: dict[str, Any], inferred: Mapping[str, Any]
) -> None:
    """Read num_heads, and compare it with tensors that determine it."""
    fields["num_heads"] = _convert(int, name, value)
    if inferred.get("num_heads", value) != value:
        raise CheckpointError(
            f"config.json has num_heads={value!r}, but the tensors have {inferred['num_heads']}: "
            "correct config.json"
        )


def _read_activation(
    name: str, value: Any, fields: dict[str, Any], expected: dict[str, Any], _: Mapping[str, Any]
) -> None:
    """Read act_layer."""
    if expected["gated"] or not (value is None or isinstance(value, str)) or value not in _GELUS:
        raise CheckpointError(
            f"config.json has model_args {name}={value!r}: expected gelu, gelu_tanh or quick_gelu"
        )
    fields["activation"] = _GELUS[value]


def _read_norm_layer(
    name: str, value: Any, fields: dict[str, Any], _: dict[str, Any], __: Mapping[str, Any]
) -> None:
    """Read norm_layer, which sets the eps."""
    if value not in _NORM_LAYERS:
        raise CheckpointError(f"config.json has model_args {name}={value!r}: expected layernorm")
    fields["norm_eps"] = _NORM_EPS


def _check_final_norm(
    name: str, value: Any, _: dict[str, Any], expected: dict[str, Any], inferred: Mapping[str, Any]
) -> None:
    """Check fc_norm and final_norm against the norm that the file has."""
    if name in ("fc_norm", "use_fc_norm"):
        pooled = inferred["final_norm"] == "pooled"
        expected["final_norm"] = inferred["final_norm"]
        wrong = value is not None and inferred["final_norm"] != "none" and bool(value) != pooled
    else:  # final_norm, use_post_transformer_norm
        wrong = value is not None and name == "final_norm" and not value
        wrong = wrong and inferred["final_norm"] != "none"
        expected["final_norm"] = inferred["final_norm"]
    if wrong:
        raise CheckpointError(
            f"config.json has model_args {name}={value!r}, and the tensors have the norm of "
            f"final_norm={inferred['final_norm']!r}"
        )


def _read_relative_position(
    _: str, __: Any, ___: dict[str, Any], expected: dict[str, Any], inferred: Mapping[str, Any]
) -> None:
    """Accept use_rel_pos_bias and use_shared_rel_pos_bias."""
    expected["relative_position"] = inferred["relative_position"]  # the tables in the file decide


def _read_rope(
    name: str, value: Any, fields: dict[str, Any], expected: dict[str, Any], _: Mapping[str, Any]
) -> None:
    """Read an argument of the rotary embedding."""
    rope, field = fields["rope"], _ROPE[name]
    if rope is None:
        return  # timm does not read it either
    if name == "rope_type" and value not in _ROPE_TYPES:
        raise CheckpointError(
            f"config.json has model_args {name}={value!r}: expected {', '.join(_ROPE_TYPES)}"
        )
    changes = _ROPE_TYPES[value] if name == "rope_type" else {field: value}
    fields["rope"] = replace(rope, **changes)
    expected["rope_freqs"] = fields["rope"].learned


def _read_pool_heads(
    _: str, value: Any, fields: dict[str, Any], __: dict[str, Any], ___: Mapping[str, Any]
) -> None:
    """Read attn_pool_num_heads."""
    fields["pool_heads"] = value or 0


_READERS: Mapping[str, _Reader] = {
    **dict.fromkeys(_ROPE, _read_rope),
    "attn_pool_num_heads": _read_pool_heads,
    "num_heads": _read_num_heads,
    "act_layer": _read_activation,
    "norm_layer": _read_norm_layer,
    "fc_norm": _check_final_norm,
    "use_fc_norm": _check_final_norm,
    "final_norm": _check_final_norm,
    "use_post_transformer_norm": _check_final_norm,
    "use_rel_pos_bias": _read_relative_position,
    "use_shared_rel_pos_bias": _read_relative_position,
}


def _is_harmless(name: str, value: Any, model: Architecture) -> bool:
    """Return True if an argument changes no number, or has the value of the architecture."""
    if name in _HARMLESS or name in ("global_pool", "pool_include_prefix"):
        return True
    if name in _SUPPORTED:
        return value in _SUPPORTED[name]
    if name == "use_rot_pos_emb":
        return bool(value) == (model.facts["rope"] is not None)
    if name == "rope_rotate_half":  # the tensors of each kind have one order of channels
        return value is (model.facts["rope"] == DINOV3_ROPE)
    if name == "use_post_norm":
        return bool(value) == bool(model.facts["post_norm"])
    if name == "swiglu_mlp":
        return bool(value) == bool(model.structure["gated"])
    if name in ("block_fn", "mlp_layer", "attn_layer", "embed_layer"):
        return value is None
    return False


def _convert(kind: Callable[[Any], Any], name: str, value: Any) -> Any:
    """Convert an argument to its type; reject a bool or a text for an int."""
    if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
        if name in ("reg_tokens", "num_reg_tokens") and value is None:
            return 0
        raise CheckpointError(f"config.json has model_args {name}={value!r}: expected a number")
    return kind(value)


def _read_pool(
    model: Architecture,
    config: Mapping[str, Any],
    args: Mapping[str, Any],
    inferred: Mapping[str, Any],
    facts: Facts,
    fields: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    """Read the pool, and with it the norm and the pool that the tensors must have."""
    default = {pool: name for name, pool in POOLS.items()}[model.facts["pool"]]
    pool, top = args.get("global_pool", default), config.get("global_pool")
    if "global_pool" in args or inferred["final_norm"] != model.structure["final_norm"]:
        # The pool decides which norm there is.
        expected["final_norm"] = inferred["final_norm"]
    if "global_pool" not in args and top not in (None, "", default):
        if inferred["final_norm"] != model.structure["final_norm"]:
            pool = top  # older versions of timm wrote no model_args
        elif facts.pool is None:
            raise CheckpointError(
                f"config.json has global_pool {top!r}, which timm itself does not read there: it "
                f"opens {model.name!r} with {default!r}; state which with "
                f"pool={_parse_pool(top)!r} or pool={model.facts['pool']!r} (--pool)"
            )
    # Timm returns all tokens without a pool.
    if pool == "" and not inferred["num_classes"]:
        pool = "token" if inferred["class_token"] else "avg"
    fields["pool"] = facts.pool or _parse_pool(pool)
    expected["attention_pool"] = fields["pool"] == "map"
    _read_pooled_tokens(model, args, inferred, fields)


def _parse_pool(name: Any) -> str:
    """Return ViTConfig.pool of timm's global_pool."""
    if name not in POOLS:
        raise CheckpointError(f"config.json has global_pool {name!r}: expected token, avg or map")
    return POOLS[name]


def _read_pooled_tokens(
    model: Architecture,
    args: Mapping[str, Any],
    inferred: Mapping[str, Any],
    fields: dict[str, Any],
) -> None:
    """Read which tokens are pooled; raise CheckpointError for those that vitlib does not pool."""
    prefix, pool = count_prefix_tokens(inferred), fields["pool"]
    # The pool of Eva, whose models are rotary, reads every token; others read the patches.
    has_prefix = count_prefix_tokens(model.structure) > 0
    usual = model.facts["pool_prefix"] if has_prefix else model.facts["rope"] is not None
    included = bool(args.get("pool_include_prefix", usual))
    fields["pool_prefix"] = included or not prefix
    if prefix and pool == "mean" and included:
        raise CheckpointError(
            f"{model.name!r} with the model_args of its config pools {pool!r} with class tokens "
            "and registers too, which vitlib does not run: expected a mean of the patches"
        )


def count_prefix_tokens(inferred: Mapping[str, Any]) -> int:
    """Count the class, distillation and register tokens.

    Args:
        inferred: Fields of ViTConfig, or the columns of an architecture.

    Returns:
        The number of tokens before the patches.
    """
    return int(inferred["class_token"] + inferred["dist_token"] + inferred["num_registers"])


def _check_label_offset(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if timm removes classes of the head at load."""
    pretrained = config.get("pretrained_cfg") or {}
    offset = pretrained.get("label_offset") if isinstance(pretrained, dict) else None
    if offset:
        raise CheckpointError(
            f"config.json has label_offset {offset!r}: expected none; timm removes that many "
            "classes, vitlib does not"
        )
