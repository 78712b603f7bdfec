"""Photos -> rows of what each linear of each block is given, for int8.py to choose levels by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from vitlib.errors import ConfigError, ImageError
from vitlib.fast.block import FastBlock
from vitlib.fast.int8 import Samples
from vitlib.fast.linears import FastLinear
from vitlib.images import ImageLike, is_one_image
from vitlib.preprocess import ImageProcessor
from vitlib.vit import ViT

BATCH = 8
ROWS = 1024  # a linear's input is known from so many of its rows


class Watched(FastLinear):
    """Another linear, and rows of what it was given."""

    def __init__(self, of: FastLinear, every: int) -> None:
        """every: one token in so many is kept."""
        nn.Module.__init__(self)
        self.of, self.every, self.rows = of, every, []
        self.dtype = of.dtype

    def see(self, x: Tensor) -> Tensor:
        """Keep some rows."""
        flat = x.reshape(-1, x.shape[-1])
        self.rows.append(flat[len(self.rows) % self.every :: self.every].float().clone())
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self.see(x))  # type: ignore[no-any-return]

    def activate(self, x: Tensor, activation: str, then: FastLinear | None) -> Tensor:
        return self.of.activate(self.see(x), activation, then)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return self.of.times(self.see(x), other)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.of.add(self.see(x), residual)


def watch(trunk: ViT, pixels: Iterable[Tensor], count: int) -> dict[str, Samples]:
    """A float32 trunk of fast blocks and batches of pixels, `count` images -> rows, by block."""
    tokens = trunk.config.num_prefix_tokens + trunk.config.grid_size[0] * trunk.config.grid_size[1]
    every = max(1, count * tokens // ROWS)
    watched: dict[str, dict[str, Watched]] = {}
    for path, block in trunk.named_modules():
        if isinstance(block, FastBlock):
            watched[path] = {
                name: Watched(getattr(block, name), every) for name in ("qkv", "out", "up", "down")
            }
            for name, linear in watched[path].items():
                setattr(block, name, linear)
    with torch.no_grad():
        for batch in pixels:
            trunk.forward_features(batch)
    return {
        path: {name: torch.cat(linear.rows) for name, linear in linears.items()}
        for path, linears in watched.items()
    }


def batches(
    photos: Iterable[ImageLike] | Tensor, processor: object | None, in_channels: int
) -> tuple[Iterator[Tensor], int]:
    """What was given to calibrate with -> batches of pixels (B, C, H, W), and the images in all.

    Raises ImageError for what is no photo, and names it; ConfigError for none, or no rule for them.
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
        return iter(photos.split(BATCH)), len(photos)
    if isinstance(photos, (str, bytes)) or is_one_image(photos):
        photos = [photos]  # type: ignore[list-item]
    if not isinstance(photos, Iterable):
        raise ConfigError(
            f"calibrate= is a {type(photos).__name__}: expected a list of photos, or their pixels"
        )
    if not isinstance(processor, ImageProcessor):
        raise ConfigError(
            "this model came without preprocessing: calibrate with normalised pixels (B, C, H, W)"
        )
    listed = list(photos)
    if not listed:
        raise ConfigError("calibrate= holds no photos: give 32 or more of yours")
    return _decoded(listed, processor), len(listed)


def _decoded(photos: list[ImageLike], processor: ImageProcessor) -> Iterator[Tensor]:
    """Batches of pixels of one size each, a few at a time."""
    waiting: list[Tensor] = []
    for index, photo in enumerate(photos):
        try:
            pixels = processor.pixels(photo)
        except ImageError as error:
            raise ImageError(f"calibrate= photo {index}: {error}") from error
        if waiting and (len(waiting) == BATCH or waiting[0].shape != pixels.shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(pixels)
    yield torch.stack(waiting)
