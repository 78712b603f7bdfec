"""Attention as one partition of oneDNN Graph, which torch.jit hands it: scores, softmax, values.

torch's own fused kernel multiplies float32 by MKL, and its softmax takes as long as the products.
oneDNN Graph keeps the scores of a head in the cache and runs at oneDNN's rate: see
docs/performance.md.

How data flows: for each new shape three lines of TorchScript are compiled and run twice, after
which torch has handed all of them over; the function is cached. Where torch hands over less, or has
no oneDNN Graph, attention_kernel returns None before anything is computed with it.

Shapes: as in attention.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

_SOURCE = """
def attend(q, k, v):
    scores = torch.matmul(q, k.transpose(-1, -2))
    return torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2).flatten(2)

def attend_with(q, k, v, bias):
    scores = torch.matmul(q, k.transpose(-1, -2)) + bias
    return torch.matmul(torch.softmax(scores, -1), v).transpose(1, 2).flatten(2)
"""
GraphKernel = Callable[..., Tensor]
# The switch of oneDNN Graph is the process's, and so is the graph that was executed last: two
# threads that compile at once would read each other's.
_compile_lock = threading.Lock()
CACHE_SIZE = 128  # shapes; the oldest goes
_kernels: dict[object, GraphKernel | None] = {}


def attention_kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> GraphKernel | None:
    """Return the kernel for tensors of these shapes and strides.

    Args:
        q: Scaled queries (B, H, Q, K).
        k: Keys (B, H, T, K), in the dtype of q.
        v: Values (B, H, T, K), in the dtype of q.
        bias: Bias of the scores (1, H, Q, T), in the dtype of q; or None.

    Returns:
        A function (q, k, v[, bias]) -> (B, Q, D), or None where oneDNN Graph has no kernel.
    """
    inputs = (q, k, v) if bias is None else (q, k, v, bias)
    if not has_graph_attention(q.dtype, bias is not None):
        return None
    layouts = tuple((x.shape, x.stride()) for x in inputs)
    # A compiled kernel has its work split for the number of threads of its first run.
    key = layouts, q.dtype, torch.get_num_threads()
    if key not in _kernels:
        with _compile_lock:
            while len(_kernels) >= CACHE_SIZE:
                del _kernels[next(iter(_kernels))]
            _kernels[key] = _try_compile(inputs)
    return _kernels.get(key)  # another thread may have removed it meanwhile


def _try_compile(inputs: tuple[Tensor, ...]) -> GraphKernel | None:
    """Compile the kernel; None where this torch cannot."""
    try:
        with torch.no_grad():
            return _compile(inputs)
    except Exception:  # absent, or another signature: the other kernels serve
        return None


def _compile(inputs: tuple[Tensor, ...]) -> GraphKernel | None:
    """Compile the kernel; None where torch hands oneDNN Graph less than all of it."""
    before = torch._C._jit_llga_enabled()
    torch._C._jit_set_llga_enabled(True)  # a switch of the process: on only while this compiles
    try:
        unit = torch.jit.CompilationUnit(_SOURCE)
        attend: GraphKernel = unit.attend if len(inputs) == 3 else unit.attend_with
        for _ in range(2):  # the first run records the shapes, the second one is compiled
            attend(*inputs)
        is_complete = _is_one_partition(str(torch._C._last_executed_optimized_graph()))
    finally:
        torch._C._jit_set_llga_enabled(before)
    return attend if is_complete else None


@lru_cache(maxsize=4)
def has_graph_attention(dtype: torch.dtype, has_bias: bool) -> bool:
    """Return True if the kernel equals the separate operations; tried once a process.

    Args:
        dtype: Of all tensors.
        has_bias: The scores have a bias.

    Returns:
        False also where this torch has no such kernel.
    """
    q, k, v, bias = (
        torch.sin(torch.arange(b * 2 * n * m, dtype=torch.float32, device="cpu") * step)
        .view(b, 2, n, m)
        .to(dtype)
        for b, n, m, step in ((2, 9, 16, 0.7), (2, 9, 16, 0.9), (2, 9, 16, 1.1), (1, 9, 9, 1.3))
    )
    inputs = (q, k, v, bias) if has_bias else (q, k, v)
    with _compile_lock:
        attend = _try_compile(inputs)
    if attend is None:
        return False
    with torch.no_grad():
        actual = attend(*inputs).float()
    scores = q.float() @ k.float().transpose(-1, -2) + (bias.float() if has_bias else 0.0)
    exact = (scores.softmax(dim=-1) @ v.float()).transpose(1, 2).flatten(2)
    # float32 sums differ in their order only; bfloat16 also rounds the scores and the sums.
    bound = 2e-6 if dtype == torch.float32 else 3e-2
    return bool((actual - exact).abs().max() <= bound * exact.abs().max())


def _is_one_partition(graph: str) -> bool:
    """Return True if one partition holds both products and the softmax."""
    _, separator, partition = graph.partition("with prim::oneDNNFusionGroup")
    return bool(separator) and all(
        partition.count(f"aten::{op}(") == count for op, count in (("matmul", 2), ("softmax", 1))
    )
