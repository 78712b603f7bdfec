"""Linear layers in 8 bits, and make_linear, which chooses among these and those in float.

An 8-bit layer is calibrated, or computes a scale for each token.

Shapes: (..., K) inputs to (..., N) outputs; M rows in all.
Source: Jacob et al. 1712.05877.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitlib.errors import ConfigError
from vitlib.fast import cpu, onednn_ops
from vitlib.fast.cpu import KernelPlan, kernel_plan
from vitlib.fast.linears import (
    FastLinear,
    LinearWeights,
    OpaqueLinear,
    PackedLinear,
    apply_activation,
)
from vitlib.fast.onednn_ops import UINT8_ZERO_POINT


class Int8Linear(OpaqueLinear):
    """A linear layer of uint8 inputs and int8 weights on VNNI, calibrated.

    Where a norm makes the input, the scale and zero point of the input are folded into the norm, so
    that only the rounding is left. `add` takes uint8, or an input in its own units.

    Args:
        weights: The numbers of the layer in 8 bits.
        dtype: Of float outputs.
    """

    def __init__(self, weights: LinearWeights, dtype: torch.dtype) -> None:
        super().__init__(weights, dtype)
        assert weights.scale is not None
        self.scale = weights.scale
        self.bias = None if weights.bias is None else weights.bias.float()
        self.x_scale = 1.0 if weights.x_scale is None else weights.x_scale
        self.x_zero_point = weights.x_zero_point

    def pack(self, weights: LinearWeights) -> Tensor:
        """Pack the int8 weight in oneDNN's layout.

        Args:
            weights: The numbers of the layer in 8 bits.

        Returns:
            An opaque tensor.
        """
        # Packing takes 4 ns a number, so that the calibration packs once for the model too.
        if weights.packed is None:
            return onednn_ops.pack_int8(weights.weight)
        return weights.packed

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack the weight for this machine.

        Raises:
            ConfigError: This CPU has no 8-bit products.
        """
        int8_plan()
        super().__setstate__(state)

    def weights(self) -> LinearWeights:
        """Return the numbers that the layer was made of."""
        weight = self.packed.to_dense().t().contiguous()
        return LinearWeights(weight, self.bias, self.scale, self.x_scale, self.x_zero_point)

    def to_uint8(self, x: Tensor) -> Tensor:
        """Convert an input to the rows that the kernel takes.

        Args:
            x: (..., K) uint8; or the same numbers in float plus 0.5, which is overwritten.

        Returns:
            (M, K) uint8.
        """
        if x.dtype != torch.uint8:
            # The conversion truncates: with the 0.5 that x already has it rounds to nearest.
            x = onednn_ops.to_uint8(x.clamp_(0, 255))
        return x.reshape(-1, x.shape[-1])

    def matmul(
        self, x: Tensor, dtype: torch.dtype, activation: str = "none",
        out_scale: float = 1.0, out_zero_point: int = 0,
    ) -> Tensor:  # fmt: skip
        """Apply the layer with an activation fused into it.

        Args:
            x: (..., K), as to_uint8 takes it.
            dtype: Of the result; torch.uint8 quantizes it.
            activation: "none", "gelu", "gelu_tanh" or "silu".
            out_scale: Scale of a uint8 result.
            out_zero_point: Zero point of a uint8 result.

        Returns:
            (..., N).
        """
        y = onednn_ops.linear_int8(
            self.to_uint8(x), self.x_scale, self.x_zero_point, self.packed, self.scale, self.bias,
            dtype, activation, out_scale, out_zero_point,
        )  # fmt: skip
        return y.view(*x.shape[:-1], self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., K), as to_uint8 takes it.

        Returns:
            (..., N) in the layer's dtype.
        """
        return self.matmul(x, self.dtype)

    def activate(self, x: Tensor, activation: str, next_linear: FastLinear | None) -> Tensor:
        """Apply the layer with the activation fused into it.

        Args:
            x: (..., K), as to_uint8 takes it.
            activation: "gelu", "gelu_tanh" or "silu".
            next_linear: The layer that reads the result, if only one does.

        Returns:
            (..., N); uint8, quantized for `next_linear`, where that is calibrated too.
        """
        if type(next_linear) is Int8Linear:
            scale, zero_point = next_linear.x_scale, next_linear.x_zero_point
            return self.matmul(x, torch.uint8, activation, scale, zero_point)
        return self.matmul(x, self.dtype, activation)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Apply the layer with the sum fused into it.

        Args:
            x: (..., K) uint8, or an input in its own units.
            residual: (..., N) float32, which is only read.

        Returns:
            (..., N) float32.
        """
        return self._add(x, residual, "add")

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        """Apply the layer and add the result into the residual stream.

        Args:
            x: (..., K) uint8, or an input in its own units.
            residual: (..., N) float32, which is overwritten.

        Returns:
            (..., N) float32.
        """
        return self._add(x, residual, "sum")

    def _add(self, x: Tensor, residual: Tensor, operation: str) -> Tensor:
        """Apply the layer with a sum: "add" to a new tensor, "sum" into the residual."""
        flat = residual.reshape(-1, self.out_features)
        if x.dtype != torch.uint8:
            x = x.float().mul_(1 / self.x_scale).add_(self.x_zero_point + 0.5)
        y = onednn_ops.linear_int8_add(
            self.to_uint8(x), self.x_scale, self.x_zero_point, self.packed, self.scale, self.bias,
            flat, operation,
        )  # fmt: skip
        return y.view(residual.shape)


