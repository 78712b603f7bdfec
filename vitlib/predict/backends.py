"""Backends: how each kind of model computes batches for the engine.

A model as loaded, an optimized one and an exported file answer the same few calls. The engine
knows nothing else of them, so a further kind of model is a further backend.

Shapes: B images, C channels, H W pixels, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

from vitlib.checkpoint.layouts.problems import check_finite
from vitlib.fast import FastViT
from vitlib.fast.model import Method, bind
from vitlib.image.processor import ImageProcessor, uint8_affine
from vitlib.vit import ViT

if TYPE_CHECKING:
    from vitlib.predict.exported_model import ExportedModel

    # Explicit: mypy, run on a caller's file alone, does not see an implicit alias in this cycle.
    Model: TypeAlias = ViT | FastViT | ExportedModel


class Backend(Protocol):
    """A model that computes batches."""

    @property
    def device(self) -> torch.device:
        """The device that computes; an exported file takes images from the CPU."""

    @property
    def is_divisible(self) -> bool:
        """True if threads may compute parts of a batch at once, each on one core.

        Not so for a runtime that divides a batch itself, nor for modules or hooks of the user's
        own, which expect one thread.
        """

    def pixel_reader(self, processor: ImageProcessor) -> Callable[..., Tensor]:
        """Return the function (image, warn=) -> (C, H, W) that preprocesses for this model.

        Args:
            processor: The preprocessing.
        """

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits, (B, C, H, W) -> (B, num_classes).

        Args:
            images: (B, C, H, W), as pixel_reader gives them.
        """

    def embed(self, images: Tensor) -> Tensor:
        """Compute embeddings, (B, C, H, W) -> (B, D).

        Args:
            images: (B, C, H, W), as pixel_reader gives them.
        """

    def compute(self, function: Method, images: Tensor) -> Tensor:
        """Compute a function of the model, (B, C, H, W) -> (B, ...).

        Args:
            function: The function; see fast/model.py.
            images: (B, C, H, W), as pixel_reader gives them.

        Raises:
            ConfigError: An exported file has its own outputs alone.
        """

    def compute_both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits and embeddings, in one pass where the model allows it.

        Args:
            images: (B, C, H, W), as pixel_reader gives them.
        """

    def check_weights(self) -> None:
        """Raise CheckpointError where weights are not finite."""


@dataclass(frozen=True)
class ViTBackend:
    """A model as it was loaded.

    Attributes:
        model: The model.
        is_divisible: False: it may have hooks.
    """

    model: ViT
    is_divisible: bool = False

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    def pixel_reader(self, processor: ImageProcessor) -> Callable[..., Tensor]:
        """Return the function that preprocesses an image: to normalised pixels.

        Args:
            processor: The preprocessing.
        """
        return processor.to_float

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits.

        Args:
            images: (B, C, H, W), on any device.
        """
        logits: Tensor = self.model(images.to(self.device))
        return logits

    def embed(self, images: Tensor) -> Tensor:
        """Compute embeddings.

        Args:
            images: (B, C, H, W), on any device.
        """
        return self.model.embed(images.to(self.device))

    def compute(self, function: Method, images: Tensor) -> Tensor:
        """Compute a function of the model.

        Args:
            function: The function.
            images: (B, C, H, W), on any device.
        """
        return bind(self.model, function)(images.to(self.device))

    def compute_both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits and embeddings.

        Args:
            images: (B, C, H, W), on any device.
        """
        return _compute_both(self, self.model, next(self.model.parameters()).dtype, images)

    def check_weights(self) -> None:
        """Raise CheckpointError where weights are not finite."""
        check_finite(self.model.state_dict().items())


@dataclass(frozen=True)
class FastBackend:
    """An optimized model.

    Attributes:
        model: The model.
    """

    model: FastViT

    @property
    def is_divisible(self) -> bool:
        """True on a CPU for vitlib's own modules."""
        return self.device.type == "cpu" and not self.model.unoptimized_modules

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    def pixel_reader(self, processor: ImageProcessor) -> Callable[..., Tensor]:
        """Return the function that preprocesses an image: to uint8 where the model normalises.

        Args:
            processor: The preprocessing.
        """
        # uint8 is right only for the scale and shift that were folded into the patch projection.
        takes_uint8 = self.model.uint8_trunk is not None and (
            uint8_affine(processor) == uint8_affine(self.model.image_processor)
        )
        return processor.to_uint8_or_float if takes_uint8 else processor.to_float

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits.

        Args:
            images: (B, C, H, W), uint8 or normalised, on any device.
        """
        if _is_compiled(self.model) and self.model.trunk.head_dist is None:
            return self.compute_both(images)[0]  # one program for labels and embeddings
        images = self.model.upload(images)
        if images.dtype == torch.uint8:
            return self.model.forward_uint8(images)
        logits: Tensor = self.model(images)
        return logits

    def embed(self, images: Tensor) -> Tensor:
        """Compute embeddings.

        Args:
            images: (B, C, H, W), uint8 or normalised, on any device.
        """
        images = self.model.upload(images)
        is_uint8 = images.dtype == torch.uint8
        return self.model.embed_uint8(images) if is_uint8 else self.model.embed(images)

    def compute(self, function: Method, images: Tensor) -> Tensor:
        """Compute a function of the model.

        Args:
            function: The function.
            images: (B, C, H, W), uint8 or normalised, on any device.
        """
        return self.model.compute(function, self.model.upload(images))

    def compute_both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits and embeddings.

        Args:
            images: (B, C, H, W), uint8 or normalised, on any device.
        """
        return _compute_both(self, self.model.trunk, self.model.input_dtype, images)

    def check_weights(self) -> None:
        """Raise CheckpointError where weights are not finite."""
        check_finite(self.model.state_dict().items())


def _is_compiled(model: FastViT) -> bool:
    """Return True if a model has compiled programs, without importing their module for others."""
    if type(model) is FastViT:
        return False
    from vitlib.fast.compiled import CompiledViT

    return isinstance(model, CompiledViT)


def _compute_both(
    backend: ViTBackend | FastBackend, trunk: ViT, dtype: torch.dtype, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute logits from the embedding, unless a distillation head reads another token."""
    if trunk.head_dist is not None:
        return backend.forward(images), backend.embed(images)
    vectors = backend.embed(images)
    return trunk.head(vectors.float().to(dtype)), vectors


def make_backend(model: Model) -> Backend:
    """Return the backend of a model.

    Args:
        model: The model; an exported one is its own backend.
    """
    # The only place that tells kinds of models apart to compute with them.
    if isinstance(model, FastViT):
        return FastBackend(model)
    return ViTBackend(model) if isinstance(model, ViT) else model
