"""A batch of any size, on a GPU, in passes of a few sizes: captured as CUDA graphs, or compiled.

How data flows: plan() cuts a batch; each piece goes to the device, and the pass of its size runs.
For few images launching the kernels costs more than running them: all of them are captured as one
graph. Pieces of a large batch that lie on the CPU are copied on a stream of their own, while the
piece before them is computed. What runs is any function of pixels; on a CPU it is called as it is.

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from vitlib.errors import first_line
from vitlib.fast.capture import Function, Graph, Place, capture_on, is_capturing

logger = logging.getLogger("vitlib")

Made = TypeVar("Made")
# Makes the function of a key; True: with its blocks compiled.
Factory = Callable[[bool], Function]

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # sizes of batch that are captured
GRAPH_TOKENS = 64 * 256  # in a batch: above, kernels outlast their launches
TILE = 128  # images: then the rows of every linear are a multiple of its tiles' 128
# In a large pass: 128 images of ViT-B/16 at 224, whose residual stream in bfloat16 (39 MB) stays in
# the L2 cache of an H100 or H200 (50 and 60 MB).
PASS_TOKENS = 32 * 1024
LAUNCHING = 6  # what a pass costs beside its arithmetic, in images of ViT-B/16 at 224 on an H200
REMEMBERED = 64  # sizes and grids that are held; the longest unused goes
# A size is captured when it comes for the second time, as that takes four runs. With many sizes
# and grids (photos in their own shapes) it would capture all the time: then at the eighth.
EARLY, EARLY_GRAPHS, LATE = 2, 16, 8
MOST_FAILURES = 3  # captures that fail before no more are tried


def pass_size(tokens: int) -> int:
    """Tokens an image -> images in a large pass: a multiple of TILE, or one of BUCKETS."""
    tiles = PASS_TOKENS // (tokens * TILE)
    return TILE * tiles or max(s for s in BUCKETS if s == 1 or s * tokens <= PASS_TOKENS)


@lru_cache(maxsize=1024)
def plan(count: int, largest: int) -> tuple[int, ...]:
    """Images in a batch and in the largest pass -> the sizes of its passes; the last is filled up.

    Only few different sizes come out, as each is captured or compiled once.
    """
    sizes = sizes_up_to(largest)
    whole, rest = divmod(count, largest)
    return (largest,) * whole + (_rest(rest, sizes) if rest or not whole else ())


def sizes_up_to(largest: int) -> tuple[int, ...]:
    """Return every size of pass that batches can be cut into, ascending."""
    return (*(s for s in (*BUCKETS, TILE) if s < largest), largest)


def _rest(count: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes for less than the largest of them: one pass filled up, or several, as is quicker."""
    filled = next(size for size in sizes if size >= count)
    below = [size for size in sizes if size < count]
    if not below:
        return (filled,)
    several = below[-1], *_rest(count - below[-1], sizes)
    return min((filled,), several, key=lambda them: sum(them) + LAUNCHING * len(them))


