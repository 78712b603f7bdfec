"""What timm's config.json means: the architecture by its name, its arguments, its labels.

A fact that no tensor holds comes from the table of published architectures (timm_models.py), then
from model_args as timm's factory takes them. A bare file is compared with that table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vitlib.checkpoint.families import get_numerics, guess_num_heads, with_profile
from vitlib.checkpoint.layouts import timm_models
from vitlib.checkpoint.layouts.facts import Facts, resolve_facts
from vitlib.checkpoint.layouts.infer import Shape, infer_config
from vitlib.checkpoint.layouts.layout import ParsedConfig
from vitlib.checkpoint.layouts.table import NameMatch
from vitlib.checkpoint.layouts.timm_args import count_prefix_tokens, read_args
from vitlib.checkpoint.layouts.timm_labels import read_labels
from vitlib.checkpoint.layouts.timm_models import Architecture
from vitlib.checkpoint.layouts.timm_sizes import check_sizes, list_input_notes
from vitlib.config import ViTConfig, to_pair
from vitlib.errors import CheckpointError

POOLS = {"token": "cls", "avg": "mean", "map": "map"}
# What the name of a model says of its family that its tensors may not.
_FAMILY_WORDS = (
    ("dinov3", "dinov3_vit"),
    ("siglip", "siglip"),
    ("clip", "clip"),
    ("beit", "beit"),
    ("deit3", "deit3"),
    ("ijepa", "ijepa"),
    ("mae", "vit_mae"),
    ("distilled", "deit"),
)
_ASSUMED = ("num_heads", "activation", "norm_eps", "pool", "position_resize")
_ROTARY = "dinov3_vit"


def read_tower(
    config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    name_match: NameMatch,
    profile: str,
    facts: Facts,
    image_size: tuple[int, int] | None,
) -> ParsedConfig:
    """Read what a model of timm's is.

    Args:
        config: architecture, model_args, pretrained_cfg and labels; empty for a bare file.
        shapes: Shapes by vitlib's names.
        name_match: Which of the file's names are which of vitlib's.
        profile: The library whose numerics hold where nothing says them.
        facts: What the caller states of a file without an architecture.
        image_size: Pixels (height, width) of the positions, where anything says them.

    Returns:
        The model, and which of it no file says.

    Raises:
        CheckpointError: The architecture is none that is read, an argument is none that is known,
            the tensors are another model's, or no file says which of several models it is.
    """
    held = infer_config(shapes, image_size) | infer_final_norm(name_match)
    check_distilled_pool(held, facts)
    name = config.get("architecture") or facts.architecture
    if name is None:
        return _bare(held, shapes, name_match, profile, facts)
    model = timm_models.get_architecture(str(name))
    pretrained, args = (get_object(config, key) for key in ("pretrained_cfg", "model_args"))
    check_sizes(model, config, held, "gate" in infer_spelling(name_match)["spelling"])
    fields, expected = read_args(model, config, held, facts)
    of_config = "architecture" in config
    _refuse_others(model, expected, build_signature(held, name_match), of_config)
    resized = expected["embed_dim"] != held["embed_dim"]  # by code of the caller's own
    if resized and "num_heads" not in args:
        fields["num_heads"] = facts.num_heads or guess_num_heads(held["embed_dim"], "")
    family = infer_family(held, f"{model.name}.{pretrained.get('tag', '')}", fields["rope_theta"])
    labels, notes = read_labels(config, held["num_classes"])
    notes += list_input_notes(model, config, held)
    cfg = with_profile(ViTConfig(family=family, **held | fields | labels), profile)
    activation: Any = "swiglu" if held.get("activation") == "swiglu" else fields["activation"]
    cfg = replace(cfg, norm_eps=fields["norm_eps"], activation=activation)
    assumed = ("num_heads",) * resized + ("pool",) * ("pool" in facts.to_fields())
    doubtful = ("num_heads",) if resized and facts.num_heads is None else ()
    return ParsedConfig(cfg, (*assumed, "position_resize"), doubtful, notes)


def _bare(
    held: dict[str, Any],
    shapes: Mapping[str, Shape],
    name_match: NameMatch,
    profile: str,
    facts: Facts,
) -> ParsedConfig:
    """Settle what no file says by the published models that have these tensors."""
    models = timm_models.list_candidates(build_signature(held, name_match), facts.saved_as)
    rows = {model.name: {**model.facts, "not_read": model.reason} for model in models}
    settled = resolve_facts(rows, facts)
    if settled.pop("not_read", ""):
        timm_models.get_architecture(next(name for name, row in rows.items() if row["not_read"]))
    doubtful: tuple[str, ...] = ()
    if not settled:
        if held["attention_pool"] and count_prefix_tokens(held) and facts.pool is None:
            raise CheckpointError(
                "an attention pool beside class tokens or registers, and no file says whether the "
                "pool reads these too; timm's reads the patches alone unless "
                "pool_include_prefix=True, and vitlib's reads all tokens: state pool='map' "
                "(--pool map) where all are read"
            )
        settled = _default(held, profile) | facts.to_fields()
        if held["final_norm"] == "none":  # of published models alone: else its absence is told
            held["final_norm"] = "tokens"
        doubtful = ("num_heads", "activation", "pool")
    family = infer_family(held, _shared_words(list(rows)), settled["rope_theta"])
    held = settled | {k: v for k, v in held.items() if k == "num_heads" or k not in settled}
    cfg = with_profile(ViTConfig(family=family, **held), profile)
    cfg = replace(cfg, norm_eps=settled["norm_eps"], activation=settled["activation"])
    known = {
        "num_heads": "attn_position.tables.0" in shapes,
        "activation": cfg.activation == "swiglu",
    }
    open_fields = tuple(name for name in _ASSUMED if not known.get(name, False))
    return ParsedConfig(cfg, open_fields, tuple(name for name in doubtful if name in open_fields))


def check_distilled_pool(held: Mapping[str, Any], facts: Facts) -> None:
    """Refuse a distilled model without its heads, unless the caller states what it pools.

    Args:
        held: What the tensors say.
        facts: What the caller states.

    Raises:
        CheckpointError: timm and the original code give the mean of two class tokens there.
    """
    if held["dist_token"] and not held["dist_head"] and facts.pool is None:
        raise CheckpointError(
            "a distilled model without its heads gives the mean of the class token and the "
            "distillation token in timm and in the original code, which vitlib does not compute: "
            "state pool='cls' (--pool cls) for the class token alone"
        )


def _shared_words(names: list[str]) -> str:
    """Return the words that tell a family and stand in all of these names."""
    words = [word for word, _ in _FAMILY_WORDS if all(word in name for name in names)]
    return " ".join(words) if names else ""


def _default(held: Mapping[str, Any], profile: str) -> dict[str, Any]:
    """Return the usual facts of tensors that no published model has."""
    if not held["pos_embed"] and not held["relative_position"]:
        if not (held["layer_scale"] and held["class_token"]):
            raise CheckpointError(
                "tensors without any positions, which no published model of timm's has: state "
                "what it is with architecture= (--architecture) or config=ViTConfig(...)"
            )
        family = _ROTARY
    else:
        family = infer_family(held)
    pool = "map" if held["attention_pool"] else "cls" if held["class_token"] else "mean"
    usual = get_numerics(profile, family)
    return {
        "num_heads": held.get("num_heads") or guess_num_heads(held["embed_dim"], family),
        "activation": "swiglu" if held.get("activation") == "swiglu" else usual["activation"],
        "norm_eps": usual["norm_eps"],
        "pool": "mean" if held["final_norm"] == "pooled" and pool == "cls" else pool,
        "rope_theta": 100.0 if family == _ROTARY else None,
    }


def get_object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return an object inside a config, empty where there is none."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json has {key} {value!r}: expected an object")
    return value


def get_position_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return pixels (height, width) of the positions, where the config says them."""
    args, defaults = (get_object(config, key) for key in ("model_args", "pretrained_cfg"))
    shape = defaults.get("input_size")
    size = args.get("img_size") or (shape[1:] if isinstance(shape, list) else None)
    several = tuple(size) if isinstance(size, list | tuple) else (size,)
    return to_pair("img_size", size) if size and None not in several else None


