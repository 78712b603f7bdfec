"""Fast modules as torch's compiler traces them: with plain weights, and kernels it can call.

How data flows: unpack_weights copies a trunk of fast modules. Its linear layers in 16 and 8 bits
become those of AMX's tiles where the CPU has them; others get plain weights, which the compiler
packs once, as packed ones are opaque to it. Its attention gets the fastest kernel that can be
traced.

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
# The layers of AMX's tiles, by those that they replace, where outputs are bfloat16.
AMX_LINEARS = {PackedLinear: AmxLinear, Int8Linear: AmxInt8Linear}


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
    if isinstance(module, PatchLinear) and precision == "bf16" and has_amx_linear():
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
    amx_linear = AMX_LINEARS.get(type(linear))
    if amx_linear is not None and linear.dtype == torch.bfloat16 and has_amx_linear():
        return amx_linear(linear.weights())
    clone = object.__new__(type(linear))  # copy.copy would pack the weight once more
    clone.__dict__.update(linear.__dict__, packed=linear.weights().weight.contiguous())
    if isinstance(clone, PackedLinear):
        traced = TracedLinear if clone.dtype == torch.float32 else FastLinear
        object.__setattr__(clone, "__class__", traced)
        if isinstance(clone, TracedLinear) and this_machine().vendor == "intel":
            clone.min_rows = MIN_ONEDNN_ROWS
    return clone
