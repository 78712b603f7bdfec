"""Read timm's config.json: the architecture by its name, its arguments and its labels.

A fact that no tensor determines comes from the table of published architectures (timm_models.py),
then from model_args as timm's factory applies them. A bare file is compared with that table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from vitlib.checkpoint.families import (
    default_num_heads,
    get_family,
    get_numerics,
    list_families,
    with_profile,
)
from vitlib.checkpoint.layouts import timm_models
from vitlib.checkpoint.layouts.computed import DINOV3_ROPE
from vitlib.checkpoint.layouts.facts import Facts, resolve_facts
from vitlib.checkpoint.layouts.infer import Shape, infer_config
from vitlib.checkpoint.layouts.layout import ParsedConfig
from vitlib.checkpoint.layouts.table import NameMatch
from vitlib.checkpoint.layouts.timm_args import count_prefix_tokens, read_args
from vitlib.checkpoint.layouts.timm_models import Architecture, match_tensors
from vitlib.checkpoint.layouts.timm_sizes import check_sizes, get_object, list_input_notes
from vitlib.config import ViTConfig
from vitlib.config_parts import Norms, Rope
from vitlib.errors import CheckpointError

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
    """Return the config of a model of timm.

    Args:
        config: architecture, model_args, pretrained_cfg and labels; empty for a bare file.
        shapes: Shapes by vitlib's names.
        name_match: The names of the file for each of vitlib's names.
        profile: The library whose numerics apply where no file gives them.
        facts: Facts that the caller states.
        image_size: Pixels (height, width) of the positions; None if no file gives them.

    Returns:
        The config, and the fields that no file gives.

    Raises:
        CheckpointError: The architecture or an argument is unknown or not computed, the tensors are
            another model's, or no file tells which of several models it is.
    """
    name = facts.published or config.get("architecture") or facts.architecture
    model = None if name is None else timm_models.get_architecture(str(name))
    inferred = infer_config(shapes, image_size) | infer_final_norm(name_match)
    check_distilled_pool(inferred, facts)
    if model is None:
        return _read_bare(inferred, shapes, name_match, profile, facts)
    pretrained, args = (get_object(config, key) for key in ("pretrained_cfg", "model_args"))
    check_sizes(model, config, inferred, "gate" in infer_spelling(name_match)["spelling"])
    fields, expected = read_args(model, config, inferred, facts)
    signature = build_signature(inferred, name_match)
    _check_tensors(model, expected, signature, "architecture" in config)
    resized = expected["embed_dim"] != inferred["embed_dim"]  # a width that timm does not publish
    resized &= "num_heads" not in inferred
    if resized and "num_heads" not in args:
        fields["num_heads"] = facts.num_heads or default_num_heads(inferred["embed_dim"], "")
    family = infer_family(inferred, f"{model.name}.{pretrained.get('tag', '')}", fields["rope"])
    from vitlib.checkpoint.layouts.timm_labels import read_labels

    labels, notes = read_labels(config, inferred["num_classes"])
    values = timm_models.to_fields(inferred, fields) | labels
    cfg = with_profile(ViTConfig(family=family, **values), profile)
    activation: Any = "swiglu" if inferred.get("activation") == "swiglu" else fields["activation"]
    cfg = replace(cfg, norm_eps=fields["norm_eps"], activation=activation)
    assumed = ("num_heads",) * resized + ("pool",) * ("pool" in facts.to_fields())
    doubtful = ("num_heads",) if resized and facts.num_heads is None else ()
    notes += list_input_notes(model, config, inferred)
    return ParsedConfig(cfg, (*assumed, "position_resize"), doubtful, notes)


def _read_bare(
    inferred: dict[str, Any],
    shapes: Mapping[str, Shape],
    name_match: NameMatch,
    profile: str,
    facts: Facts,
) -> ParsedConfig:
    """Take the facts that no file gives from the published models with these tensors."""
    models = timm_models.list_candidates(build_signature(inferred, name_match), facts.saved_as)
    rows = {model.name: {**model.facts, "not_read": model.reason} for model in models}
    settled = resolve_facts(rows, _narrow_pool(facts, models, inferred))
    if settled.pop("not_read", ""):
        timm_models.get_architecture(next(name for name, row in rows.items() if row["not_read"]))
    doubtful: tuple[str, ...] = ()
    if not settled:
        is_usual = inferred["norms"] == Norms() and inferred["proj_bias"]
        # Only the Perception Encoder, whose positions are rotary, has a pool after such a norm.
        is_usual &= not (inferred["attention_pool"] and inferred["pre_norm"])
        if "attn_position.freqs" in shapes or not is_usual:
            raise CheckpointError(
                "norms, biases or rotary frequencies of no usual ViT: expected a published "
                "model; state it with architecture= (--architecture) or config=ViTConfig(...)"
            )
        if inferred["attention_pool"] and count_prefix_tokens(inferred) and facts.pool is None:
            raise CheckpointError(
                "an attention pool with class tokens or registers, and no file says whether the "
                "pool reads these too: by default timm reads the patches only, and vitlib reads "
                "all tokens: if the model does too, state pool='map' (--pool map)"
            )
        settled = _default_facts(inferred, profile) | facts.to_fields()
        if inferred["final_norm"] == "none":
            inferred["final_norm"] = "tokens"  # only published models lack it: report it missing
        doubtful = ("num_heads", "activation", "pool")
    settled |= {} if facts.pool is None else {"pool": facts.pool}
    family = infer_family(inferred, _shared_words(list(rows)), settled["rope"])
    fixed = {"num_heads": "num_heads" in inferred, "rope": not doubtful}
    fixed["activation"] = settled["activation"] == "swiglu"
    inferred = settled | {k: v for k, v in inferred.items() if k == "num_heads" or k not in settled}
    cfg = with_profile(ViTConfig(family=family, **timm_models.to_fields(inferred, {})), profile)
    cfg = replace(cfg, norm_eps=settled["norm_eps"], activation=settled["activation"])
    open_fields = tuple(name for name in (*_ASSUMED, "rope") if not fixed.get(name, False))
    doubtful = tuple(name for name in (*doubtful, "rope") if name in open_fields)
    note = _suggest_ids(list(rows)) if facts.pool is None else ""
    return ParsedConfig(cfg, open_fields, doubtful, (note,) if note else ())


def _suggest_ids(names: list[str], config_name: str | None = None) -> str:
    """Return a clause that names published models with ids of their own; empty if none is one."""
    ids = [name for name in names if "/" in name]
    if not ids:
        return ""
    from vitlib.checkpoint.published import describe_ids  # few checkpoints need it

    return describe_ids(ids, config_name)


def _narrow_pool(facts: Facts, models: list[Architecture], inferred: Mapping[str, Any]) -> Facts:
    """Return the facts without a pool that tells no published model from another.

    Without a head, any pool of normed tokens may be stated: "cls+mean" is no pool of timm's.
    """
    is_free = not inferred["num_classes"] and inferred["final_norm"] == "tokens"
    is_published = any(model.facts["pool"] == facts.pool for model in models)
    is_pool_of_tokens = facts.pool in ("cls", "mean", "cls+mean")
    return (
        replace(facts, pool=None) if is_free and is_pool_of_tokens and not is_published else facts
    )


def check_distilled_pool(inferred: Mapping[str, Any], facts: Facts) -> None:
    """Reject a distilled model without its heads, unless the caller states the pool.

    Args:
        inferred: Fields of ViTConfig that the tensors determine.
        facts: Facts that the caller states.

    Raises:
        CheckpointError: timm and the original code return the mean of two class tokens, which
            vitlib does not compute.
    """
    if inferred["dist_token"] and not inferred["dist_head"] and facts.pool is None:
        raise CheckpointError(
            "a distilled model without its heads gives the mean of the class token and the "
            "distillation token in timm and in the original code, which vitlib does not compute: "
            "state pool='cls' (--pool cls) for the class token only"
        )


@cache
def _family_words() -> list[tuple[str, str]]:
    """Return the words in models' names that give a family where the tensors do not."""
    words = [(family.timm_word, family.name) for family in list_families() if family.timm_word]
    return sorted(words, key=lambda pair: -len(pair[0]))  # "siglip" before "clip"


