"""Calibrate int8 on photos: which layers go into 8 bits, and with which scales.

How data flows: the float32 model runs on the photos while an observer records the input of every
linear layer; int8_quantization.py searches the scales. Then the photos' embeddings are computed
with all layers rounded. If these are further from float32 than a limit, each layer is
rounded alone. The layers that move the embeddings most for their size keep bfloat16, until the
expected error of the others is small enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitlib.errors import ConfigError, ImageError
from vitlib.fast.block import BlockWeights, FastBlock
from vitlib.fast.int8_quantization import (
    SHARED_INPUT,
    ActivationStats,
    BlockStats,
    QuantParams,
    search_block_params,
)
from vitlib.fast.linears import FastLinear, apply_activation
from vitlib.image.decode import ImageLike, is_one_image
from vitlib.image.depth import WarnOnce
from vitlib.image.processor import ImageProcessor
from vitlib.vit import ViT

BATCH_SIZE = 8
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
        self.rows += [x[:, 0].float(), flat[len(self.rows) % self.every :: self.every].clone()]
        self.ranges.append(flat.aminmax(dim=0))
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


class FakeQuantLinear(FastLinear):
    """A linear layer that rounds as the 8-bit one does, in float32 arithmetic.

    Args:
        name: The layer's name in `params`.
        params: The 8-bit layers of its input.
    """

    def __init__(self, name: str, params: QuantParams) -> None:
        nn.Module.__init__(self)
        self.params, self.dtype = params, torch.float32
        layer = params.linears[name]
        self.packed, self.bias = layer.dequantize(), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Round the input and apply the layer.

        Args:
            x: (..., K).

        Returns:
            (..., N) float32.
        """
        return nn.functional.linear(self.params.fake_quantize(x), self.packed, self.bias)

    def activate(self, x: Tensor, activation: str, next_linear: FastLinear | None) -> Tensor:  # noqa: ARG002
        """Round the input, and apply the layer and an activation.

        Args:
            x: (..., K).
            activation: "gelu", "gelu_tanh" or "silu".
            next_linear: Not used.

        Returns:
            (..., N) float32.
        """
        return apply_activation(self(x), activation)


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


LayerKey = tuple[str, str]  # the path of a block, and a name of SHARED_INPUT


def calibrate_blocks(
    trunk: ViT,
    blocks: Mapping[str, BlockWeights],
    pixels: Iterable[Tensor],
    count: int,
    goal: CalibrationGoal,
) -> dict[str, dict[str, QuantParams]]:
    """Search which layers go into 8 bits, and with which scales.

    Args:
        trunk: The model with fast blocks in float32. Its layers are replaced while this runs.
        blocks: The numbers of its blocks, by path.
        pixels: Batches of normalised pixels (B, C, H, W).
        count: The number of images in all batches.
        goal: How near to float32 the model has to stay, and how.

    Returns:
        For each block the layers that go into 8 bits, by SHARED_INPUT.
    """
    first: list[Tensor] = []
    fast = {path: part for path, part in trunk.named_modules() if isinstance(part, FastBlock)}

    def record_first() -> Iterator[Tensor]:
        for batch in pixels:
            if not first:
                first.append(batch[:SENSITIVITY_PHOTOS])
            yield batch

    with torch.no_grad():
        stats = observe_inputs(trunk, fast, record_first(), count)
        params = {
            (path, name): group
            for path, block in blocks.items()
            for name, group in search_block_params(
                block, stats.pop(path), smooths_hidden=goal.smooths_hidden
            ).items()
        }
        for key in find_sensitive_layers(trunk, fast, params, first[0], goal.max_error):
            del params[key]
    return {
        path: {name: group for (owner, name), group in params.items() if owner == path}
        for path in blocks
    }


def observe_inputs(
    trunk: ViT, blocks: dict[str, FastBlock], pixels: Iterator[Tensor], count: int
) -> dict[str, BlockStats]:
    """Run a model on photos and record the input of every linear layer.

    Args:
        trunk: The model.
        blocks: Its fast blocks, by path; their layers are replaced while this runs.
        pixels: Batches of normalised pixels (B, C, H, W).
        count: The number of images in all batches.

    Returns:
        The statistics of each block's inputs.
    """
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
    for path, linears in observed.items():
        for name, linear in linears.items():
            setattr(blocks[path], name, linear.linear)
    return {
        path: {name: linear.stats() for name, linear in linears.items()}
        for path, linears in observed.items()
    }


def find_sensitive_layers(
    trunk: ViT,
    blocks: dict[str, FastBlock],
    params: dict[LayerKey, QuantParams],
    pixels: Tensor,
    max_error: float,
) -> list[LayerKey]:
    """Find the layers to leave out of 8 bits, so that the embeddings stay near float32.

    Args:
        trunk: The model in float32.
        blocks: Its fast blocks, by path; their layers are replaced while this runs.
        params: Every layer in 8 bits.
        pixels: Normalised pixels (B, C, H, W).
        max_error: As in CalibrationGoal.

    Returns:
        The keys of those layers, the most sensitive for its size first.
    """
    exact = trunk.embed(pixels).float()

    def embedding_error(keys: Iterable[LayerKey]) -> float:
        """Return the mean square error of the embeddings, as a share, with these layers rounded."""
        before: list[tuple[FastBlock, str, FastLinear]] = []
        for key in keys:
            block = blocks[key[0]]
            for name in params[key].linears:
                before.append((block, name, getattr(block, name)))
                setattr(block, name, FakeQuantLinear(name, params[key]))
        error = (trunk.embed(pixels).float() - exact).square().mean() / exact.square().mean()
        for block, name, linear in before:
            setattr(block, name, linear)
        return error.item()

    total = embedding_error(params)
    if total <= max_error**2:
        return []
    alone = {key: embedding_error([key]) for key in params}
    size = {
        key: sum(w.weight.numel() for w in group.linears.values()) for key, group in params.items()
    }
    # The errors of single layers do not quite add up to the error of all: they are scaled to it.
    scale = total / max(sum(alone.values()), 1e-30)
    sensitive: list[LayerKey] = []
    for key in sorted(alone, key=lambda k: alone[k] / size[k], reverse=True):
        if total <= max_error**2:
            break
        total -= alone[key] * scale
        sensitive.append(key)
    return sensitive


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
