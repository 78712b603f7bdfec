"""Outputs of any module by name, and which outputs of two modules belong together.

Shapes: B images, T tokens, D embed_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitlib.errors import ConfigError
from vitlib.vit import ViT

# Names of vitlib's one output in the objects that transformers returns, the most specific first.
_MAIN = ("logits", "image_embeds", "summary", "output")
_NAMES = (*_MAIN, "pooler_output", "last_hidden_state")


def name_outputs(value: Any, module: object) -> dict[str, Tensor]:
    """Name the tensors that a module returned.

    Args:
        value: A tensor ("output"), a tuple or list ("0", "1"), a mapping, or an object such as
            transformers returns.
        module: The module, for the message.

    Returns:
        Tensors of floats by name, without empty ones.

    Raises:
        ConfigError: There is none.
    """
    if isinstance(value, Tensor):
        items: dict[str, Any] = {"output": value}
    elif isinstance(value, Mapping):
        items = {str(name): item for name, item in value.items()}
    elif (isinstance(value, tuple) and not hasattr(value, "_fields")) or isinstance(value, list):
        items = {str(index): item for index, item in enumerate(value)}
    else:
        items = {name: getattr(value, name, None) for name in getattr(value, "_fields", _NAMES)}
    tensors = {
        name: item
        for name, item in items.items()
        if isinstance(item, Tensor) and item.is_floating_point() and item.numel()
    }
    if not tensors:
        raise ConfigError(
            f"{type(module).__name__} returned {type(value).__name__} without a tensor of floats: "
            "expected a tensor, or a tuple, dict or object of tensors"
        )
    return tensors


def vit_outputs(
    model: ViT, images: Tensor, logits: Tensor, others: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Compute the outputs of a ViT that correspond to those of another module.

    Args:
        model: The model, in eval mode.
        images: (B, C, H, W).
        logits: What the model returns for the images.
        others: Outputs of the other module by name.

    Returns:
        What the model returns, by each name that fits, and its tokens and its pooled vector where
        the other module has them.
    """
    names = {"logits"} if model.num_classes else {"output", *_MAIN[1:]} & {"output", *others}
    outputs = dict.fromkeys(names, logits)
    has_tokens = any(x.ndim == 3 for x in others.values())
    if "last_hidden_state" in others or "pooler_output" in others or has_tokens:
        tokens = model.forward_features(images)
        outputs["last_hidden_state"] = tokens
        if "pooler_output" in others:
            has_pooler = model.pooler is not None
            pooled = model.forward_pooler(images) if has_pooler else model.pool(tokens)
            outputs["pooler_output"] = pooled
    return outputs


def match_outputs(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair the outputs of two modules.

    Args:
        a: Outputs of the model by name.
        b: Outputs of the reference by name.

    Returns:
        Pairs by name: of the names that both have, else of the first two of the same shape; of the
        first two where no shapes are the same.
    """
    common = [name for name in b if name in a]
    if any(a[name].shape == b[name].shape for name in common):
        return {name: (a[name], b[name]) for name in common}
    first, second = _by_importance(a), _by_importance(b)
    for name in second:
        for other in first:
            if a[other].shape == b[name].shape:
                is_named = name != "output" and not name.isdecimal()
                return {name if is_named else other: (a[other], b[name])}
    return {second[0]: (a[first[0]], b[second[0]])}


def _by_importance(outputs: Mapping[str, Tensor]) -> list[str]:
    """Sort names of outputs: known ones first, others in their own order."""
    known = [name for name in _NAMES if name in outputs]
    return [*known, *(name for name in outputs if name not in known)]


def to_float64(x: Tensor) -> Tensor:
    """Return a tensor in float64 on the CPU.

    Args:
        x: Any tensor.
    """
    return x.detach().to("cpu").to(torch.float64)
