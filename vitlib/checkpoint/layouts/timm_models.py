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
from typing import Any

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
)
SIZES = ("patch_size", "depth", "image_size")
FACTS = ("num_heads", "activation", "norm_eps", "pool", "rope_theta")
COLUMNS = ("name", "reason", *STRUCTURE, "spelling", *SIZES, *FACTS)
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
    """

    name: str
    reason: str
    structure: Mapping[str, Any]
    facts: dict[str, Any]


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
        facts = {column: values.pop(column) for column in FACTS}
        models[name] = Architecture(name, reason, values if values["embed_dim"] else {}, facts)
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
    if isinstance(value, tuple):
        return str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))
    return "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)


def _value(cell: str) -> Any:
    """Return a cell as a number or a text; None for an empty one."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell or None


def normalize_name(name: str) -> str:
    """Return timm's current name of an architecture, without the tag of its weights.

    Args:
        name: A current or older name, with or without a tag.

    Returns:
        The current name; other names without their tag.
    """
    bare = name.partition(".")[0]
    return _models()[1].get(bare, bare)


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
        spelling: The names within a block must be timm's, too.

    Returns:
        The architectures.
    """
    fields = [*STRUCTURE, "patch_size", *(["spelling"] if spelling else [])]
    expected = [_cell(structure.get(field)) for field in fields]
    models = [
        model
        for model in _models()[0].values()
        if model.structure and [_cell(model.structure[field]) for field in fields] == expected
    ]
    same_depth = [model for model in models if model.structure["depth"] == structure["depth"]]
    return same_depth or models
