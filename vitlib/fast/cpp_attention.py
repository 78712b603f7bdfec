"""Attention of compiled programs, by C++ kernels of vitlib's own.

How data flows: the folder cpp/ has a kernel for bfloat16 by AMX's tiles and one for float32 by
AVX-512. Compiling a program needs a C++ compiler, which compiles the kernel of the program's dtype
as well: once, as torch's compiler keeps what it compiled. The kernel is registered with torch's
dispatcher, so that the program calls it as it calls torch's own.

Shapes: B images, H heads, Q queries, T tokens, K head_dim, D = H K.
"""

from __future__ import annotations

import logging
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from vitlib.errors import first_line
from vitlib.fast.attention import AttentionFunction, fused_attention
from vitlib.fast.cpu import Machine, this_machine
from vitlib.fast.inductor import load_cpp

logger = logging.getLogger("vitlib")
FOLDER = Path(__file__).with_name("cpp")
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
    return partial(attend, name, dtype) if name and load_kernel(name, dtype) else fused_attention


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


@lru_cache(maxsize=2)
def load_kernel(name: str, dtype: torch.dtype) -> bool:
    """Compile a kernel, or load it where it is compiled already, once a process.

    Args:
        name: Its name.
        dtype: Its dtype.

    Returns:
        False where it cannot be compiled or does not run.
    """
    try:
        if not hasattr(torch.ops.vitlib, name):  # registered for the process, not for this module
            load_cpp(read_source(name))
            torch.library.register_fake(f"vitlib::{name}", fake_attention)
        sample = torch.ones(1, 1, 1, 1, dtype=dtype, device="cpu")
        attend(name, dtype, sample, sample, sample, None)
    except Exception as error:  # no compiler, one older than AMX, a torch without small products
        reason = f"{type(error).__name__}: {first_line(error)}"
        logger.info("%s is not compiled, and torch's attention serves: %s", name, reason)
        return False
    return True


def read_source(name: str) -> str:
    """Return the source of a kernel.

    Args:
        name: Its name.

    Returns:
        C++. Its first line names torch and the CPU: what is compiled for one of each is compiled
        anew for another, as the compiler keeps a library by its source.
    """
    machine = this_machine()
    first = f"// For torch {torch.__version__} on {machine.model} ({machine.features})."
    parts = (FOLDER / "attention.h", FOLDER / f"{name}.cpp")
    return "\n".join([first, *(part.read_text(encoding="utf-8") for part in parts)])


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
    out: Tensor = getattr(torch.ops.vitlib, name)(q, k, v)
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
