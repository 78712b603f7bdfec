"""The image towers of open_clip's own configs: what a file's tensors leave open, by name.

openclip_models.csv has a row for each config of open_clip_torch 3.3.0 whose tower is no residual
network, made by tests/fixtures/make_openclip_models.py. A row has either `timm_model_name`, with
what open_clip does with that model's output, or the shapes and facts of open_clip's own tower.
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
ATTENTIONAL = "attentional"  # CoCa's pool, which has tensors of its own
_TABLE = Path(__file__).with_suffix(".csv")
SHAPES = ("embed_dim", "patch_size", "mlp_dim", "pre_norm", "layer_scale")
_FACTS = ("num_heads", "activation", "pool", "final_norm")


@cache
def load_rows() -> Mapping[str, Row]:
    """Return every row of the table by the config's name."""
    with _TABLE.open(encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def get_row(name: str) -> Row:
    """Return the row of a config.

    Raises:
        CheckpointError: open_clip has no such config with a tower that vitlib could read.
    """
    if name in load_rows():
        return load_rows()[name]
    near = difflib.get_close_matches(name, load_rows(), n=3, cutoff=0.4)
    raise CheckpointError(
        f"architecture={name!r}: no config of open_clip 3.3 with a ViT tower has this name"
        + (f"; the nearest are {', '.join(near)}" if near else "")
    )


def find_configs(held: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the facts of each config whose own tower has a file's widths, by the config's name.

    Args:
        held: What the tensors say, as fields of ViTConfig. Depth, image size and projection are
            not compared: they change no fact, and a model trained further may have others.
    """
    shapes = format_shapes(held)
    same = {name: row for name, row in load_rows().items() if get_row_shapes(row) == shapes}
    names = sorted(same, key=lambda name: (not name.startswith("ViT"), len(name)))
    return {name: parse_facts(same[name]) for name in names if same[name]["pool"] != ATTENTIONAL}


def parse_facts(row: Row) -> dict[str, Any]:
    """Return what the tensors of an own tower leave open, as fields of ViTConfig."""
    facts: dict[str, Any] = {name: row[name] for name in _FACTS}
    return facts | {"num_heads": int(row["num_heads"])}


def format_shapes(held: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the widths of a tower as the table spells them."""
    patch = held["patch_size"]
    own = dict(held) | {
        "patch_size": patch[0] if len(set(patch)) == 1 else patch,
        "pre_norm": int(held["pre_norm"]),
        "layer_scale": int(held["layer_scale"] is not None),
    }
    return tuple(str(own[name]) for name in SHAPES)


def get_row_shapes(row: Row) -> tuple[str, ...]:
    """Return the widths of a row of an own tower."""
    return tuple(row[name] for name in SHAPES)
