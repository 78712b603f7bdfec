"""Private oneDNN operations of torch, each used only after it is checked.

`torch.ops.mkldnn` and `torch.ops.onednn` hold what torch's own compiler emits. They may be absent
(Arm, macOS, another version), or change. Each is tried once a process on a small input beside
torch's public operation; where the two disagree the public one is used.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The kernels multiply uint8 inputs by int8 weights only: signed inputs are moved by this.
UINT8_ZERO_POINT = 128
_ops: Any = torch.ops


def pack(weight: Tensor) -> Tensor:
    """Pack a weight in oneDNN's layout.

    Args:
        weight: (N, K) float32 or bfloat16.

    Returns:
        An opaque tensor, whose to_dense() is the weight.
    """
    packed: Tensor = _ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """Apply a packed linear layer with an activation fused into it.

    Args:
        x: (..., K).
        packed: The packed weight.
        bias: (N,), or None.
        activation: "none", "gelu", "gelu_tanh" or "silu".

    Returns:
        (..., N).
    """
    name, variant = _ACTIVATIONS[activation]
    y: Tensor = _ops.mkldnn._linear_pointwise(x, packed, bias, name, [], variant)
    return y


def linear_binary(
    x: Tensor, packed: Tensor, bias: Tensor | None, other: Tensor, operation: str
) -> Tensor:
    """Apply a packed linear layer and combine the result with another tensor.

    Args:
        x: (..., K).
        packed: The packed weight.
        bias: (N,), or None.
        other: (..., N), contiguous.
        operation: "add" or "mul".

    Returns:
        (..., N).
    """
    y: Tensor = _ops.mkldnn._linear_pointwise.binary(x, other, packed, bias, operation)
    return y


# Our name -> oneDNN's name and variant.
_ACTIVATIONS = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}


def pack_int8(weight: Tensor) -> Tensor:
    """Pack an 8-bit weight in oneDNN's layout.

    Args:
        weight: (N, K) int8.

    Returns:
        An opaque tensor, whose to_dense().t() is the weight.
    """
    packed: Tensor = _ops.onednn.qlinear_prepack(weight.contiguous(), None)
    return packed


def linear_int8(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
    out_scale: float = 1.0,
    out_zero_point: int = 0,
) -> Tensor:
    """Apply a packed 8-bit linear layer with an activation fused into it.

    Args:
        x: (M, K) uint8, which stands for (x - x_zero_point) * x_scale.
        x_scale: Scale of the input.
        x_zero_point: Zero point of the input, 0 to 255.
        packed: The packed weight, or a plain one (N, K) int8 for the compiler (compiled.py).
        scale: Scales of the weight's rows, (N,) float32.
        bias: (N,) float32, or None.
        dtype: Of the result; torch.uint8 quantizes it.
        activation: "none", "gelu", "gelu_tanh" or "silu".
        out_scale: Scale of a uint8 result.
        out_zero_point: Zero point of a uint8 result.

    Returns:
        (M, N).
    """
    name, variant = _ACTIVATIONS[activation]
    weight, zero_points = packed, None
    if packed.is_mkldnn:
        zero_points = _zeros(len(scale))
    else:  # the compiler's, which computes this once
        weight = pack_int8(packed)
    y: Tensor = _ops.onednn.qlinear_pointwise(
        x, x_scale, x_zero_point, weight, scale, zero_points, bias,
        out_scale, out_zero_point, dtype, name, [], variant or "none",
    )  # fmt: skip
    return y


def linear_int8_add(
    x: Tensor,
    x_scale: float,
    x_zero_point: int,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    other: Tensor,
    operation: str = "add",
) -> Tensor:
    """Apply a packed 8-bit linear layer and add another tensor.

    Args:
        x: (M, K) uint8, which stands for (x - x_zero_point) * x_scale.
        x_scale: Scale of the input.
        x_zero_point: Zero point of the input, 0 to 255.
        packed: The packed weight, or a plain one (N, K) int8 for the compiler (compiled.py).
        scale: Scales of the weight's rows, (N,) float32.
        bias: (N,) float32, or None.
        other: (M, N) float32.
        operation: "add" gives a new tensor, "sum" writes into `other`.

    Returns:
        (M, N) float32.
    """
    if not packed.is_mkldnn:  # the compiler fuses the sum itself
        args = x, x_scale, x_zero_point, packed, scale, bias, torch.float32
        # Its fused sum takes the strides of `other` for those of the result.
        return linear_int8(*args) + other.contiguous()
    y: Tensor = _ops.onednn.qlinear_pointwise.binary(
        x, x_scale, x_zero_point, packed, scale, _zeros(len(scale)), other, bias,
        1.0, 0, torch.float32, 1.0, 0, operation, 1.0, "none", [], "none",
    )  # fmt: skip
    return y


def to_uint8(x: Tensor) -> Tensor:
    """Convert floats to uint8, truncating.

    Args:
        x: Floats from 0 to below 256.

    Returns:
        The same shape, uint8.
    """
    if torch.compiler.is_compiling() or not _int8_cast_wraps():
        return x.to(torch.uint8)
    return x.to(torch.int8).view(torch.uint8)


@lru_cache(maxsize=1)
def _int8_cast_wraps() -> bool:
    """Return True if 128..255 cast to int8 give the same bytes as cast to uint8.

    C++ does not promise that. Where it holds the cast to int8 serves, as it is a vector instruction
    and takes a quarter of the time.
    """
    values = torch.arange(0, 256, 0.25, dtype=torch.float32, device="cpu")
    # Slices whose ends fill no whole vector go through the compiler's scalar code.
    return all(
        torch.equal(part.to(torch.int8).view(torch.uint8), part.to(torch.uint8))
        for part in (values, values[515:], values[-7:])
    )


@lru_cache(maxsize=64)
def _zeros(count: int) -> Tensor:
    """Return the zero points of symmetric weights, (N,)."""
    return torch.zeros(count, dtype=torch.int64, device="cpu")


@lru_cache(maxsize=2)
def has_packed_linear(dtype: torch.dtype) -> bool:
    """Return True if the packed linear layer is there and equals torch's own.

    Args:
        dtype: float32 or bfloat16.

    Returns:
        False also where the operation fails on this CPU.
    """
    return _succeeds(lambda: _check_packed(dtype))


@lru_cache(maxsize=1)
def has_int8_linear() -> bool:
    """Return True if the 8-bit linear layer is there and equals its definition."""
    return _succeeds(_check_int8)


def _succeeds(check: Callable[[], bool]) -> bool:
    """Run a check; False where an operation is absent, or fails."""
    try:
        with torch.no_grad():
            return check()
    except Exception:  # absent, another signature, or no kernel for this CPU
        return False


def _sample(*shape: int) -> Tensor:
    """Return fixed numbers in -1..1, without touching the global random generator."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32, device="cpu") * 0.7).reshape(shape)


