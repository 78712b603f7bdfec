"""Run batches of any size on a GPU, in micro-batches that are captured or compiled.

How data flows: micro_batch.py splits a batch; each piece goes to the device, and the function of
its size runs. For few images launching the kernels costs more than running them, so all kernels
are captured as one CUDA graph. Pieces of a large batch that lie on the CPU are copied on a stream
of their own, while the piece before them is computed. A function is any function of pixels; on a
CPU it is called directly.

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import logging
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from vitlib.errors import count_noun, first_line
from vitlib.fast import cuda_graphs, micro_batch
from vitlib.fast.cuda_graphs import BatchFunction, CapturedGraph, CaptureStreams, is_capturing

logger = logging.getLogger("vitlib")

Entry = TypeVar("Entry")
# Makes the function of a key; True compiles its blocks.
FunctionFactory = Callable[[bool], BatchFunction]

CACHE_SIZE = 64  # functions, and sizes of them, that are kept; the least recently used goes
# A capture costs four runs, so a size is captured when it comes for the second time. With many
# sizes and grids (photos in their own shapes) every batch would be a capture: after EARLY_GRAPHS
# graphs a size is captured only when it comes for the eighth time.
EARLY, EARLY_GRAPHS, LATE = 2, 16, 8
MAX_FAILURES = 3  # failed captures, after which no more are tried

_cuda: Any = torch.cuda  # some of its functions have no annotations


class BatchRunner:
    """Run batches through functions, by a strategy for each size of micro-batch.

    It runs one batch at a time: all graphs share their memory, and each has one static input.

    Args:
        device: The device that computes.
        dtype: The dtype that pixels are cast to; uint8 pixels stay as they are.
        compiles: Compile the blocks for large micro-batches.
        graph_tokens: The most tokens of a micro-batch that is captured.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, compiles: bool, graph_tokens: int
    ) -> None:
        self.device, self.dtype, self.graph_tokens = device, dtype, graph_tokens
        self.compiles, self.captures = compiles, device.type == "cuda"
        self.lock = threading.Lock()
        self.functions: OrderedDict[Hashable, BatchFunction] = OrderedDict()
        self.functions_by_size: OrderedDict[Hashable, FixedSizeFunction] = OrderedDict()
        self.num_graphs = self.num_failures = 0  # of captures
        self.capture_streams: CaptureStreams | None = None
        self.copy_stream: torch.cuda.Stream | None = None
        self.finished: torch.cuda.Event | None = None  # the last batch

    def __reduce__(self) -> tuple[type[BatchRunner], tuple[torch.device, torch.dtype, bool, int]]:
        """Copy or pickle without the graphs: the copy captures its own."""
        return BatchRunner, (self.device, self.dtype, self.compiles, self.graph_tokens)

    def run(
        self,
        key: Hashable,
        factory: FunctionFactory,
        images: Tensor,
        sizes: tuple[int, ...],
        tokens: int,
    ) -> Tensor:
        """Run a batch.

        Args:
            key: Identifies the function.
            factory: Makes the function of that key.
            images: (B, C, H, W) pixels, uint8 or normalised, on any device.
            sizes: The size of each micro-batch, in order.
            tokens: Tokens of an image.

        Returns:
            (B, ...), in memory of the caller's.
        """
        with self.lock:
            if self.device.type != "cuda":
                return self._run(key, factory, images, sizes, tokens)
            with torch.cuda.device(self.device):
                # The caller captures this call in a graph of his own. That graph may not wait for
                # an event outside it, and a capture inside a capture fails. A function made here is
                # not kept: its position tables have no numbers before a replay of that graph.
                if is_capturing():
                    function = self.functions.get(key) or factory(False)
                    dtype = images.dtype if is_uint8(images) else self.dtype
                    return function(images.to(self.device, dtype))
                # The last batch may have been on another stream: its static inputs and outputs are
                # in use until then.
                if self.finished is not None:
                    torch.cuda.current_stream().wait_event(self.finished)
                outputs = self._run(key, factory, images, sizes, tokens)
                self.finished = self.finished or _cuda.Event()
                self.finished.record()
                return outputs

    def _run(
        self,
        key: Hashable,
        factory: FunctionFactory,
        images: Tensor,
        sizes: tuple[int, ...],
        tokens: int,
    ) -> Tensor:
        """Run a batch while the lock is held."""
        shape, dtype = images.shape[1:], images.dtype if is_uint8(images) else self.dtype

        def make() -> FixedSizeFunction:
            pixels = torch.zeros((size, *shape), dtype=dtype, device=self.device)
            return self._make_function(key, factory, pixels, tokens)

        outputs, start = [], 0
        for size in sizes:
            function = get_or_make(self.functions_by_size, (key, size), make)
            outputs.append(function(self.to_device(images[start : start + size], dtype)))
            start += size
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _make_function(
        self, key: Hashable, factory: FunctionFactory, pixels: Tensor, tokens: int
    ) -> FixedSizeFunction:
        """Choose how batches of the shape and dtype of `pixels` (B, C, H, W) run."""
        size = len(pixels)
        eager = get_or_make(self.functions, key, lambda: factory(False))
        # A weak reference: a cycle would keep the weights on the GPU until a garbage collection.
        runner: BatchRunner = weakref.proxy(self)
        if size >= micro_batch.TILE and self.compiles:
            return CompiledFunction(factory(True), eager, pixels, runner)
        if size <= micro_batch.TILE and size * tokens <= self.graph_tokens:
            return GraphedFunction(eager, pixels, runner)
        return FixedSizeFunction(eager, pixels)

    def to_device(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy images to the device.

        From the CPU they go through pinned memory of the runner's own, as the caller may write to
        his meanwhile; torch keeps it until the copy is done. The copy is on a stream of its own, so
        that it does not wait for the micro-batch before it. Pixels are cast on the CPU, as 16 bits
        are half as much to copy.

        Args:
            images: (B, C, H, W), on any device.
            dtype: The dtype of the result.

        Returns:
            The images on the device.
        """
        if images.device == self.device or self.device.type != "cuda":
            return images.to(self.device)
        if images.is_cuda:  # on another GPU
            return images.to(self.device, dtype)
        pinned = torch.empty(images.shape, dtype=dtype, device="cpu", pin_memory=True)
        return self.upload(pinned.copy_(images))

    def upload(self, pinned: Tensor) -> Tensor:
        """Copy images to the device while it computes.

        Args:
            pinned: (B, C, H, W) in pinned memory that is not written to any more.

        Returns:
            The images on the device.
        """
        with torch.cuda.device(self.device):
            if self.copy_stream is None:
                self.copy_stream = _cuda.Stream()
            compute = torch.cuda.current_stream()
            with torch.cuda.stream(self.copy_stream):
                images = pinned.to(self.device, non_blocking=True)
            compute.wait_stream(self.copy_stream)
            # Allocated on the copy stream and used on this one: without the record the allocator
            # would reuse the memory as soon as the tensor is gone, while kernels still read it.
            images.record_stream(compute)
            return images

    def capture(self, function: BatchFunction, pixels: Tensor) -> CapturedGraph | None:
        """Capture a function as a CUDA graph.

        Args:
            function: The function.
            pixels: Its static input (B, C, H, W).

        Returns:
            The graph, or None where it cannot be captured; then a warning says why, once.
        """
        try:
            graph = capture_graph(function, pixels, self)
        except torch.OutOfMemoryError:  # the batch itself did fit: it has just been computed
            self._record_failure(f"no memory to capture {count_noun(len(pixels), 'image')}")
            return None
        except RuntimeError as error:
            self._record_failure(first_line(error))
            return None
        self.num_graphs += 1
        return graph

    def _record_failure(self, reason: str) -> None:
        """Warn at the first failed capture, and stop capturing after MAX_FAILURES."""
        self.num_failures += 1
        if self.num_failures == 1:
            logger.warning("CUDA graphs are not used, and small batches are slower: %s", reason)
        self.captures = self.captures and self.num_failures < MAX_FAILURES

    def disable_compile(self, error: Exception) -> None:
        """Stop compiling, and warn once.

        Args:
            error: Why it failed: no compiler, no Triton, or a limit of the compiler.
        """
        if self.compiles:
            reason = f"{type(error).__name__}: {first_line(error)}"
            logger.warning("torch.compile is not used, and large batches are slower: %s", reason)
        self.compiles = False


def capture_graph(function: BatchFunction, pixels: Tensor, runner: BatchRunner) -> CapturedGraph:
    """Capture a function with the streams of a runner.

    Args:
        function: The function.
        pixels: Its static input (B, C, H, W).
        runner: The runner; its streams are created at the first capture.

    Returns:
        The graph.

    Raises:
        RuntimeError: The function cannot be captured.
    """
    runner.capture_streams = runner.capture_streams or CaptureStreams.create()
    return cuda_graphs.capture(runner.capture_streams, function, pixels)


def is_uint8(images: Tensor) -> bool:
    """Return True for uint8 pixels, which go to the device without a cast.

    Args:
        images: Pixels.

    Returns:
        True if their dtype is uint8.
    """
    return images.dtype == torch.uint8


def get_or_make(
    cache: OrderedDict[Hashable, Entry], key: Hashable, make: Callable[[], Entry]
) -> Entry:
    """Get an entry of a cache of at most CACHE_SIZE entries, and make it where it is missing.

    Args:
        cache: The entries, least recently used first.
        key: The key of the entry.
        make: Makes a missing entry; the least recently used one then goes.

    Returns:
        The entry.
    """
    if key not in cache:
        cache[key] = make()
        if len(cache) > CACHE_SIZE:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]


class FixedSizeFunction:
    """A function for one batch size; smaller batches are padded with zeros.

    Args:
        function: The function.
        pixels: A tensor of the shape and dtype of its batches (B, C, H, W), on the device.
    """

    def __init__(self, function: BatchFunction, pixels: Tensor) -> None:
        self.function, self.template = function, pixels.to("meta")
        self.device = pixels.device

    def __call__(self, images: Tensor) -> Tensor:
        """Run a batch.

        Args:
            images: (B, C, H, W) on the device, or fewer images.

        Returns:
            (B, ...), for as many images as came.
        """
        if len(images) == len(self.template):
            pixels = images.to(self.template.dtype).contiguous()
        else:
            pixels = torch.zeros_like(self.template, device=self.device)
            pixels[: len(images)].copy_(images)
        return self.compute(pixels)[: len(images)]

    def compute(self, pixels: Tensor) -> Tensor:
        """Call the function.

        Args:
            pixels: (B, C, H, W), of the size and dtype that it is for.

        Returns:
            (B, ...).
        """
        return self.function(pixels)


class CompiledFunction(FixedSizeFunction):
    """A function whose blocks are compiled; where compiling fails, the eager function runs.

    Args:
        compiled: The function with compiled blocks. It may fail at any call.
        eager: The same function without them.
        pixels: A tensor of the shape and dtype of its batches (B, C, H, W), on the device.
        runner: Its runner, which stops compiling after a failure.
    """

    def __init__(
        self, compiled: BatchFunction, eager: BatchFunction, pixels: Tensor, runner: BatchRunner
    ) -> None:
        super().__init__(compiled, pixels)
        self.eager, self.runner = eager, runner

    def compute(self, pixels: Tensor) -> Tensor:
        """Call the compiled function, or the eager one where compiling fails.

        Args:
            pixels: (B, C, H, W).

        Returns:
            (B, ...).
        """
        if not self.runner.compiles:
            return self.eager(pixels)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's, which the caller cannot act on
                # A tensor of inference mode fails the compiled function's guards: without the copy
                # it would be compiled a second time.
                return self.function(pixels.clone() if pixels.is_inference() else pixels)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.runner.disable_compile(error)
            return self.eager(pixels)


class GraphedFunction(FixedSizeFunction):
    """A function that becomes one CUDA graph once its size has come often enough.

    Args:
        function: The function.
        pixels: The static input of the graph (B, C, H, W), on the device.
        runner: Its runner, which captures and counts.
    """

    def __init__(self, function: BatchFunction, pixels: Tensor, runner: BatchRunner) -> None:
        super().__init__(function, pixels)
        self.pixels, self.runner = pixels, runner
        self.num_batches = 0
        self.graph: CapturedGraph | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Run a batch, and capture the function when it is due.

        Args:
            images: (B, C, H, W) on the device, or fewer images.

        Returns:
            (B, ...), for as many images as came, copied out of the graph's memory.
        """
        self.pixels[: len(images)].copy_(images)
        self.num_batches += 1
        due = EARLY if self.runner.num_graphs < EARLY_GRAPHS else LATE
        if self.num_batches == due and self.runner.captures:
            self.graph = self.runner.capture(self.function, self.pixels)
        if self.graph is None:
            return self.function(self.pixels)[: len(images)]
        self.graph.replay()
        return self.graph.output[: len(images)].clone()
