"""Causes of a difference before the first block and after the last, found by trying.

Shapes: as in vitlib/vit.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.testing.block_causes import explain_linear
from vitlib.testing.case import Case, Side, near
from vitlib.testing.outputs import match_outputs, name_outputs, to_float64
from vitlib.testing.recording import call
from vitlib.testing.trials import explain_by_trials

_MEANS, _STDS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of most processors
_CLIP_MEANS = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STDS = (0.26862954, 0.26130258, 0.27577711)


def pixel_changes(channels: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return changes that a module may make to pixels before its first layer.

    Args:
        channels: Channels of the images.

    Returns:
        Functions of (B, C, H, W) by what they do.
    """
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
        for name, change in pixel_changes(case.images.shape[1]).items():
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
    for name, change in pixel_changes(side.case.images.shape[1]).items():
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
