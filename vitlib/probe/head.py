"""The best probe as a checkpoint: the model up to a layer, and the head on its pooled tokens.

Each file is checked before it counts: the logits of the saved model are compared with those of the
probe. A pool that Hugging Face's class of the family does not have is written in vitlib's own
layout, or as a pool of theirs with the same logits.

Shapes: D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from vitlib.checkpoint.layouts.detect import get_layout
from vitlib.checkpoint.save import save, serialize_model
from vitlib.config import Pool
from vitlib.data import LabelledPhotos
from vitlib.data.write_list import TRAINING_LIST, write_list
from vitlib.errors import CheckpointError, ConfigError
from vitlib.features import Feature
from vitlib.image.processor import ImageProcessor
from vitlib.predict.predictor import Predictor
from vitlib.probe.logistic_head import LogisticHead
from vitlib.scores import Task
from vitlib.system.atomic import publish_folder, staging_folder
from vitlib.train.linear_probe import set_head
from vitlib.vit import ViT
from vitlib.weights import load

CHECKED = 4  # photos whose logits are compared
TRAINING_FIELDS = ("dropout", "attention_dropout", "drop_path")  # without effect on logits
TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2  # of the largest logit, in float32 and in 16 bits


class SavedProbe(NamedTuple):
    """Outcome of save_probe().

    Attributes:
        folder: The checkpoint; None where no layout holds it.
        layout: "hf" or "vitlib"; "" without a folder.
        note: Why it is not Hugging Face's layout, or why nothing is saved; "".
    """

    folder: Path | None
    layout: str
    note: str


def build_model(model: ViT, feature: Feature, head: LogisticHead, labels: Sequence[str]) -> ViT:
    """Build a classifier of the blocks up to a layer and a fitted head.

    Args:
        model: The model that gave the features; unchanged.
        feature: Layer and pool.
        head: The head of these features.
        labels: (C,) names of the classes.

    Returns:
        The classifier, float32, in eval mode.

    Raises:
        ConfigError: A ViT cannot be cut at this layer, or does not have this pool.
    """
    cfg, weight = model.config, torch.from_numpy(head.weight)
    outputs = replace(cfg.outputs, projection_dim=0)
    if feature.pool == "embed":
        if isinstance(model.projection, nn.Linear):
            # A head of a projection is one of what is projected.
            weight = weight @ model.projection.weight.detach().double()
    else:
        is_map, outputs = feature.pool == "map", replace(outputs, dist_head=False)
        pooling = cfg.attention_pool if is_map else None
        cfg = replace(cfg, pool=_parse_pool(feature.pool), attention_pool=pooling, outputs=outputs)
    task: Task = "multi_label_classification" if head.multi_label else "single_label_classification"
    new = ViT(
        replace(
            cfg,
            depth=feature.layer,
            num_classes=len(labels),
            labels=tuple(labels),
            problem_type=task,
            outputs=outputs,
        )
    )
    _copy_trunk(model, new)
    if new.head_dist is not None:
        # The mean of two heads with the same weights reads the mean of both tokens.
        weight = torch.cat([weight, weight], dim=1) / 2
    set_head(new, weight, torch.from_numpy(head.bias))
    return new.eval()


def _parse_pool(name: str) -> Pool:
    """Return the pool of a config by a feature's name of it."""
    for pool in get_args(Pool):
        if pool == name:
            return cast("Pool", pool)
    raise ConfigError(f"pool {name!r}: expected one of {', '.join(get_args(Pool))}")


def _copy_trunk(model: ViT, new: ViT) -> None:
    """Copy every weight but the head's. Raises ConfigError where the blocks differ."""
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    own = new.state_dict()
    for name, tensor in own.items():
        if name.startswith(("head.", "head_dist.")):
            continue
        if name not in state or state[name].shape != tensor.shape:
            raise ConfigError(f"the model cannot be cut at block {len(new.blocks)}: {name} differs")
        tensor.copy_(state[name])


