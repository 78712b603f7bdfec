"""The operation before a linear layer, and its gradient: none, LayerNorm or an activation.

Each takes little time beside the product. So only its input is saved for the backward pass, which
computes its output again.

Shapes: M rows, K features; the input of SwiGLU is 2K wide.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vitlib.fast.block import QUICK_GELU_SCALE

Prologue = Literal["none", "norm", "gelu", "gelu_tanh", "quick_gelu", "swiglu"]
NormStats = tuple[Tensor, Tensor]  # mean of each row, and 1 over its standard deviation

_aten = torch.ops.aten


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, NormStats]:
    """Normalise rows (1607.06450).

    Args:
        x: (M, K).
        gamma: (K,).
        beta: (K,).
        eps: Added to the variance.

    Returns:
        (M, K), and the statistics for the backward pass.
    """
    normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], gamma, beta, eps)
    return normed, (mean, rstd)


def layer_norm_backward(
    gradient: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, stats: NormStats, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of LayerNorm.

    Args:
        gradient: Of the output, (M, K).
        x: The input.
        gamma: (K,).
        beta: (K,).
        stats: From layer_norm.
        needed: Which of the three results are needed.

    Returns:
        Gradients of x, gamma and beta; None for those that are not needed.
    """
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None] = (
        _aten.native_layer_norm_backward(gradient, x, x.shape[-1:], *stats, gamma, beta, needed)
    )
    return gradients


def activate(x: Tensor, kind: Prologue) -> Tensor:
    """Apply an activation of encoder.py, with a graph if x has one.

    Args:
        x: (..., K); for SwiGLU (..., 2K).
        kind: The activation.

    Returns:
        (..., K).
    """
    if kind == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        output: Tensor = _aten.silu(gate) * up
    elif kind == "quick_gelu":
        # x sigmoid(s x) is silu(s x) / s, which is one kernel (1606.08415).
        output = _aten.silu(x * QUICK_GELU_SCALE) / QUICK_GELU_SCALE
    else:
        output = _aten.gelu(x, approximate=_approximation(kind))
    return output


def activate_backward(gradient: Tensor, x: Tensor, kind: Prologue) -> Tensor:
    """Compute the gradient of activate's input.

    Args:
        gradient: Of the output, (M, K). GELU overwrites it, to save memory.
        x: The input.
        kind: The activation.

    Returns:
        A gradient of the shape of x.
    """
    if kind == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        silu = _aten.silu(gate)
        return torch.cat([_aten.silu_backward(gradient * up, gate), gradient * silu], dim=-1)
    if kind == "quick_gelu":
        output: Tensor = _aten.silu_backward(gradient, x * QUICK_GELU_SCALE)
    else:
        output = _aten.gelu_backward(
            gradient, x, approximate=_approximation(kind), grad_input=gradient
        )
    return output


def _approximation(kind: Prologue) -> str:
    """Return torch's name of the form of GELU."""
    return "tanh" if kind == "gelu_tanh" else "none"
