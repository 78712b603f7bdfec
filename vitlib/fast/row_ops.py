"""What a block on a GPU does to the rows between its products, each step in one kernel.

How data flows: CudaBlock calls norm(), add_norm(), activate() and rotate(). Each is an operation of
torch's dispatcher, so that CUDA graphs, torch.compile, FakeTensors and a count of kernels see one
call. On a GPU that has Triton it is a kernel of row_kernels.py; elsewhere it is its definition,
which stands below in plain torch and is what the kernels are tested against.

For a product in 8-bit floats the same kernel quantises its result, a scale a row: see fp8.py.

Shapes: B images, T tokens, M rows, D columns, H heads, K = D / H.
Sources: Ba et al. 1607.06450 (LayerNorm); Hendrycks and Gimpel 1606.08415 (GELU); Shazeer
2002.05202 (gated MLP); Su et al. 2104.09864 (rotary positions).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.encoder import apply_rope
from vitlib.fast.dispatch import OPS, register
from vitlib.fast.rows import FP8, FP8_MAX, SMALLEST, Quantised, Rows, empty_rows


class Affine(NamedTuple):
    """Gain and offset of a LayerNorm, (D,) float32."""

    weight: Tensor
    bias: Tensor
    eps: float


def norm(x: Tensor, by: Affine, dtype: torch.dtype) -> Rows:
    """Normalise rows.

    Args:
        x: (..., D), of any floating dtype.
        by: The norm.
        dtype: Of the result; E4M3 gives quantised rows.

    Returns:
        (..., D), or (M, D) quantised.
    """
    _, out, scale = OPS.norm_rows(x, None, by.weight, by.bias, by.eps, None, dtype)
    return _rows(out, scale, x.shape)


def add_norm(
    x: Tensor, y: Tensor, by: Affine, extra: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Rows]:
    """Add what a branch gives to the residual stream, and normalise the sum.

    Args:
        x: The stream (..., D).
        y: What is added to it, (..., D).
        by: The norm.
        extra: (D,), added to the returned stream and not to what is normalised: the bias of the
            product that is later added in place.
        dtype: Of the normalised rows; E4M3 gives quantised rows.

    Returns:
        The stream x + y + extra (..., D) in x's dtype, in memory of its own, and norm(x + y), of a
        sum that is not rounded.
    """
    total, out, scale = OPS.norm_rows(x, y, by.weight, by.bias, by.eps, extra, dtype)
    return total, _rows(out, scale, x.shape)


def activate(x: Tensor, activation: str, gated: bool, dtype: torch.dtype) -> Rows:
    """Apply an activation to rows.

    Args:
        x: (..., D), or (..., 2 D) where gated: the gate first.
        activation: "gelu", "gelu_tanh", "silu" or "none".
        gated: Whether the first half, activated, multiplies the second.
        dtype: Of the result; E4M3 gives quantised rows.

    Returns:
        (..., D), or (M, D) quantised.
    """
    out, scale = OPS.activate_rows(x, activation, gated, dtype)
    return _rows(out, scale, (*x.shape[:-1], out.shape[-1]))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return GELU of a linear layer, in its tanh form.

    On a GPU cuBLASLt applies it to the product's float32 sums before they are rounded.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).

    Returns:
        (..., N) in x's dtype.
    """
    rows: Tensor = OPS.linear_gelu(x.reshape(-1, x.shape[-1]), weight, bias)
    return rows.view(*x.shape[:-1], -1)


