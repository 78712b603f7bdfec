"""Calibrate int8 on photos: which layers go into 8 bits, and with which scales.

How data flows: the float32 model runs on the photos while an observer records the input of every
linear layer; int8_quantization.py searches the scales. Then the photos' embeddings are computed
with all layers rounded. If these are further from float32 than a limit, each layer is
rounded alone. The layers that move the embeddings most for their size keep bfloat16, until the
expected error of the others is small enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitlib.errors import ConfigError, ImageError
from vitlib.fast.block import BlockWeights
from vitlib.fast.cpu import Precision
from vitlib.fast.int8_quantization import (
    SHARED_INPUT,
    ActivationStats,
    BlockStats,
    QuantParams,
    search_block_params,
)
from vitlib.fast.linears import FastLinear
from vitlib.fast.sensitivity import fast_blocks, find_sensitive_layers
from vitlib.image.decode import ImageLike, is_one_image
from vitlib.image.depth import WarnOnce
from vitlib.image.processor import ImageProcessor
from vitlib.vit import ViT

BATCH_SIZE = 4
SAMPLE_ROWS = 512  # rows of each input that the scales are searched on
SENSITIVITY_PHOTOS = 4  # photos on which the error of the embeddings is measured
# Root mean square, as a share of the embedding's. Rounding errors of layers add up as if they were
# independent (docs/performance.md), so that the share of each layer can be estimated.
MAX_EMBEDDING_ERROR = 0.03


class ObservedLinear(FastLinear):
    """A linear layer that records statistics of its input.

    Args:
        linear: The layer that computes.
        every: One row in so many is recorded.
    """

    def __init__(self, linear: FastLinear, every: int) -> None:
        nn.Module.__init__(self)
        self.linear, self.every = linear, every
        self.rows: list[Tensor] = []
        self.ranges: list[tuple[Tensor, Tensor]] = []
        self.dtype = linear.dtype

    def observe(self, x: Tensor) -> Tensor:
        """Record an input.

        Args:
            x: (B, T, K). The first token's rows are always recorded, as heads read that token.

        Returns:
            The input itself.
        """
        flat = x.reshape(-1, x.shape[-1]).float()
        # Copies: a view would keep the activations of every layer in memory.
        self.rows += [
            x[:, 0].float().clone(),
            flat[len(self.rows) % self.every :: self.every].clone(),
        ]
        # Two reductions: aminmax() along the first axis takes ten times as long as both.
        self.ranges.append((flat.amin(dim=0), flat.amax(dim=0)))
        return x

    def stats(self) -> ActivationStats:
        """Return the statistics of all inputs so far."""
        lows, highs = zip(*self.ranges, strict=True)
        low, high = torch.stack(lows).amin(0), torch.stack(highs).amax(0)
        return ActivationStats(torch.cat(self.rows), low, high)

    def forward(self, x: Tensor) -> Tensor:
        """Observe the input and apply the layer.

        Args:
            x: (B, T, K).

        Returns:
            (B, T, N).
        """
        y: Tensor = self.linear(self.observe(x))
        return y

    def activate(self, x: Tensor, activation: str, next_linear: FastLinear | None) -> Tensor:
        """Observe the input, and apply the layer and an activation.

        Args:
            x: (B, T, K).
            activation: "gelu", "gelu_tanh" or "silu".
            next_linear: The layer that reads the result, if only one does.

        Returns:
            (B, T, N).
        """
        return self.linear.activate(self.observe(x), activation, next_linear)

    def multiply(self, x: Tensor, other: Tensor) -> Tensor:
        """Observe the input, apply the layer and multiply.

        Args:
            x: (B, T, K).
            other: (B, T, N).

        Returns:
            (B, T, N).
        """
        return self.linear.multiply(self.observe(x), other)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Observe the input, apply the layer and add the residual stream.

        Args:
            x: (B, T, K).
            residual: (B, T, N) float32.

        Returns:
            (B, T, N) float32.
        """
        return self.linear.add(self.observe(x), residual)

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        """Observe the input, apply the layer and add the residual stream, which may be overwritten.

        Args:
            x: (B, T, K).
            residual: (B, T, N) float32.

        Returns:
            (B, T, N) float32.
        """
        return self.linear.add_(self.observe(x), residual)


@dataclass(frozen=True)
class CalibrationGoal:
    """Distance from float32 that a model in 8 bits may have.

    Attributes:
        max_error: Largest error of the embeddings, root mean square, as a share of them.
        smooths_hidden: The channels of the hidden layer of an MLP may be divided, though no norm
            takes that over: the layer that reads them divides them itself.
    """

    max_error: float = field(default_factory=lambda: MAX_EMBEDDING_ERROR)
    smooths_hidden: bool = False


