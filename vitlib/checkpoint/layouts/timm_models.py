"""The plain ViTs that timm publishes: their tensors, the facts these do not determine, reasons.

timm_models.csv has one row per architecture, made by tests/fixtures/make_timm_models.py with timm
1.0.31. A row "old,=new" is a name of earlier versions; a name with a slash is a model that others
publish in timm's names. `reason` says why vitlib does not compute a model.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from vitlib.config import ViTConfig
from vitlib.config_parts import Norms, PositionResize, Rope
from vitlib.errors import CheckpointError

# Columns that names and shapes of tensors determine, without the sizes that timm adapts at load.
STRUCTURE = (
    "embed_dim",
    "mlp_dim",
    "class_token",
    "dist_token",
    "num_registers",
    "pos_embed_cls",
    "pos_embed",
    "relative_position",
    "patch_bias",
    "qkv_bias",
    "key_bias",
    "pre_norm",
    "layer_scale",
    "attention_pool",
    "gated",
    "final_norm",
    "norms",
    "proj_bias",
    "pool_mlp_dim",
    "rope_freqs",
)
SIZES = ("patch_size", "depth", "image_size")
FACTS = (
    "num_heads",
    "activation",
    "norm_eps",
    "pool",
    "rope",
    "post_norm",
    "pool_heads",
    "pool_prefix",
)
COLUMNS = (
    *("name", "reason", *STRUCTURE, "spelling", *SIZES, *FACTS),
    *("position_resize", "preprocessing"),
)
Part = TypeVar("Part", Norms, Rope)
_TABLE = Path(__file__).with_name("timm_models.csv")
# MoCo v3's ViT-S (2104.02057) has other heads than DeiT's and DINO's of the same shapes.
_MOCO = ("vit_small", 384, {"num_heads": 12})
_MIN_SIMILARITY = 0.6  # of difflib: a less similar name is no misspelling


@dataclass(frozen=True)
class Architecture:
    """One architecture of timm.

    Attributes:
        name: timm's name.
        reason: Why vitlib does not compute it; empty if it does.
        structure: The columns that its tensors determine; empty if vitlib has no names for them.
        facts: The columns that no tensor determines.
        position_resize: Rule of a NaFlexVit, as in ViTConfig; None for others, which have the usual
            rule of timm.
        preprocessing: Of timm's default weights: stats, crop_pct, crop_mode and interpolation, and
            a star where weights of other tags differ; empty for models that timm does not publish.
    """

    name: str
    reason: str
    structure: Mapping[str, Any]
    facts: dict[str, Any]
    position_resize: PositionResize | None = None
    preprocessing: str = ""


@cache
def _models() -> tuple[Mapping[str, Architecture], Mapping[str, str]]:
    """Load the table: architectures by name, and the current name of each old one."""
    models: dict[str, Architecture] = {}
    renamed: dict[str, str] = {}
    with _TABLE.open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    for name, reason, *cells in rows:
        if reason.startswith("="):
            renamed[name] = reason[1:]
            continue
        values = {column: _value(cell) for column, cell in zip(COLUMNS[2:], cells, strict=True)}
        rule, preprocessing = values.pop("position_resize"), values.pop("preprocessing") or ""
        facts = {column: values.pop(column) for column in FACTS}
        facts["rope"] = _parse_part(Rope, facts["rope"]) if facts["rope"] else None
        values["norms"] = _parse_part(Norms, values["norms"] or "")
        structure = values if values["embed_dim"] else {}
        models[name] = Architecture(name, reason, structure, facts, rule, preprocessing)
    return models, renamed


def format_row(values: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row of the table.

    Args:
        values: Values by column; None and missing columns are empty cells.

    Returns:
        Texts in the order of COLUMNS; a bool is 1 or 0.
    """
    return [_cell(values.get(column)) for column in COLUMNS]


def _cell(value: Any) -> str:
    """Return a value as the text of a cell."""
    if isinstance(value, Norms | Rope):
        return _format_part(value)
    if isinstance(value, tuple):
        return str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))
    return "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)


