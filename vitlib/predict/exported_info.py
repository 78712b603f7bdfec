"""Facts that an exported file states of itself: labels, task, preprocessing, inputs and outputs.

export/ writes it as one JSON text into the metadata of the file, and the Predictor reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from vitlib.config import ProblemType, ViTConfig
from vitlib.errors import CheckpointError, VitlibError, check_int, to_pair
from vitlib.image.processor import ImageProcessor
from vitlib.scores import Task, labels_of, task_of

KEY = "vitlib"  # name of the entry in the metadata of a file
FORMAT_VERSION = 1
MAX_LENGTH = 2**24  # characters of the text that are read, at most
INPUTS = ("uint8", "float32")


@dataclass(frozen=True, kw_only=True)
class ExportInfo:
    """Facts about an exported file.

    Attributes:
        version: Version of vitlib that wrote the file.
        source: Path or hub id of the checkpoint; "" for a model in memory.
        weights_sha256: Of the checkpoint's tensors, see export/metadata.py.
        family: As in ViTConfig.
        precision: "fp32", "fp16" or "int8".
        input: dtype of the input: "uint8" levels, or normalised pixels in "float32".
        image_size: Pixels (height, width) of the input; None where any size is taken.
        patch_size: Pixels (height, width) of a patch.
        in_channels: Channels of the input.
        num_prefix_tokens: Tokens before those of the patches.
        num_features: Width of the embedding.
        num_classes: Number of logits; 0 where there is no head.
        outputs: Names of the outputs, in order.
        labels: One name for each class; empty where the checkpoint has none.
        problem_type: Task as in Hugging Face, or None.
        image_processor: Fields of the preprocessing, see PreprocessConfig.
    """

    version: str
    source: str = ""
    weights_sha256: str = ""
    family: str = "vit"
    precision: str = "fp32"
    input: str = "float32"
    image_size: tuple[int, int] | None = None
    patch_size: tuple[int, int] = (1, 1)
    in_channels: int = 3
    num_prefix_tokens: int = 0
    num_features: int = 0
    num_classes: int = 0
    outputs: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    problem_type: ProblemType = None
    image_processor: Mapping[str, Any] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name for each class; LABEL_0, LABEL_1, ... where the file has none."""
        return labels_of(self._to_config())

    @property
    def task(self) -> Task:
        """The task of the head."""
        return task_of(self._to_config())

    def make_processor(self) -> ImageProcessor | None:
        """Return the preprocessing; None where the file has none."""
        return None if self.image_processor is None else ImageProcessor(**self.image_processor)

    def to_json(self) -> str:
        """Return the facts as a JSON text."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)})

    def _to_config(self) -> ViTConfig:
        """Return a config with the head's fields alone."""
        return ViTConfig(
            num_classes=self.num_classes,
            labels=self.labels,
            problem_type=self.problem_type,
        )


def parse_info(text: str, path: str) -> ExportInfo:
    """Parse the metadata of an exported file.

    Args:
        text: The JSON text.
        path: Name of the file, for the message.

    Returns:
        The facts.

    Raises:
        CheckpointError: The text is not what vitlib writes.
    """
    try:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"{len(text)} characters")
        values = json.loads(text)
        if values.pop("format_version") != FORMAT_VERSION:
            raise ValueError("another format version")
        info = ExportInfo(**{name: _to_tuple(value) for name, value in values.items()})
        info = replace(info, patch_size=to_pair("patch_size", info.patch_size))
        if info.image_size is not None:
            info = replace(info, image_size=to_pair("image_size", info.image_size))
        for name in ("in_channels", "num_prefix_tokens", "num_features", "num_classes"):
            check_int(name, getattr(info, name), at_least=0)
        names = (*info.outputs, *info.labels)
        if info.input not in INPUTS or not all(isinstance(name, str) for name in names):
            raise ValueError(f"input {info.input!r}, outputs {info.outputs!r}")
        _ = info.task, info.class_names, info.make_processor()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, VitlibError) as error:
        raise CheckpointError(
            f"{path}: its metadata is not what this version of vitlib writes ({str(error)[:80]}): "
            "export the model again"
        ) from error
    return info


def _to_tuple(value: Any) -> Any:
    """Return a list as a tuple, also within an object."""
    if isinstance(value, dict):
        return {name: _to_tuple(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def describe_fields(processor: ImageProcessor) -> dict[str, Any]:
    """Return the fields of a preprocessing that are not the default, for the metadata.

    Args:
        processor: The preprocessing.

    Returns:
        Fields of PreprocessConfig by name, all of them: a reader without vitlib needs each.
    """
    return {field.name: getattr(processor, field.name) for field in fields(processor)}
