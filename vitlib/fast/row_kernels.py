"""The kernels of row_ops.py in Triton: one program a row, every sum in float32.

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

from vitlib.fast.rows import FP8, FP8_MAX, SMALLEST, empty_rows

_LARGEST: tl.constexpr = tl.constexpr(FP8_MAX)
_SMALLEST: tl.constexpr = tl.constexpr(SMALLEST)


@triton.jit
def _store_row(out, scale, row, at, there, width, value, quantised: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store a row as it is, or as levels and the scale that makes its largest one E4M3's."""
    if quantised:
        largest = tl.max(tl.where(there, tl.abs(value), 0.0), 0)
        unit = tl.maximum(largest, _SMALLEST) / _LARGEST
        tl.store(scale + row, unit)
        value = tl.minimum(tl.maximum(value / unit, -_LARGEST), _LARGEST)
    tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=there)


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x, y, gain, offset, extra, stream, out, scale, x_stride, width, eps,
    has_y: tl.constexpr, has_extra: tl.constexpr, quantised: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    there = at < width
    a = tl.load(x + row * x_stride + at, mask=there, other=0.0).to(tl.float32)
    if has_y:
        a += tl.load(y + row * width + at, mask=there, other=0.0).to(tl.float32)
        kept = a
        if has_extra:
            kept += tl.load(extra + at, mask=there, other=0.0).to(tl.float32)
        tl.store(stream + row * width + at, kept.to(stream.dtype.element_ty), mask=there)
    mean = tl.sum(a, 0) / width
    d = tl.where(there, a - mean, 0.0)
    d = d / tl.sqrt(tl.sum(d * d, 0) / width + eps)
    g = tl.load(gain + at, mask=there, other=0.0)
    b = tl.load(offset + at, mask=there, other=0.0)
    _store_row(out, scale, row, at, there, width, d * g + b, quantised)


@triton.jit
def _activate_kernel(  # type: ignore[no-untyped-def]
    x, out, scale, width, activation: tl.constexpr, gated: tl.constexpr,
    quantised: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    there = at < width
    start = row * (width * 2 if gated else width)
    a = tl.load(x + start + at, mask=there, other=0.0).to(tl.float32)
    if activation == "gelu":
        a = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    elif activation == "gelu_tanh":
        # tanh(u) = 2 sigmoid(2u) - 1, so that 0.5 a (1 + tanh(u)) = a sigmoid(2u).
        a = a * tl.sigmoid(1.5957691216057308 * (a + 0.044715 * a * a * a))
    elif activation == "silu":
        a = a * tl.sigmoid(a)
    if gated:
        a *= tl.load(x + start + width + at, mask=there, other=0.0).to(tl.float32)
    _store_row(out, scale, row, at, there, width, a, quantised)


@triton.jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    qkv, table, q, k, tokens, patches, width, head_dim, block: tl.constexpr
):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    there = at < width
    source = qkv + row * 3 * width + tl.program_id(1) * width
    x = tl.load(source + at, mask=there, other=0.0).to(tl.float32)
    patch = row % tokens - (tokens - patches)
    # Class tokens and registers are not turned. (Of a row, as a mask is of its columns.)
    turned = there & (at * 0 + patch >= 0)
    channel = at % head_dim
    is_left = channel < head_dim // 2
    partner = at + tl.where(is_left, head_dim // 2, -(head_dim // 2))
    other = tl.load(source + partner, mask=there, other=0.0).to(tl.float32)
    other = tl.where(is_left, -other, other)
    cos = tl.load(table + patch * head_dim + channel, mask=turned, other=1.0)
    sin = tl.load(table + (patches + patch) * head_dim + channel, mask=turned, other=0.0)
    value = x * cos + other * sin
    target = k if tl.program_id(1) == 1 else q
    tl.store(target + row * width + at, value.to(q.dtype.element_ty), mask=there)


def norm_rows(
    x: Tensor,
    y: Tensor | None,
    gain: Tensor,
    offset: Tensor,
    eps: float,
    extra: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As row_ops.define_norm_rows."""
    shape, width = x.shape, x.shape[-1]
    rows = x.reshape(-1, width)  # a view where one token an image is taken
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    stream = x.new_empty(0 if y is None else shape)
    out, scale = empty_rows(x, width, dtype)
    added = x if y is None else y.contiguous()
    _norm_kernel[(len(rows),)](
        rows, added, gain, offset, gain if extra is None else extra, stream, out, scale,
        rows.stride(0), width, eps, has_y=y is not None, has_extra=extra is not None,
        quantised=dtype == FP8, **_launch(width),
    )  # fmt: skip
    return stream, out, scale


def activate_rows(
    x: Tensor, activation: str, gated: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As row_ops.define_activate_rows."""
    x = x.contiguous()
    width = x.shape[-1] // (2 if gated else 1)
    out, scale = empty_rows(x, width, dtype)
    _activate_kernel[(len(out),)](
        x, out, scale, width, activation=activation, gated=gated, quantised=dtype == FP8,
        **_launch(width),
    )  # fmt: skip
    return out, scale


def rotate(qkv: Tensor, table: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """As row_ops.define_rotate."""
    (b, t, width), qkv = qkv.shape, qkv.contiguous()
    width //= 3
    q, k = (qkv.new_empty(b, t, num_heads, width // num_heads) for _ in range(2))
    _rotate_kernel[(b * t, 2)](
        qkv, table.contiguous(), q, k, t, table.shape[1], width, width // num_heads,
        **_launch(width),
    )  # fmt: skip
    return q, k


def _launch(width: int) -> dict[str, Any]:
    """How many columns a program holds, and by how many warps: 8 to 32 columns a thread."""
    block = triton.next_power_of_2(width)
    return {"block": block, "num_warps": min(max(block // 256, 1), 16)}