def _check_packed(dtype: torch.dtype) -> bool:
    """Compare the packed linear layer with torch's own."""
    x, weight, bias = (_sample(*s).to(dtype) for s in ((2, 9, 32), (48, 32), (48,)))
    other, packed = _sample(2, 9, 48).to(dtype).contiguous(), pack(weight)
    expected = F.linear(x, weight, bias)
    pairs = [
        (linear(x, packed, bias), expected),
        (linear(x, packed, None), F.linear(x, weight)),
        (linear(x, packed, bias, "gelu"), F.gelu(expected)),
        (linear(x, packed, bias, "gelu_tanh"), F.gelu(expected, approximate="tanh")),
        (linear(x, packed, bias, "silu"), F.silu(expected)),
        (linear_binary(x, packed, bias, other, "add"), expected + other),
        (linear_binary(x, packed, bias, other, "mul"), expected * other),
        (packed.to_dense(), weight),
    ]
    # float32 sums differ in their order only; bfloat16 results by one rounding.
    bound = 2e-6 if dtype == torch.float32 else 2e-2
    return all(_is_near(a, b, bound) for a, b in pairs)


def _check_int8() -> bool:
    """Compare the 8-bit linear layer with its definition."""
    x = (_sample(18, 32) * 100 + UINT8_ZERO_POINT).round().to(torch.uint8)
    weight, bias = (_sample(48, 32) * 127).round().to(torch.int8), _sample(48)
    other, scale, packed = _sample(18, 48), _sample(48).abs() * 1e-3 + 1e-3, pack_int8(weight)
    expected = F.linear((x.float() - 3) * 0.5, weight.float() * scale[:, None], bias)
    quantized = linear_int8(x, 0.5, 3, packed, scale, bias, torch.uint8, "gelu", 0.25, 9)
    exact = (F.gelu(expected) / 0.25 + 9).round().clamp(0, 255)
    return (
        _is_near(linear_int8(x, 0.5, 3, packed, scale, bias, torch.float32), expected, 2e-6)
        and _is_near(linear_int8_add(x, 0.5, 3, packed, scale, bias, other), expected + other, 2e-6)
        and _is_near(
            linear_int8_add(x, 0.5, 3, packed, scale, bias, other.clone(), "sum"),
            expected + other,
            2e-6,
        )
        and (quantized.float() - exact).abs().max().item() <= 1  # a tie may round either way
        and torch.equal(packed.to_dense().t(), weight)
    )


def _is_near(a: Tensor, b: Tensor, bound: float) -> bool:
    """Return True if two tensors differ by at most `bound` of the largest number."""
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= bound * b.abs().max())
