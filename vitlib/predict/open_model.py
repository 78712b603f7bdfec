"""Open a model with its preprocessing for a Predictor, and describe the two."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from vitlib.errors import ConfigError
from vitlib.fast import FastViT, deserialize
from vitlib.image.processor import ImageProcessor
from vitlib.source.locate import Source
from vitlib.vit import ViT

if TYPE_CHECKING:
    from vitlib.predict.predictor import Predictor


def load_optimized(
    source: str | os.PathLike[str], image_processor: ImageProcessor | None
) -> tuple[ViT | FastViT, ImageProcessor] | None:
    """Load a folder that FastViT.save wrote.

    Args:
        source: Any source of a model.
        image_processor: The preprocessing; None takes that in the folder.

    Returns:
        The optimized model and its preprocessing; None for another source.

    Raises:
        ConfigError: There is no preprocessing.
    """
    if not deserialize.is_optimized_model(source):
        return None
    model = deserialize.load(source)
    processor = image_processor or model.image_processor
    if processor is None:
        raise ConfigError(f"{os.fspath(source)!r} has no preprocessing: give image_processor=")
    return model, processor


def load_with_processor(
    load_model: Callable[..., ViT],
    open_source: Callable[[], Source],
    image_size: int | tuple[int, int] | Literal["keep"] | None,
) -> tuple[ViT | FastViT, ImageProcessor]:
    """Load a checkpoint and its preprocessing.

    Args:
        load_model: vitlib.load with all arguments but image_size.
        open_source: Opens the checkpoint's files.
        image_size: Pixels, one side or (height, width); "keep" takes each image in its own shape.

    Returns:
        The model and its preprocessing.

    Raises:
        VitlibError: As in vitlib.load, or the preprocessing cannot be read.
    """
    model = load_model(image_size=None if image_size == "keep" else image_size)
    processor = model.image_processor
    if processor is None:  # load() only logs why; reading it again raises the reason
        processor = ImageProcessor.from_source(open_source())
    if image_size == "keep":
        processor = processor.with_image_size("keep", model.config.patch_size)
    return model, processor


def describe_predictor(predictor: Predictor) -> str:
    """Describe a predictor in a few lines: model, labels and preprocessing.

    Args:
        predictor: The predictor.

    Returns:
        The text of its repr.
    """
    model, labels = predictor.model, predictor.labels
    cfg = model.config
    size, patch = ("x".join(map(str, pair)) for pair in (cfg.image_size, cfg.patch_size))
    shown = ", ".join(map(repr, labels[:3])) + (", ..." if len(labels) > 3 else "")
    precision = predictor.precision or getattr(model, "precision", None) or "of the weights"
    return (
        f"Predictor({predictor.source!r}\n"
        f"  model: {cfg.family}, {cfg.depth} blocks of width {cfg.embed_dim}, patches of {patch}, "
        f"images of {size}\n"
        f"  runs: on {model.device}, weights {str(model.dtype).removeprefix('torch.')}, "
        f"precision {precision}\n"
        f"  task: {predictor.task}, {model.num_classes} classes ({shown})\n"
        f"  preprocessing: {predictor.image_processor.describe()}\n"
        f"  calibration: {'none' if predictor.calibration is None else predictor.calibration})"
    )
