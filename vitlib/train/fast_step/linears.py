"""Linear layers of one input, with what stands before them and the sum after: one step of autograd.

How data flows: forward computes what stands before the layer (before.py), multiplies (gemm.py), and
keeps the input alone. Backward computes the former again, and gives gradients to whatever asks for
one: nothing is computed for frozen weights.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitlib.train.fast_step import before, gemm
from vitlib.train.fast_step.before import Before


class Plan(NamedTuple):
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
    def forward(ctx: Any, plan: Plan, residual: Tensor | None, x: Tensor, gain: Tensor | None,
                offset: Tensor | None, *layers: Tensor | None) -> Any:  # fmt: skip
        """As the class says; one tensor where there is one weight."""
        weights, biases = layers[::2], layers[1::2]
        ctx.plan, ctx.shape, ctx.x_dtype = plan, x.shape, x.dtype
        with torch.autocast("cpu", enabled=False):
            rows = x.reshape(-1, x.shape[-1])
            if plan.kind == "nothing":
                rows = rows.to(plan.dtype)
            inner = _inner(plan, rows, gain, offset)
            if residual is None:
                found = [gemm.product(inner, w, b) for w, b in zip(weights, biases, strict=True)]  # type: ignore[arg-type]
            else:
                other = residual.reshape(-1, residual.shape[-1]).contiguous()
                found = [gemm.product_onto(inner, weights[0], biases[0], other)]  # type: ignore[arg-type]
        # What stands before needs its input for its own gradient; a product for its weight's.
        kept = rows if plan.kind != "nothing" or any(ctx.needs_input_grad[5::2]) else None
        ctx.save_for_backward(kept, gain, offset, *weights)
        found = [y.view(*x.shape[:-1], y.shape[-1]) for y in found]
        return found[0] if len(found) == 1 else tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """A gradient for each input of forward that needs one."""
        plan, needed = ctx.plan, ctx.needs_input_grad
        x, gain, offset, *weights = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            wide = [g.reshape(-1, g.shape[-1]) for g in gradients]
            narrow = [g.to(plan.dtype) for g in wide]
            found: list[Tensor | None] = [None] * len(needed)
            found[1] = gradients[0] if needed[1] else None
            inner = None
            if any(needed[5::2]):
                assert x is not None
                inner = _inner(plan, x, gain, offset)
            _of_layers(needed, inner, narrow, wide, found)
            del inner
            if any(needed[2:5]):
                total = None
                for g, weight in zip(narrow, weights, strict=True):
                    total = gemm.back(g, weight, total)
                assert total is not None
                del narrow, wide
                found[2:5] = _of_input(plan, total, x, gain, offset, list(needed[2:5]))
                if found[2] is not None:
                    found[2] = found[2].to(ctx.x_dtype).view(ctx.shape)
        return tuple(found)


def _inner(plan: Plan, x: Tensor, gain: Tensor | None, offset: Tensor | None) -> Tensor:
    """(M, K), swiglu (M, 2K) -> what is multiplied, (M, K) of the plan's dtype."""
    if plan.kind == "nothing":
        return x
    if plan.kind == "norm":
        assert gain is not None
        assert offset is not None
        return before.norm(x, gain, offset, plan.eps).to(plan.dtype)
    return before.act(x, plan.kind)


def _of_layers(
    needed: tuple[bool, ...], inner: Tensor | None, narrow: list[Tensor], wide: list[Tensor],
    found: list[Tensor | None],
) -> None:  # fmt: skip
    """Puts the gradients of weights and biases in their places, from 5 on."""
    for index, (g, exact) in enumerate(zip(narrow, wide, strict=True)):
        if needed[5 + 2 * index]:
            assert inner is not None
            found[5 + 2 * index] = gemm.weight_gradient(g, inner)
        if needed[6 + 2 * index]:
            found[6 + 2 * index] = exact.sum(dim=0, dtype=torch.float32)


def _of_input(
    plan: Plan, gradient: Tensor, x: Tensor | None, gain: Tensor | None, offset: Tensor | None,
    needed: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """The gradient of what was multiplied, written over -> those of x, gain and offset."""
    if plan.kind == "nothing":
        return [gradient, None, None]
    assert x is not None
    if plan.kind == "norm":
        assert gain is not None
        assert offset is not None
        return list(before.norm_back(gradient.float(), x, gain, offset, plan.eps, needed))
    return [before.act_back(gradient, x, plan.kind), None, None]
