"""Rows between the products of a block on a GPU, plain or in 8-bit floats.

Shapes: M rows, D columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest number of E4M3 (2209.05433)
SMALLEST = 1e-12  # a row of zeros is divided by this


class Quantised(NamedTuple):
    """Rows in 8-bit floats."""

    levels: Tensor  # (M, D) E4M3
    scale: Tensor  # (M, 1) float32: a level times this is the number


Rows = Tensor | Quantised


def empty_rows(x: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return memory for as many rows as x has, (M, width), and for their scale."""
    count = x.numel() // x.shape[-1]
    rows = x.new_empty(count, width, dtype=dtype)
    scaled = (count, 1) if dtype == FP8 else (0,)
    return rows, x.new_empty(scaled, dtype=torch.float32)