def _value(cell: str) -> Any:
    """Return a cell as a number, a pair of sides or a text; None for an empty one."""
    sides = cell.split("x")
    if len(sides) == 2 and all(side.isdecimal() for side in sides):
        return int(sides[0]), int(sides[1])
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell or None


def _format_part(part: Norms | Rope) -> str:
    """Return a group of fields as a text, without those that have their defaults."""
    usual = type(part)()
    values = {name: getattr(part, name) for name in type(part).__dataclass_fields__}
    changed = {name: value for name, value in values.items() if value != getattr(usual, name)}
    # A rotary embedding by defaults is not the same as none.
    shown = {"theta": values["theta"]} | changed if isinstance(part, Rope) else changed
    return " ".join(f"{name}={_cell(value)}" for name, value in shown.items())


def _parse_part(kind: type[Part], cell: str) -> Part:
    """Return the group of fields that a cell describes."""
    fields: dict[str, Any] = {}
    for word in cell.split():
        name, _, text = word.partition("=")
        value = _value(text)
        is_bool = isinstance(getattr(kind(), name), bool)
        fields[name] = bool(value) if is_bool else value
    return kind(**fields)


def describe_structure(cfg: ViTConfig) -> dict[str, Any]:
    """Return the columns of the table that a model has, as if read from its tensors.

    Args:
        cfg: The model's config.

    Returns:
        Structure and sizes by column, without `spelling`.
    """
    special = ("gated", "layer_scale", "attention_pool", "norms", "pool_mlp_dim", "rope_freqs")
    columns = {name: getattr(cfg, name) for name in (*STRUCTURE, *SIZES) if name not in special}
    pooling = cfg.attention_pool
    return columns | {
        "layer_scale": cfg.layer_scale is not None,
        "gated": cfg.activation == "swiglu",
        "attention_pool": pooling is not None,
        "norms": replace(cfg.norms, post=False),
        "pool_mlp_dim": 0 if pooling is None else pooling.mlp_dim,
        "rope_freqs": cfg.rope is not None and cfg.rope.learned,
    }


def describe_facts(cfg: ViTConfig) -> dict[str, Any]:
    """Return the facts of the table that a model has.

    Args:
        cfg: The model's config.

    Returns:
        Facts by column.
    """
    pooling = cfg.attention_pool
    return {
        "num_heads": cfg.num_heads,
        "activation": cfg.activation,
        "norm_eps": cfg.norm_eps,
        "pool": cfg.pool,
        "rope": cfg.rope,
        "post_norm": int(cfg.norms.post),
        "pool_heads": 0 if pooling is None else pooling.num_heads,
        "pool_prefix": int(pooling is not None and pooling.prefix_tokens),
    }


