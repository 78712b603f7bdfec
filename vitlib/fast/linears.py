"""Linear layers for inference in float: torch's own, and packed for oneDNN.

All take and give activations as the block (block.py) has them: float32, or bfloat16 where the
kernel plan says so. The residual stream is always float32.

Shapes: (..., K) inputs to (..., N) outputs; M rows in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.fast import onednn_ops
from vitlib.fast.onednn_ops import UINT8_ZERO_POINT


@dataclass
class LinearWeights:
    """The numbers of a linear layer, in float or in 8 bits.

    Attributes:
        weight: (N, K) float32 or bfloat16; int8 where there is a scale.
        bias: (N,) float32, or None.
        scale: (N,) float32: an int8 weight times this is the weight. None for float weights.
        x_scale: A uint8 input stands for (input - x_zero_point) * x_scale. None: a scale is
            computed for each token.
        x_zero_point: The uint8 input that stands for 0.
        packed: The weight as the kernel takes it, where a file holds it (packed_file.py), or
            the calibration packed it before.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    x_scale: float | None = None
    x_zero_point: int = UINT8_ZERO_POINT
    packed: Tensor | None = None

    def dequantize(self) -> Tensor:
        """Return the weight (N, K) in float32, whatever it is stored in."""
        weight = self.weight.float()
        return weight if self.scale is None else weight * self.scale[:, None]


def own_copy(tensor: Tensor) -> Tensor:
    """Copy a small tensor, so that it does not keep a memory-mapped file alive.

    Args:
        tensor: Any tensor.

    Returns:
        A float32 copy without gradients.
    """
    return tensor.detach().to(torch.float32, copy=True)


class FastLinear(nn.Module):
    """A linear layer of a fast block. This class is torch's own linear, the fallback of the others.

    It has the attributes of the nn.Linear that it replaces: `weight`, `bias`, `in_features` and
    `out_features`.

    Args:
        weights: The numbers of the layer, which are copied.
        dtype: Of inputs and outputs.
    """

    def __init__(self, weights: LinearWeights, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.out_features, self.in_features = weights.weight.shape
        self.dtype = dtype
        self.packed = self.pack(weights)
        self.bias = None if weights.bias is None else weights.bias.to(dtype)

    def pack(self, weights: LinearWeights) -> Tensor:
        """Bring the weight into the form that the kernel takes.

        Args:
            weights: The numbers of the layer.

        Returns:
            The weight; here (N, K) in the layer's dtype.
        """
        return weights.dequantize().to(self.dtype, copy=True)  # the model's may still change

    @property
    def weight(self) -> Tensor:
        """The weight (N, K) in float32."""
        return self.weights().dequantize()

    def weights(self) -> LinearWeights:
        """Return the numbers that the layer was made of, as far as its dtype holds them."""
        return LinearWeights(self.packed, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., K).

        Returns:
            (..., N) in the layer's dtype.
        """
        return F.linear(x.to(self.dtype), self.packed, self.bias)

    def activate(self, x: Tensor, activation: str, next_linear: FastLinear | None) -> Tensor:  # noqa: ARG002
        """Apply the layer and an activation.

        Args:
            x: (..., K).
            activation: "gelu", "gelu_tanh" or "silu".
            next_linear: The layer that reads the result, if only one does: an 8-bit layer has its
                input quantized here.

        Returns:
            (..., N), in the layer's dtype or as `next_linear` takes its input.
        """
        return apply_activation(self(x), activation)

    def multiply(self, x: Tensor, other: Tensor) -> Tensor:
        """Apply the layer and multiply by another tensor.

        Args:
            x: (..., K).
            other: (..., N).

        Returns:
            (..., N).
        """
        y: Tensor = self(x)
        return y * other

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Apply the layer and add the residual stream.

        Args:
            x: (..., K).
            residual: (..., N) float32, which is only read.

        Returns:
            (..., N) float32.
        """
        y: Tensor = self(x)
        return y.float().add_(residual)  # a sum of two dtypes would take four times as long

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        """Apply the layer and add the residual stream, which may be overwritten.

        Args:
            x: (..., K).
            residual: (..., N) float32.

        Returns:
            (..., N) float32, in the residual's memory where the kernel can.
        """
        return self.add(x, residual)


class OpaqueLinear(FastLinear):
    """A linear layer whose packed weight is in a layout of oneDNN's, which torch cannot save."""

    def __getstate__(self) -> dict[str, Any]:
        """Unpack the weight for copies and pickles, as an array of bytes.

        A tensor made here would be sent in shared memory, and freed before a spawned process opens
        it.
        """
        weight = self.weights().weight.contiguous()
        array = weight.view(torch.uint8).numpy()
        return {**self.__dict__, "packed": (array, weight.dtype)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack the weight for this machine."""
        array, dtype = state["packed"]
        self.__dict__.update({**state, "packed": None})
        self.packed = self.pack(LinearWeights(torch.from_numpy(array.copy()).view(dtype)))


class PackedLinear(OpaqueLinear):
    """A linear layer by oneDNN's kernels, with the weight packed and what follows fused."""

    def pack(self, weights: LinearWeights) -> Tensor:
        """Pack the weight in oneDNN's layout.

        Args:
            weights: The numbers of the layer.

        Returns:
            An opaque tensor.
        """
        if weights.packed is not None:
            return weights.packed
        return onednn_ops.pack(weights.dequantize().to(self.dtype))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack the weight for this machine, or become a FastLinear where it cannot."""
        if onednn_ops.has_packed_linear(state["dtype"]):
            super().__setstate__(state)
            return
        array, dtype = state["packed"]
        weight = torch.from_numpy(array.copy()).view(dtype)
        object.__setattr__(self, "__class__", FastLinear)
        self.__dict__.update({**state, "packed": weight})

    def weights(self) -> LinearWeights:
        """Return the numbers that the layer was made of, as far as its dtype holds them."""
        return LinearWeights(self.packed.to_dense(), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., K).

        Returns:
            (..., N) in the layer's dtype.
        """
        return onednn_ops.linear(x.to(self.dtype), self.packed, self.bias)

    def activate(self, x: Tensor, activation: str, next_linear: FastLinear | None) -> Tensor:  # noqa: ARG002
        """Apply the layer with the activation fused into it.

        Args:
            x: (..., K).
            activation: "gelu", "gelu_tanh" or "silu".
            next_linear: Not used.

        Returns:
            (..., N) in the layer's dtype.
        """
        return onednn_ops.linear(x.to(self.dtype), self.packed, self.bias, activation)

    def multiply(self, x: Tensor, other: Tensor) -> Tensor:
        """Apply the layer with the product fused into it.

        Args:
            x: (..., K).
            other: (..., N).

        Returns:
            (..., N).
        """
        return onednn_ops.linear_binary(x.to(self.dtype), self.packed, self.bias, other, "mul")

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Apply the layer with the sum fused into it, in float32.

        Args:
            x: (..., K).
            residual: (..., N) float32, which is only read.

        Returns:
            (..., N) float32.
        """
        if self.dtype == torch.float32:
            other = residual.contiguous()
            return onednn_ops.linear_binary(x, self.packed, self.bias, other, "add")
        return super().add(x, residual)


def apply_activation(x: Tensor, activation: str) -> Tensor:
    """Apply an activation.

    Args:
        x: Any shape.
        activation: "gelu", "gelu_tanh", "silu" or "none".

    Returns:
        The same shape.
    """
    if activation == "none":
        return x
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
