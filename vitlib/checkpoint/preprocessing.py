"""Preprocessing of a checkpoint: its own files', or what its library does with the family."""

from __future__ import annotations

from vitlib.checkpoint.families import get_family
from vitlib.checkpoint.layouts import torchvision
from vitlib.checkpoint.read import Checkpoint
from vitlib.image import configs
from vitlib.image.processor import ImageProcessor
from vitlib.source.locate import Source


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
    return not is_uniform and configs.find_fields(src.json) is None


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
        ConfigError: The files describe one that vitlib does not do.
        SourceError: A file cannot be read.
    """
    cfg, own = checkpoint.model.config, checkpoint.layout.profile
    if profile is not None and profile != own:
        return ImageProcessor.from_profile(profile, cfg.family, cfg.image_size)
    if checkpoint.layout.name == "hf" or configs.find_fields(src.json) is not None:
        return ImageProcessor.from_source(src)
    # A ViT in the original PyTorch names is DINO's or DeiT's; Google's own is in JAX.
    is_dino = checkpoint.layout.name == "meta" and cfg.family == "vit"
    kind = "dino" if is_dino else cfg.family
    if checkpoint.layout.name == "torchvision":
        kind = torchvision.choose_preprocessing(cfg, checkpoint.architecture)
    return ImageProcessor.from_profile(own, kind, cfg.image_size)
