"""The norms of a fast model: their numbers, and how they are applied in float32."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.fast.linears import own_copy

NormKind = Literal["layer", "rms"]


class NormWeights(NamedTuple):
    """The numbers of a norm over the last axis.

    Attributes:
        weight: (D,) float32.
        bias: (D,) float32, or None. An RMSNorm gets one where an 8-bit layer reads it: the zero
            point of that layer's input.
        eps: Added to the variance, or to the mean square.
        kind: "layer" (1607.06450), or "rms", which subtracts no mean (1910.07467).
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    kind: NormKind = "layer"

    def scale(self, factor: Tensor | float) -> NormWeights:
        """Multiply the outputs of the norm.

        Args:
            factor: One number for each channel (D,), or one for all.

        Returns:
            The scaled norm.
        """
        bias = None if self.bias is None else self.bias * factor
        return self._replace(weight=self.weight * factor, bias=bias)

    def copy_to(self, device: torch.device) -> NormWeights:
        """Copy the numbers to a device.

        Args:
            device: The device.

        Returns:
            A copy, also where the numbers are on the device already.
        """
        bias = None if self.bias is None else self.bias.to(device, copy=True)
        return self._replace(weight=self.weight.to(device, copy=True), bias=bias)


def norm_weights(norm: nn.Module) -> NormWeights:
    """Copy the numbers of a norm.

    Args:
        norm: A LayerNorm or RMSNorm with a weight and an eps.

    Returns:
        Its numbers in float32.
    """
    assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    assert norm.eps is not None
    kind: NormKind = "layer" if isinstance(norm, nn.LayerNorm) else "rms"
    bias = getattr(norm, "bias", None)
    return NormWeights(
        own_copy(norm.weight), None if bias is None else own_copy(bias), norm.eps, kind
    )


def normalize(x: Tensor, norm: NormWeights) -> Tensor:
    """Apply a norm to the last axis, in float32.

    Args:
        x: (..., D), of any floating dtype.
        norm: The numbers of the norm.

    Returns:
        (..., D) float32.
    """
    x, shape = x.float(), norm.weight.shape
    if norm.kind == "layer":
        return F.layer_norm(x, shape, norm.weight, norm.bias, norm.eps)
    # On a CPU torch has no kernel for rms_norm, and its five operations take 1.6 times as long.
    root = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = root.square_().div_(shape[0]).add_(norm.eps).rsqrt_()
    y: Tensor = (x * inverse).mul_(norm.weight)
    return y if norm.bias is None else y.add_(norm.bias)


class Float32Norm(nn.LayerNorm):
    """A LayerNorm that computes and returns float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize.

        Args:
            x: (..., D), of any floating dtype.

        Returns:
            (..., D) float32.
        """
        return super().forward(x.float())


class Float32RMSNorm(nn.RMSNorm):
    """An RMSNorm that computes and returns float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize.

        Args:
            x: (..., D), of any floating dtype.

        Returns:
            (..., D) float32.
        """
        return super().forward(x.float())
