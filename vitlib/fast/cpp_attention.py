"""Attention of compiled programs, by C++ kernels of vitlib's own (cpp_kernels.py).

There is one for bfloat16 by AMX's tiles, and one for float32 by AVX-512.

Shapes: B images, H heads, Q queries, T tokens, K head_dim, D = H K.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from vitlib.fast.attention import AttentionFunction, fused_attention
from vitlib.fast.cpp_kernels import load_kernels, operation
from vitlib.fast.cpu import Machine, this_machine

# Above this many tokens the keys and values of a head fill the L2 cache, for which torch's kernel
# splits them.
MAX_TOKENS = 4608


def cpp_attention(dtype: torch.dtype) -> AttentionFunction:
    """Return the fastest attention of a compiled program on this CPU.

    Args:
        dtype: Of queries, keys and values.

    Returns:
        A C++ kernel, or torch's fused one where this CPU has none or it cannot be compiled.
    """
    name = kernel_name(dtype, this_machine())
    if name is None or not load_kernels(name, ((name, fake_attention),), SAMPLES[dtype]):
        return fused_attention
    return partial(attend, name, dtype)


def kernel_name(dtype: torch.dtype, machine: Machine) -> str | None:
    """Return the name of the kernel for a dtype on a CPU.

    Args:
        dtype: Of queries, keys and values.
        machine: The CPU.

    Returns:
        The name of its file and operation, or None where there is none.
    """
    if machine.architecture.lower() not in ("x86_64", "amd64"):
        return None
    if dtype == torch.bfloat16:
        return "attention_amx" if machine.amx else None
    return "attention_avx512" if dtype == torch.float32 and machine.avx512 else None


def attend(
    name: str, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> Tensor:
    """Attend by a C++ kernel; with a bias, or many tokens, by torch's fused kernel.

    Args:
        name: The kernel's name.
        dtype: The kernel's dtype.
        q: Scaled queries (B, H, Q, K).
        k: Keys (B, H, T, K).
        v: Values (B, H, T, K).
        bias: Bias of the scores (1, H, Q, T), or None.

    Returns:
        (B, Q, D).
    """
    is_like_kernel = all(x.dtype == dtype for x in (q, k, v)) and k.shape[2] <= MAX_TOKENS
    if bias is not None or not is_like_kernel:
        return fused_attention(q, k, v, bias)
    out: Tensor = operation(name)(q, k, v)
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


def run_sample(dtype: torch.dtype) -> Tensor:
    """Run the kernel of a dtype on one number.

    Args:
        dtype: Of queries, keys and values.
    """
    name = kernel_name(dtype, this_machine())
    assert name is not None
    sample = torch.ones(1, 1, 1, 1, dtype=dtype, device="cpu")
    return attend(name, dtype, sample, sample, sample, None)


# For load_kernels, which is cached by its arguments.
SAMPLES = {dtype: partial(run_sample, dtype) for dtype in (torch.float32, torch.bfloat16)}
