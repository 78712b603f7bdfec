"""A batch of any size, on a GPU, in passes of a few sizes: captured as CUDA graphs, or compiled.

How data flows: plan() cuts a batch; each piece goes to the device, into the place of a pass of its
size, and that pass runs. For few images launching the kernels costs more than running them: all of
them are captured as one graph. What runs is any function of pixels; on a CPU it is called as it is.

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger("vitlib")

Made = TypeVar("Made")
Function = Callable[[Tensor], Tensor]  # (B, C, H, W) pixels or levels -> (B, ...)

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # sizes of batch that are captured
GRAPH_TOKENS = 64 * 256  # in a batch: above, kernels outlast their launches
TILE = 128  # images: then the rows of every linear are a multiple of its tiles' 128
PASS_TOKENS = 64 * 1024  # in a large pass, as far as TILE allows: ViT-B/16 at 224 takes 256 images
LAUNCHING = 6  # what a pass costs beside its arithmetic, in images of ViT-B/16 at 224 on an H200
REMEMBERED = 64  # sizes and grids that are held; the longest unused goes


def pass_size(tokens: int) -> int:
    """Tokens an image -> images in a large pass, a multiple of TILE."""
    return TILE * max(1, PASS_TOKENS // (tokens * TILE))


@lru_cache(maxsize=1024)
def plan(count: int, largest: int) -> tuple[int, ...]:
    """Images in a batch and in the largest pass -> the sizes of its passes; the last is filled up.

    Only few different sizes come out, as each is captured or compiled once.
    """
    sizes = (*(s for s in (*BUCKETS, TILE) if s < largest), largest)
    whole, rest = divmod(count, largest)
    return (largest,) * whole + (_rest(rest, sizes) if rest or not whole else ())


def _rest(count: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes for less than the largest of them: one pass filled up, or several, as is quicker."""
    filled = next(size for size in sizes if size >= count)
    below = [size for size in sizes if size < count]
    if not below:
        return (filled,)
    several = below[-1], *_rest(count - below[-1], sizes)
    return min((filled,), several, key=lambda them: sum(them) + LAUNCHING * len(them))


class Runner:
    """Runs batches through functions, each size its own way.

    One batch at a time: all graphs share their memory, and each has one place for its pixels.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, compiles: bool) -> None:
        """dtype: that pixels are taken in; compiles: whether large passes are compiled."""
        self.device, self.dtype = device, dtype
        self.compiles, self.captures = compiles, device.type == "cuda"
        self.lock = threading.Lock()
        self.functions: OrderedDict[Hashable, Function] = OrderedDict()
        self.ways: OrderedDict[Hashable, Way] = OrderedDict()
        self.pool: Any = None
        self.done: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple[type[Runner], tuple[torch.device, torch.dtype, bool]]:
        """A copy has captured nothing yet."""
        return Runner, (self.device, self.dtype, self.compiles)

    def run(
        self,
        key: Hashable,
        function: Callable[[], Function],
        images: Tensor,
        sizes: tuple[int, ...],
        tokens: int,
    ) -> Tensor:
        """(B, C, H, W) pixels or levels, anywhere -> (B, ...), in memory that is the caller's.

        function: makes what the key stands for; sizes: of the passes; tokens: of an image.
        """
        with self.lock:
            if self.device.type != "cuda":
                return self._run(key, function, images, sizes, tokens)
            with torch.cuda.device(self.device):
                if self.done is not None:  # the last batch may have been another stream's
                    torch.cuda.current_stream().wait_event(self.done)
                given = self._run(key, function, images, sizes, tokens)
                self.done = self.done or torch.cuda.Event()  # type: ignore[no-untyped-call]
                self.done.record()
                return given

    def _run(
        self,
        key: Hashable,
        function: Callable[[], Function],
        images: Tensor,
        sizes: tuple[int, ...],
        tokens: int,
    ) -> Tensor:
        shape, dtype = images.shape[1:], images.dtype if is_levels(images) else self.dtype

        def new() -> Way:
            pixels = torch.zeros((size, *shape), dtype=dtype, device=self.device)
            return self._way(remembered(self.functions, key, function), pixels, tokens)

        given, start = [], 0
        for size in sizes:
            way = remembered(self.ways, (key, size), new)
            given.append(way(images[start : start + size]))
            start += size
        return given[0] if len(given) == 1 else torch.cat(given)

    def _way(self, function: Function, pixels: Tensor, tokens: int) -> Way:
        """What runs batches of the shape and dtype of (B, C, H, W)."""
        size = len(pixels)
        if size <= BUCKETS[-1] and size * tokens <= GRAPH_TOKENS:
            return Captured(function, pixels, self)
        if size >= TILE and self.compiles:
            function = self._compiled(function, pixels)
        return Way(function, pixels)

    def _compiled(self, function: Function, pixels: Tensor) -> Function:
        """The function compiled for these pixels; itself where that cannot be done."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's, which the caller cannot act on
                fast: Function = torch.compile(function, fullgraph=True, dynamic=False)
                fast(pixels)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, no Triton, a limit: it runs without
            self.compiles = False
            why = f"{type(error).__name__}: {error}".split("\n")[0]
            logger.warning("torch.compile is not used, and large batches are slower: %s", why)
            return function
        return fast


