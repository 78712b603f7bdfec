"""What each choice of the CUDA path is worth: bfloat16 with one of them changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.experiment import Experiment
from benchmarks.gpu.models import bench, clear, compare, optimized
from vitlib.fast import cuda_attention, cuda_modules, row_ops


def own_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    """Compute what row_ops.linear_gelu computes, GELU by its erf form in a kernel of its own."""
    return row_ops.activate(F.linear(x, weight, bias), "gelu", False, x.dtype)


@contextmanager
def attention_by(kernel: str) -> Iterator[None]:
    """Let a kernel attend in the block wherever flash or cuDNN would, and it can."""
    choose = cuda_attention.choose_kernel

    def chosen(card: Any, dtype: Any, queries: int, tokens: int, *rest: Any, **bias: bool) -> Any:
        usual = choose(card, dtype, queries, tokens, *rest, **bias)
        serves = usual in ("flash", "cudnn") and (kernel == "flash" or queries == tokens)
        return kernel if serves else usual

    with mock.patch.object(cuda_attention, "choose_kernel", chosen):
        yield


@contextmanager
def as_it_is() -> Iterator[None]:
    """Change nothing."""
    yield


CHANGES = {
    "as it is": as_it_is,
    "GELU in a kernel of its own": lambda: mock.patch.object(cuda_modules, "linear_gelu", own_gelu),
    "attention by flash": lambda: attention_by("flash"),
    "attention by cuDNN": lambda: attention_by("cudnn"),
    "no Triton kernels": lambda: mock.patch.object(row_ops, "_triton_kernels", return_value=None),
}


def measure_changes(experiment: Experiment) -> None:
    """Measure each of CHANGES at three batch sizes, and compare its logits with float64."""
    one, _, middle, most = experiment.sizes.batches
    for name, change in CHANGES.items():
        if experiment.is_dry and name.startswith("attention by"):
            continue  # a CPU has none of these kernels
        with experiment.attempt("models", side=f"what if: {name}"), change():
            fast = optimized(experiment, "bf16")
            compare(experiment, f"what if: {name}", fast)
            bench(experiment, f"what if: {name}", fast, (one, middle, most))
            del fast
        clear(experiment)
    with experiment.attempt("models", side="what if: no graphs"):
        fast = optimized(experiment, "bf16")
        fast.runner.captures = False
        bench(experiment, "what if: no graphs", fast, (one, middle))


def measure_passes(experiment: Experiment) -> None:
    """Measure the largest batch in passes of several sizes."""
    most = experiment.sizes.batches[-1]
    for precision in ("bf16", "fp8"):
        for size in (2, 4) if experiment.is_dry else (64, 128, 256, 512):
            side = f"what if: {precision} in passes of {size}"
            with experiment.attempt("models", side=side):
                fast = optimized(experiment, precision, size)
                bench(experiment, side, fast.forward_uint8, (most,), "levels")
                del fast
            clear(experiment)


def measure_compiled(experiment: Experiment) -> None:
    """Measure the largest batch with compile=True."""
    most = experiment.sizes.batches[-1]
    for precision in ("bf16", "fp8"):
        side = f"what if: {precision}, compile=True"
        with experiment.attempt("models", side=side):
            torch._dynamo.reset()
            fast = optimized(experiment, precision, compiles=True)
            compare(experiment, side, fast)
            bench(experiment, side, fast.forward_uint8, (most,), "levels")
            experiment.record("compiling", side=side, still_compiles=fast.runner.compiles)
            del fast
        clear(experiment)
