"""Attention as one piece of oneDNN Graph, which torch.jit hands it: scores, softmax and values.

torch's own fused kernel multiplies float32 by MKL, and softmax takes it as long as the products;
oneDNN Graph keeps the scores of a head in the cache and runs at oneDNN's rate: see
docs/performance.md.

How data flows: for each shape met, three lines of TorchScript are compiled and run twice,
after which torch has handed them over whole; the function is kept. Where torch does not, or has no
such thing, `attend` says so before anything is computed with it.

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
Kernel = Callable[..., Tensor]
_one_at_a_time = threading.Lock()
REMEMBERED = 128  # shapes; the oldest goes
_kernels: dict[object, Kernel | None] = {}


def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Kernel | None:
    """What serves tensors laid out like these, (q, k, v[, bias]) -> (B, Q, D); None: nothing does.

    q comes scaled; all of one dtype.
    """
    given = (q, k, v) if bias is None else (q, k, v, bias)
    if not agrees(q.dtype, bias is not None):
        return None
    laid_out = tuple((x.shape, x.stride()) for x in given)
    key = laid_out, q.dtype, torch.get_num_threads()  # it cuts its work for so many
    if key not in _kernels:
        with _one_at_a_time:
            while len(_kernels) >= REMEMBERED:
                del _kernels[next(iter(_kernels))]
            _kernels[key] = _tried(given)
    return _kernels.get(key)


def _tried(given: tuple[Tensor, ...]) -> Kernel | None:
    try:
        with torch.no_grad():
            return _compile(given)
    except Exception:  # absent, another signature: the plain path serves
        return None


def _compile(given: tuple[Tensor, ...]) -> Kernel | None:
    """The kernel for tensors like these; None where torch does not hand it over whole."""
    before = torch._C._jit_llga_enabled()
    torch._C._jit_set_llga_enabled(True)  # of the process: only while this compiles
    try:
        unit = torch.jit.CompilationUnit(_SOURCE)
        attend: Kernel = unit.attend if len(given) == 3 else unit.attend_with
        for _ in range(2):  # the first run notes the shapes, the second is compiled
            attend(*given)
        whole = _whole(str(torch._C._last_executed_optimized_graph()))
    finally:
        torch._C._jit_set_llga_enabled(before)
    return attend if whole else None


@lru_cache(maxsize=4)
def agrees(dtype: torch.dtype, biased: bool) -> bool:
    """Whether the kernel equals the plain operations on a small input; tried once a process."""
    q, k, v, bias = (
        torch.sin(torch.arange(b * 2 * n * m, dtype=torch.float32, device="cpu") * step)
        .view(b, 2, n, m)
        .to(dtype)
        for b, n, m, step in ((2, 9, 16, 0.7), (2, 9, 16, 0.9), (2, 9, 16, 1.1), (1, 9, 9, 1.3))
    )
    given = (q, k, v, bias) if biased else (q, k, v)
    with _one_at_a_time:
        attend = _tried(given)
    if attend is None:
        return False
    with torch.no_grad():
        found = attend(*given).float()
    scores = q.float() @ k.float().transpose(-1, -2) + (bias.float() if biased else 0.0)
    exact = (scores.softmax(dim=-1) @ v.float()).transpose(1, 2).flatten(2)
    # float32 sums differ in their order only; bfloat16 scores and sums by their roundings.
    bound = 2e-6 if dtype == torch.float32 else 3e-2
    return bool((found - exact).abs().max() <= bound * exact.abs().max())


def _whole(graph: str) -> bool:
    """Whether one piece holds both products and the softmax."""
    _, found, inside = graph.partition("with prim::oneDNNFusionGroup")
    return bool(found) and all(
        inside.count(f"aten::{op}(") == n for op, n in (("matmul", 2), ("softmax", 1))
    )