def calibrate_blocks(
    assemble: Callable[[Precision], ViT],
    blocks: Mapping[str, BlockWeights],
    pixels: Iterable[Tensor],
    count: int,
    goal: CalibrationGoal,
) -> dict[str, dict[str, QuantParams]]:
    """Search which layers go into 8 bits, and with which scales.

    Args:
        assemble: Makes the model with fast blocks in a precision. The layers of these are replaced.
        blocks: The numbers of its blocks in float32, by path.
        pixels: Batches of normalised pixels (B, C, H, W).
        count: The number of images in all batches.
        goal: How near to float32 the model has to stay, and how.

    Returns:
        For each block the layers that go into 8 bits, by SHARED_INPUT.
    """
    first: list[Tensor] = []

    def record_first() -> Iterator[Tensor]:
        for batch in pixels:
            if not first:
                first.append(batch[:SENSITIVITY_PHOTOS])
            yield batch

    with torch.no_grad():
        # bfloat16 moves a range by less than its margin. The model is freed before the next one.
        stats = observe_inputs(assemble("bf16"), record_first(), count)
        params = {
            (path, name): group
            for path, block in blocks.items()
            for name, group in search_block_params(
                block, stats.pop(path), smooths_hidden=goal.smooths_hidden
            ).items()
        }
        float32 = partial(assemble, "fp32")
        for key in find_sensitive_layers(float32, params, first[0], goal.max_error):
            del params[key]
    return {
        path: {name: group for (owner, name), group in params.items() if owner == path}
        for path in blocks
    }


def observe_inputs(trunk: ViT, pixels: Iterator[Tensor], count: int) -> dict[str, BlockStats]:
    """Run a model on photos and record the input of every linear layer.

    Args:
        trunk: The model with fast blocks, whose layers are replaced.
        pixels: Batches of normalised pixels (B, C, H, W).
        count: The number of images in all batches.

    Returns:
        The statistics of the inputs of each block, by its path.
    """
    blocks = fast_blocks(trunk)
    tokens = trunk.num_prefix_tokens + trunk.config.grid_size[0] * trunk.config.grid_size[1]
    every = max(1, count * tokens // SAMPLE_ROWS)
    observed = {
        path: {name: ObservedLinear(getattr(block, name), every) for name in SHARED_INPUT}
        for path, block in blocks.items()
    }
    for path, linears in observed.items():
        for name, linear in linears.items():
            setattr(blocks[path], name, linear)
    for batch in pixels:
        trunk.forward_features(batch)
    return {
        path: {name: linear.stats() for name, linear in linears.items()}
        for path, linears in observed.items()
    }


def calibration_batches(
    photos: Iterable[ImageLike] | Tensor, processor: object | None, in_channels: int
) -> tuple[Iterator[Tensor], int]:
    """Read what the user calibrates with.

    Args:
        photos: Photos, or normalised pixels (B, C, H, W).
        processor: The model's preprocessing, which photos need.
        in_channels: C.

    Returns:
        Batches of normalised pixels (B, C, H, W), and the number of images in all.

    Raises:
        ImageError: Something is no photo; the message names it.
        ConfigError: There are no photos, or there is no preprocessing for them.
    """
    if isinstance(photos, Tensor):
        if photos.dim() != 4 or photos.shape[1] != in_channels or not photos.is_floating_point():
            raise ImageError(
                f"calibrate= is a tensor of {photos.dtype} and shape {tuple(photos.shape)}: "
                f"expected photos, or normalised pixels (images, {in_channels}, height, width)"
            )
        if not len(photos):
            raise ConfigError("calibrate= holds no images: give 32 or more of your photos")
        if not bool(torch.isfinite(photos).all()):
            raise ImageError("calibrate= holds pixels that are NaN or infinite")
        return iter(torch.split(photos, BATCH_SIZE)), len(photos)
    is_single = isinstance(photos, (str, bytes)) or is_one_image(photos)
    if not is_single and not isinstance(photos, Iterable):
        raise ConfigError(
            f"calibrate= is a {type(photos).__name__}: expected a list of photos, or their pixels"
        )
    if not isinstance(processor, ImageProcessor):
        raise ConfigError(
            "this model came without preprocessing: calibrate with normalised pixels (B, C, H, W)"
        )
    listed: list[Any] = [photos] if is_single else list(photos)
    if not listed:
        raise ConfigError("calibrate= holds no photos: give 32 or more of yours")
    return _decode_batches(listed, processor), len(listed)


def _decode_batches(photos: list[ImageLike], processor: ImageProcessor) -> Iterator[Tensor]:
    """Yield batches of pixels of one size each; only one batch is in memory."""
    pending: list[Tensor] = []
    once = WarnOnce()
    for index, photo in enumerate(photos):
        try:
            pixels = processor.to_float(photo, once)
        except ImageError as error:
            raise ImageError(f"calibrate= photo {index}: {error}") from error
        if pending and (len(pending) == BATCH_SIZE or pending[0].shape != pixels.shape):
            yield torch.stack(pending)
            pending = []
        pending.append(pixels)
    yield torch.stack(pending)
