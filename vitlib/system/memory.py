"""Free memory of a device, for errors that come before too much is allocated."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")


def available_memory(device: torch.device) -> int | None:
    """Return the number of bytes that can still be allocated on a device.

    Args:
        device: A CPU or a GPU.

    Returns:
        Bytes; None where the system does not report them, as on macOS and Windows.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # torch's allocator keeps freed blocks: the driver counts them as used, torch reuses them.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if device.type != "cpu":
        return None
    try:
        lines = _MEMINFO.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    fields = {line.partition(":")[0]: line for line in lines}
    kib = fields.get("MemAvailable", "").split()[1:2]
    return int(kib[0]) * 1024 if kib and kib[0].isdigit() else None
