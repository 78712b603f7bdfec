"""Test what a GPU does that tensors without memory do not show: kernels, captures, memory."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import subprocess
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures.fake_gpu import (
    BEIT,
    CPU,
    GPU,
    Count,
    RecordedCuda,
    fake_mode,
    move_to_fake_gpu,
    optimize_on_cpu,
    small,
)
from vitlib import ViT
from vitlib.fast import cuda, cuda_attention, cuda_graphs, cuda_runner, row_ops
from vitlib.positions import RelativePositionBias

EFFICIENT = "_scaled_dot_product_efficient_attention"

# --- kernels --------------------------------------------------------------------------------------


@contextlib.contextmanager
def nothing(_: Any) -> Iterator[None]:
    yield


def test_kernels_that_triton_cannot_launch_are_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton fails at its first launch without a C compiler, and on tensors of a CPU likewise."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    monkeypatch.setattr(torch.cuda, "device", nothing)
    row_ops.find_triton_kernels.cache_clear()
    x, gain = torch.randn(2, 5, 48), torch.randn(48)
    arguments = x, None, gain, None, 1e-6, None, torch.float32
    run = row_ops._prefer_triton("norm_rows", row_ops.define_norm_rows)
    for _ in range(2):
        assert torch.equal(run(*arguments)[1], row_ops.define_norm_rows(*arguments)[1])
    (record,) = caplog.records
    assert record.getMessage().startswith("Triton's kernels are not used, and cpu is slower: ")
    row_ops.find_triton_kernels.cache_clear()


@pytest.mark.parametrize("error", [0.0, 1e-2])
def test_kernels_with_a_wrong_result_are_replaced(
    error: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def norm_rows(*arguments: Any) -> Any:
        total, rows, scale = row_ops.define_norm_rows(*arguments)
        return total, rows + error, scale

    kernels: Any = types.SimpleNamespace(norm_rows=norm_rows)
    monkeypatch.setitem(sys.modules, "vitlib.fast.row_kernels", kernels)
    monkeypatch.setattr("vitlib.fast.row_kernels", kernels, raising=False)
    row_ops.find_triton_kernels.cache_clear()
    assert row_ops.find_triton_kernels(CPU) is (None if error else kernels)
    assert ("a result differs from its definition" in caplog.text) == bool(error)
    row_ops.find_triton_kernels.cache_clear()


def test_kernels_are_tried_before_a_caller_can_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[torch.device] = []
    mode, model = fake_mode(monkeypatch), small()
    monkeypatch.setattr(row_ops, "find_triton_kernels", tried.append)
    with mode, torch.no_grad():
        cuda.optimize_cuda(move_to_fake_gpu(model), "bf16", None, GPU)
    assert tried == [GPU]


@pytest.mark.parametrize("name", ["norm_rows", "activate_rows", "rotate"])
def test_kernels_are_launched_on_the_device_of_their_tensors(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current device: packed() and users' modules run on any."""
    second, inside, launched = torch.device("cuda", 1), [], []

    @contextlib.contextmanager
    def enter(device: Any) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "device", enter)
    kernels = types.SimpleNamespace(**{name: lambda x: launched.append((x.device, *inside))})
    with fake_mode(monkeypatch):
        monkeypatch.setattr(row_ops, "find_triton_kernels", lambda _: kernels)
        row_ops._prefer_triton(name, lambda x: x)(torch.empty(2, 8, device=second))
    assert launched == [(second, second)]


COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget

class Driver:
    def get_current_target(self): return GPUTarget("cuda", capability, 32)
    def get_current_device(self): return capability
    def get_current_stream(self, device): return 0

triton.runtime.driver.set_active(Driver())
from vitlib.fast import row_kernels as kernels
run, compiled = triton.runtime.JITFunction.run, []

def compile_only(self, *arguments, grid, warmup, **options):
    compiled.append(run(self, *arguments, grid=grid, warmup=True, **options).asm["cubin"])

triton.runtime.JITFunction.run = compile_only
for capability in (75, 80, 89, 90, 100):
    narrow = torch.float16 if capability == 75 else torch.bfloat16
    x, gain = torch.zeros(2, 5, 96, dtype=narrow), torch.ones(96)
    kernels.norm_rows(x, None, gain, gain, 1e-6, None, torch.float32)
    kernels.rotate(x, torch.zeros(2, 4, 16), 2)
    for dtype in (narrow, *[torch.float8_e4m3fn] * (capability >= 89)):
        kernels.norm_rows(x[:, :1], x[:, :1], gain, None, 1e-6, gain, dtype, "rms")
        for activation in ("gelu", "silu"):
            kernels.activate_rows(x, activation, activation == "silu", dtype)
assert all(compiled)
print(len(compiled))
"""


def test_triton_kernels_compile_for_every_gpu(tmp_path: Path) -> None:
    """Triton's compiler and NVIDIA's assembler need no GPU."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    actual = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert actual.stdout.split() == [str(2 * 5 + 3 * 8)], actual.stderr


