"""The image towers of open_clip's configs, with the facts that their tensors do not determine.

openclip_models.csv has a row for each config of open_clip_torch 3.3.0 whose tower is no residual
network, made by tests/fixtures/make_openclip_models.py. A row has either `timm_model_name`, with
what open_clip computes from that model's output, or the shapes and facts of open_clip's own tower.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from vitlib.errors import CheckpointError

Row = Mapping[str, str]
ATTENTIONAL = "attentional"  # the pool of CoCa, which vitlib does not compute
_TABLE = Path(__file__).with_suffix(".csv")
SHAPES = ("embed_dim", "patch_size", "mlp_dim", "pre_norm", "layer_scale")
_FACTS = ("num_heads", "activation", "pool", "final_norm")


@cache
def load_rows() -> Mapping[str, Row]:
    """Load the table.

    Returns:
        Every row by the config's name.
    """
    with _TABLE.open(encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def get_row(name: str) -> Row:
    """Return the row of a config.

    Args:
        name: Name of the config, such as "ViT-B-32-quickgelu".

    Returns:
        The row.

    Raises:
        CheckpointError: The table has no such config.
    """
    if name in load_rows():
        return load_rows()[name]
    nearest = difflib.get_close_matches(name, load_rows(), n=3, cutoff=0.4)
    raise CheckpointError(
        f"architecture={name!r}: no config of open_clip 3.3 with a ViT tower has this name"
        + (f"; the nearest are {', '.join(nearest)}" if nearest else "")
    )


def find_configs(inferred: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the facts of each config whose own tower has the widths of a file.

    Args:
        inferred: Fields of ViTConfig that the tensors determine. Depth, image size and projection
            are not compared: they change no fact, and a fine-tuned model may have others.

    Returns:
        Name of the config -> its facts, as fields of ViTConfig.
    """
    shapes = format_shapes(inferred)
    matching = {name: row for name, row in load_rows().items() if get_row_shapes(row) == shapes}
    names = sorted(matching, key=lambda name: (not name.startswith("ViT"), len(name)))
    return {
        name: parse_facts(matching[name]) for name in names if matching[name]["pool"] != ATTENTIONAL
    }


def parse_facts(row: Row) -> dict[str, Any]:
    """Return the facts of an own tower that no tensor determines.

    Args:
        row: A row of the table.

    Returns:
        Fields of ViTConfig.
    """
    facts: dict[str, Any] = {name: row[name] for name in _FACTS}
    return facts | {"num_heads": int(row["num_heads"])}


def parse_tower(row: Row) -> dict[str, Any]:
    """Return the fields of an own tower, apart from the numerics that all own towers share.

    Args:
        row: A row of the table.

    Returns:
        Fields of ViTConfig.
    """
    sizes = ("embed_dim", "patch_size", "mlp_dim", "depth", "image_size")
    return parse_facts(row) | {
        **{name: int(row[name]) for name in sizes},
        "pre_norm": row["pre_norm"] == "1",
        "layer_scale": 1.0 if row["layer_scale"] == "1" else None,
        "projection_dim": int(row["output_dim"]),
        "patch_bias": False,
    }


def explain_refusal(row: Row) -> str:
    """Explain why vitlib does not compute what open_clip adds to a tower.

    Args:
        row: A row of the table.

    Returns:
        The reason; empty if vitlib computes it.
    """
    if row["pool"] == ATTENTIONAL:
        return "CoCa's attentional pool"
    if row["timm_proj"] == "mlp":
        return "a projection of two layers"
    return ""


def format_shapes(inferred: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the widths of a tower in the spelling of the table.

    Args:
        inferred: Fields of ViTConfig that the tensors determine.

    Returns:
        A text for each name in SHAPES.
    """
    patch = inferred["patch_size"]
    values = dict(inferred) | {
        "patch_size": patch[0] if len(set(patch)) == 1 else patch,
        "pre_norm": int(inferred["pre_norm"]),
        "layer_scale": int(inferred["layer_scale"] is not None),
    }
    return tuple(str(values[name]) for name in SHAPES)


def get_row_shapes(row: Row) -> tuple[str, ...]:
    """Return the widths of an own tower.

    Args:
        row: A row of the table.

    Returns:
        A text for each name in SHAPES.
    """
    return tuple(row[name] for name in SHAPES)
