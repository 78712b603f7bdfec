"""The kernels of row_ops.py in Triton: one program computes one row, with sums in float32.

Triton comes with torch's builds for CUDA. With TRITON_INTERPRET=1 the kernels run on a CPU, where
they are tested beside their definitions.

Shapes: as in row_ops.py.
"""

# Triton reads types of arguments from annotations as they stand, so they are not postponed here.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitlib.fast.quantized_rows import FP8, FP8_MAX, SMALLEST_ROW_MAX, empty_rows

_FP8_MAX: tl.constexpr = tl.constexpr(FP8_MAX)
_SMALLEST_ROW_MAX: tl.constexpr = tl.constexpr(SMALLEST_ROW_MAX)


@triton.jit
def _store_row(out, scale, row, columns, mask, width, value, quantizes: tl.constexpr):
    """Store a row in the output's dtype, or quantized, with its scale."""
    if quantizes:
        largest = tl.max(tl.where(mask, tl.abs(value), 0.0), 0)
        unit = tl.maximum(largest, _SMALLEST_ROW_MAX) / _FP8_MAX
        tl.store(scale + row, unit)
        # The division may round to just above the largest number of E4M3, which then is NaN.
        value = tl.minimum(tl.maximum(value / unit, -_FP8_MAX), _FP8_MAX)
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _norm_kernel(
    x, y, weight, bias, extra_bias, stream, out, scale, x_stride, width, eps,
    has_y: tl.constexpr, has_bias: tl.constexpr, has_extra_bias: tl.constexpr,
    centres: tl.constexpr, quantizes: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    # 64 bits: the number of rows times their width may exceed 32.
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    mask = columns < width
    a = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if has_y:
        a += tl.load(y + row * width + columns, mask=mask, other=0.0).to(tl.float32)
        total = a
        if has_extra_bias:
            total += tl.load(extra_bias + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(stream + row * width + columns, total.to(stream.dtype.element_ty), mask=mask)
    mean = tl.sum(a, 0) / width if centres else 0.0
    # Columns beyond the width were loaded as 0: less the mean they would count in the variance.
    d = tl.where(mask, a - mean, 0.0)
    d = d / tl.sqrt(tl.sum(d * d, 0) / width + eps)
    value = d * tl.load(weight + columns, mask=mask, other=0.0)
    if has_bias:
        value += tl.load(bias + columns, mask=mask, other=0.0)
    _store_row(out, scale, row, columns, mask, width, value, quantizes)


@triton.jit
def _activate_kernel(
    x, out, scale, width, activation: tl.constexpr, gated: tl.constexpr,
    quantizes: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    mask = columns < width
    start = row * (width * 2 if gated else width)
    a = tl.load(x + start + columns, mask=mask, other=0.0).to(tl.float32)
    if activation == "gelu":
        a = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    elif activation == "gelu_tanh":
        # tanh(u) = 2 sigmoid(2u) - 1, so that 0.5 a (1 + tanh(u)) = a sigmoid(2u).
        a = a * tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
    elif activation == "silu":
        a = a * tl.sigmoid(a)
    if gated:
        a *= tl.load(x + start + width + columns, mask=mask, other=0.0).to(tl.float32)
    _store_row(out, scale, row, columns, mask, width, a, quantizes)


@triton.jit
def _rotate_kernel(qkv, table, q, k, tokens, patches, width, head_dim, block: tl.constexpr):
    # The second axis of the grid is 0 for queries and 1 for keys.
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    mask = columns < width
    source = qkv + row * 3 * width + tl.program_id(1) * width
    x = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
    patch = row % tokens - (tokens - patches)
    # Class tokens and registers, whose patch is below 0, are not rotated. `columns * 0` makes the
    # row's condition a vector, as a mask is one.
    rotates = mask & (columns * 0 + patch >= 0)
    channel = columns % head_dim
    is_left = channel < head_dim // 2
    partner = columns + tl.where(is_left, head_dim // 2, -(head_dim // 2))
    other = tl.load(source + partner, mask=mask, other=0.0).to(tl.float32)
    other = tl.where(is_left, -other, other)
    cos = tl.load(table + patch * head_dim + channel, mask=rotates, other=1.0)
    sin = tl.load(table + (patches + patch) * head_dim + channel, mask=rotates, other=0.0)
    value = x * cos + other * sin
    target = k if tl.program_id(1) == 1 else q
    tl.store(target + row * width + columns, value.to(q.dtype.element_ty), mask=mask)


def norm_rows(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    extra_bias: Tensor | None,
    dtype: torch.dtype,
    kind: str = "layer",
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute row_ops.define_norm_rows in one kernel.

    Args:
        x: The stream (..., D).
        y: The output of a branch (..., D), or None.
        weight: (D,).
        bias: (D,), or None.
        eps: Added to the variance, or to the mean square.
        extra_bias: (D,), added to the returned stream alone; or None.
        dtype: Of the rows.
        kind: "layer" or "rms".

    Returns:
        The stream (empty without y), the rows (M, D), and their scales (empty but for E4M3).
    """
    shape, width = x.shape, x.shape[-1]
    rows = x.reshape(-1, width)  # still a view where x is one token of each image
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    stream = x.new_empty(0 if y is None else shape)
    out, scale = empty_rows(x, width, dtype)
    # A kernel takes a tensor for every argument: absent ones get any other, which is not read.
    added = x if y is None else y.contiguous()
    shift, extra = (weight if t is None else t for t in (bias, extra_bias))
    _norm_kernel[(len(rows),)](
        rows, added, weight, shift, extra, stream, out, scale, rows.stride(0), width, eps,
        has_y=y is not None, has_bias=bias is not None, has_extra_bias=extra_bias is not None,
        centres=kind == "layer", quantizes=dtype == FP8, **_launch_options(width),
    )  # fmt: skip
    return stream, out, scale


def activate_rows(
    x: Tensor, activation: str, gated: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute row_ops.define_activate_rows in one kernel.

    Args:
        x: (..., D), or (..., 2 D) where gated.
        activation: "gelu", "gelu_tanh", "silu" or "none".
        gated: The first half, activated, multiplies the second half.
        dtype: Of the rows.

    Returns:
        The rows (M, D), and their scales (empty but for E4M3).
    """
    x = x.contiguous()
    width = x.shape[-1] // (2 if gated else 1)
    out, scale = empty_rows(x, width, dtype)
    _activate_kernel[(len(out),)](
        x, out, scale, width, activation=activation, gated=gated, quantizes=dtype == FP8,
        **_launch_options(width),
    )  # fmt: skip
    return out, scale


def rotate(qkv: Tensor, table: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Compute row_ops.define_rotate in one kernel.

    Args:
        qkv: (B, T, 3 D).
        table: Cosines and sines of the N patches, (2, N, K) float32.
        num_heads: H.

    Returns:
        Queries and keys, (B, T, H, K) each.
    """
    (b, t, width), qkv = qkv.shape, qkv.contiguous()
    width //= 3
    q, k = (qkv.new_empty(b, t, num_heads, width // num_heads) for _ in range(2))
    _rotate_kernel[(b * t, 2)](
        qkv, table.contiguous(), q, k, t, table.shape[1], width, width // num_heads,
        **_launch_options(width),
    )  # fmt: skip
    return q, k


def _launch_options(width: int) -> dict[str, Any]:
    """Return the columns and the warps of a program: 8 to 32 columns a thread."""
    block = triton.next_power_of_2(width)
    return {"block": block, "num_warps": min(max(block // 256, 1), 16)}
