"""The three products of a linear layer and its gradients, by the library that does each fastest.

oneDNN takes weights that are packed in its own order; packing costs a fiftieth of the product of
3000 rows, so it is done for every product anew and nothing stale can be left.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.fast import private
from vitlib.fast.machine import route, this_machine

FEWEST_ROWS = 400  # below, packing a weight costs more than it gains


def packs(rows: int, dtype: torch.dtype) -> bool:
    """Whether oneDNN's own kernels serve so many rows."""
    if rows < FEWEST_ROWS:
        return False
    found = route("bf16" if dtype == torch.bfloat16 else "fp32")
    return bool(found and found.packed) and private.has_packed_linear(dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(M, K), (N, K), (N,) -> x W^T + b, (M, N), in the dtype of x."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if packs(len(x), x.dtype):
        return private.linear(x, private.pack(weight), bias)
    return F.linear(x, weight, bias)


def product_onto(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    """As product, plus `other` (M, N) float32 -> (M, N) float32."""
    if x.dtype == torch.float32 and packs(len(x), x.dtype):
        return private.linear_with(x, private.pack(weight), bias, other, "add")
    # float() and add_: a sum of two dtypes takes four times as long.
    return product(x, weight, bias).float().add_(other)


def back(gradient: Tensor, weight: Tensor, other: Tensor | None = None) -> Tensor:
    """(M, N), (N, K) -> the input's gradient, g W, (M, K), plus `other` where one is given."""
    weight = weight.to(gradient.dtype)
    if not packs(len(gradient), gradient.dtype):
        found = gradient @ weight
        return found if other is None else found.add_(other)
    packed = private.pack(weight.t())
    if other is None:
        return private.linear(gradient, packed, None)
    return private.linear_with(gradient, packed, None, other, "add")


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """(M, N), (M, K) -> the weight's gradient, g^T x, (N, K) float32.

    oneDNN turns its first matrix around: the narrower one. On AMD only; elsewhere, and in bfloat16,
    torch's own product is as fast.
    """
    rows, dtype = gradient.shape[0], gradient.dtype
    if dtype != torch.float32 or this_machine().vendor != "amd" or not packs(rows, dtype):
        return (gradient.t() @ x).float()
    if gradient.shape[1] <= x.shape[1]:
        return private.linear(gradient.t(), x.t(), None)
    return private.linear(x.t(), gradient.t(), None).t().contiguous()
