"""Capture a function as a CUDA graph: all its kernels are launched at once, without Python.

Every BatchRunner captures on a stream of its own. torch.cuda.graph() would take one stream for all,
on the device that was current at the process's first capture. On another device nothing would be
captured, and each replay would give the first output again (pytorch#87894). The graphs of a runner
share one memory pool and one stream, as cuBLAS's workspaces of a stream lie in that pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

BatchFunction = Callable[[Tensor], Tensor]  # (B, C, H, W) pixels, uint8 or normalised -> (B, ...)

_cuda: Any = torch.cuda  # some of its functions have no annotations
_torch_c: Any = torch._C  # likewise
# torch allows one capture at a time in a process, also on several devices.
_capture_lock = threading.Lock()


class CaptureStreams(NamedTuple):
    """The streams and the memory pool that the graphs of a runner are captured with.

    Attributes:
        warmup: The stream of the warm-up runs. A capture may not create cuBLAS plans and
            workspaces, so they are created here.
        capture: The stream of the capture.
        pool: The memory pool of all graphs.
    """

    warmup: torch.cuda.Stream
    capture: torch.cuda.Stream
    pool: Any

    @classmethod
    def create(cls) -> CaptureStreams:
        """Create both streams on the current device.

        Only two are made: cuBLAS keeps a workspace of 32 MiB for each further stream.
        """
        warmup, capture = _cuda.Stream(), _cuda.Stream()
        return cls(warmup, capture, torch.cuda.graph_pool_handle())


class CapturedGraph(NamedTuple):
    """A captured function.

    Attributes:
        replay: Computes again with what the input tensor then holds.
        output: The static output: the next replay overwrites it.
    """

    replay: Callable[[], object]
    output: Tensor


def capture(streams: CaptureStreams, function: BatchFunction, pixels: Tensor) -> CapturedGraph:
    """Capture a function.

    Args:
        streams: Streams and pool of the current device.
        function: The function, which runs three times.
        pixels: Its static input (B, C, H, W): a replay reads what was written there.

    Returns:
        The graph.

    Raises:
        RuntimeError: It cannot be captured. The current stream is the caller's again.
    """
    with _capture_lock:
        caller = torch.cuda.current_stream()
        streams.warmup.wait_stream(caller)
        with torch.cuda.stream(streams.warmup):
            for _ in range(2):
                function(pixels)
        caller.wait_stream(streams.warmup)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may decode and copy meanwhile, and their calls to CUDA would
        # otherwise fail the capture.
        options = {
            "pool": streams.pool, "stream": streams.capture, "capture_error_mode": "thread_local"
        }  # fmt: skip
        try:
            with torch.cuda.graph(graph, **options):
                output = function(pixels)
        except BaseException:
            _end_allocation(streams.pool)
            raise
        finally:  # a failed capture leaves torch's own stream as the current one
            torch.cuda.set_stream(caller)
        return CapturedGraph(graph.replay, output)


def _end_allocation(pool: Any) -> None:
    """End the allocations of a failed capture from its pool, which torch itself may leave open.

    CUDAGraph.capture_end tells the allocator of the end only where CUDA has ended the capture
    without an error. Until the allocator is told, it refuses a second capture with this pool, fails
    in empty_cache(), and never reuses the memory of uploaded pixels.
    """
    with suppress(RuntimeError, AttributeError):  # the first call raises where it has been told
        _torch_c._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        _torch_c._cuda_releasePool(torch.cuda.current_device(), pool)


def is_capturing() -> bool:
    """Return True if the caller is capturing a CUDA graph on the current stream."""
    return torch.cuda.is_current_stream_capturing()
