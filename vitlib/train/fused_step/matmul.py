"""The three products of a linear layer and its gradients, each by the fastest library.

oneDNN takes weights as they are, or packed in its own order. Packing gains 2 to 5 % in float32 for
large weights, costs more than it gains for small ones, and gains nothing in bfloat16. It takes a
fiftieth of the product of 3000 rows. So weights are packed anew for every product, and no stale
copy can remain after the optimizer's step.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.fast import onednn_ops
from vitlib.fast.cpu import kernel_plan, this_machine

MIN_ROWS = 400  # below, torch's own product is faster
MIN_PACKED_WEIGHTS = 300_000  # below, packing costs more than it gains


def uses_onednn(rows: int, dtype: torch.dtype) -> bool:
    """Return True if oneDNN's own kernels are faster than torch's.

    Args:
        rows: M.
        dtype: Of the product.
    """
    if rows < MIN_ROWS:
        return False
    # On Intel oneDNN is as fast as MKL with weights that are packed once, and slower with weights
    # that are packed anew: a step of B/16 takes 2.8 s, and 2.4 s with MKL.
    if dtype == torch.float32 and this_machine().vendor == "intel":
        return False
    plan = kernel_plan("bf16" if dtype == torch.bfloat16 else "fp32")
    return bool(plan and plan.packed) and onednn_ops.has_packed_linear(dtype)


def _pack(weight: Tensor) -> Tensor:
    """Return a weight (N, K) in the order in which oneDNN multiplies it fastest."""
    gains = weight.dtype == torch.float32 and weight.numel() >= MIN_PACKED_WEIGHTS
    return onednn_ops.pack(weight) if gains else weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W^T + b in the dtype of x.

    Args:
        x: (M, K).
        weight: (N, K).
        bias: (N,), or None.

    Returns:
        (M, N).
    """
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if uses_onednn(len(x), x.dtype):
        return onednn_ops.linear(x, _pack(weight), bias)
    return F.linear(x, weight, bias)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """Compute residual + x W^T + b in float32.

    Args:
        x: (M, K).
        weight: (N, K).
        bias: (N,), or None.
        residual: (M, N) float32.

    Returns:
        (M, N) float32.
    """
    if x.dtype == torch.float32 and uses_onednn(len(x), x.dtype):
        return onednn_ops.linear_binary(x, _pack(weight), bias, residual, "add")
    # float() and then add_(): torch's sum of two dtypes takes four times as long.
    return linear(x, weight, bias).float().add_(residual)


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """Compute the input's gradient, g W.

    Args:
        gradient: Of the output, (M, N).
        weight: (N, K).

    Returns:
        (M, K) in the dtype of the gradient.
    """
    weight = weight.to(gradient.dtype)
    if not uses_onednn(len(gradient), gradient.dtype):
        return gradient @ weight
    return onednn_ops.linear(gradient, _pack(weight.t()), None)


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Compute the weight's gradient, g^T x, by torch.

    oneDNN would transpose one of them first, which takes a tenth of the product.

    Args:
        gradient: Of the output, (M, N).
        x: The input, (M, K).

    Returns:
        (N, K) float32.
    """
    return (gradient.t() @ x).float()
