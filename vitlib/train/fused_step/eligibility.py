"""Modules that the fused forward computes in place of their own code: stock ones, in float32.

Stock means vitlib's or torch's own class, unchanged and without hooks. A custom class, a hook or a
wrapped parameter may change the numbers, so such a module is called as it is. On a GPU no
parameter is eligible, and attention alone is replaced.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn

from vitlib.adapters.lora import LoraLinear
from vitlib.encoder import MLP, Attention, Block, LayerNorm, Linear, RotaryAttention, SwiGLU
from vitlib.fast.module_swap import is_stock

# Every step asks for each module, so only the method that is replaced is looked at.
_METHODS = ("forward",)


def is_linear(module: object) -> bool:
    """Return True for a linear layer that LinearFunction can compute.

    Args:
        module: Any module.
    """
    return is_stock(module, (nn.Linear, Linear), _METHODS) and _has_own_parameters(module)


def is_lora(module: object) -> TypeGuard[LoraLinear]:
    """Return True for an update of a linear layer that LinearFunction can compute.

    Args:
        module: Any module.
    """
    return is_stock(module, (LoraLinear,), _METHODS) and is_linear(getattr(module, "base", None))


def is_norm(module: object) -> TypeGuard[nn.LayerNorm]:
    """Return True for a LayerNorm with a bias that LinearFunction can compute.

    Args:
        module: Any module.
    """
    return (
        is_stock(module, (nn.LayerNorm, LayerNorm), _METHODS)
        and _has_own_parameters(module)
        and getattr(module, "bias", None) is not None
    )


def is_block(module: object) -> bool:
    """Return True for a block whose branches can be computed one by one.

    Args:
        module: Any module.
    """
    return is_stock(module, (Block,), _METHODS)


def is_attention(module: object) -> bool:
    """Return True for attention whose projections can be computed one by one.

    Attention that drops probabilities is not: no kernel here returns them.

    Args:
        module: Any module.
    """
    if not is_stock(module, (Attention, RotaryAttention), _METHODS):
        return False
    assert isinstance(module, Attention)
    differs = module.q_norm is not None or module.sub_norm is not None or module.attend is not None
    return not differs and not (module.training and module.dropout)


def is_mlp(module: object) -> bool:
    """Return True for an MLP whose layers can be computed one by one.

    Args:
        module: Any module.
    """
    return is_stock(module, (MLP, SwiGLU), _METHODS) and getattr(module, "sub_norm", 0) is None


def is_plain_residual(block: Block, layer_scale: nn.Module | None) -> bool:
    """Return True if a branch is added as it is: no LayerScale, dropout or stochastic depth.

    Args:
        block: The block of the branch.
        layer_scale: LayerScale of the branch, or None.
    """
    return layer_scale is None and not (block.training and (block.dropout or block.drop_path))


def _has_own_parameters(module: object) -> bool:
    """Return True for plain float32 parameters on a CPU, not tensors of a subclass (DTensor)."""
    assert isinstance(module, nn.Module)
    return all(
        p is None or (type(p) is nn.Parameter and p.dtype == torch.float32 and p.is_cpu)
        for p in module._parameters.values()
    )
