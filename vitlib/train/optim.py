"""Which weights move, at which rate, and how the rate goes over the steps.

Sources: Clark et al. 2003.10555 and Bao et al. 2106.08254 (rates that fall with depth); Loshchilov
and Hutter 1608.03983 (cosine), 1711.05101 (AdamW); Goyal et al. 1706.02677 (warm-up).
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from vitlib.errors import ConfigError
from vitlib.train.config import Optimizer, TrainConfig, Tuning
from vitlib.vit import ViT

HEAD = ("head.", "head_dist.")
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_EMBEDDING = ("patch_embed.", "norm_pre.", "attn_position.")


def freeze(model: ViT, tune: Tuning) -> None:
    """Leave the gradients of what does not move out. Raises ConfigError where nothing would."""
    depth = len(model.blocks)
    if tune.layers_to_freeze > depth + 1:
        raise ConfigError(
            f"layers_to_freeze={tune.layers_to_freeze}: expected 0 to {depth + 1}, the embedding "
            f"and {depth} blocks"
        )
    for name, parameter in model.named_parameters():
        frozen = tune.head_only and not name.startswith(HEAD)
        frozen |= layer_of(name, depth) < tune.layers_to_freeze
        frozen |= name.startswith("pooler.") and model.config.pool != "pooler"
        if frozen:
            parameter.requires_grad_(False)


def layer_of(name: str, depth: int) -> int:
    """A parameter's place from the pixels up: 0 the embedding, then each block, last all above."""
    block = _BLOCK.match(name)
    if block:
        return int(block[1]) + 1
    return 0 if name.startswith(_EMBEDDING) else depth + 1


def groups(model: ViT, optim: Optimizer) -> list[dict[str, Any]]:
    """Parameters of one rate and decay together, each group with its `rate`, a share of
    learning_rate: layer_decay to the power of the layers above it."""
    depth = len(model.blocks)
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, depth)
        decays = parameter.ndim > 1 and "_token" not in name and "pos_embed" not in name
        decays &= "relative" not in name and not name.endswith("probe")
        key = (layer, decays)
        if key not in found:
            found[key] = {
                "params": [],
                "names": [],
                "weight_decay": optim.weight_decay if decays else 0.0,
                "rate": optim.layer_decay ** (depth + 1 - layer),
            }
        found[key]["params"].append(parameter)
        found[key]["names"].append(name)
    if not found:
        raise ConfigError("nothing is left to train: freeze fewer layers")
    return [found[key] for key in sorted(found)]


def optimizer(model: ViT, optim: Optimizer) -> torch.optim.Optimizer:
    """AdamW or SGD over the groups."""
    given = groups(model, optim)
    for group in given:
        group["lr"] = optim.learning_rate * group["rate"]
    if optim.optim == "sgd":
        nesterov = optim.nesterov and optim.momentum > 0
        return torch.optim.SGD(
            given, lr=optim.learning_rate, momentum=optim.momentum, nesterov=nesterov
        )
    return torch.optim.AdamW(
        given,
        lr=optim.learning_rate,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_epsilon,
        fused=True,
    )


def rate_at(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of a step (from 0) of `total`, as a share of learning_rate."""
    optim = config.optim
    warm = optim.warmup_steps or round(total * optim.warmup_ratio)
    if step < warm:
        return (step + 1) / (warm + 1)
    if optim.lr_scheduler_type == "constant":
        return 1.0
    gone = (step - warm) / max(total - warm, 1)
    if optim.lr_scheduler_type == "cosine":
        left = (1 + math.cos(math.pi * gone)) / 2
    elif optim.lr_scheduler_type == "linear":
        left = 1 - gone
    else:
        left = (1 - gone) ** optim.lr_power
    return optim.lr_end + (1 - optim.lr_end) * left


def set_rate(opt: torch.optim.Optimizer, share: float, config: TrainConfig) -> None:
    """Every group's learning rate for the next step."""
    for group in opt.param_groups:
        group["lr"] = config.optim.learning_rate * share * group["rate"]


def largest_rate(opt: torch.optim.Optimizer) -> float:
    """For the log: the head's."""
    return max(float(group["lr"]) for group in opt.param_groups)
