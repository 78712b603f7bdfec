"""LoRA in a training run: which layers get updates, and their merge at the end (2106.09685).

The checkpoint of a run has no trace of the updates, which are merged into its weights.
"""

from __future__ import annotations

from typing import Any

import torch

from vitlib.adapters.lora import LoraLinear, is_wrappable, layer_parent
from vitlib.adapters.settings import LINEARS
from vitlib.errors import ConfigError
from vitlib.train.optim import HEAD
from vitlib.train.settings import Tuning
from vitlib.vit import ViT


def add_updates(model: ViT, tune: Tuning, seed: int) -> None:
    """Wrap the layers of lora_targets, and freeze all else but the head.

    Args:
        model: Changed in place.
        tune: Its lora_* settings; a rank of 0 does nothing.
        seed: Seed of the first values.

    Raises:
        ConfigError: A target is no linear layer in some block, or the model has parts of
            vitlib.adapt: the merge would reach the base whose memory they share.
    """
    if not tune.lora_r:
        return
    if model.adaptation is not None:
        raise ConfigError(
            f"lora_r: the model has {', '.join(model.adaptation.to_json())} of vitlib.adapt: leave "
            "lora_r out; vitlib.adapt(base, lora=...) adds LoRA beside them"
        )
    for name, parameter in model.named_parameters():
        if not name.startswith(HEAD):
            parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for block in model.blocks[max(tune.layers_to_freeze - 1, 0) :]:
        for target in tune.lora_targets:
            name = LINEARS[target]
            parent = layer_parent(block, name)
            base: Any = getattr(parent, name, None)
            if parent is None or not is_wrappable(base):
                raise ConfigError(
                    f"lora_targets: {target} is a {type(base).__name__} in a block put in by hand, "
                    "no plain linear: leave it out of lora_targets"
                )
            setattr(parent, name, LoraLinear(base, tune.lora_r, tune.lora_alpha, generator))


def merge_updates(model: ViT) -> None:
    """Merge every update of the run into its layer, which removes all LoraLinear modules.

    Args:
        model: Changed in place. What vitlib.adapt added stays.
    """
    if model.adaptation is not None:
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LoraLinear):
                setattr(module, name, child.merge())