def _shared_words(names: list[str]) -> str:
    """Return the words for families that all of these names have."""
    words = [word for word, _ in _family_words() if all(word in name for name in names)]
    return " ".join(words) if names else ""


def _default_facts(inferred: Mapping[str, Any], profile: str) -> dict[str, Any]:
    """Return default facts for tensors that no published model has."""
    if not inferred["pos_embed"] and not inferred["relative_position"]:
        is_axial = inferred["qkv_bias"] and inferred["key_bias"] and not inferred["num_registers"]
        if is_axial or not (inferred["layer_scale"] and inferred["class_token"]):
            raise CheckpointError(
                "tensors without any positions: expected those of a published model of timm; state "
                "the model with architecture= (--architecture) or config=ViTConfig(...)"
            )
        family = _ROTARY
    else:
        family = infer_family(inferred)
    pool = "map" if inferred["attention_pool"] else "cls" if inferred["class_token"] else "mean"
    defaults = get_numerics(profile, family)
    return {
        "num_heads": inferred.get("num_heads") or default_num_heads(inferred["embed_dim"], family),
        "activation": "swiglu"
        if inferred.get("activation") == "swiglu"
        else defaults["activation"],
        "norm_eps": defaults["norm_eps"],
        "pool": "mean" if inferred["final_norm"] == "pooled" and pool == "cls" else pool,
        "rope": DINOV3_ROPE if family == _ROTARY else None,
        **{"post_norm": 0, "pool_heads": 0, "pool_prefix": 1},
    }


def infer_final_norm(name_match: NameMatch) -> dict[str, str]:
    """Return final_norm by the names of the file: norm, fc_norm or neither.

    Args:
        name_match: The names of the file for each of vitlib's names.

    Returns:
        The field of ViTConfig.
    """
    norm = name_match.matches.get("norm.weight")
    if norm is None:
        return {"final_norm": "none"}
    return {"final_norm": "pooled" if norm[0].file_name.endswith("fc_norm.weight") else "tokens"}


