"""Weights as the tiles of AMX take them, 16 rows of 64 bytes.

Shapes: (N, K) a weight of N outputs and K inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # columns of a block of the result
TILE_ROWS, TILE_BYTES = 16, 64  # of a row


def split_numbers(values: Tensor, count: int) -> list[Tensor]:
    """Write numbers as sums of bfloat16 numbers: each is what is left, rounded.

    Args:
        values: Any shape, float32.
        count: Numbers of each sum. Three hold every bit of a float32.

    Returns:
        As many tensors of the same shape.
    """
    parts = []
    for _ in range(count):
        parts.append(values.bfloat16())
        values = values - parts[-1].float()
    return parts


def pack_tiles(weight: Tensor) -> Tensor:
    """Pack a weight as the tiles of AMX take it.

    Args:
        weight: (N, K) of 2 or 1 bytes a number.

    Returns:
        (N / 32, K / n, 2, 16, 16, m): for each block of columns and each row of a tile, of n
        numbers, two tiles of 16 rows of 16 columns, of which each has m numbers of 4 bytes in all.
        N and K are whole blocks, with zeros after their ends.
    """
    numbers = TILE_BYTES // weight.element_size()
    outputs, inputs = weight.shape
    padded = F.pad(weight, (0, -inputs % numbers, 0, -outputs % BLOCK))
    steps = padded.shape[1] // numbers
    tiles = padded.view(-1, 2, TILE_ROWS, steps, TILE_ROWS, numbers // TILE_ROWS)
    return tiles.permute(0, 3, 1, 4, 2, 5).contiguous()


def pad_outputs(values: Tensor | None, outputs: int) -> Tensor:
    """Return numbers of each output in whole blocks.

    Args:
        values: (N,), or None for zeros.
        outputs: N.

    Returns:
        (N,) float32 with zeros after its end, up to whole blocks.
    """
    if values is None:
        values = torch.zeros(outputs, dtype=torch.float32, device="cpu")
    return F.pad(values.float(), (0, -outputs % BLOCK))
