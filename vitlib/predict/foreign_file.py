"""Describe a file of another exporter: a classifier that states no labels and no preprocessing.

The caller gives both. The file is run once, on a black image, so that an input or an output of
another kind is an error at the start.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vitlib.errors import CheckpointError, ConfigError
from vitlib.image.processor import ImageProcessor
from vitlib.predict.exported_info import ExportInfo
from vitlib.predict.runtimes import Runtime, run_pixels


def describe_foreign(
    runtime: Runtime, processor: ImageProcessor | None, labels: Sequence[str] | None
) -> tuple[ExportInfo, str]:
    """Describe a classifier that vitlib did not export.

    Args:
        runtime: The open file.
        processor: Its preprocessing.
        labels: One name for each class.

    Returns:
        The facts, and the file's name of its logits.

    Raises:
        ConfigError: The caller gives no preprocessing or no labels, or they do not fit the file.
        CheckpointError: The file does not take images or does not give logits.
    """
    if processor is None or labels is None:
        raise ConfigError(
            f"{runtime.path} was not exported by vitlib, so it states no preprocessing and no "
            "labels: give image_processor= and labels= (--preprocess FOLDER, --labels FILE)"
        )
    _check_input(runtime, processor.in_channels)
    name, size = _choose_output(runtime), _fixed_size(runtime.input_shape)
    width = _count_logits(runtime, name, processor, size)
    if width != len(labels):
        raise ConfigError(
            f"{runtime.path} gives {width} logits, and there are {len(labels)} labels: give one "
            "for each"
        )
    info = ExportInfo(
        version="", precision="unknown", input=runtime.input_dtype, image_size=size,
        in_channels=processor.in_channels, num_classes=width, outputs=("logits",),
        labels=tuple(labels),
    )  # fmt: skip
    return info, name


def _check_input(runtime: Runtime, channels: int) -> None:
    """Raise CheckpointError where the input is not images, channels first."""
    shape = runtime.input_shape
    if len(shape) == 4 and shape[1] in (None, channels):
        return
    size = "x".join("?" if side is None else str(side) for side in shape)
    kind = " (channels last)" if len(shape) == 4 and shape[3] == channels else ""
    raise CheckpointError(
        f"{runtime.path} takes an input of {size}{kind}: expected images x {channels} channels x "
        "height x width, as the preprocessing gives"
    )


def _choose_output(runtime: Runtime) -> str:
    """Return the name of the logits; raise CheckpointError where it is not clear."""
    names = runtime.outputs
    if "logits" in names:
        return "logits"
    if len(names) == 1:
        return names[0]
    raise CheckpointError(
        f"{runtime.path} has the outputs {', '.join(names[:8])}: expected a single one, or one "
        "named logits"
    )


def _count_logits(
    runtime: Runtime, name: str, processor: ImageProcessor, size: tuple[int, int] | None
) -> int:
    """Run a black image, and return the number of its logits."""
    size = size or processor.crop_size or processor.size
    if size is None:
        raise ConfigError(
            "image_processor: it gives images of any size, and the file is tried with one: give a "
            "preprocessing with a size"
        )
    shape = (runtime.input_shape[0] or 1, processor.in_channels, *size)
    logits = run_pixels(runtime, np.zeros(shape, runtime.input_dtype))[name]
    if logits.ndim != 2:
        raise CheckpointError(
            f"{runtime.path} gives {name} of shape {logits.shape}: expected logits, images x "
            "classes"
        )
    return int(logits.shape[1])


def _fixed_size(shape: Sequence[int | None]) -> tuple[int, int] | None:
    """Return the height and width of an input; None where one of them may vary."""
    height, width = shape[2:]
    return None if height is None or width is None else (height, width)
