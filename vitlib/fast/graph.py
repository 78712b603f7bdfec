"""Attention as one piece of oneDNN Graph, which torch.jit hands it: scores, softmax and values.

torch's own fused kernel multiplies float32 by MKL, and softmax takes it as long as the products;
oneDNN Graph keeps the scores of a head in the cache and runs at oneDNN's rate: see
docs/performance.md.

How data flows: for each shape met, three lines of TorchScript are compiled and run twice on zeros,
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


def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Kernel | None:
    """What serves tensors laid out like these, (q, k, v[, bias]) -> (B, Q, D); None: nothing does.

    q comes scaled; all of one dtype.
    """
    given = (q, k, v) if bias is None else (q, k, v, bias)
    laid_out = tuple((x.shape, x.stride()) for x in given)
    return _compiled(laid_out, q.dtype, torch.get_num_threads())


@lru_cache(maxsize=128)
def _compiled(
    laid_out: tuple[tuple[torch.Size, tuple[int, ...]], ...],
    dtype: torch.dtype,
    threads: int,  # noqa: ARG001  # the kernel cuts its work for so many
) -> Kernel | None:
    with _one_at_a_time:
        before = torch._C._jit_llga_enabled()
        torch._C._jit_set_llga_enabled(True)  # of the process: only while this compiles
        try:
            with torch.no_grad():
                given = [_zeros(shape, stride, dtype) for shape, stride in laid_out]
                unit = torch.jit.CompilationUnit(_SOURCE)
                attend: Kernel = unit.attend if len(given) == 3 else unit.attend_with
                for _ in range(2):  # the first run notes the shapes, the second is compiled
                    attend(*given)
                whole = _whole(str(torch._C._last_executed_optimized_graph()))
        except Exception:  # absent, another signature: the plain path serves
            return None
        finally:
            torch._C._jit_set_llga_enabled(before)
    return attend if whole else None


def _zeros(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype).zero_()


def _whole(graph: str) -> bool:
    """Whether one piece holds both products and the softmax."""
    pieces = graph.split("prim::oneDNNFusionGroup")[-1]
    inside = pieces.split("with prim::FallbackGraph")[0]
    return all(inside.count(f"aten::{op}(") == n for op, n in (("matmul", 2), ("softmax", 1)))
