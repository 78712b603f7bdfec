"""The optimizer: trainable parameters, and the learning rate of each step.

Sources: Loshchilov and Hutter 1608.03983 (cosine), 1711.05101 (AdamW); Goyal et al. 1706.02677
(warm-up).
"""

from __future__ import annotations

import math

import torch

from vitlib.errors import ConfigError
from vitlib.param_groups import layer_index, parameter_groups
from vitlib.train.config import TrainConfig
from vitlib.train.settings import Optimizer, Tuning
from vitlib.vit import ViT

HEAD = ("head.", "head_dist.")


def freeze_parameters(model: ViT, tune: Tuning) -> None:
    """Turn off gradients of the parameters that do not train.

    Args:
        model: Changed in place.
        tune: Its head_only and layers_to_freeze.

    Raises:
        ConfigError: layers_to_freeze is larger than the number of layers.
    """
    depth = len(model.blocks)
    if tune.layers_to_freeze > depth + 1:
        raise ConfigError(
            f"layers_to_freeze={tune.layers_to_freeze}: expected 0 to {depth + 1}, the embedding "
            f"and {depth} blocks"
        )
    for name, parameter in model.named_parameters():
        frozen = tune.head_only and not name.startswith(HEAD)
        frozen |= layer_index(name, depth) < tune.layers_to_freeze
        # forward does not read this pooler, so it would have no gradient.
        frozen |= name.startswith("pooler.") and model.config.pool != "pooler"
        if frozen:
            parameter.requires_grad_(False)


def create_optimizer(model: ViT, optim: Optimizer) -> torch.optim.Optimizer:
    """Create AdamW or SGD over the parameter groups.

    Args:
        model: The model.
        optim: Settings of the optimizer.

    Returns:
        The optimizer.

    Raises:
        ConfigError: No parameter trains.
    """
    groups = parameter_groups(
        model,
        lr=optim.learning_rate,
        weight_decay=optim.weight_decay,
        layer_decay=optim.layer_decay,
    )
    if optim.optim == "sgd":
        nesterov = optim.nesterov and optim.momentum > 0
        return torch.optim.SGD(
            groups, lr=optim.learning_rate, momentum=optim.momentum, nesterov=nesterov
        )
    return torch.optim.AdamW(
        groups,
        lr=optim.learning_rate,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_epsilon,
        fused=True,
    )


def lr_factor(step: int, total: int, config: TrainConfig) -> float:
    """Compute the learning rate of a step as a share of learning_rate.

    Args:
        step: Step, from 0.
        total: Steps of the run.
        config: Its schedule.

    Returns:
        A factor of 0 to 1.
    """
    optim = config.optim
    warmup = optim.warmup_steps or round(total * optim.warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if optim.lr_scheduler_type == "constant":
        return 1.0
    progress = (step - warmup) / max(total - warmup, 1)
    if optim.lr_scheduler_type == "cosine":
        factor = (1 + math.cos(math.pi * progress)) / 2
    elif optim.lr_scheduler_type == "linear":
        factor = 1 - progress
    else:
        factor = (1 - progress) ** optim.lr_power
    return optim.lr_end + (1 - optim.lr_end) * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float, config: TrainConfig) -> None:
    """Set every group's learning rate for the next step.

    Args:
        optimizer: Changed in place.
        factor: From lr_factor.
        config: Its learning_rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = config.optim.learning_rate * factor * group["lr_scale"]


def max_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the largest learning rate of all groups, the head's.

    Args:
        optimizer: The optimizer.

    Returns:
        The rate of the next step.
    """
    return max(float(group["lr"]) for group in optimizer.param_groups)
