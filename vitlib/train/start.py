"""The model that a run starts from: its head, what it drops, and what of it moves.

A model that the caller gives is trained itself: its own parts, its frozen parameters, its
parametrizations stay what they are. What cannot be trained so is refused before the first step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

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


def check_given(model: object) -> ViT:
    """A model that the caller gives, its config in agreement with its modules.

    Raises:
        ConfigError: It is no ViT, or keeps numbers in training that a run's checkpoints do not.
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


def fit_head(model: ViT, labels: Sequence[str], given: bool) -> bool:
    """Give a model a head for these labels, unless it has one.

    Args:
        model: changed in place.
        labels: one a class.
        given: the caller made the model: a head put in by hand stays.

    Returns:
        Whether the head is new.

    Raises:
        ConfigError: The head put in by hand has another number of classes.
    """
    cfg, count = model.config, len(labels)
    by_hand = given and cfg.num_classes > 0 and type(model.head) is not Linear
    if by_hand and cfg.num_classes != count:
        raise ConfigError(
            f"the head put in by hand gives {cfg.num_classes} classes, the photos have {count} "
            f"labels: give it {count}, or call model.reset_classifier({count})"
        )
    is_new = not by_hand and (cfg.labels != tuple(labels) or cfg.num_classes != count)
    if is_new:
        model.reset_classifier(count)
    model.loaded_labels = ()  # the labels are those of this head now
    return is_new


def head_at(model: ViT, mean: npt.NDArray[np.float64]) -> None:
    """Let a new head of a regression start at the mean of its targets, (C,): from 0, numbers that
    are far from it would take the whole run to be reached."""
    with torch.no_grad():
        for head in (model.head, model.head_dist):
            if isinstance(head, torch.nn.Linear) and head.bias is not None:
                head.bias.copy_(torch.from_numpy(mean))


def set_rates(model: ViT, rates: Mapping[str, float]) -> None:
    """Set what the model's parts drop in training: dropout, attention_dropout, drop_path.

    Raises:
        ConfigError: A part put in by hand does not drop at a rate that is set.
    """
    depth = max(len(model.blocks) - 1, 1)
    for name, rate in rates.items():
        places: list[tuple[str, object, float]] = []
        for index, block in enumerate(model.blocks):
            path, own = f"blocks.{index}", rate * index / depth if name == "drop_path" else rate
            if name == "attention_dropout":
                places.append((f"{path}.attn", getattr(block, "attn", None), own))
            else:
                places.append((path, block, own))
        if name == "dropout":
            places.append(("patch_embed", model.patch_embed, rate))
        for path, part, own in places:
            if isinstance(part, Attention if name == "attention_dropout" else Block | PatchEmbed):
                setattr(part, "drop_path" if name == "drop_path" else "dropout", own)
            elif own:
                raise ConfigError(
                    f"{name}={rate}: {path} ({type(part).__name__}) is not vitlib's and does not "
                    "drop at that rate: leave it out"
                )


def own_parts(model: ViT) -> list[str]:
    """Parts that no checkpoint of another library can hold, as "path (class)"."""
    reconcile(model)
    return foreign_parts(model)


def layout_for(model: ViT, rule: ImageProcessor) -> str:
    """Return the layout that a run writes: hf, or vitlib for what that cannot hold."""
    try:
        serialize_model(model, get_layout("hf"), rule)
    except ConfigError:
        return "vitlib"
    return "hf"


def tell_output(model: ViT, rule: ImageProcessor) -> None:
    """Log what a run of this model will write, where it is no checkpoint of Hugging Face's."""
    parts = own_parts(model)
    if not parts and layout_for(model, rule) != "hf":
        logger.warning("no class of transformers is this model: the run writes vitlib's own layout")
    if parts:
        logger.warning(
            "%s: put in by hand, so the run writes %s for model.load_state_dict(), and no "
            "checkpoint of another library",
            join_names(parts),
            WEIGHTS,
        )


def list_moved(model: object) -> list[tuple[nn.Parameter, bool]]:
    """Each parameter of a model that the caller gives, and whether it moves."""
    given = model.parameters() if isinstance(model, nn.Module) else ()
    return [(parameter, parameter.requires_grad) for parameter in given]


def write_own(model: ViT, out: Path, rule: ImageProcessor) -> None:
    """Write the weights of a model with parts of its own, for model.load_state_dict.

    Raises SourceError where they cannot be written.
    """
    tensors = {name: t.detach().cpu().clone() for name, t in model.state_dict().items()}
    with open_atomic(out / WEIGHTS) as file:
        save_file({name: t.contiguous() for name, t in tensors.items()}, file.name)
    with open_atomic(out / "preprocessor_config.json") as file:
        file.write(json.dumps(rule.to_dict(), indent=2).encode())
