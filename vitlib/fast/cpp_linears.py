"""Linear layers of compiled programs, by C++ kernels of vitlib's own (cpp_kernels.py).

Shapes: (..., K) inputs to (..., N) outputs of a linear layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlib.fast import onednn_ops
from vitlib.fast.cpp_kernels import load_kernels, operation
from vitlib.fast.cpu import this_machine
from vitlib.fast.embeddings import PatchTokens
from vitlib.fast.linears import LinearWeights
from vitlib.fast.tiles import pack_tiles, pad_outputs, split_numbers


def has_amx_linear(dtype: torch.dtype) -> bool:
    """Return True if this CPU has the kernels' instructions, and they can be compiled.

    Args:
        dtype: Of the layers' float outputs, bfloat16 or float32.
    """
    if not this_machine().amx:
        return False
    if dtype == torch.float32:
        return load_kernels("linear_split_amx", SPLIT_FAKES, run_split_sample)
    return load_kernels("linear_amx", FAKES, run_samples)


class TileLinear(nn.Module):
    """A linear layer on AMX's tiles, with what follows fused into it.

    It has the methods of FastLinear that compute, and calls a kernel alone.

    Attributes:
        dtype: Of float outputs.
    """

    dtype: torch.dtype

    def run(
        self, x: Tensor, other: Tensor | None, then: str, next_linear: nn.Module | None = None
    ) -> Tensor:
        """Apply the layer and an operation to its result.

        Args:
            x: (..., K).
            other: (..., N) for "mul" or "add", else None.
            then: "none", an activation, "mul" by a tensor of the layer's dtype, or "add" a float32
                one.
            next_linear: The layer that reads the result, if only one does.

        Returns:
            (..., N) in the layer's dtype, or as `next_linear` takes it; float32 from "add".
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, (..., K) to (..., N).

        Args:
            x: (..., K).
        """
        return self.run(x, None, "none")

    def activate(self, x: Tensor, activation: str, next_linear: nn.Module | None) -> Tensor:
        """Apply the layer and an activation, (..., K) to (..., N).

        Args:
            x: (..., K).
            activation: "gelu", "gelu_tanh" or "silu".
            next_linear: The layer that reads the result, if only one does.
        """
        return self.run(x, None, activation, next_linear)

    def multiply(self, x: Tensor, other: Tensor) -> Tensor:
        """Apply the layer and multiply by another tensor, (..., K) to (..., N).

        Args:
            x: (..., K).
            other: (..., N).
        """
        return self.run(x, other.to(self.dtype), "mul")

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Apply the layer and add the residual stream, (..., K) to (..., N) float32.

        Args:
            x: (..., K).
            residual: (..., N) float32, which is only read.
        """
        return self.run(x, residual, "add")

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        """Apply the layer and add the residual stream, as `add` does.

        Args:
            x: (..., K).
            residual: (..., N) float32.
        """
        return self.add(x, residual)


