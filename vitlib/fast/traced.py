"""Fast modules as torch's compiler traces them: with plain weights, and kernels it can call.

How data flows: unpack_weights copies a trunk of fast modules. Its linear layers become those of
AMX's tiles where the CPU has them; others get plain weights, which the compiler packs once, as
packed ones are opaque to it. Its attention gets the fastest kernel that can be traced.

Shapes: (..., K) inputs to (..., N) outputs of a linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitlib.fast import onednn_ops
from vitlib.fast.attention import bmm_attention, fused_attention, graph_attention
from vitlib.fast.block import FastBlock
from vitlib.fast.cpp_attention import cpp_attention
from vitlib.fast.cpp_linears import AmxInt8Linear, AmxLinear, AmxPatches, has_amx_linear
from vitlib.fast.cpu import this_machine
from vitlib.fast.embeddings import PatchLinear
from vitlib.fast.int8_linears import Int8Linear
from vitlib.fast.linears import FastLinear, OpaqueLinear, PackedLinear
from vitlib.fast.module_swap import copy_with_children

# Fewest rows whose float32 product is faster by oneDNN, with what follows fused, than by MKL, which
# the compiler takes for a plain linear layer. Measured on an Intel CPU with AMX, ViT-S/16: 7 % and
# 3 % slower at 197 and 394 rows, 5 % and 11 % faster at 788 and 1576. On AMD MKL is slow (cpu.py).
MIN_ONEDNN_ROWS = 600
# Fewest rows whose float32 product is faster on AMX's tiles, whose weights take 1.5 times the
# memory. Measured with weights of 384 x 384 to 768 x 3072: slower at 8 rows, 1.0 to 2.1 times as
# fast at 16.
MIN_AMX_ROWS = 16


class TracedLinear(PackedLinear):
    """A float32 layer of a plain weight, which the compiler packs for MKL or for oneDNN."""

    min_rows = 0  # fewest for oneDNN

    def has_few_rows(self, x: Tensor) -> bool:
        """Return True if MKL's kernels are faster.

        Args:
            x: (..., K).
        """
        return x.numel() < self.min_rows * self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, as PackedLinear does.

        Args:
            x: (..., K).

        Returns:
            (..., N).
        """
        if self.has_few_rows(x):
            return FastLinear.forward(self, x)
        return onednn_ops.linear(x.to(self.dtype), onednn_ops.pack(self.packed), self.bias)

    def activate(self, x: Tensor, activation: str, next_linear: FastLinear | None) -> Tensor:
        """Apply the layer and an activation, as PackedLinear does.

        Args:
            x: (..., K).
            activation: "gelu", "gelu_tanh" or "silu".
            next_linear: Not used.

        Returns:
            (..., N).
        """
        if self.has_few_rows(x):
            return FastLinear.activate(self, x, activation, next_linear)
        packed = onednn_ops.pack(self.packed)
        return onednn_ops.linear(x.to(self.dtype), packed, self.bias, activation)

    def multiply(self, x: Tensor, other: Tensor) -> Tensor:
        """Apply the layer and multiply by another tensor, as PackedLinear does.

        Args:
            x: (..., K).
            other: (..., N).

        Returns:
            (..., N).
        """
        if self.has_few_rows(x):
            return FastLinear.multiply(self, x, other)
        packed = onednn_ops.pack(self.packed)
        return onednn_ops.linear_binary(x.to(self.dtype), packed, self.bias, other, "mul")

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Apply the layer and add the residual stream, as PackedLinear does.

        Args:
            x: (..., K).
            residual: (..., N), which is only read.

        Returns:
            (..., N).
        """
        if self.has_few_rows(x):
            return FastLinear.add(self, x, residual)
        packed, other = onednn_ops.pack(self.packed), residual.contiguous()
        return onednn_ops.linear_binary(x, packed, self.bias, other, "add")


class SplitLinear(nn.Module):
    """A float32 layer on AMX's tiles, which leaves few rows to a TracedLinear.

    Args:
        source: The layer that it computes.
    """

    def __init__(self, source: PackedLinear) -> None:
        super().__init__()
        self.source = source
        self.amx = AmxLinear(source.weights(), torch.float32)
        self.traced: nn.Module | None = None

    def choose(self, x: Tensor) -> Any:
        """Choose the layer for an input.

        Args:
            x: (..., K).

        Returns:
            The layer. The first call makes that of few rows, before the compiler traces.
        """
        if x.numel() >= MIN_AMX_ROWS * self.amx.in_features:
            return self.amx
        if self.traced is None:
            self.traced = plain_copy(self.source)
        return self.traced

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, (..., K) to (..., N).

        Args:
            x: (..., K).
        """
        y: Tensor = self.choose(x)(x)
        return y

    def activate(self, x: Tensor, activation: str, next_linear: nn.Module | None) -> Tensor:
        """Apply the layer and an activation, (..., K) to (..., N).

        Args:
            x: (..., K).
            activation: "gelu", "gelu_tanh" or "silu".
            next_linear: Not used.
        """
        y: Tensor = self.choose(x).activate(x, activation, next_linear)
        return y

    def multiply(self, x: Tensor, other: Tensor) -> Tensor:
        """Apply the layer and multiply by another tensor, (..., K) to (..., N).

        Args:
            x: (..., K).
            other: (..., N).
        """
        y: Tensor = self.choose(x).multiply(x, other)
        return y

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Apply the layer and add the residual stream, (..., K) to (..., N).

        Args:
            x: (..., K).
            residual: (..., N) float32, which is only read.
        """
        y: Tensor = self.choose(x).add(x, residual)
        return y

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        """Apply the layer and add the residual stream, as `add` does.

        Args:
            x: (..., K).
            residual: (..., N) float32.
        """
        return self.add(x, residual)


def unpack_weights(module: nn.Module, precision: str) -> Any:
    """Copy a module, with weights and attention that can be traced.

    Args:
        module: A trunk of fast modules, which is only read.
        precision: The model's.

    Returns:
        The copy, which shares everything else.
    """
    if isinstance(module, OpaqueLinear):
        return unpack_linear(module)
    if isinstance(module, PatchLinear) and precision == "bf16" and has_amx_linear(torch.bfloat16):
        return AmxPatches(module.linear.weights(), module.kernel)
    children = {
        name: None if child is None else unpack_weights(child, precision)
        for name, child in module._modules.items()
    }
    clone = copy_with_children(module, children)
    if isinstance(clone, FastBlock):
        dtype = clone.plan.attention_dtype
        if clone.sdpa is graph_attention:
            # oneDNN Graph's kernel is TorchScript. Without AMX the fused one is slower in bfloat16.
            clone.sdpa = bmm_attention if dtype == torch.bfloat16 else fused_attention
        if clone.sdpa is fused_attention:
            clone.sdpa = cpp_attention(dtype)
    return clone


def unpack_linear(linear: OpaqueLinear) -> nn.Module:
    """Copy a linear layer with a weight that can be traced.

    Args:
        linear: The layer, which is only read.

    Returns:
        A layer of AMX's tiles where there is one, else a copy with the plain weight.
    """
    if linear.dtype in (torch.float32, torch.bfloat16) and has_amx_linear(linear.dtype):
        if type(linear) is Int8Linear and linear.dtype == torch.bfloat16:
            return AmxInt8Linear(linear.weights())
        if type(linear) is PackedLinear:
            is_float32 = linear.dtype == torch.float32
            return SplitLinear(linear) if is_float32 else AmxLinear(linear.weights(), linear.dtype)
    return plain_copy(linear)


def plain_copy(linear: OpaqueLinear) -> OpaqueLinear:
    """Copy a linear layer with its weight as a plain tensor.

    Args:
        linear: The layer, which is only read.

    Returns:
        The copy, a TracedLinear in float32.
    """
    clone = object.__new__(type(linear))  # copy.copy would pack the weight once more
    clone.__dict__.update(linear.__dict__, packed=linear.weights().weight.contiguous())
    if isinstance(clone, PackedLinear):
        traced = TracedLinear if clone.dtype == torch.float32 else FastLinear
        object.__setattr__(clone, "__class__", traced)
        if isinstance(clone, TracedLinear) and this_machine().vendor == "intel":
            clone.min_rows = MIN_ONEDNN_ROWS
    return clone
