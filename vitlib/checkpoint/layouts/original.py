"""Files of original code whose names are its own: `Family.original` describes each.

Such a file has no config. Facts that neither its tensors nor its code say, as the number of heads,
are those of the published models with these tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor

from vitlib.checkpoint.families import default_num_heads, get_family, list_families, with_profile
from vitlib.checkpoint.families.family import Family, OriginalCode
from vitlib.checkpoint.layouts import timm_models, timm_names
from vitlib.checkpoint.layouts.equivalences import check_supported, join_rotary_pairs
from vitlib.checkpoint.layouts.facts import Facts, resolve_facts
from vitlib.checkpoint.layouts.infer import Shape, infer_config
from vitlib.checkpoint.layouts.layout import (
    Json,
    ParsedConfig,
    Serialized,
    read_sidecar,
    sidecar_size,
)
from vitlib.checkpoint.layouts.table import NameMatch, index_names, match_names, write_state
from vitlib.checkpoint.layouts.timm_config import build_signature, infer_final_norm
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError, ConfigError

# What a stated architecture need not share with a file: sizes, and the norm of a head.
_FREE = ("embed_dim", "mlp_dim", "pool_mlp_dim", "final_norm")
_FINAL_NORMS = ("tokens", "pooled", "none")
# Values of fields in which few families differ; `OriginalCode.allowed` has the others.
_USUAL: Mapping[str, tuple[Any, ...]] = {
    "pre_norm": (False,),
    "patch_bias": (True,),
    "attention_pool": (None,),
    "pooler_dim": (0,),
    "projection_dim": (0,),
    "dist_token": (False,),
    "num_registers": (0,),
    "relative_position": (None,),
    "qkv_bias": (True,),
    "key_bias": (True,),
}


def find_code(names: Iterable[str]) -> tuple[Family, OriginalCode] | None:
    """Return the family whose code has names of its own that are in a file.

    Args:
        names: Names of the file's tensors.

    Returns:
        The family, and its code; None if the names are those that most code shares.
    """
    bare = {_cut_prefix(name) for name in names}
    for family in list_families():
        if family.original is not None and family.original.is_own(bare):
            return family, family.original
    return None


def choose_code(
    json: Json, names: Iterable[str], facts: Facts
) -> tuple[Family, OriginalCode] | None:
    """Return the family by the names in a file, by vitlib.json, or by the stated architecture.

    Args:
        json: The checkpoint's JSON files by name.
        names: Names of the file's tensors.
        facts: What the caller states.

    Returns:
        The family, and its code; None if neither says one.
    """
    code = find_code(names)
    name, architecture = read_sidecar(json).get("family"), facts.architecture or ""
    for family in list_families() if code is None else ():
        is_stated = family.timm_word and family.timm_word in timm_models.normalize_name(
            architecture
        )
        if family.original is not None and (is_stated or family.name == name):
            return family, family.original
    return code


def _cut_prefix(name: str) -> str:
    """Return a name without a prefix that match_names() would skip."""
    prefix = next((p for p in timm_names.PREFIXES if name.startswith(p)), "")
    return name.removeprefix(prefix)


@cache
def _index(family: str) -> Any:
    """Return the index of the tables by which files of a family's code are read."""
    code = get_family(family).original
    assert code is not None
    return index_names(code.spellings)


def find(names: list[str], family: Family, code: OriginalCode) -> NameMatch:
    """Match names of one family's code.

    Args:
        names: Names of the file's tensors.
        family: The family.
        code: Its code.

    Returns:
        The matches.
    """
    other = code.other_modality
    ignored = (*code.ignored, *(name for name in names if other and other in name))
    return match_names(names, _index(family.name), prefixes=timm_names.PREFIXES, ignored=ignored)