def is_levels(images: Tensor) -> bool:
    """Whether they are bytes, which go to the device as they are."""
    return images.dtype == torch.uint8


def remembered(held: OrderedDict[Hashable, Made], key: Hashable, make: Callable[[], Made]) -> Made:
    """What is held under a key, made if it is not there; of REMEMBERED the longest unused goes."""
    if key not in held:
        held[key] = make()
        if len(held) > REMEMBERED:
            held.popitem(last=False)
    held.move_to_end(key)
    return held[key]


class Way:
    """A function for one size of batch."""

    def __init__(self, function: Function, pixels: Tensor) -> None:
        """pixels: (B, C, H, W) on the device, that a batch has the shape and dtype of."""
        self.function, self.like = function, pixels.to("meta")
        self.device = pixels.device

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W), or fewer images -> as many (B, ...)."""
        if len(images) == len(self.like) and images.device == self.device:
            pixels = images.to(self.like.dtype).contiguous()
        else:
            pixels = torch.zeros_like(self.like, device=self.device)
            put(images, pixels)
        return self.function(pixels)[: len(images)]


class Captured(Way):
    """The same as one CUDA graph, in which no kernel waits for Python.

    Captured at the second batch, as that takes four runs: a size that comes once is run as it is.
    """

    def __init__(self, function: Function, pixels: Tensor, runner: Runner) -> None:
        super().__init__(function, pixels)
        self.pixels, self.runner = pixels, runner
        self.batches = 0
        self.graph: tuple[Callable[[], object], Tensor] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W), or fewer images -> as many (B, ...), copied out of the graph's memory."""
        put(images, self.pixels)
        self.batches += 1
        if self.batches == 2 and self.runner.captures:
            self.graph = self.captured()
        if self.graph is None:
            return self.function(self.pixels)[: len(images)]
        replay, given = self.graph
        replay()
        return given[: len(images)].clone()

    def captured(self) -> tuple[Callable[[], object], Tensor] | None:
        """What replays, and where its answer lies; None where it cannot be captured."""
        try:
            return capture(self.function, self.pixels, self.runner)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.runner.captures = False
            logger.warning("CUDA graphs are not used: %s", str(error).split("\n")[0])
            return None


def put(images: Tensor, pixels: Tensor) -> None:
    """(b, C, H, W) -> the first b of (B, C, H, W), in their dtype, without waiting for the copy.

    From the CPU that takes pinned memory, and the caller's may be written to meanwhile: ours, which
    torch keeps until the copy is done. bfloat16 is made there, as it is half as much to copy.
    """
    if pixels.is_cuda and not images.is_cuda:
        held = torch.empty(images.shape, dtype=pixels.dtype, pin_memory=True)
        images = held.copy_(images)
    pixels[: len(images)].copy_(images, non_blocking=True)


def capture(
    function: Function, pixels: Tensor, runner: Runner
) -> tuple[Callable[[], object], Tensor]:
    """A function of static pixels -> what replays it, and its static answer (B, ...)."""
    side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    here = torch.cuda.current_stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(2):  # plans and workspaces are made by running, which a capture forbids
            function(pixels)
    here.wait_stream(side)
    runner.pool = runner.pool or torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    # Other threads may decode and copy meanwhile: only this one's calls are the capture's.
    with torch.cuda.graph(graph, pool=runner.pool, capture_error_mode="thread_local"):
        given = function(pixels)
    return graph.replay, given
