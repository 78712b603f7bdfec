"""Isolation from torch's global settings, which belong to the user and change no result.

These are the default device and dtype, autocast, the precision of float32 products and the state of
the random number generators. vitlib states the dtype of every tensor that it makes, and makes
tensors inside isolate_torch_settings().
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from vitlib.errors import ConfigError

_KINDS = ("cpu", "cuda")


@contextmanager
def isolate_torch_settings() -> Iterator[None]:
    """Disable autocast and TF32 and reset the default device in a block or a decorated function.

    The default dtype cannot be reset for one thread alone: code in the block states dtypes.
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
    """Return a device that computes float64.

    Args:
        device: Any device.

    Returns:
        The same device, or the CPU in place of MPS or XPU.
    """
    return device if device.type in ("cpu", "cuda", "meta") else torch.device("cpu")


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Make normal tensors in a block or function, also under the caller's inference mode.

    Tensors of inference mode can never be trained.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore torch's global random number generators after a block or a function."""
    cuda: Any = torch.cuda  # whose is_initialized is not typed
    devices = range(cuda.device_count()) if cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def num_threads(count: int | None) -> Iterator[None]:
    """Compute with a number of threads in a block.

    Threads cost small products more than they save, and most where the machine is busy. A change
    of the number takes milliseconds, so this belongs around many products.

    Args:
        count: The number; None leaves it.
    """
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Disable autocast on the device of a tensor.

    Args:
        tensor: An input of the block.

    Returns:
        A context manager.
    """
    kind = tensor.device.type
    if kind in _KINDS and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


@contextmanager
def strict_float32() -> Iterator[None]:
    """Disable autocast and TF32: the part of isolate_torch_settings that a forward needs.

    It takes a few microseconds.
    """
    with _float32:
        if not any(map(torch.is_autocast_enabled, _KINDS)):
            yield
            return
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield


class _Float32:
    """Context that computes float32 products in float32, not in TF32 or bfloat16.

    TF32 has ten bits after the point. torch.set_float32_matmul_precision may allow both. These are
    settings of the process: the first thread to enter changes them, and the last to leave restores
    the caller's values.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_users = 0
        self.saved: list[Any] = []
        mkldnn: Any = torch.backends.mkldnn
        # The older settings of the same, such as allow_tf32, cannot be mixed with these.
        self.backends: tuple[Any, ...] = mkldnn.matmul, torch.backends.cuda.matmul

    def __enter__(self) -> None:
        with self.lock:
            self.num_users += 1
            if self.num_users == 1:
                self.saved = [backend.fp32_precision for backend in self.backends]
                for backend, value in zip(self.backends, self.saved, strict=True):
                    if value in _ROUNDED:
                        backend.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.num_users -= 1
            if self.num_users:
                return
            for backend, value in zip(self.backends, self.saved, strict=True):
                if value not in _ROUNDED:
                    continue
                # "none" inherits from the parent setting. An explicit value is only set where that
                # is not the same: else the caller's later changes would not reach it.
                backend.fp32_precision = "none"
                if backend.fp32_precision != value:
                    backend.fp32_precision = value


_ROUNDED = ("bf16", "tf32")
_float32 = _Float32()


def list_devices() -> list[str]:
    """List the devices by torch's names, "cpu" first."""
    counts = {
        "cuda": torch.cuda.device_count(),
        "xpu": torch.xpu.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    return ["cpu", *(f"{name}:{index}" for name, n in counts.items() for index in range(n))]


def is_available(device: torch.device | str) -> bool:
    """Return True if torch knows a device and this machine has it.

    Args:
        device: A device, or its name with or without a number.
    """
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        return False
    number = 0 if chosen.index is None else chosen.index
    return str(chosen) == "cpu" or f"{chosen.type}:{number}" in list_devices()


def unavailable(device: object) -> ConfigError:
    """Make the error for a device that cannot be had.

    Args:
        device: What was asked for.

    Returns:
        The error, for `raise`.
    """
    return ConfigError(
        f"device={str(device)!r} cannot be had on this machine with this torch: expected "
        f"{' or '.join(list_devices())}"
    )
