"""Causes of a difference before the first block and after the last, found by trying.

Shapes: as in vitlib/vit.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.config_parts import PositionResize
from vitlib.patch_embed import resize_positions
from vitlib.testing.block_causes import explain_linear
from vitlib.testing.case import Case, Side, is_normalized, near
from vitlib.testing.outputs import match_outputs, name_outputs, to_float64
from vitlib.testing.recording import call
from vitlib.testing.trials import explain_by_trials
from vitlib.vit import ViT

_MEANS, _STDS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of most processors
_CLIP_MEANS = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STDS = (0.26862954, 0.26130258, 0.27577711)


def _pixel_changes(channels: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return changes that a module may make to pixels before its first layer."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "divided by 255": lambda x: x / 255,
        "multiplied by 255": lambda x: x * 255,
        "mapped from 0..1 to -1..1": lambda x: 2 * x - 1,
        "mapped from -1..1 to 0..1": lambda x: (x + 1) / 2,
        "with channels in reverse order (BGR)": lambda x: x.flip(1),
        "with rows and columns exchanged": lambda x: x.mT,
    }
    if channels == 3:
        for name, means, stds in (
            ("ImageNet's", _MEANS, _STDS),
            ("CLIP's", _CLIP_MEANS, _CLIP_STDS),
        ):
            mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (means, stds))
            changes[f"normalised by {name} mean and std"] = partial(_normalize, mean, std)
            changes[f"with {name} mean and std undone"] = partial(_normalize, -mean / std, 1 / std)
    return changes


def _normalize(mean: Tensor, std: Tensor, x: Tensor) -> Tensor:
    """Normalise pixels by channel, (B, C, H, W) -> (B, C, H, W)."""
    return (x - mean) / std


def explain_pixels(case: Case) -> str | None:
    """Find what a module does to pixels before its first layer.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    for side in case.sides():
        for name, change in _pixel_changes(case.images.shape[1]).items():
            if near(change(case.images), side.x):
                return f"preprocessing range: the {side.own.role} itself takes pixels {name}"
    return "preprocessing range: a module changes the pixels before its first layer"


def explain_patches(case: Case) -> str | None:
    """Find why the patch projection gives other patches.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    parts = [case.model.part(case.point), case.reference.part(case.point)]
    weights = [getattr(part, "weight", None) for part in parts]
    if all(isinstance(w, Tensor) and w.ndim == 4 for w in weights):
        a, b = weights
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        if near(a.flip(1), b):
            return "preprocessing: the patch projection has its channels in reverse order (BGR)"
        if near(a.mT, b):
            return "patch projection: rows and columns of its kernel are exchanged"
    shapes = {tuple(x.shape) for x in (case.a[case.point], case.b[case.point])}
    if len(shapes) > 1:
        return f"patch size, stride or width: the patches are {' and '.join(map(str, shapes))}"
    return explain_linear(case)


def explain_embedding(case: Case) -> str | None:
    """Find why tokens differ before the first block: count, positions, class token, norm.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    a, b = case.a[case.point], case.b[case.point]
    if a.shape != b.shape:
        return (
            f"tokens: the model has {a.shape[1]} of width {a.shape[-1]}, the reference "
            f"{b.shape[1]} of width {b.shape[-1]}: class token, registers or patch size"
        )
    for side in case.sides():
        vit = side.own.vit
        for label, tokens in [] if vit is None else _embed_otherwise(vit, case.images):
            if side.explains(tokens):
                return f"{label}: that gives the {side.other.role}'s tokens in the {side.own.role}"
        if is_normalized(side.x, side.y):
            return f"pre-norm: the {side.other.role} alone normalises tokens before the blocks"
    # What no image changes is a parameter: a position, or the class token.
    gap = (a - b).abs().amax(dim=-1)
    if float(gap.max()) <= case.eps * float(b.abs().max()):
        return None
    if float((a - b - (a - b)[:1]).abs().max()) > 1e-4 * float(gap.max()):
        return None
    rows = gap.amax(dim=0).gt(1e-4 * gap.max()).nonzero().flatten().tolist()
    listed = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    first = next((s.vit.num_prefix_tokens for s in (case.model, case.reference) if s.vit), 1)
    if max(rows) < first:
        return f"class token or its position: only tokens {listed} differ, alike in every image"
    return f"position rows: tokens {listed} of {a.shape[1]} differ, alike in every image"


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