def infer_spelling(name_match: NameMatch) -> dict[str, str]:
    """Return which of timm's spellings of the names in a block a file has.

    Args:
        name_match: The names of the file for each of vitlib's names.

    Returns:
        The column `spelling` of the table.
    """
    ends = {
        "naflex": ("patch_embed.proj.weight", "embeds.proj.weight"),
        "factorized": ("patch_embed.pos_embed", "pos_embed_yx"),
        "gamma": ("blocks.0.ls1.gamma", "gamma_1"),
        "split": ("blocks.0.attn.q.weight", "q_proj.weight"),
        "q_bias": ("blocks.0.attn.q.bias", "q_bias"),
        "gate": ("blocks.0.mlp.fc1.weight", "fc1_g.weight"),
    }
    words = [
        word
        for word, (name, end) in ends.items()
        if name in name_match.matches and name_match.file_name(name).endswith(end)
    ]
    return {"spelling": " ".join(words)}


def build_columns(
    shapes: Mapping[str, Shape], name_match: NameMatch, image_size: tuple[int, int]
) -> dict[str, Any]:
    """Return the columns of the table that the tensors of a published model determine.

    Args:
        shapes: Shapes by vitlib's names.
        name_match: The names of the file for each of vitlib's names.
        image_size: Pixels (height, width) of the positions.

    Returns:
        Structure, spelling and sizes by column.
    """
    return build_signature(
        infer_config(shapes, image_size) | infer_final_norm(name_match), name_match
    )


def build_signature(inferred: Mapping[str, Any], name_match: NameMatch) -> dict[str, Any]:
    """Return what the tensors determine, by the columns of the table.

    Args:
        inferred: Fields of ViTConfig that the tensors determine.
        name_match: The names of the file for each of vitlib's names.

    Returns:
        Structure, spelling and sizes by column.
    """
    pooling = inferred["attention_pool"]
    columns = {
        "gated": inferred.get("activation") == "swiglu",
        "layer_scale": inferred["layer_scale"] is not None,
        "attention_pool": pooling is not None,
        "pool_mlp_dim": 0 if pooling is None else pooling.mlp_dim,
        "rope_freqs": "attn_position.freqs" in name_match.matches,
    }
    return {**inferred, **columns, **infer_spelling(name_match)}


def _check_tensors(
    model: Architecture, expected: Mapping[str, Any], signature: Mapping[str, Any], has_config: bool
) -> None:
    """Raise CheckpointError if the tensors are not those of the architecture."""
    clashes = [
        f"{field} {_convert_cell(value, signature[field])!r} "
        f"(the tensors have {signature[field]!r})"
        for field, value in expected.items()
        if field not in ("embed_dim", "mlp_dim")  # check_sizes compares these
        if (value or 0) != (signature[field] or 0)
        if not (field == "gated" and signature[field])  # the class of an MLP is not in any JSON
    ]
    if clashes and has_config:
        suggestion = _suggest_ids([row.name for row in match_tensors(signature)], model.name)
        raise CheckpointError(
            f"{model.name!r} with the model_args of its config has {', '.join(clashes)}: "
            + (
                suggestion
                or "the weights next to this config are another model's; copy the "
                "weights file to a folder without one, and load it there with its architecture= "
                "(--architecture)"
            )
        )
    if clashes:
        raise CheckpointError(
            f"architecture={model.name!r} has {', '.join(clashes)}: state another one, or leave it "
            "out"
        )


def _convert_cell(value: Any, other: Any) -> Any:
    """Return a cell of the table as a bool, if the value to compare is one."""
    return bool(value) if isinstance(other, bool) else value


def infer_family(inferred: Mapping[str, Any], name: str = "", rope: Rope | None = None) -> str:
    """Return the family of a model by its tensors and its name.

    Args:
        inferred: Fields of ViTConfig, or the columns of an architecture.
        name: Name of the model; empty if there is none.
        rope: The rotary embedding; None without one.

    Returns:
        The field `family` of ViTConfig.
    """
    word = next((family for word, family in _family_words() if word in name), None)
    if inferred["relative_position"]:
        return "beit"
    if word is not None and get_family(word).timm_only:
        return word
    if rope is not None:
        return _ROTARY
    if inferred["pre_norm"]:
        return "clip"
    if inferred["attention_pool"] or (word == "siglip" and not inferred["class_token"]):
        return "siglip"
    if inferred["layer_scale"] and inferred["class_token"]:
        if inferred["num_registers"]:
            return "dinov2_with_registers"
        return "deit3" if not inferred["pos_embed_cls"] and "dinov2" not in name else "dinov2"
    if inferred["dist_token"]:
        return "deit"
    if not inferred["class_token"]:
        return "vit" if inferred["num_registers"] else "ijepa"
    return "vit_mae" if word == "vit_mae" else "vit"
