"""Linears in 8-bit floats, scaled by rows, for GPUs that multiply them.

Shapes: M rows, K inputs, N outputs.
Source: Micikevicius et al. 2209.05433 (E4M3).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.fast.linears import FastLinear, Weights

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest number of E4M3


class Fp8Linear(FastLinear):
    """A linear in 8-bit floats: a scale for each token and one for each row of the weights."""

    def hold(self, weights: Weights) -> Tensor:
        """(N, K) E4M3; the scales beside it."""
        held, self.scale = quantised(weights.plain())
        return held

    def weights(self) -> Weights:
        """What it was made of, as far as it is known."""
        return Weights(self.held.float() * self.scale, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        levels, scale = quantised(x.reshape(-1, self.in_features))
        y = product(levels, scale, self.held, self.scale, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> the same in E4M3, and what each row is to be multiplied by, (M, 1) float32."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """(M, K), (M, 1), (N, K), (N, 1), bias (N,) bfloat16 -> (M, N) bfloat16."""
    if x.is_cuda:
        return torch._scaled_mm(
            x, weight.t(), scale_a=x_scale, scale_b=scale.t(), bias=bias,
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
    y = F.linear(x.float() * x_scale, weight.float() * scale)
    return (y if bias is None else y + bias.float()).to(torch.bfloat16)


@lru_cache(maxsize=8)
def has_fp8(device: torch.device) -> bool:
    """Whether the private product is there, and equals its own definition."""
    x = torch.sin(torch.arange(50 * 64, dtype=torch.float32, device="cpu") * 0.7).reshape(50, 64)
    sample = *quantised(x), *quantised(x[:32] * 3), x[0, :32].to(torch.bfloat16)
    try:
        found = product(*(t.to(device) for t in sample)).float().cpu()
    except (RuntimeError, TypeError, AttributeError, ValueError):  # absent, or not for this GPU
        return False
    exact = product(*sample).float()
    return bool((found - exact).abs().max() <= 2e-2 * exact.abs().max())