class Int8PerToken(Int8Linear):
    """An 8-bit linear layer whose input no norm can scale: each token has a scale of its own."""

    def weights(self) -> LinearWeights:
        """Return the numbers that the layer was made of."""
        weights = super().weights()
        weights.x_scale = None
        return weights

    def forward(self, x: Tensor) -> Tensor:
        """Quantize each token symmetrically, and apply the layer.

        Args:
            x: (..., K) in its own units.

        Returns:
            (..., N) in the layer's dtype.
        """
        x = x.float()
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12)
        # The kernel takes unsigned inputs, so the signed ones are moved by the zero point; the 0.5
        # makes the truncation of to_uint8 a rounding.
        shifted = (x * (127 / largest)).add_(UINT8_ZERO_POINT + 0.5)
        y = onednn_ops.linear_int8(
            self.to_uint8(shifted), 1.0, UINT8_ZERO_POINT, self.packed, self.scale, None,
            torch.float32,
        )  # fmt: skip
        y = y.view(*x.shape[:-1], self.out_features).mul_(largest / 127)
        return (y if self.bias is None else y.add_(self.bias)).to(self.dtype)

    def activate(self, x: Tensor, activation: str, next_linear: FastLinear | None) -> Tensor:  # noqa: ARG002
        """Apply the layer, then the activation.

        Args:
            x: (..., K) in its own units.
            activation: "gelu", "gelu_tanh" or "silu".
            next_linear: Not used.

        Returns:
            (..., N) in the layer's dtype.
        """
        return apply_activation(self(x), activation)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Apply the layer and add the residual stream.

        Args:
            x: (..., K) in its own units.
            residual: (..., N) float32, which is only read.

        Returns:
            (..., N) float32.
        """
        return FastLinear.add(self, x, residual)

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        """Apply the layer and add the residual stream.

        Args:
            x: (..., K) in its own units.
            residual: (..., N) float32.

        Returns:
            (..., N) float32.
        """
        return FastLinear.add(self, x, residual)


def int8_plan() -> KernelPlan:
    """Return the kernels of int8 on this CPU.

    Raises:
        ConfigError: This CPU, or this torch, has no 8-bit products.
    """
    plan = kernel_plan("int8")
    if plan is None:
        raise ConfigError(
            f"int8 needs a CPU with AVX-512 VNNI and this one has {cpu.this_machine().features}"
            ": use fp32 or bf16"
        )
    if not onednn_ops.has_int8_linear():
        raise ConfigError(
            f"int8 needs operations that torch {torch.__version__} does not have here, or that do "
            "not compute what they should: use fp32 or bf16"
        )
    return plan


def linear_kind(weights: LinearWeights, plan: KernelPlan) -> tuple[type[FastLinear], torch.dtype]:
    """Choose the linear layer of a kernel plan.

    Args:
        weights: The numbers of the layer, in float or in 8 bits.
        plan: The kernels of this machine.

    Returns:
        The class of the layer, and the dtype of its float inputs and outputs.
    """
    if weights.scale is not None and plan.arithmetic == "int8":
        per_token = weights.x_scale is None
        return Int8PerToken if per_token else Int8Linear, plan.attention_dtype
    # In an int8 model the layers that stay out of 8 bits have the dtype of its attention.
    dtype = torch.float32 if plan.arithmetic == "fp32" else plan.attention_dtype
    packed = plan.packed and onednn_ops.has_packed_linear(dtype)
    return PackedLinear if packed else FastLinear, dtype


def make_linear(weights: LinearWeights, plan: KernelPlan) -> FastLinear:
    """Make the linear layer of a kernel plan.

    Args:
        weights: The numbers of the layer, in float or in 8 bits.
        plan: The kernels of this machine.

    Returns:
        The layer.
    """
    kind, dtype = linear_kind(weights, plan)
    return kind(weights, dtype)
