"""Causes of a difference in the sequence of tokens, before the first block and between blocks.

Tokens may be fewer, in another order, with other positions, or those of another block. Two images
tell these apart: what they change is of patches, and what they do not change is a parameter.

Shapes: T tokens, N patches, D embed_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from vitlib.config_parts import PositionResize
from vitlib.errors import count_noun
from vitlib.patch_embed import resize_positions
from vitlib.testing.block_causes import explain_residual
from vitlib.testing.case import Case, Side, is_normalized, match_rows, near
from vitlib.testing.outputs import to_float64
from vitlib.testing.states import States, common_states
from vitlib.testing.trials import explain_block_by_trials
from vitlib.testing.trunk_causes import pixel_changes
from vitlib.vit import ViT

_SHOWN = 5  # numbers of tokens in a message
_UNCHANGED = 1e-4  # relative, of a token that another image leaves as it is
_BY_IMAGES = "by the same for two images"


def explain_embedding(case: Case) -> str | None:
    """Find why tokens differ before the first block: count, order, positions, class token, norm.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    for side in case.sides():
        vit = side.own.vit
        for label, tokens in [] if vit is None else _embed_otherwise(vit, case.images):
            if side.explains(tokens):
                return f"{label}: that gives the {side.other.role}'s tokens in the {side.own.role}"
        if is_normalized(side.x, side.y):
            return f"pre-norm: the {side.other.role} alone normalises tokens before the blocks"
        factor = (side.x * side.y).sum() / side.x.square().sum()
        if side.explains(side.x * factor):
            return (
                f"scale: tokens of the {side.other.role} are {factor:.4g} times those of the "
                f"{side.own.role}"
            )
    for search in (explain_blocks, explain_order, _explain_by_another_image, _explain_by_pixels):
        text = search(case)
        if text is not None:
            return text
    return None


def usual_embedding(case: Case) -> str:
    """Return what usually makes tokens differ before the first block.

    Args:
        case: The difference.
    """
    usual = "positions, their resize rule, class token, order of patches, or pre-norm"
    a, b = case.a[case.point], case.b[case.point]
    rows = _moved_rows((a - b)[0]).tolist() if a.shape == b.shape and a.ndim == 3 else []
    if not rows or len(rows) == a.shape[1]:
        return usual
    return f"position rows: tokens {_list(rows)} of {a.shape[1]} alone differ, or {usual}"


def explain_between(case: Case) -> str | None:
    """Find why a block takes other tokens: the block before it, count, order, or another block.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    if case.index <= 0:
        return explain_embedding(case)
    text = explain_blocks(case) or explain_order(case)
    before = f"blocks.{case.index - 1}.resid"
    if text is not None or (before in case.a and before in case.b):
        return text
    # The block before gives them, and shows nothing else.
    return next(
        filter(None, (explain_block_by_trials(s, case.index - 1) for s in case.sides())), None
    )


def explain_block(case: Case) -> str | None:
    """Find why a block gives other tokens.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    text = explain_blocks(case) or explain_residual(case) or explain_order(case)
    if text is not None or case.pair("resid_mid") is not None:
        return text
    return next(filter(None, (explain_block_by_trials(s, case.index) for s in case.sides())), None)


def explain_count(case: Case) -> str | None:
    """Describe tokens of which one module has more, or of another width.

    Args:
        case: The difference.

    Returns:
        A sentence, or None where they are no sequences of tokens.
    """
    a, b = case.a[case.point], case.b[case.point]
    if a.ndim != 3 or b.ndim != 3:
        return None
    hint = "tokens that one drops, merges or pads"
    if case.index <= 0 and case.kind in ("embed", "resid_pre"):
        hint = f"class token, registers, patch size, or {hint}"
    for side in case.sides():
        x, y = side.x[0], side.y[0]
        if len(x) < len(y) and x.shape[1] == y.shape[1]:
            nearest = torch.cdist(x, y).argmin(dim=1)
            lacking = sorted({*range(len(y))} - {*nearest.tolist()})
            if near(y[nearest], x) and len(lacking) == len(y) - len(x):
                return (
                    f"tokens: the {side.own.role} has {len(x)}, without tokens {_list(lacking)} of "
                    f"the {len(y)} of the {side.other.role}: {hint}"
                )
    return (
        f"tokens: the model has {a.shape[1]} of width {a.shape[-1]}, the reference {b.shape[1]} of "
        f"width {b.shape[-1]}: {hint}"
    )


class _State(NamedTuple):
    """Tokens between blocks."""

    depth: int  # blocks before them
    tokens: Tensor


