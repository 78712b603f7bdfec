"""CUDA graphs and compiling: the real code on a stand-in for torch.cuda, and on the CPU."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.fake_gpu import CPU, FAMILIES, RecordedCuda, optimized, pixels_of, small
from fixtures.references import distance
from vitlib import ViT
from vitlib.fast import cuda, cuda_runner, micro_batch
from vitlib.fast.cuda_graphs import CapturedGraph


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> ViT:
    return small(**FAMILIES[request.param])


# --- captures, by a stand-in that computes --------------------------------------------------------


class Computed:
    """A graph as CUDA's: it computes where it was captured, into memory that it overwrites."""

    def __init__(self, function: Callable[[Tensor], Tensor], pixels: Tensor) -> None:
        self.function, self.pixels, self.replays = function, pixels, 0
        self.output = function(pixels)

    def replay(self) -> None:
        self.replays += 1
        self.output.copy_(self.function(self.pixels))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Computed]:
    found: list[Computed] = []

    def capture(function: Callable[[Tensor], Tensor], pixels: Tensor, _: Any) -> CapturedGraph:
        found.append(Computed(function, pixels))
        return CapturedGraph(found[-1].replay, found[-1].output)

    monkeypatch.setattr(cuda_runner, "capture_graph", capture)
    return found


def capturing(model: ViT, **options: Any) -> cuda.CudaViT:
    quick = optimized(model, **options)
    quick.runner.captures = True
    return quick


def test_small_batches_are_captured_once_a_size(graphs: list[Computed]) -> None:
    model = small()
    quick = capturing(model)
    images = torch.randn(7, 3, 32, 32)
    with torch.no_grad():
        exact = model(images)
    answers = [quick(images[:count]) for count in (3, 4, 3, 4, 3)]  # all four wide
    assert [graph.replays for graph in graphs] == [4]
    for answer in answers:  # none was overwritten by those after it
        assert distance(answer, exact[: len(answer)]) <= 5e-6
        assert answer.untyped_storage().data_ptr() != graphs[0].output.untyped_storage().data_ptr()
    quick(images[:1])
    quick.embed(images[:4])
    quick(torch.randn(4, 3, 48, 32))
    quick.forward_uint8(torch.zeros(4, 3, 32, 32, dtype=torch.uint8))
    assert len(graphs) == 1  # each is a graph of its own, and came once
    quick.embed(images[:4])
    assert len(graphs) == 2
    assert distance(quick(images), exact) <= 5e-6


