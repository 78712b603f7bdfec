"""Parts of a model that this package computes in their place: vitlib's own, in float32.

On a GPU that is attention alone. Whatever else stands in a part's place, or listens to it, is
called as it is.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from vitlib.encoder import MLP, Attention, Block, LayerNorm, Linear, RotaryAttention, SwiGLU

# What a module calls on its way, besides forward.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL = tuple(f"_global{name}" for name in _HOOKS)


def is_plain(module: object, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of these classes itself, with nobody listening to it."""
    return (
        type(module) in kinds
        and "forward" not in vars(module)
        and not any(getattr(module, name) for name in _HOOKS)
    )


def has_global_hooks() -> bool:
    """Whether somebody listens to every module."""
    return any(getattr(torch_module, name) for name in _GLOBAL)


def is_linear(module: object) -> bool:
    """Whether a linear layer is one of ours."""
    return is_plain(module, nn.Linear, Linear) and _all_plain(module)


def is_norm(module: object) -> bool:
    """Whether a norm is one of ours."""
    return (
        is_plain(module, nn.LayerNorm, LayerNorm)
        and _all_plain(module)
        and getattr(module, "bias", None) is not None
    )


def is_block(module: object) -> bool:
    """Whether a block's parts may be taken one by one."""
    return is_plain(module, Block)


def is_attention(module: object) -> bool:
    """Whether attention may be taken apart; where it drops probabilities, it does so itself."""
    if not is_plain(module, Attention, RotaryAttention):
        return False
    assert isinstance(module, Attention)
    return not (module.training and module.dropout)


def is_mlp(module: object) -> bool:
    """Whether an MLP may be taken apart."""
    return is_plain(module, MLP, SwiGLU)


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
