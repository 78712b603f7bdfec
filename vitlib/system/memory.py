"""Free memory of a device, for errors that come before too much is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from vitlib.errors import ImageError, count_noun

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


def check_attention_memory(
    images: torch.Tensor,
    grid: tuple[int, int],
    patch_size: tuple[int, int],
    num_prefix_tokens: int,
    num_heads: int,
    num_layers: int,
    num_queries: int | None,
    copies: int,
) -> None:
    """Check that attention probabilities in float32 fit in free memory.

    Args:
        images: Pixels, (B, C, H, W).
        grid: Patches (down, across).
        patch_size: Pixels (height, width) of a patch.
        num_prefix_tokens: Tokens before the patches.
        num_heads: Heads of a block.
        num_layers: Number of blocks whose probabilities are stored.
        num_queries: Number of rows stored of each; None means all.
        copies: How many tensors of that size are stored for each block.

    Raises:
        ImageError: They do not fit; the message states a size that does.
    """
    (p, q), (height, width) = patch_size, images.shape[2:]
    tokens = grid[0] * grid[1] + num_prefix_tokens
    # One layer more than are stored: its scores, while its probabilities are computed.
    each = (copies * num_layers + 1) * len(images) * num_heads * 4
    need, free = each * (num_queries or tokens) * tokens, available_memory(images.device)
    if free is None or need <= free:
        return
    most = free / each / num_queries if num_queries else math.sqrt(free / each)
    side = math.isqrt(max(int(most) - num_prefix_tokens, 0))
    fits = f"images of {side * p}x{side * q} pixels fit" if side else "no image fits"
    raise ImageError(
        f"attention of {count_noun(num_layers, 'layer')} on {count_noun(len(images), 'image')} of "
        f"{height}x{width} pixels takes {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: "
        f"{fits}; or "
        "ask for fewer layers=, fewer images, or rows='prefix'"
    )


@contextmanager
def explain_out_of_memory(images: Tensor) -> Iterator[None]:
    """Turn an allocator's error into an ImageError that says what to do.

    Args:
        images: The batch (B, C, H, W) that is computed.

    Raises:
        ImageError: Memory ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        _raise_too_large(images, error)
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "allocate memory" not in str(error):
            raise
        _raise_too_large(images, error)


def _raise_too_large(images: Tensor, error: Exception) -> NoReturn:
    """Raise ImageError for a batch that memory cannot hold."""
    count, *shape = images.shape
    size = "x".join(map(str, shape))
    if count == 1:
        raise ImageError(
            f"one image of {size} does not fit in memory: give a smaller one, or free memory that "
            "other programs hold"
        ) from error
    raise ImageError(
        f"{count} images of {size} do not fit in memory: give fewer at a time, or a smaller "
        "batch_size= to optimize()"
    ) from error
