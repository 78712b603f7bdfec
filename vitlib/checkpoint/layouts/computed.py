"""Tensors of a file that vitlib computes again: the same, or the file is refused.

Original code and older versions of timm save what follows from the configuration: the periods of
rotary angles, the row of a table for each pair of patches, the part of a bias that is masked away.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vitlib.config_parts import Rope
from vitlib.errors import CheckpointError
from vitlib.positions import relative_index

DINOV3_ROPE = Rope(theta=100.0)  # 2508.10104
PERIODS = "rope_embed.periods"
_ROUNDED = 2.0**-7  # published files hold periods in bfloat16, too
_MOST_PATCHES = 128 * 128  # of a grid whose index is compared


def check_computed_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a tensor is not what vitlib computes in its place.

    Args:
        tensors: By the names of the file.
    """
    compared: set[int] = set()  # sizes of the index whose values were compared in an earlier block
    for name, tensor in tensors.items():
        if name.endswith(PERIODS) and not _is_dinov3(tensor):
            raise CheckpointError(
                f"{name}: its periods are not DINOv3's, 1 to {DINOV3_ROPE.theta:g} in a geometric "
                "series, which are those that vitlib computes"
            )
        if name.endswith("qkv.bias_mask") and not _masks_keys(tensor):
            raise CheckpointError(
                f"{name}: expected ones for queries and values and zeros for keys, as in DINOv3"
            )
        if name.endswith("relative_position_index") and tensor.numel() not in compared:
            compared.add(tensor.numel())
            if not _is_index(tensor):
                raise CheckpointError(
                    f"{name}: its rows are not BEiT's, of offsets down and across, which are those "
                    "that vitlib computes"
                )


def _is_dinov3(periods: Tensor) -> bool:
    count = periods.numel()
    expected = DINOV3_ROPE.theta ** (torch.arange(count, dtype=torch.float32) / max(count, 1))
    return torch.allclose(periods.float().flatten(), expected, rtol=_ROUNDED, atol=0.0)


def _masks_keys(mask: Tensor) -> bool:
    if mask.ndim != 1 or mask.numel() % 3:
        return False
    queries, keys, values = mask.float().chunk(3)
    return bool((queries == 1).all() and (keys == 0).all() and (values == 1).all())


def _is_index(index: Tensor) -> bool:
    """Return whether an index is that of any grid with so many patches, [CLS] first."""
    tokens = index.shape[0] if index.ndim == 2 and index.shape[0] == index.shape[1] else 0
    patches = tokens - 1
    if not 0 < patches <= _MOST_PATCHES:
        return False
    side = math.isqrt(patches)
    heights = [side, *(h for h in range(1, patches + 1) if patches % h == 0 and h != side)]
    return any(
        torch.equal(relative_index((h, patches // h)), index.long())
        for h in heights
        if h and patches % h == 0 and int(index.max()) == (2 * h - 1) * (2 * patches // h - 1) + 2
    )
