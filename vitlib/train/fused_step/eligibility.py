"""Parts of a model that this package computes in their place: vitlib's own, in float32.

On a GPU that is attention alone. Whatever else stands in a part's place, or listens to it, is
called as it is.
"""

from __future__ import annotations

import torch
from torch import nn

from vitlib.encoder import MLP, Attention, Block, LayerNorm, Linear, RotaryAttention, SwiGLU
from vitlib.fast.module_swap import is_stock

# Training asks for each module at every step: only the method that it replaces is looked at.
_METHODS = ("forward",)


def is_linear(module: object) -> bool:
    """Whether a linear layer is one of ours."""
    return is_stock(module, (nn.Linear, Linear), _METHODS) and _all_plain(module)


def is_norm(module: object) -> bool:
    """Whether a norm is one of ours."""
    return (
        is_stock(module, (nn.LayerNorm, LayerNorm), _METHODS)
        and _all_plain(module)
        and getattr(module, "bias", None) is not None
    )


def is_block(module: object) -> bool:
    """Whether a block's parts may be taken one by one."""
    return is_stock(module, (Block,), _METHODS)


def is_attention(module: object) -> bool:
    """Whether attention may be taken apart; where it drops probabilities, it does so itself."""
    if not is_stock(module, (Attention, RotaryAttention), _METHODS):
        return False
    assert isinstance(module, Attention)
    return not (module.training and module.dropout)


def is_mlp(module: object) -> bool:
    """Whether an MLP may be taken apart."""
    return is_stock(module, (MLP, SwiGLU), _METHODS)


def is_plain_residual(block: Block, layer_scale: nn.Module | None) -> bool:
    """Whether a branch adds what it computed, with no LayerScale, and in training drops nothing."""
    return layer_scale is None and not (block.training and (block.dropout or block.drop_path))


def _all_plain(module: object) -> bool:
    """Parameters of a float32 model on a CPU, not of a wrapper's class."""
    assert isinstance(module, nn.Module)
    return all(
        p is None or (type(p) is nn.Parameter and p.dtype == torch.float32 and p.is_cpu)
        for p in module._parameters.values()
    )