# --- attention ------------------------------------------------------------------------------------


class OwnBias(RelativePositionBias):
    """Positions of a user."""


def replace_positions(model: ViT) -> None:
    model.attn_position.__class__ = OwnBias


def add_hook(model: ViT) -> None:
    model.blocks[1].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("change", [replace_positions, add_hook])
def test_bias_rows_are_aligned_beside_modules_of_the_user(
    change: Callable[[ViT], None], precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The efficient kernel raises for rows that begin at an odd number of elements."""
    mode, model = fake_mode(monkeypatch), small(**BEIT)
    change(model)
    with mode, torch.no_grad():
        quick = cuda.optimize_cuda(move_to_fake_gpu(model), precision, None, GPU)
        with Count() as count:
            quick.trunk(torch.empty(2, 3, 32, 32, device=GPU))
    biases = [arguments[3] for name, arguments in count.calls if name == EFFICIENT]
    assert len(biases) == (2 if change is add_hook else 3)  # the user's block attends by itself
    for bias in biases:
        assert bias.shape == (2, 2, 17, 17)
        assert all(stride % cuda_attention.BIAS_ALIGNMENT == 0 for stride in bias.stride()[:-1])


def test_bias_of_all_heads_is_broadcast() -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 8)
    bias = torch.randn(1, 1, 5, 5)
    actual = cuda_attention.attend(q, k, v, bias, cuda_attention.Gpu((0, 0)))
    exact = nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
    assert torch.allclose(actual, exact.transpose(1, 2).flatten(2), atol=1e-6)


# --- captures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_failed_capture_ends_its_allocations(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else torch's allocator refuses every later capture, and keeps the memory of uploads."""
    recorder, calls = RecordedCuda(monkeypatch), []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        call = lambda *arguments, name=name: calls.append((name, *arguments))  # noqa: E731
        monkeypatch.setattr(torch._C, name, call, raising=False)
    streams = cuda_graphs.CaptureStreams.create()

    def function(x: Tensor) -> Tensor:
        if fails and recorder.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        cuda_graphs.capture(streams, function, torch.ones(2))
    pool = streams.pool
    ended = [("_cuda_endAllocateToPool", 1, pool), ("_cuda_releasePool", 1, pool)]
    assert calls == ended * fails


def test_pool_that_torch_has_closed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory ends a capture well: CUDAGraph then releases the pool itself."""
    RecordedCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    released: list[Any] = []

    def end(*_: Any) -> None:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *x: released.append(x), raising=False)
    cuda_graphs._end_allocation((0, 1))
    assert not released


def test_function_made_in_a_graph_of_the_callers_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its position tables are kernels of that graph, and hold no numbers before a replay."""
    RecordedCuda(monkeypatch)
    runner = cuda_runner.BatchRunner(CPU, torch.float32, False, 10**6)
    runner.device = types.SimpleNamespace(type="cuda")  # type: ignore[assignment]
    made: list[int] = []

    def factory(compiles: bool) -> Any:  # noqa: ARG001
        made.append(1)
        return lambda x: x

    monkeypatch.setattr(Tensor, "to", lambda x, *_: x)
    monkeypatch.setattr(cuda_runner, "is_capturing", lambda: True)
    for _ in range(2):
        runner.run("key", factory, torch.ones(1), (1,), 1)
    assert len(made) == 2
    assert not runner.functions
    runner.functions["key"] = lambda x: x + 1
    assert runner.run("key", factory, torch.ones(1), (1,), 1) == 2
    assert len(made) == 2


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiles", [False, True])
def test_dropped_model_is_freed_at_once(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cycle would keep its weights on the GPU until Python collects garbage."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    quick = optimize_on_cpu(small(depth=1), "bf16", compiles=compiles)
    quick.runner.graph_tokens = 64 * 17
    quick(torch.randn(2, 3, 32, 32))
    quick(torch.randn(130, 3, 32, 32))
    kinds = {type(function).__name__ for function in quick.runner.functions_by_size.values()}
    assert kinds >= {"GraphedFunction", "CompiledFunction" if compiles else "FixedSizeFunction"}
    parts = [weakref.ref(quick.runner), weakref.ref(quick.trunk.blocks[0])]
    gc.disable()
    try:
        del quick
        assert [part() for part in parts] == [None, None]
    finally:
        gc.enable()


def test_model_with_token_functions_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    monkeypatch.setattr(cuda, "is_reduced", lambda _: True)
    before, moved = copy.deepcopy(model.state_dict()), []

    def to(self: nn.Module, _: torch.device) -> nn.Module:
        moved.append(self)
        return self

    monkeypatch.setattr(nn.Module, "to", to)
    quick = cuda.optimize_cuda(model, "fp32", None, torch.device("meta"))
    assert moved == [quick.trunk]
    assert quick.trunk is not model
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
