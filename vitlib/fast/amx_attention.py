"""Attention in bfloat16 by AMX's tiles, in compiled programs.

amx_attention.cpp has the kernel. It is twice as fast as torch's fused one, and needs a C++ compiler
as the programs do. It is compiled once, and kept where the compiler keeps its programs.

Shapes: B images, H heads, Q queries, T tokens, K head_dim, D = H K.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from vitlib.errors import first_line
from vitlib.fast.attention import fused_attention
from vitlib.fast.cpu import this_machine
from vitlib.fast.inductor import load_cpp

logger = logging.getLogger("vitlib")
SOURCE = Path(__file__).with_suffix(".cpp")


@lru_cache(maxsize=1)
def load_kernel() -> bool:
    """Compile the kernel, or load it where it is compiled already, once a process.

    Returns:
        False where this CPU has no AMX, or the kernel cannot be compiled.
    """
    if not this_machine().amx:
        return False
    try:
        load_cpp(SOURCE.read_text(encoding="utf-8"))
    except Exception as error:  # a compiler that is missing or older than AMX, a full disk
        reason = f"{type(error).__name__}: {first_line(error)}"
        logger.info("attention by AMX is not compiled, and torch's serves: %s", reason)
        return False
    torch.library.register_fake("vitlib::amx_attention", fake_attention)
    return True


def amx_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attend by AMX's tiles; with a bias, or in another dtype, by torch's fused kernel.

    Args:
        q: Scaled queries (B, H, Q, K).
        k: Keys (B, H, T, K).
        v: Values (B, H, T, K).
        bias: Bias of the scores (1, H, Q, T), or None.

    Returns:
        (B, Q, D).
    """
    if bias is not None or any(x.dtype != torch.bfloat16 for x in (q, k, v)):
        return fused_attention(q, k, v, bias)
    out: Tensor = torch.ops.vitlib.amx_attention(q, k, v)
    return out


def fake_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG001
    """Return an empty tensor of the result's shape, (B, Q, D).

    Args:
        q: Queries (B, H, Q, K).
        k: Keys.
        v: Values.
    """
    b, h, n, head_dim = q.shape
    return q.new_empty(b, n, h * head_dim)
