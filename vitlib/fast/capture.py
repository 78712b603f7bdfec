"""CUDA graphs: the kernels of a function launched as one, of which none waits for Python.

Every Runner captures on a stream of its own. The stream that torch.cuda.graph() would take is of
the device that was current at the process's first capture: on another device nothing would be
captured, and each replay would give the first answer again (pytorch#87894). A runner's graphs share
one pool of memory and one stream, as the workspaces of a stream's products lie in that pool.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]  # (B, C, H, W) pixels or levels -> (B, ...)

# torch allows one capture in a process, also on several devices.
_CAPTURING = threading.Lock()


class Place(NamedTuple):
    """Where the graphs of a runner are captured. Made on the device that is current."""

    warm: torch.cuda.Stream  # a capture forbids to make plans and workspaces: they are made here
    side: torch.cuda.Stream
    pool: Any

    @classmethod
    def new(cls) -> Place:
        """Make both streams: each further one would keep a workspace of cuBLAS (32 MiB)."""
        warm, side = (torch.cuda.Stream() for _ in range(2))  # type: ignore[no-untyped-call]
        return cls(warm, side, torch.cuda.graph_pool_handle())


class Graph(NamedTuple):
    """A captured function."""

    replay: Callable[[], object]
    answer: Tensor  # static: the next replay writes over it


def capture_on(place: Place, function: Function, pixels: Tensor) -> Graph:
    """Capture a function.

    Args:
        place: Where; of the current device.
        function: What is captured. It runs three times.
        pixels: Its input (B, C, H, W), static: a replay reads what was written there.

    Raises:
        RuntimeError: It cannot be captured. The current stream is the one that it was.
    """
    with _CAPTURING:
        here = torch.cuda.current_stream()
        place.warm.wait_stream(here)
        with torch.cuda.stream(place.warm):
            for _ in range(2):
                function(pixels)
        here.wait_stream(place.warm)
        graph = torch.cuda.CUDAGraph()
        # Other threads may decode and copy meanwhile: only this one's calls are the capture's.
        options = {"pool": place.pool, "stream": place.side, "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, **options):
                answer = function(pixels)
        finally:  # where a capture fails torch leaves its own stream as the current one
            torch.cuda.set_stream(here)
        return Graph(graph.replay, answer)


def is_capturing() -> bool:
    """Whether the caller captures what he runs, in a graph of his own."""
    return torch.cuda.is_current_stream_capturing()
