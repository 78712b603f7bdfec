"""The three products of a linear layer and its gradients, by the library that does each fastest.

oneDNN takes weights as they are, or packed in its own order, which gains 2 to 5 % in float32 where
they are large, costs more where they are small, and gains nothing in bfloat16. Packing takes a
fiftieth of the product of 3000 rows, so it is done anew for every one and nothing stale is left.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.fast import onednn_ops
from vitlib.fast.cpu import kernel_plan

FEWEST_ROWS = 400  # below, torch's own product is faster
FEWEST_WEIGHTS = 300_000  # below, packing them costs more than it gains


def serves(rows: int, dtype: torch.dtype) -> bool:
    """Whether oneDNN's own kernels serve so many rows."""
    if rows < FEWEST_ROWS:
        return False
    found = kernel_plan("bf16" if dtype == torch.bfloat16 else "fp32")
    return bool(found and found.packed) and onednn_ops.has_packed_linear(dtype)


def _ready(weight: Tensor) -> Tensor:
    """(N, K) as oneDNN takes it fastest."""
    gains = weight.dtype == torch.float32 and weight.numel() >= FEWEST_WEIGHTS
    return onednn_ops.pack(weight) if gains else weight


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(M, K), (N, K), (N,) -> x W^T + b, (M, N), in the dtype of x."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if serves(len(x), x.dtype):
        return onednn_ops.linear(x, _ready(weight), bias)
    return F.linear(x, weight, bias)


def product_onto(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """As product, plus `other` (M, N) float32 -> (M, N) float32."""
    if x.dtype == torch.float32 and serves(len(x), x.dtype):
        return onednn_ops.linear_binary(x, _ready(weight), bias, other, "add")
    # float() and add_: a sum of two dtypes takes four times as long.
    return product(x, weight, bias).float().add_(other)


def back(gradient: Tensor, weight: Tensor) -> Tensor:
    """(M, N), (N, K) -> the input's gradient, g W, (M, K)."""
    weight = weight.to(gradient.dtype)
    if not serves(len(gradient), gradient.dtype):
        return gradient @ weight
    return onednn_ops.linear(gradient, _ready(weight.t()), None)


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """(M, N), (M, K) -> the weight's gradient, g^T x, (N, K) float32.

    By torch: oneDNN would first turn one of them around, which takes a tenth of the product.
    """
    return (gradient.t() @ x).float()