def explain_pooled(case: Case) -> str | None:
    """Find which tokens the heads read, and whether they are normalised.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    norms = [subject.part("norm") for subject in (case.model, case.reference)]
    for side in case.sides():
        if any(side.explains(_normalize_pooled(norm, side.x)) for norm in norms):
            return f"final norm: missing in the {side.own.role}, on the pooled vector"
    # Both vectors are pooled from tokens that are equal: a rule for each shows where they part.
    for side in case.sides():
        tokens, vit = side.states.get("norm"), side.own.vit or side.other.vit
        if tokens is None or tokens.ndim != 3:
            continue
        pools = _pool_tokens(tokens, vit.num_prefix_tokens if vit is not None else 1)
        for norm in (None, *norms):
            fits = {
                name: x if norm is None else _normalize_pooled(norm, x) for name, x in pools.items()
            }
            own = next((name for name, x in fits.items() if near(x, side.x)), None)
            other = next((name for name, x in fits.items() if near(x, side.y)), None)
            if own and other:
                return f"pooling: the {side.own.role} reads {own}, the {side.other.role} {other}"
    return None


def _normalize_pooled(norm: torch.nn.Module | None, x: Tensor) -> Tensor | None:
    """Apply a final norm to a vector, where it has one of this width."""
    weight = getattr(norm, "weight", None)
    if norm is None or not isinstance(weight, Tensor) or weight.shape != x.shape[-1:]:
        return None
    return to_float64(norm(x.to(weight)))


def _pool_tokens(tokens: Tensor, first: int) -> dict[str, Tensor]:
    """Pool tokens by every usual rule."""
    if tokens.shape[1] <= first:  # the last block may compute no others
        return {"the class token": tokens[:, 0]}
    mean = tokens[:, first:].mean(dim=1)
    return {
        "the class token": tokens[:, 0],
        "the mean of patches": mean,
        "the mean of all tokens": tokens.mean(dim=1),
        "the class token beside the mean of patches": torch.cat([tokens[:, 0], mean], dim=-1),
        "the last token": tokens[:, -1],
        "the largest of patches": tokens[:, first:].amax(dim=1),
    }


def explain_output(case: Case) -> str | None:
    """Find why outputs differ: activation, head, pooling, final norm, or pixels.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    if case.a[case.point].shape != case.b[case.point].shape:
        shapes = [tuple(x.shape) for x in (case.a[case.point], case.b[case.point])]
        return (
            f"head: outputs of other shapes, {shapes[0]} in the model, {shapes[1]} in the reference"
        )
    for side in case.sides():
        for name, x in {
            "a softmax": side.x.softmax(-1),
            "a log-softmax": side.x.log_softmax(-1),
            "a sigmoid": side.x.sigmoid(),
            "a normalisation to length 1": F.normalize(side.x, dim=-1),
            "a tanh": side.x.tanh(),
        }.items():
            if near(x, side.y):
                return (
                    f"head: the {side.other.role} ends in {name}, and the {side.own.role} does not"
                )
        if side.explains(side.x * ((side.x * side.y).sum() / side.x.square().sum())):
            return "head: the outputs of one are a multiple of the other's (a scale or temperature)"
        text = _explain_by_head(side)
        if text is not None:
            return text
    for subject, states in ((case.model, case.a), (case.reference, case.b)):
        if "norm" in subject.sources and "norm" not in states:
            return f"final norm: the {subject.role} does not call {subject.sources['norm']!r}"
    text = explain_pooled(case)
    if text is not None:
        return text
    head = replace(case, point="logits")
    if "logits" in case.a and "logits" in case.b:
        text = explain_linear(head)
        if text is not None:
            return f"head: {text}"
    for search in (_explain_by_pixels, explain_by_trials):
        text = next(filter(None, map(search, case.sides())), None)
        if text is not None:
            return text
    return None


def _explain_by_head(side: Side) -> str | None:
    """Run the head of a ViT on tokens that are not normalised, or pooled otherwise."""
    vit, tokens = side.own.vit, side.states.get("norm")
    if vit is None or tokens is None or vit.head_dist is not None:
        return None
    last = side.states.get(f"blocks.{side.own.depth - 1}.resid")
    if last is not None and not near(last, tokens) and side.explains(vit.forward_head(last)):
        return f"final norm: missing in the {side.other.role}"
    for name, pooled in _pool_tokens(tokens, vit.num_prefix_tokens).items():
        if pooled.shape[-1] == vit.num_features and side.explains(vit.head(pooled)):
            return f"pooling: the {side.other.role} reads {name}"
    return None


def _explain_by_pixels(side: Side) -> str | None:
    """Run a module on changed pixels until it gives what the other gives."""
    for name, change in _pixel_changes(side.case.images.shape[1]).items():
        images = change(side.case.images)
        if images.shape != side.case.images.shape:
            continue
        outputs = name_outputs(call(side.own.module, images), side.own.module)
        pairs = match_outputs(outputs, {"output": side.y})
        if side.explains(to_float64(next(iter(pairs.values()))[0])):
            return (
                f"preprocessing range: the {side.own.role} gives the {side.other.role}'s outputs "
                f"for pixels {name}"
            )
    return None
