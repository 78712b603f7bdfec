"""Linears in 8-bit floats, scaled by rows, for GPUs that multiply them.

Shapes: M rows, K inputs, N outputs.
Source: Micikevicius et al. 2209.05433 (E4M3).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.fast.dispatch import OPS, register
from vitlib.fast.linears import FastLinear, Weights
from vitlib.fast.row_ops import activate, quantise
from vitlib.fast.rows import FP8, Quantised, Rows


class Fp8Linear(FastLinear):
    """A linear in 8-bit floats: a scale for each token and one for each row of the weights."""

    def hold(self, weights: Weights) -> Tensor:
        """(N, K) E4M3; the scales beside it."""
        held, self.scale = quantise(weights.plain())
        return held

    def weights(self) -> Weights:
        """What it was made of, as far as it is known."""
        return Weights(self.held.float() * self.scale, self.bias)

    def forward(self, x: Rows) -> Tensor:
        """(..., K) -> (..., N); of quantised rows (M, K) -> (M, N)."""
        shape = None if isinstance(x, Quantised) else (*x.shape[:-1], self.out_features)
        if not isinstance(x, Quantised):
            x = activate(x, "none", False, FP8)
            assert isinstance(x, Quantised)
        y = product(x.levels, x.scale, self.held, self.scale, self.bias)
        return y if shape is None else y.view(shape)


def product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """(M, K), (M, 1), (N, K), (N, 1), bias (N,) bfloat16 -> (M, N) bfloat16."""
    return OPS.fp8_product(x, x_scale, weight, scale, bias)  # type: ignore[no-any-return]


def _define_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    y = F.linear(x.float() * x_scale, weight.float() * scale)
    return (y if bias is None else y + bias.float()).to(torch.bfloat16)


def _on_gpu_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    return torch._scaled_mm(
        x, weight.t(), scale_a=x_scale, scale_b=scale.t(), bias=bias,
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip


def _fake_product(
    x: Tensor,
    x_scale: Tensor,  # noqa: ARG001
    weight: Tensor,
    scale: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(len(x), len(weight), dtype=torch.bfloat16)


register(
    "fp8_product(Tensor x, Tensor x_scale, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
    _define_product,
    _on_gpu_product,
    _fake_product,
)


@lru_cache(maxsize=8)
def has_fp8(device: torch.device) -> bool:
    """Whether the private product is there, and equals its own definition."""
    x = torch.sin(torch.arange(50 * 64, dtype=torch.float32, device="cpu") * 0.7).reshape(50, 64)
    sample = *quantise(x), *quantise(x[:32] * 3), x[0, :32].to(torch.bfloat16)
    try:
        found = product(*(t.to(device) for t in sample)).float().cpu()
    except (RuntimeError, TypeError, AttributeError, ValueError):  # absent, or not for this GPU
        return False
    exact = product(*sample).float()
    return bool((found - exact).abs().max() <= 2e-2 * exact.abs().max())
