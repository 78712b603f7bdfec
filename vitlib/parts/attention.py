"""Attention by a function of one's own, in place of torch's.

How data flows: the blocks project queries, keys and values, with their norms and rotation, as
before; the function takes them and the bias, and gives the attended values; the blocks project
these. Shapes: as in vitlib/vit.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import Tensor, nn

from vitlib.encoder import Attend, Attention
from vitlib.errors import ConfigError, resolve_block_indices
from vitlib.parts.sharing import copy_sharing_weights
from vitlib.vit import ViT


class CheckedAttend(nn.Module):
    """A function of the user's own, or a module with parameters, whose result is checked.

    Args:
        fn: The function.
        path: Path of the attention in the model, for messages.
    """

    def __init__(self, fn: Attend, path: str) -> None:
        super().__init__()
        self.fn, self.path = fn, path

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Call the function.

        Args:
            q: Queries, (B, H, Q, K).
            k: Keys, (B, H, T, K).
            v: Values, (B, H, T, K).
            bias: Bias of the scores, (1, H, Q, T), or None.

        Returns:
            The attended values, (B, H, Q, K).

        Raises:
            ConfigError: The function returned anything else.
        """
        heads: object = self.fn(q, k, v, bias)
        expected = f"expected {tuple(q.shape)} {v.dtype}, as torch's scaled_dot_product_attention"
        name = describe_function(self.fn)
        if not isinstance(heads, Tensor):
            raise ConfigError(f"{self.path}: {name} returned {type(heads).__name__}: {expected}")
        if heads.shape != q.shape or heads.dtype != v.dtype:
            got = f"{tuple(heads.shape)} {heads.dtype}"
            raise ConfigError(f"{self.path}: {name} returned {got}: {expected}")
        return heads


def describe_function(fn: object) -> str:
    """Name a function for messages.

    Args:
        fn: A function or any other callable.
    """
    return str(getattr(fn, "__name__", type(fn).__name__))


def check_signature(fn: object, count: int, message: str) -> None:
    """Check that a function takes so many tensors.

    Args:
        fn: Anything.
        count: Number of positional arguments that it is called with.
        message: What was expected, the beginning of the message.

    Raises:
        ConfigError: It is no function, a class, or takes other arguments.
    """
    if not callable(fn):
        raise ConfigError(f"{message}, got {type(fn).__name__}")
    if isinstance(fn, type):
        raise ConfigError(f"{message}, got the class {fn.__name__}: give an instance of it")
    call = fn.forward if isinstance(fn, nn.Module) else fn
    try:
        inspect.signature(call).bind(*range(count))
    except ValueError:  # functions written in C have no signature
        return
    except TypeError as error:
        name, text = describe_function(fn), inspect.signature(call)
        raise ConfigError(f"{message}, got {name}{text}") from error


def with_attention(model: ViT, fn: Attend, blocks: int | Sequence[int] | None = None) -> ViT:
    """Make a model that attends by a function of one's own.

    Args:
        model: The model, which is not changed.
        fn: `fn(q, k, v, bias)` with the meaning of torch's scaled_dot_product_attention. An
            nn.Module becomes a part of the model, with its parameters.
        blocks: The blocks that use it, as `indices` of `forward_intermediates`; None means all.

    Returns:
        A new model that shares the weights. Its last block computes every token if the function
        is in it, so that the function always takes as many queries as keys.

    Raises:
        ConfigError: `fn` is no function, a block is not there or its attention is not vitlib's own,
            or the model drops attention probabilities, which the function alone would know.
    """
    check_signature(fn, 4, "with_attention: expected fn(q, k, v, bias)")
    indices = sorted(resolve_block_indices(blocks, len(model.blocks), "blocks"))
    changed = copy_sharing_weights(model)
    for index in indices:
        attn = changed.blocks[index].attn
        path = f"blocks.{index}.attn"
        if not isinstance(attn, Attention):
            raise ConfigError(f"{path} is a {type(attn).__name__}: expected vitlib's Attention")
        if attn.dropout:
            raise ConfigError(
                f"{path} drops attention probabilities in training: set attention_dropout=0 and "
                "drop in the function"
            )
        attn.attend = CheckedAttend(fn, path)
    if len(changed.blocks) - 1 in indices:
        changed.compute_all_tokens = True
    return changed