def test_many_grids_are_captured_late(
    graphs: list[Computed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With photos in their own shapes it would capture all the time, four runs each."""
    monkeypatch.setattr(cuda_runner, "EARLY_GRAPHS", 2)
    quick = capturing(small(depth=1))
    for width in (32, 40, 48):
        for _ in range(cuda_runner.LATE - 1):
            quick(torch.randn(1, 3, 32, width))
    assert len(graphs) == 2
    quick(torch.randn(1, 3, 32, 48))
    assert len(graphs) == 3


def test_too_many_tokens_are_not_captured(
    graphs: list[Computed], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_runner, "MAX_GRAPH_TOKENS", 4 * 17)
    quick = capturing(small())
    for count in (4, 4, 8, 8):
        quick(torch.randn(count, 3, 32, 32))
    assert [len(graph.pixels) for graph in graphs] == [4]


def test_what_is_held_is_bounded(graphs: list[Computed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_runner, "CACHE_SIZE", 2)
    quick = capturing(small())
    for side in (32, 40, 48, 32, 32):
        quick(torch.randn(1, 3, side, 32))
    assert len(quick.runner.functions_by_size) == len(quick.runner.functions) == 2
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("operation not permitted when stream is capturing\nmore"), "not permitted"),
        (torch.OutOfMemoryError("CUDA out of memory"), "no memory to capture 2 images"),
    ],
)
def test_what_cannot_be_captured_runs_as_it_is(
    error: Exception, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def fails(*_: Any) -> Any:
        tried.append(1)
        raise error

    monkeypatch.setattr(cuda_runner, "capture_graph", fails)
    model, images = small(), torch.randn(9, 3, 32, 32)
    quick = capturing(model)
    with torch.no_grad():
        exact = model(images)
    for count in (2, 1, 4, 8):
        for _ in range(3):
            assert distance(quick(images[:count]), exact[:count]) <= 5e-6
    (record,) = caplog.records
    assert record.getMessage().startswith("CUDA graphs are not used, and small batches are slower")
    assert why in record.getMessage()
    assert "more" not in record.getMessage()
    assert len(tried) == cuda_runner.MAX_FAILURES  # one failure does not end all


@pytest.mark.usefixtures("graphs")
def test_inference_mode_may_come_and_go() -> None:
    model, images = small(), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        quick = capturing(model)
        inside = [quick(images.clone()) for _ in range(2)]
    outside = quick(images)
    assert all(torch.equal(answer, outside) for answer in inside)
    probe = torch.ones(5, requires_grad=True)
    (inside[0] * probe).sum().backward()  # what it gives may be learned from
    assert probe.grad is not None


@pytest.mark.usefixtures("graphs")
def test_deepcopy() -> None:
    quick, images = capturing(small()), torch.randn(2, 3, 32, 32)
    first = [quick(images) for _ in range(2)]
    twin = copy.deepcopy(quick)
    assert torch.equal(twin(images), first[0])
    assert twin.runner is not quick.runner
    assert len(twin.runner.functions_by_size) == 1


# --- the real capture, on a recording torch.cuda --------------------------------------------------


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordedCuda:
    return RecordedCuda(monkeypatch)


def runner() -> cuda_runner.BatchRunner:
    return cuda_runner.BatchRunner(CPU, torch.float32, False)


def test_a_capture_is_on_a_stream_of_the_runners_own(recorded: RecordedCuda) -> None:
    """torch.cuda.graph's own stream is of the device that was current at the process's first
    capture: on another device nothing is captured, and replays give the first answer for ever."""
    first, second = runner(), runner()
    for one in (first, second, first, second):
        cuda_runner.capture_graph(lambda x: x * 2, torch.ones(2), one)
    streams = [asked["stream"] for asked in recorded.asked]
    assert streams[0] is streams[2] is not streams[1] is streams[3]  # a pool wants one stream
    assert recorded.asked[0]["pool"] == recorded.asked[2]["pool"]
    assert all(asked["capture_error_mode"] == "thread_local" for asked in recorded.asked)
    # cuBLAS keeps a workspace, 32 MiB on Hopper, for each stream that it was called on.
    assert len(recorded.made) == 4
    assert recorded.current is recorded.user


def test_a_capture_warms_up_on_another_stream(recorded: RecordedCuda) -> None:
    """What a product allocates for a stream before a capture would lie outside of its pool."""
    on: list[Any] = []
    one = runner()
    cuda_runner.capture_graph(lambda x: (on.append(recorded.current), x * 2)[1], torch.ones(2), one)
    assert one.capture_streams is not None
    assert on[:2] == [one.capture_streams.warmup] * 2
    assert one.capture_streams.warmup is not one.capture_streams.capture
    assert one.capture_streams.warmup.waited is recorded.user  # type: ignore[attr-defined]
    assert recorded.user.waited is one.capture_streams.warmup


def test_a_failed_capture_leaves_the_stream_as_it_was(recorded: RecordedCuda) -> None:
    runs: list[int] = []

    def function(x: Tensor) -> Tensor:
        runs.append(1)
        if len(runs) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x * 2

    with pytest.raises(RuntimeError):
        cuda_runner.capture_graph(function, torch.ones(2), runner())
    assert recorded.current is recorded.user


def test_one_capture_at_a_time_in_a_process(recorded: RecordedCuda) -> None:
    """torch allows no two, also of two devices."""
    inside = threading.Event()

    def slow(x: Tensor) -> Tensor:
        inside.wait(0.05)
        return x * 2

    def capture() -> None:
        cuda_runner.capture_graph(slow, torch.ones(2), runner())

    threads = [threading.Thread(target=capture) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recorded.asked) == 3
    assert recorded.most_capturing == 1


def test_replays_answer(recorded: RecordedCuda) -> None:
    quick, images = capturing(small()), torch.randn(2, 3, 32, 32)
    first = quick(images)
    assert recorded.log == []
    assert torch.equal(quick(images), first)
    quick(images)
    assert recorded.log == ["replay"] * 2


# --- compiling ------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Counts what is compiled, and runs it as it is."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, real = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: real(f, backend=counter, **k))
    monkeypatch.setattr(micro_batch, "TILE", 4)
    monkeypatch.setattr(micro_batch, "GRAPH_SIZES", (1,))
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_one_function_without_a_graph_break(family: ViT, precision: str) -> None:
    quick = optimized(family, precision)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert quick.uint8_trunk is not None
    uint8_trunk, on_pixels = (
        cuda.bind_method(cuda.copy_for_grid(trunk, (4, 4), CPU), method, quick.runner.dtype)
        for trunk, method in ((quick.uint8_trunk, "forward"), (quick.trunk, "forward_features"))
    )
    with torch.no_grad():
        explained = torch._dynamo.explain(uint8_trunk)(images)
        assert explained.graph_break_count == 0, explained.break_reasons
        assert explained.graph_count == 1
        whole = torch.compile(on_pixels, fullgraph=True, dynamic=False, backend="eager")
        assert torch.equal(whole(pixels_of(images)), on_pixels(pixels_of(images)))
    torch._dynamo.reset()


def test_blocks_that_are_alike_are_compiled_once(compiler: Any) -> None:
    model, images = small(depth=6), torch.randn(4, 3, 32, 32)
    quick = optimized(model, "bf16", 4, compiles=True)
    plain = optimized(model, "bf16", 4)(images)
    for _ in range(3):
        assert torch.equal(quick(images), plain)
    assert compiler.frame_count == 1
    assert quick.runner.compiles


def test_nothing_is_compiled_unasked(compiler: Any) -> None:
    quick = optimized(small(depth=1), "bf16", 4)
    for _ in range(2):
        quick(torch.randn(4, 3, 32, 32))
    assert compiler.frame_count == 0


def test_more_than_eight_grids_are_compiled(compiler: Any) -> None:
    """All of them would be one code object to the compiler, whose recompile_limit is 8."""
    quick = optimized(small(depth=1), "bf16", 4, compiles=True)
    for height in range(1, 12):
        quick(torch.randn(4, 3, 8 * height, 32))
    assert quick.runner.compiles
    assert compiler.frame_count == 11


@pytest.mark.usefixtures("compiler")
def test_a_recompile_that_fails_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    quick = optimized(small(depth=1), "bf16", 4, compiles=True)
    images = torch.randn(4, 3, 32, 32)
    with torch._dynamo.config.patch(recompile_limit=1):
        first = quick(images)
        torch.set_default_dtype(torch.float64)  # what a guard sees
        try:
            assert torch.equal(quick(images), first)
        finally:
            torch.set_default_dtype(torch.float32)
    assert "torch.compile is not used" in caplog.text
    assert torch.equal(quick(images), first)


def test_what_the_caller_does_compiles_nothing_again(compiler: Any) -> None:
    quick = optimized(small(depth=1), "bf16", 4, compiles=True)
    levels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    quick.forward_uint8(levels)
    with torch.inference_mode():
        quick.forward_uint8(levels.clone())
    with torch.autocast("cpu", torch.bfloat16):
        quick.forward_uint8(levels)
    torch.set_float32_matmul_precision("high")
    try:
        quick.forward_uint8(levels)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert compiler.frame_count == 1


def test_without_a_compiler_it_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = small(depth=1)
    images = torch.randn(129, 3, 32, 32)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    quick = optimized(model, "fp32", 128, compiles=True)
    with caplog.at_level(logging.WARNING, logger="vitlib"), torch.no_grad():
        for name in ("forward", "embed"):
            assert distance(getattr(quick, name)(images), getattr(model, name)(images)) <= 5e-6
    assert len(caplog.records) == 1
    assert "Failed to find C compiler." in caplog.text
    assert "CC" not in caplog.text
