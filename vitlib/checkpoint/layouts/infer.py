"""Infer a model's structure from the shapes of its tensors: all fields but its numerics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vitlib.checkpoint.layouts.table import ranges
from vitlib.config_parts import Norms, Pooling
from vitlib.errors import CheckpointError, to_pair

Shape = tuple[int, ...]

# The ways to give a size that a file does not hold; a test tries both.
SIZE_REMEDY = (
    "give config=ViTConfig(...), or write a vitlib.json beside the file: "
    '{"image_size": [height, width]}, in pixels'
)


def auxiliary_fields(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the fields for tensors that files keep and that not every forward reads.

    Args:
        shapes: By vitlib's names.

    Returns:
        mask_token, pooler_dim, attention_pool and projection_dim.
    """
    return {
        "mask_token": "patch_embed.mask_token" in shapes,
        "pooler_dim": (shapes.get("pooler.weight") or (0,))[0],
        "attention_pool": infer_pooling(shapes),
        "projection_dim": (shapes.get("projection.weight") or (0,))[0],
    }


def sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the sizes that single tensors show.

    Args:
        shapes: By vitlib's names.

    Returns:
        depth and num_registers, and embed_dim, in_channels, patch_size and mlp_dim where their
        tensors are there. `depth` is a text where blocks are missing between others.
    """
    blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
    fields: dict[str, Any] = {
        "depth": len(blocks) if blocks == set(range(len(blocks))) else f"blocks {ranges(blocks)}",
        "num_registers": 0,
    }
    match shapes.get("patch_embed.proj.weight"):
        case (embed_dim, in_channels, p, q):
            fields |= {"embed_dim": embed_dim, "in_channels": in_channels, "patch_size": (p, q)}
    match shapes.get("blocks.0.mlp.fc2.weight"):
        case (_, mlp_dim):
            fields["mlp_dim"] = mlp_dim
    match shapes.get("patch_embed.reg_token"):
        case (_, registers, _):
            fields["num_registers"] = registers
    return fields


def mismatches(
    values: Mapping[str, Any], shapes: Mapping[str, Shape]
) -> list[tuple[str, Any, Any]]:
    """List the fields in which a config differs from the tensors.

    The check comes before anything is built: a config cannot make vitlib build more than its file
    holds.

    Args:
        values: Fields of ViTConfig, from the config.
        shapes: By vitlib's names.

    Returns:
        (field, value in the config, value in the tensors) of each difference.
    """
    stated: dict[str, Any] = {"num_registers": 0, "dist_token": False}
    stated |= {"class_token": True, "pos_embed_cls": True, **values}
    stated["patch_size"] = to_pair("patch_size", stated["patch_size"])
    h, w = to_pair("image_size", stated["image_size"])
    fields = sizes(shapes)
    clashes = [
        (name, stated[name], value) for name, value in fields.items() if stated[name] != value
    ]
    match shapes.get("patch_embed.pos_embed"):
        case (_, rows, _) if fields.get("patch_size") == stated["patch_size"]:
            p, q = fields["patch_size"]
            first = (stated["class_token"] + stated["dist_token"]) * stated["pos_embed_cls"]
            needed = (h // p) * (w // q) + first
            if needed != rows:
                clashes.append(("image_size", f"{h}x{w}, {needed} positions", f"{rows} positions"))
    return clashes


def infer_config(
    shapes: Mapping[str, Shape], image_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Infer every field that follows from names and shapes, for files without a config.

    Args:
        shapes: By vitlib's names.
        image_size: Pixels (height, width), where a file says them. None: the grid is square.

    Returns:
        Fields of ViTConfig: all but the numerics and, mostly, num_heads.

    Raises:
        CheckpointError: The tensors are not a whole ViT.
    """
    fields = sizes(shapes)
    absent = [
        name
        for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc2.weight")
        if len(shapes.get(name, ())) != (4 if "proj" in name else 2)
    ]
    if absent or not isinstance(fields["depth"], int):
        lacking = ", ".join(absent) if absent else f"only {fields['depth']}"
        raise CheckpointError(f"these tensors are no whole ViT: of ours, missing or odd: {lacking}")

    def any_ends(end: str) -> bool:
        return any(name.endswith(end) for name in shapes if name.startswith("blocks."))

    tables = [shape for name, shape in shapes.items() if name.startswith("attn_position.tables.")]
    fields |= auxiliary_fields(shapes) | {
        "patch_bias": "patch_embed.proj.bias" in shapes,
        "qkv_bias": any_ends("attn.q.bias"),
        "key_bias": any_ends("attn.k.bias") or not any_ends("attn.q.bias"),
        "proj_bias": any_ends("mlp.fc2.bias") or not any_ends("mlp.fc2.weight"),
        "norms": infer_norms(shapes),
        "pre_norm": "norm_pre.weight" in shapes,
        "layer_scale": 1.0 if any_ends("ls1.gamma") else None,
        "class_token": "patch_embed.cls_token" in shapes,
        "dist_token": "patch_embed.dist_token" in shapes,
        "pos_embed": "patch_embed.pos_embed" in shapes,
        "relative_position": {0: None, 1: "shared"}.get(len(tables), "block")
        if fields["depth"] > 1
        else ("block" if tables else None),
        "num_classes": (shapes.get("head.weight") or (0,))[0],
        "dist_head": "head_dist.weight" in shapes,
    }
    gate = shapes.get("blocks.0.mlp.fc1.weight", (0,))[0]
    if gate == 2 * fields["mlp_dim"]:
        fields["activation"] = "swiglu"
    return fields | _infer_num_heads(shapes) | _grid(fields, shapes, tables, image_size)


