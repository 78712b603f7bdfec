"""Settings of the whole process that belong to who uses vitlib: they change no answer of it.

torch's default device and dtype, autocast, the precision of float32 products and the random numbers
that everyone draws from are the caller's. What vitlib makes itself names its dtype, and is made
inside `isolate_torch_settings`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_KINDS = ("cpu", "cuda")


@contextmanager
def isolate_torch_settings() -> Iterator[None]:
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


def float64_device(device: torch.device) -> torch.device:
    """Return a device that computes float64: this one, or the CPU in place of MPS or XPU."""
    return device if device.type in ("cpu", "cuda", "meta") else torch.device("cpu")


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """A block, or a function, whose tensors can be trained later: none is of inference mode."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """A block, or a function, after which torch's global generators are as they were."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=cuda):
        yield


@contextmanager
def strict_float32() -> Iterator[None]:
    """The part of isolate_torch_settings that a forward needs: it takes some microseconds."""
    with _float32:
        if not any(map(torch.is_autocast_enabled, _KINDS)):
            yield
            return
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield


class _Float32:
    """Products of float32 in float32, whatever set_float32_matmul_precision allows: on a CPU and on
    a GPU, whose TF32 has ten bits after the point.

    These are settings of all threads: the first to enter changes them, and the last to leave puts
    back what the caller had.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before: list[Any] = []
        self.settings: list[tuple[Any, str]] = [(torch.backends.cuda.matmul, "allow_tf32")]
        matmul = getattr(torch.backends.mkldnn, "matmul", None)
        if matmul is not None:  # torch 2.9 and later; it forbids to mix both ways
            both = matmul, torch.backends.cuda.matmul
            self.settings = [(backend, "fp32_precision") for backend in both]

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.before = [getattr(backend, name) for backend, name in self.settings]
                for (backend, name), value in zip(self.settings, self.before, strict=True):
                    if value in _ROUNDED:
                        setattr(backend, name, "ieee" if name == "fp32_precision" else False)

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside:
                return
            for (backend, name), value in zip(self.settings, self.before, strict=True):
                if value not in _ROUNDED:
                    continue
                if value is not True:
                    setattr(backend, name, "none")  # as the setting above it says, if that was it
                if getattr(backend, name) != value:
                    setattr(backend, name, value)


_ROUNDED = ("bf16", "tf32", True)
_float32 = _Float32()
