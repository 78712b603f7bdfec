"""timm's model_args: those that change a model, those that change no number, none other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vitlib.checkpoint.layouts.facts import Facts
from vitlib.checkpoint.layouts.timm_models import Architecture
from vitlib.errors import CheckpointError

_POOLS = {"token": "cls", "avg": "mean", "map": "map"}
_GELUS = {None: "gelu", "": "gelu", "gelu": "gelu", "gelu_tanh": "gelu_tanh"}
_GELUS |= {"quick_gelu": "quick_gelu"}
_NORMS = (None, "", "layernorm")  # of eps 1e-6 each
_NORM_EPS = 1e-6
# Sizes that the tensors say, what only training reads, and how the weights were initialised.
_HARMLESS = {
    *("img_size", "patch_size", "in_chans", "num_classes", "depth", "mlp_ratio"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "weight_init", "fix_init", "head_init_scale", "dynamic_img_size"),
    *("strict_img_size", "no_embed_class", "qkv_fused", "device", "dtype", "scriptable"),
    *("exportable", "no_jit", "rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"),
    *("swiglu_align_to", "pretrained", "checkpoint_path", "cache_dir"),
}
# Arguments that tensors show: the column of the table, and what it becomes.
_SHOWN: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
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
}
# Arguments that the trunk runs with one value alone.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "qk_norm": (False,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "scale_mlp": (False,),
    "scale_attn_inner": (False,),
    "proj_bias": (True,),
    "dynamic_img_pad": (False,),
    "embed_norm_layer": (None, ""),
    "use_post_norm": (False,),
    "attn_only_layer_scale": (False,),
    "num_kv_heads": (None,),
    "attn_pool_num_heads": (None,),
    "attn_pool_mlp_ratio": (None,),
    "use_naflex": (False, None),
    "features_only": (False,),
    "rope_mrope_section": (None,),
    "attn_type": ("eva",),
}
# Arguments of the rotary embedding, which the trunk runs as DINOv3's or not at all.
_ROPE: Mapping[str, Any] = {
    "use_rot_pos_emb": True,
    "rope_type": "dinov3",
    "rope_temperature": 100,
    "rope_rotate_half": True,
    "rope_grid_offset": 0.0,
    "rope_grid_indexing": "ij",
    "ref_feat_shape": None,
}


def read_args(
    model: Architecture, config: Mapping[str, Any], held: Mapping[str, Any], facts: Facts
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what model_args make of a published architecture.

    Args:
        model: The architecture.
        config: timm's config.json.
        held: What the tensors say.
        facts: What the caller states.

    Returns:
        The fields of ViTConfig that no tensor holds, and the columns of the table that the tensors
        must have.

    Raises:
        CheckpointError: An argument is none that is known, or has a value that vitlib does not run.
    """
    args = config.get("model_args") or {}
    if not isinstance(args, dict):
        raise CheckpointError(f"config.json has model_args {args!r}: expected an object")
    fields = dict(model.facts)
    expected = {name: value for name, value in model.structure.items() if name not in _LOOSE}
    for name, value in args.items():
        if name in _SHOWN:
            column, meaning = _SHOWN[name]
            expected[column] = _as(meaning, name, value)
        elif name in _READERS:
            _READERS[name](name, value, fields, expected, held)
        elif not _is_harmless(name, value, model):
            raise CheckpointError(
                f"config.json has model_args {name}={value!r}, which vitlib does not run: "
                "it would change the numbers"
            )
    if "embed_dim" in args or "mlp_ratio" in args:
        del expected["mlp_dim"]
    if not {"pre_norm", "use_pre_transformer_norm"}.isdisjoint(args):
        expected["patch_bias"] = not expected["pre_norm"]
    if "qkv_bias" in args:
        del expected["key_bias"]
    _read_pool(model, config, args, held, facts, fields, expected)
    _read_labels_offset(config)
    return fields, expected


# Columns that are not compared: timm resamples patches and positions, and trunks are cut.
_LOOSE = ("patch_size", "depth", "image_size", "pos_embed_cls", "spelling")
_Reader = Callable[[str, Any, dict[str, Any], dict[str, Any], Mapping[str, Any]], None]


def _heads(
    name: str, value: Any, fields: dict[str, Any], _: dict[str, Any], held: Mapping[str, Any]
) -> None:
    fields["num_heads"] = _as(int, name, value)
    if held.get("num_heads", value) != value:
        raise CheckpointError(
            f"config.json has num_heads={value!r}, and the tensors {held['num_heads']}"
        )


def _gelu(
    name: str, value: Any, fields: dict[str, Any], expected: dict[str, Any], _: Mapping[str, Any]
) -> None:
    if expected["gated"] or not (value is None or isinstance(value, str)) or value not in _GELUS:
        raise CheckpointError(
            f"config.json has model_args {name}={value!r}: expected gelu, gelu_tanh or quick_gelu"
        )
    fields["activation"] = _GELUS[value]


def _norm(
    name: str, value: Any, fields: dict[str, Any], _: dict[str, Any], __: Mapping[str, Any]
) -> None:
    if value not in _NORMS:
        raise CheckpointError(f"config.json has model_args {name}={value!r}: expected layernorm")
    fields["norm_eps"] = _NORM_EPS


