"""What the shapes of the tensors, by our names, say of the model: all but its numerics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vitlib.checkpoint.layouts.table import ranges
from vitlib.config import to_pair
from vitlib.errors import CheckpointError

Shape = tuple[int, ...]

# How a user gives the size that a file does not hold; a test follows both.
SIZE_REMEDY = (
    "give config=ViTConfig(...), or write a vitlib.json beside the file: "
    '{"image_size": [height, width]}, in pixels'
)


def auxiliary_fields(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields that say which tensors there are that not every forward reads, and files keep."""
    return {
        "mask_token": "patch_embed.mask_token" in shapes,
        "pooler_dim": (shapes.get("pooler.weight") or (0,))[0],
        "attention_pool": any(name.startswith("attn_pool.") for name in shapes),
        "projection_dim": (shapes.get("projection.weight") or (0,))[0],
    }


def sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The plain numbers; `depth` is a text where blocks are missing between others."""
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    held: dict[str, Any] = {
        "depth": len(blocks) if blocks == set(range(len(blocks))) else f"blocks {ranges(blocks)}",
        "num_registers": 0,
    }
    match shapes.get("patch_embed.proj.weight"):
        case (embed_dim, in_channels, p, q):
            held |= {"embed_dim": embed_dim, "in_channels": in_channels, "patch_size": (p, q)}
    match shapes.get("blocks.0.mlp.fc2.weight"):
        case (_, mlp_dim):
            held["mlp_dim"] = mlp_dim
    match shapes.get("patch_embed.reg_token"):
        case (_, registers, _):
            held["num_registers"] = registers
    return held


def mismatches(
    values: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> list[tuple[str, Any, Any]]:
    """(field, what the config says, what the tensors hold) wherever the two differ.

    It comes before anything is built, so a config can make vitlib build no more than its file
    holds.
    """
    said = {"num_registers": 0, "dist_token": False, "class_token": True, **values}
    said["patch_size"] = to_pair("patch_size", said["patch_size"])
    h, w = to_pair("image_size", said["image_size"])
    held = sizes(shapes)
    clashes = [(name, said[name], value) for name, value in held.items() if said[name] != value]
    match shapes.get("patch_embed.pos_embed"):
        case (_, rows, _) if held.get("patch_size") == said["patch_size"]:
            p, q = held["patch_size"]
            needed = (h // p) * (w // q) + said["class_token"] + said["dist_token"]
            if needed != rows:
                clashes.append(("image_size", f"{h}x{w}, {needed} positions", f"{rows} positions"))
    return clashes


def infer_config(
    shapes: Mapping[str, Shape], image_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Every field that follows from names and shapes, for files that no config describes.

    image_size: pixels, where something says it; else the grid is taken to be square. Raises
    CheckpointError where the tensors are no ViT.
    """
    held = sizes(shapes)
    absent = [
        name
        for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc2.weight")
        if len(shapes.get(name, ())) != (4 if "proj" in name else 2)
    ]
    if absent or not isinstance(held["depth"], int):
        what = ", ".join(absent) if absent else f"only {held['depth']}"
        raise CheckpointError(f"these tensors are no whole ViT: of ours, missing or odd: {what}")

    def any_ends(end: str) -> bool:
        return any(name.endswith(end) for name in shapes if name.startswith("blocks."))

    tables = [shape for name, shape in shapes.items() if name.startswith("attn_position.tables.")]
    held |= auxiliary_fields(shapes) | {
        "patch_bias": "patch_embed.proj.bias" in shapes,
        "qkv_bias": any_ends("attn.q.bias"),
        "key_bias": any_ends("attn.k.bias") or not any_ends("attn.q.bias"),
        "pre_norm": "norm_pre.weight" in shapes,
        "layer_scale": 1.0 if any_ends("ls1.gamma") else None,
        "class_token": "patch_embed.cls_token" in shapes,
        "dist_token": "patch_embed.dist_token" in shapes,
        "pos_embed": "patch_embed.pos_embed" in shapes,
        "relative_position": {0: None, 1: "shared"}.get(len(tables), "block")
        if held["depth"] > 1
        else ("block" if tables else None),
        "num_classes": (shapes.get("head.weight") or (0,))[0],
        "dist_head": "head_dist.weight" in shapes,
    }
    gate = shapes.get("blocks.0.mlp.fc1.weight", (0,))[0]
    if gate == 2 * held["mlp_dim"]:
        held["activation"] = "swiglu"
    if tables and len(tables[0]) == 2:
        held["num_heads"] = tables[0][1]
    return held | _grid(held, shapes, tables, image_size)


def _grid(
    held: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    tables: list[Shape],
    image_size: tuple[int, int] | None,
) -> dict[str, Any]:
    """image_size and pos_embed_cls, from how many positions there are."""
    p, q = held["patch_size"]
    first = held["class_token"] + held["dist_token"]
    grid = None if image_size is None else (image_size[0] // p, image_size[1] // q)
    table = shapes.get("patch_embed.pos_embed") or (1, 0, 0)
    if len(table) != 3:
        shape = "x".join(map(str, table))
        raise CheckpointError(
            f"positions are {shape}: expected 1 x tokens x {held['embed_dim']}, as files hold them"
        )
    rows = table[1]
    if tables:
        h, w = _grid_of_offsets(tables[0][0] - 3, grid)
        return {"image_size": image_size or (h * p, w * q), "pos_embed_cls": True}
    if not rows:  # nothing is learned of a grid
        return {"image_size": image_size or (14 * p, 14 * q), "pos_embed_cls": True}
    if grid is not None and rows in (grid[0] * grid[1], grid[0] * grid[1] + first):
        pos_embed_cls = rows != grid[0] * grid[1] or not first
        return {"image_size": image_size, "pos_embed_cls": pos_embed_cls}
    # Otherwise the file has another grid than its config says, or no config says one.
    for count, pos_embed_cls in ((rows - first, True), (rows, not first)):
        side = square_side(count)
        if side:
            return {"image_size": (side * p, side * q), "pos_embed_cls": pos_embed_cls}
    raise CheckpointError(f"{rows} positions are no square grid of patches: {SIZE_REMEDY}")


def _grid_of_offsets(count: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """The grid (h, w) whose patches are (2h - 1)(2w - 1) offsets apart, square where none is given.

    Raises CheckpointError where the offsets are another grid's.
    """
    if grid is not None and (2 * grid[0] - 1) * (2 * grid[1] - 1) == count:
        return grid
    side = square_side(count)
    if grid is not None or side % 2 == 0:
        expected = "of no square grid" if grid is None else f"not those of {grid[0]}x{grid[1]}"
        raise CheckpointError(f"{count} offsets between patches are {expected}: {SIZE_REMEDY}")
    return (side + 1) // 2, (side + 1) // 2


def square_side(count: int) -> int:
    """The side of a square grid of so many patches; 0 where they are no square."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def compact_size(size: tuple[int, int]) -> int | list[int]:
    """Return a square as one number, as timm's and open_clip's own configs have it."""
    return size[0] if size[0] == size[1] else list(size)
