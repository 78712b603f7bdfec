"""The model that a run starts from: its head, its dropout, and its trainable parameters.

A model that the caller passes is itself trained: custom modules, frozen parameters and
parametrizations stay. A model that cannot be trained so is refused before the first step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import nn

from vitlib.checkpoint.layouts.detect import get_layout
from vitlib.checkpoint.reconcile import foreign_parts, reconcile
from vitlib.checkpoint.save import serialize_model
from vitlib.data.photos import join_names
from vitlib.encoder import Attention, Block, Linear
from vitlib.errors import ConfigError
from vitlib.image.processor import ImageProcessor
from vitlib.patch_embed import PatchEmbed
from vitlib.system.atomic import open_atomic
from vitlib.vit import ViT

logger = logging.getLogger("vitlib")
WEIGHTS = "state_dict.safetensors"


def check_model(model: object) -> ViT:
    """Check a model that the caller passes, and make its config agree with its modules.

    Args:
        model: The caller's object.

    Returns:
        The model.

    Raises:
        ConfigError: It is no ViT, or has running statistics, which checkpoints do not hold.
    """
    if not isinstance(model, ViT):
        raise ConfigError(
            f"a {type(model).__name__} cannot be trained: give a hub id, a folder, a file, or a ViT"
        )
    reconcile(model)
    for name, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None:
            raise ConfigError(
                f"{name} ({type(module).__name__}) keeps running statistics, which are no part of "
                "a run's checkpoints: put in a LayerNorm, or track_running_stats=False"
            )
    return model


def set_head(model: ViT, labels: Sequence[str], is_caller_model: bool) -> bool:
    """Create a head for the labels, unless the model has one.

    Args:
        model: Changed in place.
        labels: One a class.
        is_caller_model: The caller made the model, so a custom head stays.

    Returns:
        True if the head is new.

    Raises:
        ConfigError: The custom head has another number of classes.
    """
    cfg, count = model.config, len(labels)
    is_custom = is_caller_model and cfg.num_classes > 0 and type(model.head) is not Linear
    if is_custom and cfg.num_classes != count:
        raise ConfigError(
            f"the head put in by hand gives {cfg.num_classes} classes, the photos have {count} "
            f"labels: give it {count}, or call model.reset_classifier({count})"
        )
    is_new = not is_custom and (cfg.labels != tuple(labels) or cfg.num_classes != count)
    if is_new:
        model.reset_classifier(count)
    # From now on the labels are those of this head.
    model.loaded_labels = ()
    return is_new


def init_regression_head(model: ViT, mean: npt.NDArray[np.float64]) -> None:
    """Let a new regression head answer the mean of its targets for every photo.

    From random weights and a bias of 0, targets far from 0, or close together, would take the whole
    run to be reached.

    Args:
        model: Changed in place.
        mean: (C,).
    """
    with torch.no_grad():
        for head in (model.head, model.head_dist):
            if isinstance(head, torch.nn.Linear) and head.bias is not None:
                head.weight.zero_()
                head.bias.copy_(torch.from_numpy(mean))


def set_dropout_rates(model: ViT, rates: Mapping[str, float]) -> None:
    """Set the probabilities of dropout in training.

    Args:
        model: Changed in place.
        rates: By the names dropout, attention_dropout and drop_path. The rate of drop_path is that
            of the last block, and rises from 0 (2012.12877).

    Raises:
        ConfigError: A custom module cannot take a rate above 0.
    """
    max_index = max(len(model.blocks) - 1, 1)
    for name, rate in rates.items():
        modules: list[tuple[str, object, float]] = []
        for index, block in enumerate(model.blocks):
            path = f"blocks.{index}"
            block_rate = rate * index / max_index if name == "drop_path" else rate
            if name == "attention_dropout":
                modules.append((f"{path}.attn", getattr(block, "attn", None), block_rate))
            else:
                modules.append((path, block, block_rate))
        if name == "dropout":
            modules.append(("patch_embed", model.patch_embed, rate))
        for path, module, module_rate in modules:
            if isinstance(module, Attention if name == "attention_dropout" else Block | PatchEmbed):
                setattr(module, "drop_path" if name == "drop_path" else "dropout", module_rate)
            elif module_rate:
                raise ConfigError(
                    f"{name}={rate}: {path} ({type(module).__name__}) is not vitlib's and does not "
                    "drop at that rate: leave it out"
                )


def list_custom_parts(model: ViT) -> list[str]:
    """List the modules that no checkpoint of another library can hold.

    Args:
        model: The model.

    Returns:
        "path (class)" of each.
    """
    reconcile(model)
    return foreign_parts(model)


def choose_layout(model: ViT, processor: ImageProcessor) -> Literal["hf", "vitlib"]:
    """Choose the layout of the checkpoint that a run writes.

    Args:
        model: A model without custom modules.
        processor: Its preprocessing.

    Returns:
        "hf", or "vitlib" for a model that Hugging Face's layout cannot hold.
    """
    try:
        serialize_model(model, get_layout("hf"), processor)
    except ConfigError:
        return "vitlib"
    return "hf"


def warn_of_layout(model: ViT, processor: ImageProcessor) -> None:
    """Log a warning if the run will not write a checkpoint of Hugging Face's.

    Args:
        model: The model before training.
        processor: Its preprocessing.
    """
    parts = list_custom_parts(model)
    if not parts and choose_layout(model, processor) != "hf":
        logger.warning("no class of transformers is this model: the run writes vitlib's own layout")
    if parts:
        logger.warning(
            "%s: put in by hand, so the run writes %s for model.load_state_dict(), and no "
            "checkpoint of another library",
            join_names(parts),
            WEIGHTS,
        )


def list_trainable(model: object) -> list[tuple[nn.Parameter, bool]]:
    """List the parameters of the caller's model, to restore requires_grad after a run.

    Args:
        model: The caller's model, or anything else that finetune takes.

    Returns:
        Each parameter and its requires_grad; empty unless the caller passes a model.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return [(parameter, parameter.requires_grad) for parameter in parameters]


def write_state_dict(model: ViT, out: Path, processor: ImageProcessor) -> None:
    """Write the weights of a model with custom modules, for model.load_state_dict.

    Args:
        model: The trained model.
        out: Folder of the run.
        processor: Its preprocessing, written beside the weights.

    Raises:
        SourceError: The files cannot be written.
    """
    tensors = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    with open_atomic(out / WEIGHTS) as file:
        save_file({name: t.contiguous() for name, t in tensors.items()}, file.name)
    with open_atomic(out / "preprocessor_config.json") as file:
        file.write(json.dumps(processor.to_dict(), indent=2).encode())
