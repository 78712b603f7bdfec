"""Gain of each choice of the CUDA path: the bfloat16 model with one choice changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.experiment import Experiment
from benchmarks.gpu.models import (
    free_memory,
    measure_accuracy,
    measure_batches,
    optimize_checkpoint,
)
from vitlib.fast import cuda_attention, cuda_modules, row_ops


def separate_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    """Compute row_ops.linear_gelu with exact GELU in a separate kernel."""
    return row_ops.activate(F.linear(x, weight, bias), "gelu", False, x.dtype)


@contextmanager
def use_attention(kernel: str) -> Iterator[None]:
    """Use an attention kernel in place of flash or cuDNN, where it is supported."""
    choose_default = cuda_attention.choose_kernel

    def choose_kernel(
        gpu: Any, dtype: Any, queries: int, tokens: int, *rest: Any, **options: bool
    ) -> Any:
        default = choose_default(gpu, dtype, queries, tokens, *rest, **options)
        is_supported = default in ("flash", "cudnn") and (kernel == "flash" or queries == tokens)
        return kernel if is_supported else default

    with mock.patch.object(cuda_attention, "choose_kernel", choose_kernel):
        yield


@contextmanager
def change_nothing() -> Iterator[None]:
    """Keep the model as it is."""
    yield


CHANGES = {
    "unchanged": change_nothing,
    "separate GELU": lambda: mock.patch.object(cuda_modules, "linear_gelu", separate_gelu),
    "attention by flash": lambda: use_attention("flash"),
    "attention by cuDNN": lambda: use_attention("cudnn"),
    "no Triton kernels": lambda: mock.patch.object(
        row_ops, "find_triton_kernels", return_value=None
    ),
}


def measure_changes(experiment: Experiment) -> None:
    """Measure each of CHANGES at three batch sizes, and its errors against float64."""
    smallest, _, middle, largest = experiment.sizes.batches
    for name, change in CHANGES.items():
        if experiment.is_dry and name.startswith("attention by"):
            continue  # a CPU has none of these kernels
        with experiment.attempt("models", side=f"what if: {name}"), change():
            fast = optimize_checkpoint(experiment, "bf16")
            measure_accuracy(experiment, f"what if: {name}", fast)
            measure_batches(experiment, f"what if: {name}", fast, (smallest, middle, largest))
            del fast
        free_memory(experiment)
    with experiment.attempt("models", side="what if: no graphs"):
        fast = optimize_checkpoint(experiment, "bf16")
        fast.runner.captures = False
        measure_batches(experiment, "what if: no graphs", fast, (smallest, middle))


def measure_passes(experiment: Experiment) -> None:
    """Measure the largest batch in passes of several sizes."""
    largest = experiment.sizes.batches[-1]
    for precision in ("bf16", "fp8"):
        for size in (2, 4) if experiment.is_dry else (64, 128, 256, 512):
            side = f"what if: {precision} in passes of {size}"
            with experiment.attempt("models", side=side):
                fast = optimize_checkpoint(experiment, precision, size)
                measure_batches(experiment, side, fast.forward_uint8, (largest,), "uint8")
                del fast
            free_memory(experiment)


def measure_compiled(experiment: Experiment) -> None:
    """Measure the largest batch with compile=True."""
    largest = experiment.sizes.batches[-1]
    for precision in ("bf16", "fp8"):
        side = f"what if: {precision}, compile=True"
        with experiment.attempt("models", side=side):
            torch._dynamo.reset()
            fast = optimize_checkpoint(experiment, precision, compiles=True)
            measure_accuracy(experiment, side, fast)
            measure_batches(experiment, side, fast.forward_uint8, (largest,), "uint8")
            experiment.record("compiling", side=side, still_compiles=fast.runner.compiles)
            del fast
        free_memory(experiment)
