"""The steps of a block on a GPU between its matrix products, each in one kernel.

How data flows: CudaBlock calls norm(), add_norm(), activate() and rotate(). Each is an operation of
torch's dispatcher, so that CUDA graphs, torch.compile, FakeTensors and a count of kernels see one
call. On a GPU where Triton works it is a kernel of row_kernels.py. Elsewhere it is its definition
below, in separate operations of torch, which the kernels are tested against.

Before a product in 8-bit floats the same kernel quantizes its result, with a scale for each row:
see fp8.py.

Shapes: B images, T tokens, M rows, D columns, H heads, K = D / H.
Sources: Ba et al. 1607.06450 (LayerNorm); Zhang and Sennrich 1910.07467 (RMSNorm); Hendrycks and
Gimpel 1606.08415 (GELU); Shazeer 2002.05202 (gated MLP); Su et al. 2104.09864 (rotary positions).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.errors import first_line
from vitlib.fast.custom_ops import OPS, register
from vitlib.fast.linears import apply_activation
from vitlib.fast.norms import NormKind, NormWeights, normalize
from vitlib.fast.quantized_rows import (
    FP8,
    FP8_MAX,
    SMALLEST_ROW_MAX,
    QuantizedRows,
    Rows,
    empty_rows,
)
from vitlib.positions import apply_rope

logger = logging.getLogger("vitlib")


def norm(x: Tensor, weights: NormWeights, dtype: torch.dtype) -> Rows:
    """Normalize rows by a LayerNorm or RMSNorm.

    Args:
        x: (..., D), of any floating dtype.
        weights: The norm.
        dtype: Of the result; E4M3 gives quantized rows.

    Returns:
        (..., D), or (M, D) quantized.
    """
    weight, bias, eps, kind = weights
    _, out, scale = OPS.norm_rows(x, None, weight, bias, eps, None, dtype, kind)
    return _to_rows(out, scale, x.shape)


def add_norm(
    x: Tensor, y: Tensor, weights: NormWeights, extra_bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Rows]:
    """Add the output of a branch to the residual stream, and normalize the sum.

    Args:
        x: The stream (..., D).
        y: The output of the branch (..., D).
        weights: The norm.
        extra_bias: (D,), added to the returned stream and not to what is normalized: the bias of
            the product that is later added in place. Or None.
        dtype: Of the normalized rows; E4M3 gives quantized rows.

    Returns:
        The stream x + y + extra_bias (..., D) in x's dtype, in new memory, and norm(x + y), of a
        sum that is not rounded.
    """
    weight, bias, eps, kind = weights
    total, out, scale = OPS.norm_rows(x, y, weight, bias, eps, extra_bias, dtype, kind)
    return total, _to_rows(out, scale, x.shape)


def activate(x: Tensor, activation: str, gated: bool, dtype: torch.dtype) -> Rows:
    """Apply an activation to rows.

    Args:
        x: (..., D), or (..., 2 D) where gated: the gate first.
        activation: "gelu", "gelu_tanh", "silu" or "none".
        gated: The first half, activated, multiplies the second half.
        dtype: Of the result; E4M3 gives quantized rows.

    Returns:
        (..., D), or (M, D) quantized.
    """
    out, scale = OPS.activate_rows(x, activation, gated, dtype)
    return _to_rows(out, scale, (*x.shape[:-1], out.shape[-1]))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear layer and GELU in its tanh form.

    On a GPU cuBLASLt applies GELU to the product's float32 sums before they are rounded.

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
    """Apply rotary embeddings to the queries and keys of the patches, which are the last tokens.

    Args:
        qkv: (B, T, 3 D).
        table: Cosines and sines of the N patches, (2, N, K) or (2, H, N, K) float32.
        num_heads: H.

    Returns:
        Queries and keys, (B, H, T, K) each, in memory laid out as (B, T, H, K).
    """
    if table.ndim == 4:  # a table for each head, which the kernel does not read
        q, k = define_rotate(qkv, table, num_heads)
    else:
        q, k = OPS.rotate(qkv, table, num_heads)
    return q.transpose(1, 2), k.transpose(1, 2)


def _to_rows(out: Tensor, scale: Tensor, shape: tuple[int, ...] | torch.Size) -> Rows:
    """Give float rows their shape back, and pair quantized rows with their scales."""
    return QuantizedRows(out, scale) if out.dtype == FP8 else out.view(shape)


# --- definitions ----------------------------------------------------------------------------------


def quantize_fp8(x: Tensor) -> QuantizedRows:
    """Quantize rows to E4M3, so that each row's largest number becomes E4M3's largest.

    Args:
        x: (M, D).

    Returns:
        The rows and their scales.
    """
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST_ROW_MAX) / FP8_MAX
    return QuantizedRows((x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale)


def define_norm_rows(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    extra_bias: Tensor | None,
    dtype: torch.dtype,
    kind: NormKind = "layer",
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the definition of norm() and add_norm().

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
    width = x.shape[-1]
    total = x.float() if y is None else x.float() + y.float()
    rows = normalize(total, NormWeights(weight, bias, eps, kind)).reshape(-1, width)
    stream = x.new_empty(0)
    if y is not None:
        # A copy even where nothing is to be rounded: the caller adds to it in place.
        stream = (total if extra_bias is None else total + extra_bias).to(x.dtype)
    return stream, *_cast_rows(rows, dtype)


def define_activate_rows(
    x: Tensor, activation: str, gated: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute the definition of activate().

    Args:
        x: (..., D), or (..., 2 D) where gated.
        activation: "gelu", "gelu_tanh", "silu" or "none".
        gated: The first half, activated, multiplies the second half.
        dtype: Of the rows.

    Returns:
        The rows (M, D), and their scales (empty but for E4M3).
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    gate, up = rows.chunk(2, dim=-1) if gated else (rows, None)
    gate = apply_activation(gate, activation)
    return _cast_rows(gate if up is None else gate * up, dtype)


def define_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute the definition of linear_gelu().

    Args:
        x: (M, K).
        weight: (N, K).
        bias: (N,).

    Returns:
        (M, N) in x's dtype.
    """
    sums = F.linear(x.float(), weight.float(), bias.float())
    return F.gelu(sums, approximate="tanh").to(x.dtype)