def read(
    json: Json,
    shapes: Mapping[str, Shape],
    name_match: NameMatch,
    facts: Facts,
    family: Family,
    code: OriginalCode,
) -> ParsedConfig:
    """Read a model by its tensors, its code and the published models with these tensors.

    Args:
        json: The checkpoint's JSON files by name.
        shapes: Shapes by vitlib's names.
        name_match: The matched names.
        facts: What the caller states.
        family: The family.
        code: Its code.

    Returns:
        The model, with what is assumed.

    Raises:
        CheckpointError: A stated fact has no such published model, or the tensors are no whole ViT.
    """
    inferred = infer_config(shapes, sidecar_size(json)) | infer_final_norm(name_match)
    sidecar = read_sidecar(json)
    published = _find_published(inferred, name_match, facts, family)
    if sidecar.get("family") == family.name:
        published["is_stated"] = True
    fields = dict(code.read(inferred, name_match.shapes, published))
    is_open = fields.pop("open_pool", False)
    known = {"num_heads": published.get("num_heads")} if published.get("num_heads") else {}
    silent = "num_heads" not in fields.keys() | inferred.keys() | sidecar.keys()
    values = {
        "num_heads": facts.num_heads or default_num_heads(inferred["embed_dim"], family.name),
        **{"post_norm": 0, "pool_heads": 0, "pool_prefix": 0},
        "activation": "gelu",
        **known,
        **inferred,
        # Code that has no final norm says so; of other code it is reported as missing.
        "final_norm": "tokens" if inferred["final_norm"] == "none" else inferred["final_norm"],
        **fields,
    }
    cfg = ViTConfig(family=family.name, **timm_models.to_fields(values, {}))
    assumed = ("norm_eps", "position_resize", *["num_heads"] * silent, *["pool"] * is_open)
    doubtful = ["num_heads"] * (silent and not known) + ["pool"] * is_open
    return ParsedConfig(with_profile(cfg, "original"), assumed, tuple(doubtful))


def _find_published(
    inferred: Mapping[str, Any], name_match: NameMatch, facts: Facts, family: Family
) -> dict[str, Any]:
    """Return the facts of the published models with these tensors; empty if there are none.

    A stated architecture may have other sizes than the file. The number of heads is then open.
    """
    signature = build_signature(inferred, name_match)
    models = [
        model
        for final_norm in _FINAL_NORMS  # the same model is published with a head and without
        for model in timm_models.match_tensors({**signature, "final_norm": final_norm}, False)
        if family.timm_word and family.timm_word in model.name and not model.reason
    ]
    if facts.architecture is not None:
        stated = timm_models.get_architecture(facts.architecture)
        if stated not in models:
            clashes = timm_models.list_clashes(stated, signature, _FREE)
            if clashes:
                raise CheckpointError(
                    f"architecture={stated.name!r} has {', '.join(clashes)}: state another one, or "
                    "leave it out"
                )
            stated = replace(stated, facts=stated.facts | {"num_heads": 0})
        models = [stated]
    # The code says how it rotates; in timm that depends on the image size, too.
    rows = {
        model.name: {
            "num_heads": model.facts["num_heads"],
            "is_rotary": model.facts["rope"] is not None,
            "is_stated": facts.architecture is not None,
        }
        for model in models
    }
    is_sized = any(row["num_heads"] for row in rows.values())
    return resolve_facts(rows, Facts(num_heads=facts.num_heads if is_sized else None))


def absorb(cfg: ViTConfig, state: dict[str, Tensor], _: Json) -> dict[str, Tensor]:
    """Rewrite tensors of a code that rotates neighbouring channels, so that halves turn.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names; changed in place.

    Returns:
        The same dict.
    """
    code = get_family(cfg.family).original
    if code is not None and code.turns_pairs and cfg.rope is not None:
        join_rotary_pairs(cfg, state)
    return state


def write(cfg: ViTConfig, state: dict[str, Tensor], code: OriginalCode) -> Serialized:
    """Write a file with the names of one family's code.

    Args:
        cfg: The model's config.
        state: Its tensors by vitlib's names.
        code: The family's code.

    Returns:
        The file.

    Raises:
        ConfigError: The code does not compute such a model.
    """
    check_supported(cfg, {**_USUAL, **code.allowed(cfg)}, "the original code")
    if len(set(cfg.grid_size)) > 1 or len(set(cfg.patch_size)) > 1:
        raise ConfigError(
            f"image_size={cfg.image_size}, patch_size={cfg.patch_size}: expected squares, which "
            "alone the original code computes; choose another layout"
        )
    state = dict(state)
    if cfg.final_norm == "none":
        state = {name: t for name, t in state.items() if not name.startswith("norm.")}
    if code.turns_pairs and cfg.rope is not None:
        join_rotary_pairs(cfg, state, inverse=True)
    tensors = write_state(state, code.names(cfg), cfg) | code.computed(cfg)
    wrapper = get_family(cfg.family).original_wrapper
    return Serialized(tensors, weights="model.pth", wrapper=wrapper)
