"""Linear layers of one input, with what stands before them and the sum after: one step of autograd.

How data flows: forward computes what stands before the layer (before.py), multiplies by all weights
at once (gemm.py), and keeps the input alone. Backward computes the former again, and gives
gradients to whatever asks for one: nothing is computed where all weights are frozen.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitlib.train.fused_step import matmul, prologue
from vitlib.train.fused_step.prologue import Before, Stats


class LinearSpec(NamedTuple):
    """What a call of Linears does."""

    kind: Before
    dtype: torch.dtype  # of the products and of what they give: float32 or bfloat16
    eps: float = 0.0  # of the norm


class Linears(torch.autograd.Function):
    """(plan, residual, x, gain, offset, weight, bias, weight, bias, ...) -> an output a weight.

    x: (..., K), with SwiGLU (..., 2K), float32 where a norm comes first. gain, offset: the norm's
    (K,), or None. residual: (..., N) float32 that is added to the one output, then float32; or
    None. weights: (N, K) float32; biases: (N,), or None.
    """

    @staticmethod
    def forward(ctx: Any, plan: LinearSpec, residual: Tensor | None, x: Tensor, gain: Tensor | None,
                offset: Tensor | None, *layers: Tensor | None) -> Any:  # fmt: skip
        """As the class says; one tensor where there is one weight."""
        weights: list[Tensor] = layers[::2]  # type: ignore[assignment]
        ctx.plan, ctx.shape, ctx.x_dtype = plan, x.shape, x.dtype
        ctx.widths = [len(weight) for weight in weights]
        with torch.autocast("cpu", enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            if plan.kind == "nothing":
                rows = rows.to(plan.dtype)
            inner, _ = _inner(plan, rows, gain, offset)
            weight, bias = _one(weights), _one_bias(layers[1::2], ctx.widths)
            if residual is None:
                found = matmul.product(inner, weight, bias)
            else:
                other = residual.reshape(-1, residual.shape[-1]).contiguous()
                found = matmul.product_onto(inner, weight, bias, other)
        # What stands before needs its input for its own gradient; a product for its weight's.
        kept = rows if plan.kind != "nothing" or any(ctx.needs_input_grad[5::2]) else None
        ctx.save_for_backward(kept, gain, offset, *weights)
        found = found.view(*x.shape[:-1], found.shape[-1])
        return found if len(weights) == 1 else torch.split(found, ctx.widths, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """A gradient for each input of forward that needs one."""
        plan, needed = ctx.plan, ctx.needs_input_grad
        x, gain, offset, *weights = ctx.saved_tensors
        found: list[Tensor | None] = [None] * len(needed)
        found[1] = gradients[0] if needed[1] else None
        stats: Stats | None = None
        with torch.autocast("cpu", enabled=False):
            wide = torch.cat(gradients, dim=-1) if len(gradients) > 1 else gradients[0]
            wide = wide.reshape(-1, wide.shape[-1])
            narrow = wide.to(plan.dtype)
            if any(needed[5::2]):
                assert x is not None
                inner, stats = _inner(plan, x, gain, offset)
                of_weights = matmul.weight_gradient(narrow, inner)
                del inner
                _part(torch.split(of_weights, ctx.widths), needed, found, 5)
            if any(needed[6::2]):
                of_biases = wide.sum(dim=0, dtype=torch.float32)
                _part(torch.split(of_biases, ctx.widths), needed, found, 6)
            if any(needed[2:5]):
                total = matmul.back(narrow, _one(weights))
                del narrow, wide
                found[2:5] = _of_input(plan, total, x, gain, offset, stats, list(needed[2:5]))
                if found[2] is not None:
                    found[2] = found[2].to(ctx.x_dtype).view(ctx.shape)
        return tuple(found)


def _one(weights: Sequence[Tensor]) -> Tensor:
    """(N, K) each -> all of them as one, so that one product serves."""
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def _one_bias(biases: Sequence[Tensor | None], widths: list[int]) -> Tensor | None:
    """(N,) or None each -> all of them as one; None where there is none at all."""
    there = next((bias for bias in biases if bias is not None), None)
    if there is None or len(biases) == 1:
        return there
    whole = [there.new_zeros(n) if b is None else b for b, n in zip(biases, widths, strict=True)]
    return torch.cat(whole)


def _part(
    parts: Sequence[Tensor], needed: Sequence[bool], found: list[Tensor | None], first: int
) -> None:
    """Puts each layer's part of a gradient in its place, where one is needed."""
    for place, part in zip(range(first, len(found), 2), parts, strict=False):
        if needed[place]:
            found[place] = part


def _inner(
    plan: LinearSpec, x: Tensor, gain: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Stats | None]:
    """(M, K), swiglu (M, 2K) -> what is multiplied, (M, K) of the plan's dtype; a norm's Stats."""
    if plan.kind == "nothing":
        return x, None
    if plan.kind == "norm":
        assert gain is not None
        assert offset is not None
        found, stats = prologue.norm(x, gain, offset, plan.eps)
        return found.to(plan.dtype), stats
    return prologue.act(x, plan.kind), None


def _of_input(
    plan: LinearSpec, gradient: Tensor, x: Tensor | None, gain: Tensor | None,
    offset: Tensor | None, stats: Stats | None, needed: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """The gradient of what was multiplied, written over -> those of x, gain and offset."""
    if plan.kind == "nothing":
        return [gradient, None, None]
    assert x is not None
    if plan.kind == "norm":
        assert gain is not None
        assert offset is not None
        stats = stats or prologue.norm(x, gain, offset, plan.eps)[1]
        return list(prologue.norm_back(gradient.float(), x, gain, offset, stats, needed))
    return [prologue.act_back(gradient, x, plan.kind), None, None]
