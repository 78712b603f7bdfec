"""Operations that torch ships without promising them, each behind a proof.

`torch.ops.mkldnn` and `torch.ops.onednn` hold what torch's own compiler emits. They may be absent
(Arm, macOS, another version), or change: each is tried once a process on a small input beside the
plain operation, and where that does not agree the plain path serves.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Signed levels lie around this in unsigned bytes: the fast kernels multiply u8 by s8 only.
MIDDLE = 128


def pack(weight: Tensor) -> Tensor:
    """(N, K) -> the same in oneDNN's own order; to_dense() undoes it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())  # type: ignore[no-any-return]


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, fused: str = "none") -> Tensor:
    """(..., K) -> (..., N), then what is fused: none, gelu, gelu_tanh or silu."""
    name, form = _FUSED[fused]
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], form)  # type: ignore[no-any-return]


def linear_with(x: Tensor, packed: Tensor, bias: Tensor | None, other: Tensor, how: str) -> Tensor:
    """(..., K), other (..., N) -> the linear of x, "add" or "mul" with other (..., N)."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, bias, how)  # type: ignore[no-any-return]


_FUSED = {
    "none": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}


def pack_int8(weight: Tensor) -> Tensor:
    """(N, K) int8 -> the same in oneDNN's own order; to_dense().t() undoes it."""
    return torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)  # type: ignore[no-any-return]


def linear_int8(
    x: Tensor,
    x_scale: float,
    x_zero: int,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fused: str = "none",
    out_scale: float = 1.0,
    out_zero: int = 0,
) -> Tensor:
    """(M, K) levels -> (M, N) of the dtype; as levels again where that is uint8.

    x_scale, x_zero: a level stands for (level - x_zero) * x_scale. scale: (N,), of the weights.
    """
    name, form = _FUSED[fused]
    return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
        x, x_scale, x_zero, packed, scale, _zeros(len(scale)), bias,
        out_scale, out_zero, dtype, name, [], form or "none",
    )  # fmt: skip


def linear_int8_add(
    x: Tensor,
    x_scale: float,
    x_zero: int,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    other: Tensor,
    how: str = "add",
) -> Tensor:
    """(M, K) levels, other (M, N) float32 -> the linear of x plus other, (M, N) float32.

    how: "add", or "sum" to write into other.
    """
    return torch.ops.onednn.qlinear_pointwise.binary(  # type: ignore[no-any-return]
        x, x_scale, x_zero, packed, scale, _zeros(len(scale)), other, bias,
        1.0, 0, torch.float32, 1.0, 0, how, 1.0, "none", [], "none",
    )  # fmt: skip


def to_bytes(levels: Tensor) -> Tensor:
    """Floats in 0..255 -> uint8, cut off."""
    if not _wraps():
        return levels.to(torch.uint8)
    return levels.to(torch.int8).view(torch.uint8)


@lru_cache(maxsize=1)
def _wraps() -> bool:
    """Whether 128..255 as int8 are the same bytes as in uint8: no promise of the language, but the
    conversion is then a vector instruction, and takes a quarter of the time."""
    levels = torch.arange(0, 256, 0.25, dtype=torch.float32, device="cpu")
    return all(
        torch.equal(some.to(torch.int8).view(torch.uint8), some.to(torch.uint8))
        for some in (levels, levels[515:], levels[-7:])  # also what no whole vector holds
    )


@lru_cache(maxsize=64)
def _zeros(count: int) -> Tensor:
    """The zero points of symmetric weights, (N,)."""
    return torch.zeros(count, dtype=torch.int64, device="cpu")


@lru_cache(maxsize=2)
def has_packed_linear(dtype: torch.dtype) -> bool:
    """Whether the packed linear is there for float32 or bfloat16 and equals the plain one."""
    return _proved(_try_packed, dtype)


@lru_cache(maxsize=1)
def has_int8_linear() -> bool:
    """Whether the 8-bit linear is there and equals its own definition."""
    return _proved(_try_int8, torch.int8)


def _proved(trial: object, dtype: torch.dtype) -> bool:
    try:
        with torch.no_grad():
            return trial(dtype)  # type: ignore[operator, no-any-return]
    except Exception:  # absent, another signature, no kernel for this CPU: the plain path serves
        return False


def _sample(*shape: int) -> Tensor:
    """Numbers in -1..1, always the same, drawing from nobody's generator."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32, device="cpu") * 0.7).reshape(shape)


def _try_packed(dtype: torch.dtype) -> bool:
    x, weight, bias = (_sample(*s).to(dtype) for s in ((2, 9, 32), (48, 32), (48,)))
    other, packed = _sample(2, 9, 48).to(dtype).contiguous(), pack(weight)
    plain = F.linear(x, weight, bias)
    pairs = [
        (linear(x, packed, bias), plain),
        (linear(x, packed, None), F.linear(x, weight)),
        (linear(x, packed, bias, "gelu"), F.gelu(plain)),
        (linear(x, packed, bias, "gelu_tanh"), F.gelu(plain, approximate="tanh")),
        (linear(x, packed, bias, "silu"), F.silu(plain)),
        (linear_with(x, packed, bias, other, "add"), plain + other),
        (linear_with(x, packed, bias, other, "mul"), plain * other),
        (packed.to_dense(), weight),
    ]
    # float32 sums differ in their order only; bfloat16 results by a rounding of theirs.
    bound = 2e-6 if dtype == torch.float32 else 2e-2
    return all(_near(a, b, bound) for a, b in pairs)


def _try_int8(_: torch.dtype) -> bool:
    x = (_sample(18, 32) * 100 + MIDDLE).round().to(torch.uint8)
    weight, bias = (_sample(48, 32) * 127).round().to(torch.int8), _sample(48)
    other, scale, packed = _sample(18, 48), _sample(48).abs() * 1e-3 + 1e-3, pack_int8(weight)
    plain = F.linear((x.float() - 3) * 0.5, weight.float() * scale[:, None], bias)
    levels = linear_int8(x, 0.5, 3, packed, scale, bias, torch.uint8, "gelu", 0.25, 9)
    exact = (F.gelu(plain) / 0.25 + 9).round().clamp(0, 255)
    return (
        _near(linear_int8(x, 0.5, 3, packed, scale, bias, torch.float32), plain, 2e-6)
        and _near(linear_int8_add(x, 0.5, 3, packed, scale, bias, other), plain + other, 2e-6)
        and _near(
            linear_int8_add(x, 0.5, 3, packed, scale, bias, other.clone(), "sum"),
            plain + other,
            2e-6,
        )
        and (levels.float() - exact).abs().max().item() <= 1  # a tie may round either way
        and torch.equal(packed.to_dense().t(), weight)
    )


def _near(a: Tensor, b: Tensor, bound: float) -> bool:
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= bound * b.abs().max())
