"""Split a batch on a GPU into micro-batches of a few fixed sizes.

Only few sizes come out, as each is captured as a CUDA graph or compiled once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64)  # images, few enough that launches dominate
# Images: with 128 of them the rows of every linear layer are a multiple of the 128 rows of a tile
# of its matrix product.
TILE = 128
# Tokens in a large micro-batch: 128 images of ViT-B/16 at 224, whose residual stream in bfloat16
# (39 MB) stays in the L2 cache of an H100 or H200 (50 and 60 MB).
MAX_TOKENS = 32 * 1024
# Tokens of a micro-batch that is captured as a CUDA graph, of a model as wide as ViT-B: above, the
# kernels run longer than their launches.
MAX_GRAPH_TOKENS, GRAPH_WIDTH = 64 * 256, 768
# The fixed cost of a micro-batch, in images of ViT-B/16 at 224: an estimate from published rates of
# GPUs, not measured.
LAUNCH_COST = 6


def micro_batch_size(tokens: int) -> int:
    """Return the number of images in a large micro-batch.

    Args:
        tokens: Tokens of an image, from 1.

    Returns:
        A multiple of TILE, or one of GRAPH_SIZES.
    """
    tiles = MAX_TOKENS // (tokens * TILE)
    return TILE * tiles or max(s for s in GRAPH_SIZES if s == 1 or s * tokens <= MAX_TOKENS)


def max_graph_tokens(width: int) -> int:
    """Return the most tokens of a micro-batch that is captured as a CUDA graph.

    Args:
        width: D, the width of the model. In narrow models a token costs less, by its square.

    Returns:
        The number of tokens.
    """
    return MAX_GRAPH_TOKENS * max(GRAPH_WIDTH**2 // width**2, 1)


@lru_cache(maxsize=1024)
def split_batch(count: int, largest: int) -> tuple[int, ...]:
    """Split a batch into micro-batches.

    Args:
        count: Images in the batch; 0 gives one micro-batch, which yields the output's shape.
        largest: Images in the largest micro-batch, from 1.

    Returns:
        The size of each micro-batch. The last one may be larger than what is left: it is padded.
    """
    sizes = micro_batch_sizes(largest)
    full, rest = divmod(count, largest)
    return (largest,) * full + (_split_rest(rest, sizes) if rest or not full else ())


def micro_batch_sizes(largest: int) -> tuple[int, ...]:
    """Return every size of micro-batch that batches can be split into.

    Args:
        largest: Images in the largest one, from 1.

    Returns:
        The sizes, ascending.
    """
    return (*(s for s in (*GRAPH_SIZES, TILE) if s < largest), largest)


def _split_rest(count: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Choose between one padded micro-batch and several smaller ones, by their cost."""
    padded = next(size for size in sizes if size >= count)
    below = [size for size in sizes if size < count]
    if not below:
        return (padded,)
    several = below[-1], *_split_rest(count - below[-1], sizes)
    return min((padded,), several, key=lambda split: sum(split) + LAUNCH_COST * len(split))


def halve_until_fits(
    run: Callable[[int], Result], size: int, error: type[Exception] = torch.OutOfMemoryError
) -> tuple[Result, int]:
    """Run with a number of images, and with half as many each time that memory runs out.

    Args:
        run: Computes with the number of images that it is given.
        size: Images at first, from 1.
        error: The exception by which `run` reports that memory ran out.

    Returns:
        What `run` returned, and the size with which it did.

    Raises:
        Exception: Of the kind `error`, where not even one image fits.
    """
    cuda: Any = torch.cuda
    while True:
        try:
            return run(size), size
        except error:
            if size == 1:
                raise
        # Outside the handler: the traceback would keep the failed run's tensors alive.
        if cuda.is_initialized():
            cuda.empty_cache()
        size //= 2