def infer_final_norm(name_match: NameMatch) -> dict[str, str]:
    """Return final_norm as the names say it: norm, fc_norm or none of both."""
    norm = name_match.matches.get("norm.weight")
    if norm is None:
        return {"final_norm": "none"}
    return {"final_norm": "pooled" if norm[0].file_name.endswith("fc_norm.weight") else "tokens"}


def infer_spelling(name_match: NameMatch) -> dict[str, str]:
    """Return which of timm's ways to name the parts of a block a file has."""
    ends = {
        "gamma": ("blocks.0.ls1.gamma", "gamma_1"),
        "split": ("blocks.0.attn.q.weight", "q_proj.weight"),
        "q_bias": ("blocks.0.attn.q.bias", "q_bias"),
        "gate": ("blocks.0.mlp.fc1.weight", "fc1_g.weight"),
    }
    words = [
        word
        for word, (ours, end) in ends.items()
        if ours in name_match.matches and name_match.file_name(ours).endswith(end)
    ]
    return {"spelling": " ".join(words)}


def build_columns(
    shapes: Mapping[str, Shape], name_match: NameMatch, image_size: tuple[int, int]
) -> dict[str, Any]:
    """Return the columns of the table that a published model's tensors say, its sizes too."""
    return build_signature(
        infer_config(shapes, image_size) | infer_final_norm(name_match), name_match
    )