def rotate(qkv: Tensor, table: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Turn the queries and keys of the patches, which are the last tokens.

    Args:
        qkv: (B, T, 3 D).
        table: Cosines and sines of the N patches, (2, N, K) float32.
        num_heads: H.

    Returns:
        Queries and keys, (B, H, T, K) each, in memory laid out as (B, T, H, K).
    """
    q, k = OPS.rotate(qkv, table, num_heads)
    return q.transpose(1, 2), k.transpose(1, 2)


def _rows(out: Tensor, scale: Tensor, shape: tuple[int, ...] | torch.Size) -> Rows:
    return Quantised(out, scale) if out.dtype == FP8 else out.view(shape)


# --- definitions ----------------------------------------------------------------------------------


def quantise(x: Tensor) -> Quantised:
    """(M, D) -> the same in E4M3, scaled so that a row's largest number is E4M3's largest."""
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST) / FP8_MAX
    return Quantised((x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale)


def define_norm_rows(
    x: Tensor,
    y: Tensor | None,
    gain: Tensor,
    offset: Tensor,
    eps: float,
    extra: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of norm() and add_norm(): stream, rows (M, D), scale; empty where unused."""
    width = x.shape[-1]
    total = x.float() if y is None else x.float() + y.float()
    rows = F.layer_norm(total, (width,), gain, offset, eps).view(-1, width)
    stream = x.new_empty(0)
    if y is not None:
        # A copy even where nothing is to be rounded: the caller adds to it in place.
        stream = (total if extra is None else total + extra).to(x.dtype)
    return stream, *_as_dtype(rows, dtype)


def define_activate_rows(
    x: Tensor, activation: str, gated: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The definition of activate(): rows (M, D), scale."""
    rows = x.reshape(-1, x.shape[-1]).float()
    gate, up = rows.chunk(2, dim=-1) if gated else (rows, None)
    gate = _activated(gate, activation)
    return _as_dtype(gate if up is None else gate * up, dtype)


def _activated(x: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return x
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def define_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition of linear_gelu(), of rows (M, K)."""
    sums = F.linear(x.float(), weight.float(), bias.float())
    return F.gelu(sums, approximate="tanh").to(x.dtype)


def define_rotate(qkv: Tensor, table: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """The definition of rotate(): queries and keys (B, T, H, K)."""
    (b, t, _), first = qkv.shape, qkv.shape[1] - table.shape[1]
    q, k, _ = qkv.view(b, t, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return tuple(apply_rope(x, first, table).transpose(1, 2).contiguous() for x in (q, k))  # type: ignore[return-value]


def _as_dtype(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dtype == FP8:
        return quantise(rows)
    # A new tensor: an operation may not return what it was given.
    return rows.to(dtype, copy=True), rows.new_empty(0)


# --- what is given to the dispatcher --------------------------------------------------------------


def _by_triton(name: str, definition: Callable[..., Any]) -> Callable[..., Any]:
    """Return what runs a kernel of row_kernels.py, or its definition where Triton is not there."""

    def run(*arguments: Any) -> Any:
        kernels = _triton_kernels()
        return (definition if kernels is None else getattr(kernels, name))(*arguments)

    return run


def _on_gpu_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


@cache
def _triton_kernels() -> Any:
    """Return the module of Triton's kernels; None where Triton is not there, as on Windows."""
    try:
        from vitlib.fast import row_kernels
    except ImportError:
        return None
    return row_kernels


def _fake_norm_rows(
    x: Tensor,
    y: Tensor | None,
    gain: Tensor,  # noqa: ARG001
    offset: Tensor,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    extra: Tensor | None,  # noqa: ARG001
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    stream = x.new_empty(0 if y is None else x.shape)
    return stream, *empty_rows(x, x.shape[-1], dtype)


def _fake_activate_rows(
    x: Tensor,
    activation: str,  # noqa: ARG001
    gated: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return empty_rows(x, x.shape[-1] // (2 if gated else 1), dtype)


def _fake_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG001
    return x.new_empty(len(x), len(weight))


def _fake_rotate(qkv: Tensor, table: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    b, t, width = qkv.shape
    shape = b, t, num_heads, width // (3 * num_heads)
    return qkv.new_empty(shape), qkv.new_empty(shape)


register(
    "norm_rows(Tensor x, Tensor? y, Tensor gain, Tensor offset, float eps, Tensor? extra, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    define_norm_rows,
    _by_triton("norm_rows", define_norm_rows),
    _fake_norm_rows,
)
register(
    "activate_rows(Tensor x, str activation, bool gated, ScalarType dtype) -> (Tensor, Tensor)",
    define_activate_rows,
    _by_triton("activate_rows", define_activate_rows),
    _fake_activate_rows,
)
register(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    define_linear_gelu,
    _on_gpu_linear_gelu,
    _fake_linear_gelu,
)
register(
    "rotate(Tensor qkv, Tensor table, int num_heads) -> (Tensor, Tensor)",
    define_rotate,
    _by_triton("rotate", define_rotate),
    _fake_rotate,
)