def to_fields(inferred: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of ViTConfig: those of the tensors, and facts of the table.

    Args:
        inferred: Fields of ViTConfig that the tensors determine.
        facts: Facts by column, and further fields of ViTConfig.

    Returns:
        The fields; a fact takes precedence.
    """
    fields = {**inferred, **facts}
    post, heads, prefix = (fields.pop(name) for name in ("post_norm", "pool_heads", "pool_prefix"))
    fields["norms"] = replace(inferred["norms"], post=bool(post))
    heads = 0 if heads == fields["num_heads"] else heads
    if inferred["attention_pool"] is not None:
        fields["attention_pool"] = replace(
            inferred["attention_pool"], num_heads=heads, prefix_tokens=bool(prefix)
        )
    return fields


def normalize_name(name: str) -> str:
    """Return timm's current name of an architecture, without the tag of its weights.

    Args:
        name: A current or older name, with or without a tag.

    Returns:
        The current name; other names without their tag.
    """
    bare = name.partition(".")[0]
    return _models()[1].get(bare, bare)


def find_architecture(name: str) -> Architecture | None:
    """Return an architecture of timm, computed by vitlib or not; None for any other name.

    Args:
        name: A current or older name, with or without a tag, or any other.
    """
    return _models()[0].get(normalize_name(name))


def is_naflex_name(name: str) -> bool:
    """Return True if an architecture is a NaFlexVit.

    Args:
        name: A current or older name of timm, with or without a tag, or any other.
    """
    model = find_architecture(name)
    return model is not None and model.position_resize is not None


def list_architectures() -> tuple[Architecture, ...]:
    """Return every architecture of timm, also those that vitlib does not compute."""
    return tuple(_models()[0].values())


def list_old_names() -> Mapping[str, str]:
    """Return the names of earlier versions of timm, each with its current name."""
    return _models()[1]


def get_architecture(name: str) -> Architecture:
    """Return an architecture of timm by its name.

    Args:
        name: A current or older name, with or without the tag of weights.

    Returns:
        The row of the table.

    Raises:
        CheckpointError: The table has no such name, or vitlib does not compute the model.
    """
    bare = normalize_name(name)
    model = _models()[0].get(bare)
    if model is None:
        raise CheckpointError(
            f"timm's architecture {name!r} is not in vitlib's table{_nearest(bare)}: for a model "
            "of your own give config=ViTConfig(...)"
        )
    if model.reason:
        raise CheckpointError(
            f"timm's architecture {bare!r} is not read: {model.reason}{_nearest(bare)}"
        )
    return model


def list_supported() -> list[Architecture]:
    """List the architectures of timm that vitlib computes."""
    models = _models()[0].values()
    return [model for model in models if not model.reason and "/" not in model.name]


def list_candidates(
    structure: Mapping[str, Any], saved_as: str | None, spelling: bool = True
) -> list[Architecture]:
    """List the architectures that a bare file may be, those that vitlib computes first.

    Args:
        structure: The columns that the tensors determine.
        saved_as: The model's name in a training checkpoint. A name of timm decides if the tensors
            match it; any other name belongs to the training code. None: no name.
        spelling: The names within a block must be timm's, as in match_tensors().

    Returns:
        The architectures.
    """
    models = sorted(match_tensors(structure, spelling), key=lambda model: model.reason)
    name = normalize_name(saved_as) if saved_as else ""
    models = [model for model in models if model.name == name] or models
    if saved_as == _MOCO[0] and structure["embed_dim"] == _MOCO[1]:
        models += [
            replace(
                model, name=f"facebookresearch/moco-v3 {saved_as}", facts=model.facts | _MOCO[2]
            )
            for model in models[:1]
        ]
    return models


def _nearest(name: str) -> str:
    """Return the supported architecture with the most similar name, as the end of a sentence."""
    supported = [model.name for model in _models()[0].values() if not model.reason]
    nearest = difflib.get_close_matches(name, supported, n=1, cutoff=_MIN_SIMILARITY)
    return f"; the nearest that is read is {nearest[0]!r}" if nearest else ""


def match_tensors(structure: Mapping[str, Any], spelling: bool = True) -> list[Architecture]:
    """List the architectures, computed or not, whose tensors have these names and shapes.

    The depth decides only if one of the models has it. The image size and the number of classes
    are not compared, because fine-tuning changes them.

    Args:
        structure: The columns that the tensors determine.
        spelling: The names within a block must be timm's, too. Without it no NaFlexVit is listed.

    Returns:
        The architectures.
    """
    fields = [*STRUCTURE, "patch_size", *(["spelling"] if spelling else [])]
    expected = [_cell(structure.get(field)) for field in fields]
    models = [
        model
        for model in _models()[0].values()
        if model.structure and (spelling or model.position_resize is None)
        if [_cell(model.structure[field]) for field in fields] == expected
    ]
    same_depth = [model for model in models if model.structure["depth"] == structure["depth"]]
    return same_depth or models


def list_clashes(
    model: Architecture, structure: Mapping[str, Any], free: tuple[str, ...]
) -> list[str]:
    """List the columns in which tensors differ from those of an architecture.

    Args:
        model: The architecture.
        structure: The columns that the tensors determine.
        free: Columns that may differ.

    Returns:
        A clause for each.
    """
    pairs = {
        name: tuple(_cell(columns.get(name)) or "0" for columns in (model.structure, structure))
        for name in STRUCTURE
        if name not in free
    }
    return [f"{name} {a} (the tensors have {b})" for name, (a, b) in pairs.items() if a != b]
