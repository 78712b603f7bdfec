"""Photos -> what each linear is given, and so its levels; and which linears stay out of 8 bits.

How data flows: the float32 model is run on the photos with every linear watched; int8.py chooses
the levels by what was seen. Then the photos' vectors are computed with all of them rounded: if they
are further from float32 than AT_MOST, each linear is rounded alone, and those that move the vectors
most for their size keep bfloat16, until what is left is expected to be near enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from vitlib.errors import ConfigError, ImageError
from vitlib.fast.block import BlockWeights, FastBlock
from vitlib.fast.int8 import TOGETHER, Choice, Samples, Seen, choices
from vitlib.fast.linears import FastLinear, activated
from vitlib.image.decode import ImageLike, is_one_image
from vitlib.image.depth import WarnOnce
from vitlib.image.processor import ImageProcessor
from vitlib.vit import ViT

BATCH = 8
ROWS = 512  # a linear's input is known from so many of its rows
PHOTOS = 4  # that tell how far the rounding moves the answer
# Of the vector that the head reads, root mean square. Rounding errors of linears add up as if they
# had nothing to do with each other (docs/performance.md), so that a share of each can be told.
AT_MOST = 0.03


class Watched(FastLinear):
    """Another linear, and rows of what it was given."""

    def __init__(self, of: FastLinear, every: int) -> None:
        """every: one token in so many is kept."""
        nn.Module.__init__(self)
        self.of, self.every = of, every
        self.rows: list[Tensor] = []
        self.ranges: list[tuple[Tensor, Tensor]] = []
        self.dtype = of.dtype

    def see(self, x: Tensor) -> Tensor:
        """Keep some rows (the first token's always, as heads read it), and the range of all."""
        flat = x.reshape(-1, x.shape[-1]).float()
        self.rows += [x[:, 0].float(), flat[len(self.rows) % self.every :: self.every].clone()]
        self.ranges.append(flat.aminmax(dim=0))
        return x

    def seen(self) -> Seen:
        """All of it."""
        lows, highs = zip(*self.ranges, strict=True)
        return Seen(torch.cat(self.rows), torch.stack(lows).amin(0), torch.stack(highs).amax(0))

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return self.of(self.see(x))  # type: ignore[no-any-return]

    def activate(self, x: Tensor, activation: str, then: FastLinear | None) -> Tensor:
        """(..., K) -> (..., N), after the activation."""
        return self.of.activate(self.see(x), activation, then)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """(..., K), (..., N) -> (..., N), multiplied."""
        return self.of.times(self.see(x), other)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """(..., K), (..., N) -> (..., N) float32, added."""
        return self.of.add(self.see(x), residual)

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        """The same; the residual may be written over."""
        return self.of.add_(self.see(x), residual)


class Rounded(FastLinear):
    """Another linear as it will be in 8 bits, in float32 arithmetic."""

    def __init__(self, name: str, choice: Choice) -> None:
        nn.Module.__init__(self)
        self.choice, self.dtype = choice, torch.float32
        self.held, self.bias = choice.linears[name].plain(), choice.linears[name].bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return nn.functional.linear(self.choice.rounded(x), self.held, self.bias)

    def activate(self, x: Tensor, activation: str, then: FastLinear | None) -> Tensor:  # noqa: ARG002
        """(..., K) -> (..., N), after the activation."""
        return activated(self(x), activation)


Place = tuple[str, str]  # the path of a block, a name of TOGETHER


def calibrated(
    trunk: ViT, blocks: dict[str, BlockWeights], pixels: Iterable[Tensor], count: int
) -> dict[str, dict[str, Choice]]:
    """A float32 trunk of fast blocks, their weights, batches of pixels, `count` images -> by the
    path of a block, the linears that go into 8 bits."""
    first: list[Tensor] = []
    fast = {path: part for path, part in trunk.named_modules() if isinstance(part, FastBlock)}

    def some() -> Iterator[Tensor]:
        for batch in pixels:
            if not first:
                first.append(batch[:PHOTOS])
            yield batch

    with torch.no_grad():
        samples = watch(trunk, fast, some(), count)
        found = {
            (path, name): choice
            for path, block in blocks.items()
            for name, choice in choices(block, samples.pop(path)).items()
        }
        for place in kept_accurate(trunk, fast, found, first[0]):
            del found[place]
    return {path: {n: c for (p, n), c in found.items() if p == path} for path in blocks}


def watch(
    trunk: ViT, blocks: dict[str, FastBlock], pixels: Iterator[Tensor], count: int
) -> dict[str, Samples]:
    """Run a trunk on batches of pixels -> rows of each linear's input, by block and TOGETHER."""
    tokens = trunk.config.num_prefix_tokens + trunk.config.grid_size[0] * trunk.config.grid_size[1]
    every = max(1, count * tokens // ROWS)
    watched = {
        path: {name: Watched(getattr(block, name), every) for name in TOGETHER}
        for path, block in blocks.items()
    }
    for path, linears in watched.items():
        for name, linear in linears.items():
            setattr(blocks[path], name, linear)
    for batch in pixels:
        trunk.forward_features(batch)
    for path, linears in watched.items():
        for name, linear in linears.items():
            setattr(blocks[path], name, linear.of)
    return {
        path: {name: linear.seen() for name, linear in linears.items()}
        for path, linears in watched.items()
    }


def kept_accurate(
    trunk: ViT, blocks: dict[str, FastBlock], found: dict[Place, Choice], pixels: Tensor
) -> list[Place]:
    """Which linears are better left out of 8 bits, on pixels (B, C, H, W)."""
    exact = trunk.embed(pixels).float()

    def moved(places: Iterable[Place]) -> float:
        """How far the vectors move with these rounded, squared, as a share."""
        before: list[tuple[FastBlock, str, FastLinear]] = []
        for place in places:
            block = blocks[place[0]]
            for name in found[place].linears:
                before.append((block, name, getattr(block, name)))
                setattr(block, name, Rounded(name, found[place]))
        error = (trunk.embed(pixels).float() - exact).square().mean() / exact.square().mean()
        for block, name, linear in before:
            setattr(block, name, linear)
        return error.item()

    total = moved(found)
    if total <= AT_MOST**2:
        return []
    alone = {place: moved([place]) for place in found}
    size = {
        place: sum(w.weight.numel() for w in choice.linears.values())
        for place, choice in found.items()
    }
    scale = total / max(sum(alone.values()), 1e-30)
    kept: list[Place] = []
    for place in sorted(alone, key=lambda p: alone[p] / size[p], reverse=True):
        if total <= AT_MOST**2:
            break
        total -= alone[place] * scale
        kept.append(place)
    return kept


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
        return iter(torch.split(photos, BATCH)), len(photos)
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
    once = WarnOnce()
    for index, photo in enumerate(photos):
        try:
            pixels = processor.to_float(photo, once)
        except ImageError as error:
            raise ImageError(f"calibrate= photo {index}: {error}") from error
        if waiting and (len(waiting) == BATCH or waiting[0].shape != pixels.shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(pixels)
    yield torch.stack(waiting)
