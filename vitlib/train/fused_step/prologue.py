"""What stands before a linear layer, and its gradient: nothing, a norm, or an activation.

Each is little work beside the product, so that only its input is kept for the gradient, and what it
gave is computed again.

Shapes: M rows, K numbers each; what SwiGLU takes is 2K wide.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Before = Literal["nothing", "norm", "gelu", "gelu_tanh", "quick_gelu", "swiglu"]
Stats = tuple[Tensor, Tensor]  # the mean of each row, and 1 over its deviation
QUICK = 1.702  # x * sigmoid(1.702 x) is silu(1.702 x) / 1.702 (1606.08415)

_ops = torch.ops.aten


def norm(x: Tensor, gain: Tensor, offset: Tensor, eps: float) -> tuple[Tensor, Stats]:
    """(M, K) -> the same, normed (1607.06450); and what its rows were normed by."""
    found, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], gain, offset, eps)
    return found, (mean, rstd)


def norm_back(
    gradient: Tensor, x: Tensor, gain: Tensor, offset: Tensor, stats: Stats, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of norm's input, gain and offset, those that are needed."""
    shape, (mean, rstd) = x.shape[-1:], stats
    return _ops.native_layer_norm_backward(  # type: ignore[no-any-return]
        gradient, x, shape, mean, rstd, gain, offset, needed
    )


def act(x: Tensor, kind: Before) -> Tensor:
    """(..., K), swiglu (..., 2K) -> (..., K): the activations of encoder.py. Differentiable."""
    if kind == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        return _ops.silu(gate) * up  # type: ignore[no-any-return]
    if kind == "quick_gelu":
        return _ops.silu(x * QUICK) / QUICK  # type: ignore[no-any-return]
    return _ops.gelu(x, approximate=_form(kind))  # type: ignore[no-any-return]


def act_back(gradient: Tensor, x: Tensor, kind: Before) -> Tensor:
    """The gradient of act's input; what came is written over where it fits."""
    if kind == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        silu = _ops.silu(gate)
        return torch.cat([_ops.silu_backward(gradient * up, gate), gradient * silu], dim=-1)
    if kind == "quick_gelu":
        return _ops.silu_backward(gradient, x * QUICK)  # type: ignore[no-any-return]
    return _ops.gelu_backward(  # type: ignore[no-any-return]
        gradient, x, approximate=_form(kind), grad_input=gradient
    )


def _form(kind: Before) -> str:
    return "tanh" if kind == "gelu_tanh" else "none"