class AmxLinear(TileLinear):
    """A layer of bfloat16 or float32 numbers.

    In float32 each number is a sum of three in bfloat16, and six products of those are added: the
    result is as near to float64 as that of a float32 product.

    Args:
        weights: The numbers of the layer.
        dtype: Of inputs and outputs, bfloat16 or float32.
    """

    def __init__(self, weights: LinearWeights, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weights.weight.shape
        self.dtype = dtype
        parts = split_numbers(weights.dequantize(), 3 if dtype == torch.float32 else 1)
        self.operation = "linear_split_amx" if dtype == torch.float32 else "linear_amx"
        self.packed = torch.stack([pack_tiles(part) for part in parts], dim=2)
        self.bias = pad_outputs(weights.bias, self.out_features)

    def run(
        self,
        x: Tensor,
        other: Tensor | None,
        then: str,
        next_linear: nn.Module | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Apply the layer and an operation to its result, as TileLinear.run says.

        Args:
            x: (..., K).
            other: (..., N), or None.
            then: The operation.
            next_linear: Not used.
        """
        y: Tensor = operation(self.operation)(
            x.to(self.dtype), self.packed, self.bias, other, self.out_features, then
        )
        return y


class AmxInt8Linear(TileLinear):
    """A calibrated layer in 8 bits, which takes inputs as Int8Linear does.

    Args:
        weights: The numbers of the layer in 8 bits. Its float outputs are bfloat16.
    """

    dtype = torch.bfloat16

    def __init__(self, weights: LinearWeights) -> None:
        super().__init__()
        assert weights.scale is not None
        assert weights.x_scale is not None
        self.out_features, self.in_features = weights.weight.shape
        self.x_scale, self.x_zero_point = weights.x_scale, weights.x_zero_point
        # An input stands for (x - zero_point) * x_scale: the zero point goes into the bias.
        scale = weights.scale.double() * self.x_scale
        sums = weights.weight.sum(dim=1, dtype=torch.int64)
        bias = -self.x_zero_point * scale * sums
        if weights.bias is not None:
            bias = bias + weights.bias
        self.packed = pack_tiles(weights.weight)
        self.scale = pad_outputs(scale, self.out_features)
        self.bias = pad_outputs(bias, self.out_features)

    def run(
        self, x: Tensor, other: Tensor | None, then: str, next_linear: nn.Module | None = None
    ) -> Tensor:
        """Apply the layer and an operation to its result, as TileLinear.run says.

        Args:
            x: (..., K), as Int8Linear.to_uint8 takes it.
            other: (..., N), or None.
            then: The operation.
            next_linear: Its input is quantized here, if it is an AmxInt8Linear.
        """
        factor, zero_point = None, 0.0
        if isinstance(next_linear, AmxInt8Linear):
            factor, zero_point = 1 / next_linear.x_scale, float(next_linear.x_zero_point)
        if x.dtype != torch.uint8:
            x = onednn_ops.to_uint8(x.clamp(0, 255))
        y: Tensor = operation("linear_int8_amx")(
            x, self.packed, self.scale, self.bias, other, self.out_features, then, factor,
            zero_point,
        )  # fmt: skip
        return y

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Apply the layer and add the residual stream, (..., K) to (..., N) float32.

        Args:
            x: (..., K) uint8, or an input in its own units.
            residual: (..., N) float32, which is only read.
        """
        if x.dtype != torch.uint8:
            x = x.float() * (1 / self.x_scale) + (self.x_zero_point + 0.5)
        return self.run(x, residual, "add")


class AmxPatches(PatchTokens):
    """A patch projection of float32 pixels on AMX's tiles.

    Pixels and weights are sums of two bfloat16 numbers each, of which three of the four products
    are computed: the result errs by 1e-5, where that of one product errs by 2e-3.

    Args:
        linear: The projection of flattened patches, (C p q) to D.
        kernel: The shape of the convolution's weight, (D, C, p, q).
    """

    def __init__(self, linear: LinearWeights, kernel: torch.Size) -> None:
        super().__init__(kernel)
        first, second = split_numbers(linear.dequantize(), 2)
        self.packed = pack_tiles(torch.cat([first, first, second], dim=1))
        self.bias = pad_outputs(linear.bias, kernel[0])

    def tokens(self, images: Tensor) -> Tensor:
        """Project images to tokens, (B, h * w, D) float32.

        Args:
            images: Pixels (B, C, H, W).
        """
        outputs, _, p, q = self.kernel
        project = operation("patches_amx")
        y: Tensor = project(images.float(), self.packed, self.bias, outputs, p, q)
        return y


def fake_linear(
    x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None, outputs: int, then: str,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    """Return an empty tensor of the result's shape, (..., N).

    Args:
        x: (..., K).
        weight: The packed weight.
        bias: In whole blocks.
        other: (..., N), or None.
        outputs: N.
        then: What follows the product.
    """
    dtype = torch.float32 if then == "add" else x.dtype
    return x.new_empty((*x.shape[:-1], outputs), dtype=dtype)


def fake_int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, other: Tensor | None, outputs: int,  # noqa: ARG001
    then: str, out_factor: float | None, out_zero_point: float,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    """Return an empty tensor of the result's shape, (..., N).

    Args:
        x: (..., K).
        weight: The packed weight.
        scale: In whole blocks.
        bias: In whole blocks.
        other: (..., N), or None.
        outputs: N.
        then: What follows the product.
        out_factor: Of a uint8 result, else None.
        out_zero_point: Of a uint8 result.
    """
    dtype = torch.bfloat16 if out_factor is None else torch.uint8
    dtype = torch.float32 if then == "add" else dtype
    return x.new_empty((*x.shape[:-1], outputs), dtype=dtype)


def fake_patches(
    images: Tensor, weight: Tensor, bias: Tensor, outputs: int, down: int, across: int,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    """Return an empty tensor of the result's shape, (B, h * w, N).

    Args:
        images: (B, C, H, W).
        weight: The packed weight.
        bias: In whole blocks.
        outputs: N.
        down: Height of a patch.
        across: Width of a patch.
    """
    b, _, height, width = images.shape
    return images.new_empty((b, (height // down) * (width // across), outputs))


SPLIT_FAKES = (("linear_split_amx", fake_linear),)
FAKES = (
    ("linear_amx", fake_linear),
    ("linear_int8_amx", fake_int8_linear),
    ("patches_amx", fake_patches),
)


def run_samples() -> None:
    """Run the kernels on one number."""
    one = torch.ones(1, 1, dtype=torch.bfloat16, device="cpu")
    AmxLinear(LinearWeights(one), torch.bfloat16)(one)
    scale = torch.ones(1, dtype=torch.float32, device="cpu")
    weights = LinearWeights(one.to(torch.int8), scale=scale, x_scale=1.0)
    AmxInt8Linear(weights)(one.to(torch.uint8))
    image = torch.ones(1, 1, 1, 1, dtype=torch.float32, device="cpu")
    AmxPatches(LinearWeights(image[0, 0]), image.shape)(image)


def run_split_sample() -> None:
    """Run the kernel of float32 on one number."""
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    AmxLinear(LinearWeights(one), torch.float32)(one)
