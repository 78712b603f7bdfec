"""The plain ViTs that timm publishes: their tensors, what these do not say, and which are read.

timm_models.csv has one row an architecture, made by tests/fixtures/make_timm_models.py with timm
1.0.31. A row "old,=new" is a name of earlier versions; a name with a slash is a model that others
publish in timm's names. `reason` says why vitlib's trunk does not compute a model.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from vitlib.errors import CheckpointError

# What names and shapes of tensors say, but for sizes that timm adapts when it loads.
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
)
SIZES = ("patch_size", "depth", "image_size")
FACTS = ("num_heads", "activation", "norm_eps", "pool", "rope_theta")
COLUMNS = ("name", "reason", *STRUCTURE, "spelling", *SIZES, *FACTS)
_TABLE = Path(__file__).with_name("timm_models.csv")
# MoCo v3's ViT-S (2104.02057) has other heads than DeiT's and DINO's of the same shapes.
_MOCO = ("vit_small", 384, {"num_heads": 12})
_NEAR = 0.6  # of difflib: of less, a name is none of timm's misspelt


@dataclass(frozen=True)
class Architecture:
    """One architecture of timm.

    Attributes:
        name: timm's name of it.
        reason: Why vitlib's trunk does not compute it; empty where it does.
        structure: The columns that its tensors say; empty where vitlib has no names for them.
        facts: The columns that they do not say.
    """

    name: str
    reason: str
    structure: Mapping[str, Any]
    facts: dict[str, Any]


@cache
def _models() -> tuple[Mapping[str, Architecture], Mapping[str, str]]:
    """Return the architectures by name, and today's name of each old one."""
    models: dict[str, Architecture] = {}
    renamed: dict[str, str] = {}
    with _TABLE.open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    for name, reason, *cells in rows:
        if reason.startswith("="):
            renamed[name] = reason[1:]
            continue
        values = {column: _value(cell) for column, cell in zip(COLUMNS[2:], cells, strict=True)}
        facts = {column: values.pop(column) for column in FACTS}
        models[name] = Architecture(name, reason, values if values["embed_dim"] else {}, facts)
    return models, renamed


def format_row(values: Mapping[str, Any]) -> list[str]:
    """Return the cells of a row of the table: numbers and texts, 1 and 0 for a bool."""
    return [_cell(values.get(column)) for column in COLUMNS]


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))
    return "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)


def _value(cell: str) -> Any:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell or None


def normalize_name(name: str) -> str:
    """Return timm's name of today without the tag of its weights."""
    bare = name.partition(".")[0]
    return _models()[1].get(bare, bare)


def get_architecture(name: str) -> Architecture:
    """Return timm's architecture of a name, with or without the tag of its weights.

    Raises:
        CheckpointError: The table has no such name, or vitlib's trunk does not compute it.
    """
    bare = normalize_name(name)
    model = _models()[0].get(bare)
    if model is None:
        raise CheckpointError(
            f"timm's architecture {name!r} is none that vitlib knows{_nearest(bare)}: for a model "
            "of your own give config=ViTConfig(...)"
        )
    if model.reason:
        raise CheckpointError(
            f"timm's architecture {bare!r} is not read: {model.reason}{_nearest(bare)}"
        )
    return model


def list_candidates(
    structure: Mapping[str, Any], saved_as: str | None, spelling: bool = True
) -> list[Architecture]:
    """Return the architectures that a bare file can be, those that are read first.

    Args:
        structure: The columns that the tensors say.
        saved_as: The model's name in a training checkpoint. One of timm's decides where the tensors
            are that model's; any other is some code's own.
        spelling: As for alike().
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
    """Return which architectures that are read have the nearest names, as the end of a sentence."""
    read = [model.name for model in _models()[0].values() if not model.reason]
    near = difflib.get_close_matches(name, read, n=1, cutoff=_NEAR)
    return f"; the nearest that is read is {near[0]!r}" if near else ""


def match_tensors(structure: Mapping[str, Any], spelling: bool = True) -> list[Architecture]:
    """Return the architectures, read or not, whose tensors have these names and shapes.

    The depth tells models apart only where one of them has it; the size of the image and the
    number of classes never do, for fine-tuning changes them.

    Args:
        structure: The columns that the tensors say.
        spelling: The names within a block must be timm's own, too.
    """
    fields = [*STRUCTURE, "patch_size", *(["spelling"] if spelling else [])]
    wanted = [_cell(structure.get(field)) for field in fields]
    models = [
        model
        for model in _models()[0].values()
        if model.structure and [_cell(model.structure[field]) for field in fields] == wanted
    ]
    deep = [model for model in models if model.structure["depth"] == structure["depth"]]
    return deep or models
