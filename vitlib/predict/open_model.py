"""Open the model of a Predictor: a checkpoint, an optimized model or an exported file.

Each opener returns the model with its preprocessing. The name of the source says which it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from vitlib.errors import ConfigError, to_pair
from vitlib.image.processor import ImageProcessor
from vitlib.source.locate import Source
from vitlib.vit import ViT

if TYPE_CHECKING:
    from vitlib.predict.backends import Model

ImageSize = int | tuple[int, int] | Literal["keep"] | None


def open_exported(
    source: str | os.PathLike[str],
    image_processor: ImageProcessor | None,
    labels: Sequence[str] | None,
    image_size: ImageSize,
    device: torch.device | str | None,
    reading: Mapping[str, object],
) -> tuple[Model, ImageProcessor] | None:
    """Open an exported file.

    Args:
        source: Any source of a model.
        image_processor: The preprocessing; None takes the file's.
        labels: One name for each class; None takes the file's.
        image_size: Pixels, for a file that takes any size; or the file's own.
        device: The device; None takes the runtime's.
        reading: Options that are for checkpoints, by name.

    Returns:
        The model and its preprocessing; None for another source.

    Raises:
        VitlibError: The file cannot be opened, or an option does not suit it.
    """
    from vitlib.predict.runtimes import find_format, open_file

    if find_format(source) is None:
        if labels is not None:
            raise ConfigError(
                "labels= is for an exported file (.onnx, .pt2, .xml): a checkpoint has its own"
            )
        return None
    from vitlib.predict.exported_model import ExportedModel  # few programs run exported files

    options = [name for name, value in reading.items() if value is not None]
    if options:
        raise ConfigError(
            f"{os.fspath(source)} is an exported file, which stays as it was written: leave "
            f"{options[0]}= out, or give the checkpoint"
        )
    runtime = open_file(source)
    _check_device(device, runtime.devices, runtime.path)
    model = ExportedModel(runtime, image_processor, labels)
    processor = model.image_processor
    if image_size is not None:
        size = image_size if image_size == "keep" else to_pair("image_size", image_size)
        processor = processor.with_image_size(size, model.config.patch_size)
    return model, processor


def _check_device(device: torch.device | str | None, devices: Sequence[str], path: Path) -> None:
    """Raise ConfigError where the runtime of a file does not compute on a device."""
    kind = None if device is None else str(device).partition(":")[0]
    if kind is not None and kind not in devices:
        raise ConfigError(
            f"device={str(device)!r}: the runtime of {path.name} computes on "
            f"{' and '.join(devices)} here: leave device= (--device) out, or give the checkpoint"
        )


def load_optimized(
    source: str | os.PathLike[str], image_processor: ImageProcessor | None
) -> tuple[Model, ImageProcessor] | None:
    """Load a folder that FastViT.save wrote.

    Args:
        source: Any source of a model.
        image_processor: The preprocessing; None takes that in the folder.

    Returns:
        The optimized model and its preprocessing; None for another source.

    Raises:
        ConfigError: There is no preprocessing.
    """
    from vitlib.fast import deserialize  # few programs open a saved model

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
    image_size: ImageSize,
) -> tuple[Model, ImageProcessor]:
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
