"""Causes of a difference in a norm: its place, eps, kind, or weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.testing.case import Case, Side, differ_in_parameters, near
from vitlib.testing.outputs import to_float64

_EPS = (1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 1e-2)


def explain_norm(case: Case) -> str | None:
    """Find why a norm gives other tokens: place, eps, kind, or weights.

    Args:
        case: The difference.

    Returns:
        A sentence, or None.
    """
    if case.prefix and (text := _explain_norm_order(case)) is not None:
        return text
    name = "final norm" if case.kind == "norm" else case.kind
    for side in case.sides():
        x, part = _norm_input(side), side.own.part(case.point)
        if x is None:
            continue
        # An Identity stands for a norm in some files.
        if near(side.x, x):
            return f"{name}: missing in the {side.own.role}"
        eps = _eps_of(part)
        for tried in (*filter(None, (_eps_of(side.other.part(case.point)),)), *_EPS):
            if part is not None and eps != tried and side.explains(_normalize(part, x, tried)):
                return (
                    f"eps of {name}: {eps:g} in the {side.own.role}, and the {side.other.role} "
                    f"computes with {tried:g}"
                )
        if part is not None and side.explains(_normalize(part, x, eps or 1e-6, other_kind=True)):
            return f"kind of {name}: one is a LayerNorm, the other an RMSNorm"
    kinds = [_kind_of(side) for side in case.sides()]
    if None not in kinds and kinds[0] != kinds[1]:
        return f"kind of {name}: {kinds[0]} in the model, {kinds[1]} in the reference"
    return differ_in_parameters(case, f"weights of {name}")


def _norm_input(side: Side) -> Tensor | None:
    """Return what the norm of a module takes."""
    if side.case.kind != "norm":
        return side.state(f"{side.case.kind}.in")
    depth = side.own.depth
    return side.states.get(f"blocks.{depth - 1}.resid")


def _eps_of(part: nn.Module | None) -> float | None:
    """Return the eps of a norm."""
    value = getattr(part, "eps", getattr(part, "variance_epsilon", None))
    return value if isinstance(value, float) else None


def _normalize(
    part: nn.Module, x: Tensor, eps: float, *, other_kind: bool = False
) -> Tensor | None:
    """Apply a norm with another eps, or of the other kind; None where it has no weight."""
    weight, bias = getattr(part, "weight", None), getattr(part, "bias", None)
    if not isinstance(weight, Tensor) or weight.shape != x.shape[-1:]:
        return None
    weight, bias = to_float64(weight), to_float64(bias) if isinstance(bias, Tensor) else None
    if ("rms" in type(part).__name__.lower()) != other_kind:
        y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight
        return y if bias is None else y + bias
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _kind_of(side: Side) -> str | None:
    """Return the kind of norm that a module computes; None where it is neither."""
    x, part = _norm_input(side), side.own.part(side.case.point)
    if x is None or part is None:
        return None
    eps, is_rms = _eps_of(part) or 1e-6, "rms" in type(part).__name__.lower()
    for other_kind in (False, True):
        if near(_normalize(part, x, eps, other_kind=other_kind), side.x):
            return "an RMSNorm" if is_rms != other_kind else "a LayerNorm"
    return None


def _explain_norm_order(case: Case) -> str | None:
    """Compare what the norms of both modules take: the residual stream, or a branch."""
    inputs = case.pair(f"{case.kind}.in")
    if inputs is None or near(*inputs):
        return None
    stream = "resid_pre" if case.kind == "norm1" else "resid_mid"
    is_pre = [near(side.state(f"{case.kind}.in"), side.state(stream)) for side in case.sides()]
    if is_pre[0] == is_pre[1]:
        return None
    first, last = ("model", "reference") if is_pre[0] else ("reference", "model")
    return (
        f"pre-norm and post-norm: {case.kind} of the {first} comes before the branch, that of the "
        f"{last} after it"
    )
