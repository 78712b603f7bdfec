"""Settings of the whole process that belong to who uses vitlib: they change no answer of it.

torch's default device and dtype, autocast, the precision of float32 products and the random numbers
that everyone draws from are the caller's. What vitlib makes itself names its dtype, and is made
inside `own_settings`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_KINDS = ("cpu", "cuda")


@contextmanager
def own_settings() -> Iterator[None]:
    """A block, or as a decorator a function, for which default device, autocast and the precision
    of float32 products do not count.

    The default dtype cannot be left out for one thread alone: code in the block names dtypes.
    """
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in _KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_float32)
        yield


@contextmanager
def normal_tensors() -> Iterator[None]:
    """A block, or a function, whose tensors can be trained later: none is of inference mode."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """A block, or a function, after which torch's global generators are as they were."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=cuda):
        yield


@contextmanager
def own_arithmetic() -> Iterator[None]:
    """The part of own_settings that a forward needs: it takes some microseconds."""
    with _float32:
        if not any(map(torch.is_autocast_enabled, _KINDS)):
            yield
            return
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield


class _Float32:
    """Products of float32 on a CPU in float32, whatever set_float32_matmul_precision allows.

    That is one setting of all threads: the first to enter changes it, and the last to leave puts
    back what the caller had.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside, self.before = 0, ""
        self.matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 and later

    def __enter__(self) -> None:
        if self.matmul is None:
            return
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.before = self.matmul.fp32_precision
                if self.before in _ROUNDED:
                    self.matmul.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        if self.matmul is None:
            return
        with self.lock:
            self.inside -= 1
            if self.inside == 0 and self.before in _ROUNDED:
                self.matmul.fp32_precision = self.before


_ROUNDED = ("bf16", "tf32")
_float32 = _Float32()