def _infer_num_heads(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Infer num_heads where tensors have an axis of heads, or the width of one; else nothing."""
    match shapes.get("attn_position.tables.0"), shapes.get("attn_position.freqs"):
        case ((_, heads), _) | (_, (_, _, heads, _)):
            return {"num_heads": heads}
    match shapes.get("blocks.0.attn.q_norm.weight"), shapes.get("blocks.0.attn.q.weight"):
        case ((head_dim,), (dim, _)) if 0 < head_dim < dim and dim % head_dim == 0:
            return {"num_heads": dim // head_dim}
    return {}


def infer_pooling(shapes: Mapping[str, Shape]) -> Pooling | None:
    """Infer the attention pool, as far as shapes show it.

    Args:
        shapes: By vitlib's names.

    Returns:
        The pool with the width of its MLP where that is not the trunk's; None where there is none.
    """
    if not any(name.startswith("attn_pool.") for name in shapes):
        return None
    (width,), (trunk_width,) = (
        (shapes.get(f"{module}.mlp.fc2.weight") or (0, 0))[1:2] or (0,)
        for module in ("attn_pool", "blocks.0")
    )
    return Pooling(mlp_dim=width if width != trunk_width else 0)


def infer_norms(shapes: Mapping[str, Shape]) -> Norms:
    """Infer the kind of the norms, and which a block has inside.

    Args:
        shapes: By vitlib's names.

    Returns:
        The norms. Whether they come before or after the branches, no shape shows.
    """
    block = {name[9:]: shape for name, shape in shapes.items() if name.startswith("blocks.0.")}
    has_bias = any(
        name.startswith("blocks.") and name.endswith(("norm1.bias", "norm2.bias"))
        for name in shapes
    )
    width = (block.get("attn.q_norm.weight") or (0,))[0]
    is_whole = width == (shapes.get("patch_embed.proj.weight") or (0,))[0]
    return Norms(
        kind="layer" if has_bias or "norm1.weight" not in block else "rms",
        patch="patch_embed.norm.weight" in shapes,
        qk=None if not width else "width" if is_whole else "head",
        attn="attn.sub_norm.weight" in block,
        mlp="mlp.sub_norm.weight" in block,
    )


def _grid(
    fields: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    tables: list[Shape],
    image_size: tuple[int, int] | None,
) -> dict[str, Any]:
    """Infer image_size and pos_embed_cls from the number of positions."""
    p, q = fields["patch_size"]
    first = fields["class_token"] + fields["dist_token"]
    grid = None if image_size is None else (image_size[0] // p, image_size[1] // q)
    table = shapes.get("patch_embed.pos_embed") or (1, 0, 0)
    if len(table) != 3:
        shape = "x".join(map(str, table))
        raise CheckpointError(
            f"positions are {shape}: expected 1 x tokens x "
            f"{fields['embed_dim']}, as files hold them"
        )
    rows = table[1]
    if tables:
        h, w = _grid_of_offsets(tables[0][0] - 3, grid)
        return {"image_size": image_size or (h * p, w * q), "pos_embed_cls": True}
    if not rows:  # the file has no tensor of a grid's size
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
    """Infer the grid (h, w) that has (2h - 1)(2w - 1) offsets between patches.

    Without a grid it is square. Raises CheckpointError where the offsets are another grid's.
    """
    if grid is not None and (2 * grid[0] - 1) * (2 * grid[1] - 1) == count:
        return grid
    side = square_side(count)
    if grid is not None or side % 2 == 0:
        expected = "of no square grid" if grid is None else f"not those of {grid[0]}x{grid[1]}"
        raise CheckpointError(f"{count} offsets between patches are {expected}: {SIZE_REMEDY}")
    return (side + 1) // 2, (side + 1) // 2


def square_side(count: int) -> int:
    """Return the side of a square grid.

    Args:
        count: Number of patches.

    Returns:
        The side; 0 where the number is not a square.
    """
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def compact_size(size: tuple[int, int]) -> int | list[int]:
    """Return a size as timm's and open_clip's own configs have it.

    Args:
        size: Height and width.

    Returns:
        One number of a square, else a list of two.
    """
    return size[0] if size[0] == size[1] else list(size)
