"""The devices that torch can use on this machine, for messages."""

from __future__ import annotations

import torch

from vitlib.errors import ConfigError


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