def build_signature(held: Mapping[str, Any], name_match: NameMatch) -> dict[str, Any]:
    """Return what the tensors say, by the columns of the table."""
    gated = {"gated": held.get("activation") == "swiglu"}
    scaled = {"layer_scale": held["layer_scale"] is not None}
    return {**held, **gated, **scaled, **infer_spelling(name_match)}


def _refuse_others(
    model: Architecture, expected: Mapping[str, Any], signature: Mapping[str, Any], of_config: bool
) -> None:
    """Raise CheckpointError where the tensors are not those of the named model."""
    clashes = [
        f"{field} {_like(value, signature[field])!r} (the tensors have {signature[field]!r})"
        for field, value in expected.items()
        if field not in ("embed_dim", "mlp_dim")  # which every tensor shows
        if (value or 0) != (signature[field] or 0)
        if not (field == "gated" and signature[field])  # a class of MLP, which no JSON holds
    ]
    if clashes and of_config:
        raise CheckpointError(
            f"{model.name!r} with the model_args of its config has {', '.join(clashes)}: another "
            "model's weights lie beside this config; copy the weights file to a folder without "
            "one, and load it there with architecture= (--architecture) of what it is"
        )
    if clashes:
        raise CheckpointError(f"architecture={model.name!r} has {', '.join(clashes)}")


def _like(value: Any, other: Any) -> Any:
    """Return a cell of the table, 1 or 0, as the bool that it stands for."""
    return bool(value) if isinstance(other, bool) else value


def infer_family(held: Mapping[str, Any], name: str = "", rope_theta: float | None = None) -> str:
    """Return the family that the tensors, and the model's name where there is one, say."""
    word = next((family for word, family in _FAMILY_WORDS if word in name), None)
    if held["relative_position"]:
        return "beit"
    if rope_theta is not None:
        return _ROTARY
    if held["pre_norm"]:
        return "clip"
    if held["attention_pool"] or (word == "siglip" and not held["class_token"]):
        return "siglip"
    if held["layer_scale"] and held["class_token"]:
        if held["num_registers"]:
            return "dinov2_with_registers"
        return "deit3" if not held["pos_embed_cls"] and "dinov2" not in name else "dinov2"
    if held["dist_token"]:
        return "deit"
    if not held["class_token"]:
        return "vit" if held["num_registers"] else "ijepa"
    return "vit_mae" if word == "vit_mae" else "vit"