def _list_states(states: States, depth: int) -> Iterator[_State]:
    """Yield what a module shows of the tokens before each block and after the last."""
    for index in range(depth):
        for name, before in (("resid_pre", index), ("resid", index + 1)):
            tokens = states.get(f"blocks.{index}.{name}")
            if tokens is not None:
                yield _State(before, tokens)


def explain_blocks(case: Case) -> str | None:
    """Look for tokens that the other module has before or after another block.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    count = case.index + (case.kind == "resid") if case.prefix else 0
    for side in case.sides():
        states = (s for s in _list_states(side.states, side.own.depth) if s.depth != count)
        match = next((s.depth for s in states if side.explains(s.tokens)), None)
        if match is not None:
            return (
                f"blocks: the tokens of the {side.other.role} after {count_noun(count, 'block')} "
                f"are those of the {side.own.role} after {match}: a block is left out, runs twice "
                "or is in another place, or `points` names its neighbour"
            )
    for side in case.sides():
        vit = side.own.vit
        if vit is None:
            continue
        steps = zip(vit.blocks, vit.attn_positions(case.images), strict=False)
        for index, (block, position) in enumerate(steps):
            if side.explains(block(side.x, None, position)):
                return (
                    f"blocks: block {index} runs once more in the {side.other.role}, after "
                    f"{count_noun(count, 'block')}"
                )
    return None


def explain_exchange(case: Case) -> str | None:
    """Run other blocks of a ViT on the tokens of a block that differs.

    Args:
        case: The difference, in a block.

    Returns:
        A sentence, or None.
    """
    x_name, y_name = f"{case.prefix}resid_pre", f"{case.prefix}resid"
    for side in case.sides():
        vit, x, y = side.own.vit, side.states.get(x_name), side.others.get(y_name)
        if vit is None or x is None or y is None or x.ndim != 3:
            continue
        steps = zip(vit.blocks, vit.attn_positions(case.images), strict=False)
        for index, (block, position) in enumerate(steps):
            # What a block adds, which is little under a fresh LayerScale.
            start, tokens = x[:, : y.shape[1]], block(x, None, position)[:, : y.shape[1]]
            if index != case.index and near(tokens - start, y - start):
                return (
                    f"blocks: block {case.index} of the {side.other.role} is block {index} of the "
                    f"{side.own.role}: blocks in another order"
                )
    return None


def explain_order(case: Case) -> str | None:
    """Look for the same tokens in another order.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    a, b = case.a[case.point], case.b[case.point]
    if a.ndim != 3 or a.shape != b.shape:
        return None
    order = match_rows(a[0], b[0])
    if order is None:
        return None
    return f"order of tokens: {_describe(order, [*range(len(order))])}"


def _explain_by_another_image(case: Case) -> str | None:
    """Compare what another image changes: it moves patches, and leaves positions as they are."""
    image = _another_image(case.images)
    a, b = common_states(case.model.read(image)[1], case.reference.read(image)[1])
    if (
        case.point not in a
        or case.point not in b
        or a[case.point].shape != case.a[case.point].shape
    ):
        return None
    moved_a, moved_b = a[case.point] - case.a[case.point], b[case.point] - case.b[case.point]
    gap = float((case.a[case.point] - case.b[case.point]).abs().max())
    if float((moved_a - moved_b).abs().max()) <= _UNCHANGED * gap:
        return _explain_parameters(case)
    rows = [_moved_rows(moved[0]) for moved in (moved_a, moved_b)]
    order = match_rows(moved_a[0][rows[0]], moved_b[0][rows[1]])
    if order is None or rows[0].tolist() != rows[1].tolist():
        return None
    return (
        f"order of patches, not of their positions: {_describe(order, rows[0].tolist())}; another "
        "image is changed in the same order"
    )


def _explain_by_pixels(case: Case) -> str | None:
    """Change the pixels of a module until it gives the tokens that the other gives."""
    if "patch_embed.proj" in case.a and "patch_embed.proj" in case.b:
        return None
    for side in case.sides():
        for label, change in pixel_changes(case.images.shape[1]).items():
            images = change(case.images)
            if images.shape == case.images.shape:
                tokens = side.own.read(images)[1].get(case.point)
                if tokens is not None and side.explains(tokens):
                    return (
                        f"preprocessing range: the {side.own.role} gives the {side.other.role}'s "
                        f"tokens for pixels {label}"
                    )
    return None