def widen(model: ViT) -> ViT:
    """Express a head of class token or mean as one of both, which gives the other no weight.

    Args:
        model: A classifier with pool "cls" or "mean", and a class token.

    Returns:
        A classifier with pool "cls+mean" and the same logits.
    """
    new = ViT(replace(model.config, pool="cls+mean"))
    _copy_trunk(model, new)
    state = model.state_dict()
    parts = [state["head.weight"], torch.zeros_like(state["head.weight"])]
    if model.config.pool == "mean":
        parts.reverse()
    set_head(new, torch.cat(parts, dim=1), state["head.bias"])
    return new.eval()


def save_probe(
    predictor: Predictor,
    feature: Feature,
    head: LogisticHead,
    photos: LabelledPhotos,
    features: npt.NDArray[np.float32],
    folder: Path,
) -> SavedProbe:
    """Write a probe as a checkpoint that classifies, and compare its logits with the probe's.

    Args:
        predictor: The model with its preprocessing.
        feature: Layer and pool.
        head: The fitted head.
        photos: The training photos, which are listed beside the checkpoint.
        features: (N, D) of these photos.
        folder: The folder to write; an earlier checkpoint there is replaced.

    Returns:
        Where and how it is saved, or why not.

    Raises:
        SourceError: The folder cannot be written.
    """
    model, processor = predictor.model, predictor.image_processor
    if not isinstance(model, ViT):
        return SavedProbe(None, "", "an optimized or exported file cannot get another head")
    try:
        new = build_model(model, feature, head, photos.labels)
    except ConfigError as error:
        return SavedProbe(None, "", f"not saved as a checkpoint: {error}")
    chosen, layout, note = _choose_layout(new, processor)
    is_exact = model.dtype == torch.float32 and predictor.precision in (None, "fp32")
    with staging_folder(folder.parent, ".vitlib-model-") as staging:
        target = staging / "model"
        try:
            save(chosen, target, layout=layout, image_processor=processor)
            _check_logits(target, head, photos, features, TOLERANCE if is_exact else HALF_TOLERANCE)
        except (ConfigError, CheckpointError) as error:
            return SavedProbe(None, "", f"not saved as a checkpoint: {error}")
        write_list(photos, target, TRAINING_LIST)
        publish_folder(target, folder)
    return SavedProbe(folder, layout, note)


def _choose_layout(
    model: ViT, processor: ImageProcessor
) -> tuple[ViT, Literal["hf", "vitlib"], str]:
    """Find the description of a classifier that Hugging Face's files can hold, or vitlib's own."""
    candidates, cfg = [model], model.config
    is_single = cfg.pool in ("cls", "mean") and cfg.final_norm != "pooled"
    if is_single and cfg.tokens.cls and not cfg.outputs.dist_head:
        candidates.append(widen(model))
    for candidate in candidates:
        try:
            _, lost = serialize_model(candidate, get_layout("hf"), processor)
        except (ConfigError, CheckpointError):
            continue
        if not lost.keys() - {*TRAINING_FIELDS}:
            return candidate, "hf", ""
    note = (
        f"Hugging Face's files hold no {cfg.family} model with a head on {cfg.pool!r}: the "
        "checkpoint of the best probe is in vitlib's own layout, which vitlib alone opens"
    )
    return model, "vitlib", note


def _check_logits(
    folder: Path,
    head: LogisticHead,
    photos: LabelledPhotos,
    features: npt.NDArray[np.float32],
    tolerance: float,
) -> None:
    """Compare a checkpoint with its probe. Raises CheckpointError where the logits differ."""
    model = load(folder)
    processor = ImageProcessor.load(folder)
    expected = head.logits(features[:CHECKED])
    for photo, row in zip(photos.photos[:CHECKED], expected, strict=False):
        with torch.inference_mode():
            logits = model(processor(str(photo.path)))[0].double().numpy()
        gap = float(np.abs(logits - row).max() / max(np.abs(row).max(), 1e-3))
        if not gap <= tolerance:
            raise CheckpointError(
                f"its logits of {photo.path} would differ from the probe's by {gap:.1g}, relative"
            )