def halve_until_it_fits(
    run: Callable[[int], Made], size: int, full: type[Exception] = torch.OutOfMemoryError
) -> tuple[Made, int]:
    """Run a number of images, or half as many where memory ends, and so on down to 1.

    Args:
        run: Computes with the number it is given.
        size: Images, at first.
        full: What it raises where memory ends.

    Returns:
        What `run` returned, and the size with which it did.

    Raises:
        Exception: Of the kind `full`: not even one image fits.
    """
    while True:
        try:
            return run(size), size
        except full:
            if size == 1:
                raise
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        size //= 2


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
        self.graphs = self.failures = 0  # captures that succeeded, that did not
        self.place: Place | None = None
        self.copies: torch.cuda.Stream | None = None
        self.done: torch.cuda.Event | None = None

    def __reduce__(self) -> tuple[type[Runner], tuple[torch.device, torch.dtype, bool]]:
        """A copy has captured nothing yet."""
        return Runner, (self.device, self.dtype, self.compiles)

    def run(
        self,
        key: Hashable,
        function: Factory,
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
                if is_capturing():  # his graph may not wait for what lies outside it
                    made = remembered(self.functions, key, lambda: function(False))
                    dtype = images.dtype if is_levels(images) else self.dtype
                    return made(images.to(self.device, dtype))
                if self.done is not None:  # the last batch may have been another stream's
                    torch.cuda.current_stream().wait_event(self.done)
                answers = self._run(key, function, images, sizes, tokens)
                self.done = self.done or torch.cuda.Event()  # type: ignore[no-untyped-call]
                self.done.record()
                return answers

    def _run(
        self,
        key: Hashable,
        function: Factory,
        images: Tensor,
        sizes: tuple[int, ...],
        tokens: int,
    ) -> Tensor:
        shape, dtype = images.shape[1:], images.dtype if is_levels(images) else self.dtype

        def new() -> Way:
            pixels = torch.zeros((size, *shape), dtype=dtype, device=self.device)
            return self._way(key, function, pixels, tokens)

        answers, start = [], 0
        for size in sizes:
            way = remembered(self.ways, (key, size), new)
            answers.append(way(self.moved(images[start : start + size], dtype)))
            start += size
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def _way(self, key: Hashable, function: Factory, pixels: Tensor, tokens: int) -> Way:
        """What runs batches of the shape and dtype of (B, C, H, W)."""
        size = len(pixels)
        plain = remembered(self.functions, key, lambda: function(False))
        if size <= BUCKETS[-1] and size * tokens <= GRAPH_TOKENS:
            return Captured(plain, pixels, self)
        if size >= TILE and self.compiles:
            return Compiled(function(True), plain, pixels, self)
        return Way(plain, pixels)

    def moved(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, C, H, W) from anywhere -> on the device, in a dtype.

        From the CPU through pinned memory, which torch keeps until the copy is done, as the
        caller's may be written to meanwhile; and on a stream of its own, so that a copy does not
        wait for the pass before. 16 bits are made there, as they are half as much to copy.
        """
        if images.device == self.device or self.device.type != "cuda":
            return images.to(self.device)
        if images.is_cuda:  # another GPU's
            return images.to(self.device, dtype)
        pinned = torch.empty(images.shape, dtype=dtype, device="cpu", pin_memory=True)
        return self.upload(pinned.copy_(images))

    def upload(self, pinned: Tensor) -> Tensor:
        """(B, C, H, W) in pinned memory that is not written to any more -> on the device."""
        with torch.cuda.device(self.device):
            if self.copies is None:
                self.copies = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            here = torch.cuda.current_stream()
            with torch.cuda.stream(self.copies):
                images = pinned.to(self.device, non_blocking=True)
            here.wait_stream(self.copies)
            images.record_stream(here)
            return images

    def capture(self, function: Function, pixels: Tensor) -> Graph | None:
        """Capture a function of static pixels (B, C, H, W); None where that cannot be done."""
        try:
            graph = capture(function, pixels, self)
        except torch.OutOfMemoryError:  # the batch itself has just been computed
            self._failed(f"no memory to capture {len(pixels)} images")
            return None
        except RuntimeError as error:
            self._failed(first_line(error))
            return None
        self.graphs += 1
        return graph

    def _failed(self, why: str) -> None:
        """Say once that there is no graph, and in the end try no more."""
        self.failures += 1
        if self.failures == 1:
            logger.warning("CUDA graphs are not used, and small batches are slower: %s", why)
        self.captures = self.captures and self.failures < MOST_FAILURES

    def not_compiled(self, error: Exception) -> None:
        """Say once why nothing is compiled: no compiler, no Triton, a limit."""
        if self.compiles:
            why = f"{type(error).__name__}: {first_line(error)}"
            logger.warning("torch.compile is not used, and large batches are slower: %s", why)
        self.compiles = False


def capture(function: Function, pixels: Tensor, runner: Runner) -> Graph:
    """A function of static pixels -> its graph. Raises RuntimeError where it has none."""
    runner.place = runner.place or Place.new()
    return capture_on(runner.place, function, pixels)


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
        """(B, C, H, W) on the device, or fewer images -> as many (B, ...)."""
        if len(images) == len(self.like):
            pixels = images.to(self.like.dtype).contiguous()
        else:
            pixels = torch.zeros_like(self.like, device=self.device)
            pixels[: len(images)].copy_(images)
        return self.function(pixels)[: len(images)]


class Compiled(Way):
    """A function whose blocks are compiled; as it is where that fails, at whichever call."""

    def __init__(self, compiled: Function, plain: Function, pixels: Tensor, runner: Runner) -> None:
        super().__init__(self.guarded, pixels)
        self.compiled, self.plain, self.runner = compiled, plain, runner

    def guarded(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, ...)."""
        if not self.runner.compiles:
            return self.plain(pixels)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's, which the caller cannot act on
                # For tensors of inference mode it would be compiled a second time.
                return self.compiled(pixels.clone() if pixels.is_inference() else pixels)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.runner.not_compiled(error)
            return self.plain(pixels)


class Captured(Way):
    """A function as one CUDA graph, once its size has come often enough."""

    def __init__(self, function: Function, pixels: Tensor, runner: Runner) -> None:
        super().__init__(function, pixels)
        self.pixels, self.runner = pixels, runner
        self.batches = 0
        self.graph: Graph | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W), or fewer images -> as many (B, ...), copied out of the graph's memory."""
        self.pixels[: len(images)].copy_(images)
        self.batches += 1
        due = EARLY if self.runner.graphs < EARLY_GRAPHS else LATE
        if self.batches == due and self.runner.captures:
            self.graph = self.runner.capture(self.function, self.pixels)
        if self.graph is None:
            return self.function(self.pixels)[: len(images)]
        self.graph.replay()
        return self.graph.answer[: len(images)].clone()
