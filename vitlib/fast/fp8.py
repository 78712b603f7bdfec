"""Linear layers in 8-bit floats (E4M3), for GPUs that multiply them.

Shapes: M rows, K inputs, N outputs.
Source: Micikevicius et al. 2209.05433 (E4M3).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.fast.custom_ops import OPS, register
from vitlib.fast.linears import FastLinear, LinearWeights
from vitlib.fast.quantized_rows import FP8, QuantizedRows, Rows
from vitlib.fast.row_ops import activate, quantize_fp8


class Fp8Linear(FastLinear):
    """A linear layer in 8-bit floats, with a scale for each token and each row of the weight.

    Args:
        weights: The numbers of the layer, whose sides are multiples of 16.
        dtype: Of inputs and outputs, bfloat16.
    """

    def pack(self, weights: LinearWeights) -> Tensor:
        """Quantize the weight; its scales become an attribute.

        Args:
            weights: The numbers of the layer.

        Returns:
            (N, K) E4M3.
        """
        packed, self.scale = quantize_fp8(weights.dequantize())
        return packed

    def weights(self) -> LinearWeights:
        """Return the numbers that the layer was made of, as far as E4M3 holds them."""
        return LinearWeights(self.packed.float() * self.scale, self.bias)

    def forward(self, x: Rows) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., K), or quantized rows (M, K).

        Returns:
            (..., N) bfloat16; (M, N) for quantized rows.
        """
        shape = None if isinstance(x, QuantizedRows) else (*x.shape[:-1], self.out_features)
        if not isinstance(x, QuantizedRows):
            x = activate(x, "none", False, FP8)
            assert isinstance(x, QuantizedRows)
        y = fp8_product(x.values, x.scale, self.packed, self.scale, self.bias)
        return y if shape is None else y.view(shape)


def fp8_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Multiply two matrices in 8-bit floats.

    Args:
        x: (M, K) E4M3.
        x_scale: Scales of its rows (M, 1) float32.
        weight: (N, K) E4M3.
        scale: Scales of its rows (N, 1) float32.
        bias: (N,) bfloat16, or None.

    Returns:
        (M, N) bfloat16.
    """
    y: Tensor = OPS.fp8_product(x, x_scale, weight, scale, bias)
    return y


def _define_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Compute the operation's definition, on any device."""
    y = F.linear(x.float() * x_scale, weight.float() * scale)
    return (y if bias is None else y + bias.float()).to(torch.bfloat16)


def _product_on_gpu(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Compute the operation by cuBLAS."""
    # use_fast_accum sums in fewer bits than float32; E4M3's own rounding is larger.
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
    """Return an empty tensor of the result's shape."""
    return x.new_empty(len(x), len(weight), dtype=torch.bfloat16)


register(
    "fp8_product(Tensor x, Tensor x_scale, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
    _define_product,
    _product_on_gpu,
    _fake_product,
)


@lru_cache(maxsize=8)
def has_fp8(device: torch.device) -> bool:
    """Return True if torch's private fp8 product runs on a device and equals its definition.

    Args:
        device: The GPU.

    Returns:
        False also where it fails.
    """
    x = torch.sin(torch.arange(50 * 64, dtype=torch.float32, device="cpu") * 0.7).reshape(50, 64)
    sample = *quantize_fp8(x), *quantize_fp8(x[:32] * 3), x[0, :32].to(torch.bfloat16)
    try:
        actual = fp8_product(*(t.to(device) for t in sample)).float().cpu()
    except (RuntimeError, TypeError, AttributeError, ValueError):  # absent, or not for this GPU
        return False
    exact = fp8_product(*sample).float()
    return bool((actual - exact).abs().max() <= 2e-2 * exact.abs().max())
