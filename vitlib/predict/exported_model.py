"""ExportedModel: a model in an exported file, run by the runtime of its format.

The file says of itself what a checkpoint would: labels, task, preprocessing and outputs
(exported_info.py). Of a file of another exporter the caller says it (foreign_file.py).

Shapes: B images, C channels, H W pixels, T tokens, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError, ConfigError, ImageError
from vitlib.fast.model import Method
from vitlib.image.decode import ImageLike
from vitlib.image.depth import log_image_warning
from vitlib.image.processor import ImageProcessor, uint8_affine
from vitlib.predict.foreign_file import describe_foreign
from vitlib.predict.runtimes import Array, Runtime, open_file, run_pixels

Warn = Callable[[str], None]


class ExportedModel:
    """A model in a file. It has the calls of a ViT that the file has outputs for.

    Attributes:
        runtime: The open file.
        info: Facts about the file, as it states them or as the caller does.
        config: Family, pixels and head. Its other fields are ViTConfig's defaults: a file does
            not state its trunk.
        image_processor: The preprocessing.
        precision: Arithmetic of the file: "fp32", "fp16", "int8", or "unknown".
        device: The CPU: the runtime takes arrays from there, whatever it computes on.
        dtype: Of the results.
        is_divisible: False: the runtime divides a batch among threads of its own.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    is_divisible = False

    def __init__(
        self,
        runtime: Runtime,
        image_processor: ImageProcessor | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        """Make a model of an open file.

        Args:
            runtime: The open file.
            image_processor: The preprocessing; None takes the file's.
            labels: One name for each class; None takes the file's.

        Raises:
            ConfigError: The file does not state its preprocessing or labels, and the caller gives
                none, or they do not fit the file.
            CheckpointError: The input or the outputs are not those of an image classifier.
        """
        self.runtime, self.name = runtime, runtime.path.name
        self._names = {name: name for name in runtime.outputs}
        info = runtime.info
        if info is None:
            info, self._names["logits"] = describe_foreign(runtime, image_processor, labels)
        missing = [name for name in info.outputs if name not in self._names]
        if missing:
            raise CheckpointError(
                f"{runtime.path} has no output {missing[0]!r}, which its metadata states: export "
                "the model again"
            )
        processor = image_processor or info.make_processor()
        if processor is None:
            raise ConfigError(f"{runtime.path} has no preprocessing: give image_processor=")
        self.info, self.image_processor = info, processor
        self.precision = info.precision
        has_head = "logits" in info.outputs
        # Any text; ViTConfig checks that it is a task.
        problem_type: Any = info.problem_type
        self.config = ViTConfig(
            family=info.family,
            image_size=info.image_size or processor.crop_size or processor.size or (224, 224),
            patch_size=info.patch_size,
            in_channels=info.in_channels,
            num_classes=info.num_classes if has_head else 0,
            labels=tuple(info.labels if labels is None else labels) if has_head else (),
            problem_type=problem_type,
        )
        # Raises here, and not at the first image, where the pixels do not fit.
        self.pixel_reader(processor)

    @property
    def num_classes(self) -> int:
        """The number of logits; 0 for a file that does not give them."""
        return self.config.num_classes

    @property
    def has_embedding(self) -> bool:
        """True if the file gives embeddings."""
        return "embedding" in self.info.outputs

    @property
    def num_features(self) -> int:
        """The width of the embedding.

        Raises:
            ConfigError: The file does not give embeddings.
        """
        self.check_output("embedding")
        return self.info.num_features

    def check_output(self, name: str) -> None:
        """Check that the file has an output.

        Args:
            name: "logits", "embedding" or "tokens".

        Raises:
            ConfigError: It has not; the message says what to export.
        """
        outputs = self.info.outputs
        if name not in outputs:
            wanted = ",".join(dict.fromkeys((*outputs, name)))
            raise ConfigError(
                f"{self.name} has no output {name!r}, it gives {', '.join(outputs)}: export the "
                f"checkpoint with --outputs {wanted}"
            )

    def eval(self) -> ExportedModel:
        """Return the model: a file is always in eval mode."""
        return self

    def check_weights(self) -> None:
        """Check nothing: the weights are in the file's own form."""

    def pixel_reader(self, processor: ImageProcessor) -> Callable[..., Tensor]:
        """Return the function that preprocesses an image for this file.

        Args:
            processor: The preprocessing.

        Returns:
            (image, warn=) -> (C, H, W), uint8 or float32; it can be pickled.

        Raises:
            ConfigError: The preprocessing gives other pixels than the file takes.
        """
        expected, size = self.info.image_size, processor.crop_size or processor.size
        if processor.in_channels != self.info.in_channels:
            raise ConfigError(
                f"{self.name} takes {self.info.in_channels} channels, the preprocessing gives "
                f"{processor.in_channels}: leave image_processor= out, or give an ImageProcessor "
                "of as many"
            )
        if expected is not None and size != expected:
            got = "any size" if size is None else "{}x{}".format(*size)
            raise ConfigError(
                "{} takes images of {}x{}, the preprocessing gives {}: leave the image size out, "
                "or export the checkpoint with --image-size or --dynamic-size".format(
                    self.name, *expected, got
                )
            )
        if self.runtime.input_dtype != "uint8":
            return processor.to_float
        # A file of another exporter does not state its mean and std, so any are taken.
        own, other = uint8_affine(self.info.make_processor()), uint8_affine(processor)
        if other is None or own not in (None, other):
            raise ConfigError(
                f"{self.name} normalises uint8 levels itself, by another mean and std than this "
                "preprocessing: leave image_processor= out, or export with --input float"
            )
        return partial(read_levels, processor)

    def __call__(self, images: Tensor) -> Tensor:
        """Compute what forward() does.

        Args:
            images: (B, C, H, W).

        Returns:
            As forward().
        """
        return self.forward(images)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits; the embedding where the file gives no logits.

        Args:
            images: Pixels (B, C, H, W): uint8 levels or normalised, as the file takes them.

        Returns:
            (B, num_classes), float32; or (B, D).

        Raises:
            ConfigError: The file has no such output.
            ImageError: The pixels do not fit the file.
        """
        name = "logits" if "logits" in self.info.outputs else "embedding"
        return self._run(images, name)[0]

    def embed(self, images: Tensor) -> Tensor:
        """Compute the vector that the head reads.

        Args:
            images: As in forward().

        Returns:
            (B, D), float32.

        Raises:
            ConfigError: The file gives no embeddings.
            ImageError: The pixels do not fit the file.
        """
        return self._run(images, "embedding")[0]

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute every token after the final norm.

        Args:
            images: As in forward().

        Returns:
            (B, T, D), float32, prefix tokens first.

        Raises:
            ConfigError: The file gives no tokens.
            ImageError: The pixels do not fit the file.
        """
        return self._run(images, "tokens")[0]

    def attention(
        self,
        images: Tensor,  # noqa: ARG002
        layers: int | Sequence[int] | None = None,  # noqa: ARG002
        rows: Literal["all", "prefix"] = "all",  # noqa: ARG002
    ) -> list[Tensor]:
        """Refuse attention maps, which a file does not compute.

        Args:
            images: As in ViT.attention.
            layers: As in ViT.attention.
            rows: As in ViT.attention.

        Raises:
            ConfigError: Always; the message says what to do.
        """
        raise ConfigError(
            f"{self.name} is an exported file, which computes no attention maps of every block: "
            "load the checkpoint it was made from"
        )

    def compute(self, function: Method, images: Tensor) -> Tensor:  # noqa: ARG002
        """Refuse a function of the model, of which a file has its outputs alone.

        Args:
            function: As in Backend.compute.
            images: As in forward().

        Raises:
            ConfigError: Always; the message says what to do.
        """
        raise ConfigError(f"{self.name} is an exported file: load the checkpoint it was made from")

    def compute_both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits and embeddings, in one run.

        Args:
            images: As in forward().

        Returns:
            What forward() and embed() return.

        Raises:
            ConfigError: The file lacks one of them.
            ImageError: The pixels do not fit the file.
        """
        logits, vectors = self._run(images, "logits", "embedding")
        return logits, vectors

    def _run(self, images: Tensor, *outputs: str) -> list[Tensor]:
        """Run the file on a batch, in parts where the file takes a fixed number of images."""
        for name in outputs:
            self.check_output(name)
        self._check_pixels(images)
        pixels = images.detach().cpu().numpy().astype(self.runtime.input_dtype, copy=False)
        # Other exporters often fix the batch at 1.
        count = self.runtime.input_shape[0]
        parts = [pixels] if count is None else _split(pixels, count)
        results = [run_pixels(self.runtime, part) for part in parts]
        rows = [
            np.concatenate([result[self._names[name]] for result in results])[: len(pixels)]
            for name in outputs
        ]
        for name, row in zip(outputs, rows, strict=True):
            self._check_width(name, row)
        return [torch.from_numpy(row.astype(np.float32, copy=False)) for row in rows]

    def _check_pixels(self, images: Tensor) -> None:
        """Raise ImageError for pixels of another shape or dtype than the file takes."""
        expected = (self.info.in_channels, *(self.info.image_size or tuple(images.shape[2:])))
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            size = "x".join(map(str, expected[1:]))
            raise ImageError(
                f"pixels of shape {tuple(images.shape)}: {self.name} takes images of "
                f"{expected[0]} channels and {size} pixels"
            )
        if (images.dtype == torch.uint8) != (self.runtime.input_dtype == "uint8"):
            raise ImageError(
                f"the pixels are {images.dtype}: {self.name} takes {self.runtime.input_dtype}"
            )

    def _check_width(self, name: str, rows: Array) -> None:
        """Raise CheckpointError where an output is not as wide as the file states."""
        width = {"logits": self.info.num_classes, "embedding": self.info.num_features}.get(name)
        if width is not None and rows.shape[1:] != (width,):
            raise CheckpointError(
                f"{self.runtime.path}: {name} of shape {rows.shape[1:]}, its metadata states "
                f"{width}: export the model again"
            )

    def save(self, *arguments: object, **options: object) -> NoReturn:  # noqa: ARG002
        """Refuse to write a checkpoint.

        Args:
            *arguments: As in FastViT.save.
            **options: As in FastViT.save.

        Raises:
            ConfigError: Always; the message says what to do.
        """
        raise ConfigError(
            f"{self.name} is an exported file, and no checkpoint can be made of it: copy the file, "
            "or save the checkpoint that it was made from"
        )

    def describe(self) -> str:
        """Describe the file in a line: format, family, pixels and outputs."""
        runtime, info = self.runtime, self.info
        size = "any size" if info.image_size is None else "{}x{}".format(*info.image_size)
        return (
            f"{runtime.format} file of {info.family if info.version else 'another exporter'}, "
            f"images of {size} in {runtime.input_dtype}, gives {', '.join(info.outputs)}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A runtime holds memory of its library. The file is opened again where the state arrives.
        path = self.runtime.path.absolute()
        return _reopen, (path, self.image_processor, self.config)

    def __repr__(self) -> str:
        return f"ExportedModel({self.describe()})"


def _reopen(path: Path, processor: ImageProcessor, config: ViTConfig) -> ExportedModel:
    """Open a file again, for a copy or in another process."""
    model = ExportedModel(open_file(path), processor, config.labels or None)
    model.config = config
    return model


def read_levels(
    processor: ImageProcessor, image: ImageLike, warn: Warn = log_image_warning
) -> Tensor:
    """Preprocess an image to uint8 levels, for a file that normalises them.

    Args:
        processor: The preprocessing.
        image: Any image.
        warn: As in ImageProcessor.to_float.

    Returns:
        (C, H, W), uint8.

    Raises:
        ImageError: The image cannot be read, or is deeper than 8 bits.
    """
    levels = processor.to_uint8_or_float(image, warn)
    if levels.dtype != torch.uint8:
        raise ImageError(
            "an image deeper than 8 bits has no levels for this file: export the checkpoint with "
            "--input float"
        )
    return levels


def _split(pixels: Array, count: int) -> list[Array]:
    """Split a batch into parts of a fixed number of images; black images fill the last one."""
    total = max(math.ceil(len(pixels) / count), 1) * count
    fill = np.zeros((total - len(pixels), *pixels.shape[1:]), pixels.dtype)
    return np.split(np.concatenate([pixels, fill]), total // count)