def _norm_place(
    name: str, value: Any, _: dict[str, Any], expected: dict[str, Any], held: Mapping[str, Any]
) -> None:
    """Compare fc_norm and final_norm with the norm that the file has."""
    if name in ("fc_norm", "use_fc_norm"):
        pooled = held["final_norm"] == "pooled"
        expected["final_norm"] = held["final_norm"]
        wrong = value is not None and held["final_norm"] != "none" and bool(value) != pooled
    else:  # final_norm, use_post_transformer_norm
        wrong = value is not None and name == "final_norm" and not value
        wrong = wrong and held["final_norm"] != "none"
        expected["final_norm"] = held["final_norm"]
    if wrong:
        raise CheckpointError(
            f"config.json has model_args {name}={value!r}, and the tensors have the norm of "
            f"final_norm={held['final_norm']!r}"
        )


def _offsets(
    _: str, __: Any, ___: dict[str, Any], expected: dict[str, Any], held: Mapping[str, Any]
) -> None:
    expected["relative_position"] = held["relative_position"]  # the tables are in the file


_READERS: Mapping[str, _Reader] = {
    "num_heads": _heads,
    "act_layer": _gelu,
    "norm_layer": _norm,
    "fc_norm": _norm_place,
    "use_fc_norm": _norm_place,
    "final_norm": _norm_place,
    "use_post_transformer_norm": _norm_place,
    "use_rel_pos_bias": _offsets,
    "use_shared_rel_pos_bias": _offsets,
}


def _is_harmless(name: str, value: Any, model: Architecture) -> bool:
    """Return whether an argument changes no number of a model, or no more than it is built with."""
    if name in _HARMLESS or name in ("global_pool", "pool_include_prefix"):
        return True
    if name in _ONLY:
        return value in _ONLY[name]
    if name in _ROPE and model.facts["rope_theta"] is not None:
        return bool(value == _ROPE[name])
    if name == "use_rot_pos_emb":
        return value is False
    if name == "swiglu_mlp":
        return bool(value) == bool(model.structure["gated"])
    if name in ("block_fn", "mlp_layer", "attn_layer", "embed_layer"):
        return value is None
    return False


def _as(kind: Callable[[Any], Any], name: str, value: Any) -> Any:
    """Return an argument as its type; a number for an int, as JSON has it."""
    if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
        if name in ("reg_tokens", "num_reg_tokens") and value is None:
            return 0
        raise CheckpointError(f"config.json has model_args {name}={value!r}: expected a number")
    return kind(value)


def _read_pool(
    model: Architecture,
    config: Mapping[str, Any],
    args: Mapping[str, Any],
    held: Mapping[str, Any],
    facts: Facts,
    fields: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    """Read what the head reads, and with it which norm and pool the tensors must have."""
    usual = {pool: name for name, pool in _POOLS.items()}[model.facts["pool"]]
    pool, top = args.get("global_pool", usual), config.get("global_pool")
    if "global_pool" in args or held["final_norm"] != model.structure["final_norm"]:
        expected["final_norm"] = held["final_norm"]  # the place of the norm follows the pool
    if "global_pool" not in args and top not in (None, "", usual):
        if held["final_norm"] != model.structure["final_norm"]:
            pool = top  # written by a timm that kept no model_args
        elif facts.pool is None:
            raise CheckpointError(
                f"config.json has global_pool {top!r}, which timm itself does not read there: it "
                f"opens {model.name!r} with {usual!r}; state which with pool={_pool_of(top)!r} or "
                f"pool={model.facts['pool']!r} (--pool)"
            )
    if pool == "" and not held["num_classes"]:  # every token comes out, and no vector
        pool = "token" if held["class_token"] else "avg"
    fields["pool"] = facts.pool or _pool_of(pool)
    expected["attention_pool"] = fields["pool"] == "map"
    _refuse_prefix(model, args, held, fields["pool"])


def _pool_of(name: Any) -> str:
    if name not in _POOLS:
        raise CheckpointError(f"config.json has global_pool {name!r}: expected token, avg or map")
    return _POOLS[name]


def _refuse_prefix(
    model: Architecture, args: Mapping[str, Any], held: Mapping[str, Any], pool: str
) -> None:
    """Raise CheckpointError where the pool reads other tokens than vitlib's does."""
    prefix = count_prefix_tokens(held)
    # timm pools the patches alone. A published attention pool beside class tokens or registers
    # reads these too: one of the patches alone is not read, for the reason in its row.
    usual = model.facts["pool"] == "map" and count_prefix_tokens(model.structure) > 0
    included = args.get("pool_include_prefix", usual)
    if prefix and ((pool == "mean" and included) or (pool == "map" and not included)):
        which = "too" if included else "left out"
        raise CheckpointError(
            f"{model.name!r} with the model_args of its config pools {pool!r} with class tokens "
            f"and registers {which}, which vitlib does not run"
        )


def count_prefix_tokens(held: Mapping[str, Any]) -> int:
    """Return the number of class, distillation and register tokens."""
    return int(held["class_token"] + held["dist_token"] + held["num_registers"])


def _read_labels_offset(config: Mapping[str, Any]) -> None:
    pretrained = config.get("pretrained_cfg") or {}
    offset = pretrained.get("label_offset") if isinstance(pretrained, dict) else None
    if offset:
        raise CheckpointError(
            f"config.json has label_offset {offset!r}: timm leaves out that many classes; vitlib "
            "does not"
        )
