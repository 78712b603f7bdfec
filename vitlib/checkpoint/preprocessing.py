"""Preprocessing of a checkpoint: its own files', or what its library does with the family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitlib.checkpoint.families import get_family
from vitlib.checkpoint.layouts import timm_models, torchvision
from vitlib.checkpoint.read import Checkpoint
from vitlib.errors import ConfigError
from vitlib.image import configs
from vitlib.image.configs.fields import CLIP_STATS, HALF_STATS, IMAGENET_STATS, Stats
from vitlib.image.processor import ImageProcessor
from vitlib.source.locate import Source

# Mean and std by the words of timm_models.csv.
_STATS: Mapping[str, Stats] = {
    "half": HALF_STATS,
    "imagenet": IMAGENET_STATS,
    "clip": CLIP_STATS,
    "zero": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def has_assumed_preprocessing(src: Source, checkpoint: Checkpoint) -> bool:
    """Return True if no file says the preprocessing and it can be another than the profile's.

    Args:
        src: The files.
        checkpoint: Their contents.

    Returns:
        False also where all published checkpoints of the family agree.
    """
    layout, family = checkpoint.layout, get_family(checkpoint.model.config.family)
    # torchvision's layout lists the weights that there are in a note of its own.
    is_uniform = layout.name in ("jax", "torchvision") or layout.profile in family.uniform_libraries
    is_stated = configs.find_fields(src.json) is not None or _read_recipe(checkpoint) is not None
    return not is_uniform and not is_stated


def read_image_processor(
    src: Source, checkpoint: Checkpoint, profile: str | None = None
) -> ImageProcessor:
    """Read the checkpoint's preprocessing, or choose its library's where no file says it.

    Args:
        src: The files.
        checkpoint: Their contents.
        profile: A library whose preprocessing replaces the checkpoint's; None: as the files say.

    Returns:
        The preprocessing.

    Raises:
        ConfigError: The files describe one that vitlib does not do, or no file states that of a
            model of more bands than a photo has.
        SourceError: A file cannot be read.
    """
    cfg, own = checkpoint.model.config, checkpoint.layout.profile
    if profile is not None and profile != own:
        return ImageProcessor.from_profile(profile, cfg.family, cfg.image_size)
    recipe = _read_recipe(checkpoint)
    if recipe is not None and configs.find_fields(src.json) is None:
        return recipe
    if checkpoint.layout.name == "hf" or configs.find_fields(src.json) is not None:
        return ImageProcessor.from_source(src)
    if cfg.in_channels not in (1, 3):
        raise ConfigError(
            f"no file states the preprocessing of {cfg.in_channels} channels: give image_processor="
        )
    # A ViT in the original PyTorch names is DINO's or DeiT's; Google's own is in JAX.
    is_dino = checkpoint.layout.name == "meta" and cfg.family == "vit"
    kind = "dino" if is_dino else cfg.family
    code = get_family(cfg.family).original
    if checkpoint.layout.name == "meta" and code is not None:
        kind = code.choose_transform(cfg)
    rule = _find_timm_rule(checkpoint.architecture or src.arch) if own == "timm" else None
    if rule is not None:
        return ImageProcessor(**configs.timm_fields(rule | {"input_size": (3, *cfg.image_size)}))
    if checkpoint.layout.name == "torchvision":
        kind = torchvision.choose_preprocessing(cfg, checkpoint.architecture)
    return ImageProcessor.from_profile(own, kind, cfg.image_size)


def _find_timm_rule(name: str | None) -> dict[str, Any] | None:
    """Return keys of timm's `pretrained_cfg` for an architecture: those of its default weights.

    None for a name that is not timm's, and for a tag where tags differ.
    """
    model = None if name is None else timm_models.find_architecture(name)
    words = [] if model is None else model.preprocessing.split()
    if name is None or not words or ("*" in words and "." in name):
        return None
    stats, crop_pct, crop_mode, interpolation = words[:4]
    rule = dict(zip(("mean", "std"), _STATS[stats], strict=True))
    return {
        **rule,
        "crop_pct": float(crop_pct),
        "crop_mode": crop_mode,
        "interpolation": interpolation,
    }


def _read_recipe(checkpoint: Checkpoint) -> ImageProcessor | None:
    """Return the preprocessing of the published model that the caller states, if any."""
    if checkpoint.recipe is None:
        return None
    fields = checkpoint.recipe.build_fields(checkpoint.model.config.image_size)
    return None if fields is None else ImageProcessor(**fields)
