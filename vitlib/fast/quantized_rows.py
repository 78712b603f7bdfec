"""Rows between the matrix products of a block on a GPU, in float or in 8-bit floats.

Shapes: M rows, D columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # the largest number of E4M3 (2209.05433)
SMALLEST_ROW_MAX = 1e-12  # a row of zeros is divided by this


class QuantizedRows(NamedTuple):
    """Rows in 8-bit floats.

    Attributes:
        values: (M, D) E4M3.
        scale: (M, 1) float32: a value times this is the number.
    """

    values: Tensor
    scale: Tensor


Rows = Tensor | QuantizedRows


def empty_rows(x: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return uninitialised memory for rows and for their scales.

    Args:
        x: A tensor (..., K) with as many rows.
        width: D.
        dtype: Of the rows.

    Returns:
        (M, D), and the scales: (M, 1) float32 for E4M3, otherwise empty.
    """
    count = x.numel() // x.shape[-1]
    rows = x.new_empty(count, width, dtype=dtype)
    scale_shape = (count, 1) if dtype == FP8 else (0,)
    return rows, x.new_empty(scale_shape, dtype=torch.float32)