def _another_image(images: Tensor) -> Tensor:
    """Add seeded noise to images, (B, C, H, W), which changes every patch otherwise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float64, device="cpu")
    return to_float64(images) + noise


def _moved_rows(change: Tensor) -> Tensor:
    """Return the numbers of the tokens that another image changes, of (T, D)."""
    size = change.abs().amax(dim=-1)
    return size.gt(_UNCHANGED * size.max()).nonzero().flatten()


def _explain_parameters(case: Case) -> str | None:
    """Describe a difference that is the same for every image: of positions or the class token."""
    a, b = case.a[case.point], case.b[case.point]
    gap = (a - b)[0]
    size = gap.abs().amax(dim=-1)
    if float(size.max()) <= case.eps * float(b.abs().max()):
        return None
    text = _explain_positions(case)
    if text is not None:
        return text
    rows = size.gt(_UNCHANGED * size.max()).nonzero().flatten().tolist()
    first = next((s.vit.num_prefix_tokens for s in (case.model, case.reference) if s.vit), 1)
    if max(rows) < first:
        return f"class token or its position: only tokens {_list(rows)} differ, {_BY_IMAGES}"
    if len(rows) > 1 and near(gap[rows], gap[rows[:1]].expand(len(rows), -1)):
        return (
            f"a vector added to tokens {_list(rows)}, {_BY_IMAGES}: the bias of the patch "
            "projection, or an embedding that all share"
        )
    return f"position rows: tokens {_list(rows)} of {len(size)} differ, {_BY_IMAGES}"


def _explain_positions(case: Case) -> str | None:
    """Look for the positions of a ViT in another order."""
    for side in case.sides():
        vit = side.own.vit
        if vit is None or vit.patch_embed.pos_embed is None:
            continue
        if not isinstance(vit.norm_pre, torch.nn.Identity):
            continue
        first = vit.num_prefix_tokens
        _, rows = vit.patch_embed.resize_pos_embed(vit.patch_grid(case.images))
        order = match_rows(rows[0], rows[0] + (side.y - side.x)[0, first:])
        if order is not None:
            numbers = [*range(first, first + len(order))]
            return f"order of positions, not of patches: {_describe(order, numbers, side)}"
    return None


def _describe(order: list[int], numbers: list[int], side: Side | None = None) -> str:
    """Describe an order by the first tokens that it moves.

    Args:
        order: For each row of the other module, that of the own.
        numbers: Numbers of the tokens of the rows.
        side: The modules; None for the model and the reference.
    """
    own, other = ("model", "reference") if side is None else (side.own.role, side.other.role)
    moved = [(numbers[i], numbers[j]) for i, j in enumerate(order) if i != j]
    targets, sources = zip(*moved, strict=True)
    return f"tokens {_list(targets)} of the {other} are {_list(sources)} of the {own}"


def _list(numbers: list[int] | tuple[int, ...]) -> str:
    """List the first of some numbers."""
    return ", ".join(map(str, numbers[:_SHOWN])) + (", ..." if len(numbers) > _SHOWN else "")


def _embed_otherwise(vit: ViT, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tokens of a ViT with other positions, or without the norm after them."""
    embed = vit.patch_embed
    tokens = embed(images)
    if not isinstance(vit.norm_pre, torch.nn.Identity):
        yield "pre-norm: without the norm before the blocks (norm_pre)", tokens
    if embed.pos_embed is None:
        return
    grid = embed.patch_grid(images)
    first, count = vit.num_prefix_tokens, embed.num_prefix_positions
    prefix, rows = embed.resize_pos_embed(grid)

    def replaced(new: Tensor, new_prefix: Tensor = prefix) -> Tensor:
        """Replace the positions of patches, and of the class tokens."""
        changed = tokens.clone()
        changed[:, first:] += new - rows
        changed[:, :count] += new_prefix - prefix
        result: Tensor = vit.norm_pre(changed)
        return result

    yield "positions: without any", replaced(torch.zeros_like(rows), torch.zeros_like(prefix))
    if grid != embed.grid_size:
        for rule in get_args(PositionResize):
            if rule != embed.position_resize and (rule != "sincos" or rows.shape[-1] % 4 == 0):
                learned = embed.pos_embed[:, count:]
                new = resize_positions(learned, embed.grid_size, grid, rule)
                yield (
                    f"position resize rule {rule!r} (here {embed.position_resize!r})",
                    replaced(new),
                )
    for shift, label in ((1, "later"), (-1, "earlier")):
        yield f"positions one row {label}", replaced(rows.roll(shift, dims=1))
    flipped = rows.reshape(1, *grid, -1).transpose(1, 2).flatten(1, 2)
    yield "positions with rows and columns exchanged", replaced(flipped)
    if count:
        yield "positions of patches alone, none of the class token", replaced(rows, 0 * prefix)