def define_rotate(qkv: Tensor, table: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Compute the definition of rotate().

    Args:
        qkv: (B, T, 3 D).
        table: Cosines and sines of the N patches, (2, N, K) float32.
        num_heads: H.

    Returns:
        Queries and keys, (B, T, H, K) each.
    """
    (b, t, _), first = qkv.shape, qkv.shape[1] - table.shape[-2]
    q, k, _ = qkv.view(b, t, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = (apply_rope(x, first, table).transpose(1, 2).contiguous() for x in (q, k))
    return q, k


def _cast_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cast rows (M, D) to a dtype, or quantize them; with their scales, empty but for E4M3."""
    if dtype == FP8:
        return quantize_fp8(rows)
    # A new tensor: the dispatcher forbids an operation to return its input.
    return rows.to(dtype, copy=True), rows.new_empty(0)


# --- registration with the dispatcher -------------------------------------------------------------


def _prefer_triton(name: str, definition: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs a kernel of row_kernels.py, or the definition without Triton."""

    def run(x: Tensor, *arguments: Any) -> Any:
        # Unlike torch's operations, Triton launches on the current device, whatever the tensors'.
        with torch.cuda.device(x.device):
            kernels = find_triton_kernels(x.device)
            return (definition if kernels is None else getattr(kernels, name))(x, *arguments)

    return run


def _linear_gelu_on_gpu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute linear_gelu() in one kernel of cuBLASLt."""
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


@cache
def find_triton_kernels(device: torch.device) -> Any:
    """Return the module of Triton's kernels; None where Triton is absent, or fails on a device.

    At its first launch Triton compiles a part of itself. That needs a C compiler and the headers of
    Python, which many containers lack. Nor does each version of Triton know every GPU.

    Args:
        device: The GPU.

    Returns:
        The module row_kernels.py, or None.
    """
    try:
        from vitlib.fast import row_kernels
    except ImportError:  # as on Windows
        return None
    x = torch.sin(torch.arange(2 * 64, dtype=torch.float32, device="cpu")).view(2, 64)
    arguments: tuple[Any, ...] = (x, x, x[0].abs(), None, 1e-6, None, torch.float32)
    try:
        there: Any = (a.to(device) if isinstance(a, Tensor) else a for a in arguments)
        _, actual, _ = row_kernels.norm_rows(*there)
        _, exact, _ = define_norm_rows(*arguments)
        if torch.allclose(actual.cpu(), exact, atol=1e-4):
            return row_kernels
        reason = "a result differs from its definition"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's errors, and those of the tools that it starts
        reason = f"{type(error).__name__}: {first_line(error)}"
    logger.warning("Triton's kernels are not used, and %s is slower: %s", device, reason)
    return None


def _fake_norm_rows(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    extra_bias: Tensor | None,  # noqa: ARG001
    dtype: torch.dtype,
    kind: NormKind = "layer",  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors of the shapes that norm_rows gives."""
    stream = x.new_empty(0 if y is None else x.shape)
    return stream, *empty_rows(x, x.shape[-1], dtype)


def _fake_activate_rows(
    x: Tensor,
    activation: str,  # noqa: ARG001
    gated: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return empty tensors of the shapes that activate_rows gives."""
    return empty_rows(x, x.shape[-1] // (2 if gated else 1), dtype)


def _fake_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG001
    """Return an empty tensor of the shape that linear_gelu gives."""
    return x.new_empty(len(x), len(weight))


def _fake_rotate(qkv: Tensor, table: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """Return empty tensors of the shapes that rotate gives."""
    b, t, width = qkv.shape
    shape = b, t, num_heads, width // (3 * num_heads)
    return qkv.new_empty(shape), qkv.new_empty(shape)


register(
    "norm_rows(Tensor x, Tensor? y, Tensor weight, Tensor? bias, float eps, Tensor? extra_bias, "
    "ScalarType dtype, str kind='layer') -> (Tensor, Tensor, Tensor)",
    define_norm_rows,
    _prefer_triton("norm_rows", define_norm_rows),
    _fake_norm_rows,
)
register(
    "activate_rows(Tensor x, str activation, bool gated, ScalarType dtype) -> (Tensor, Tensor)",
    define_activate_rows,
    _prefer_triton("activate_rows", define_activate_rows),
    _fake_activate_rows,
)
register(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    define_linear_gelu,
    _linear_gelu_on_gpu,
    _fake_linear_gelu,
)
register(
    "rotate(Tensor qkv, Tensor table, int num_heads) -> (Tensor, Tensor)",
    define_rotate,
    _prefer_triton("rotate", define_rotate),
    _fake_rotate,
)
