"""Test CUDA graphs and compiling on a recorded torch.cuda and on the CPU."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.fake_gpu import CPU, FAMILIES, RecordedCuda, normalise, optimize_on_cpu, small
from fixtures.references import distance
from vitlib import ViT
from vitlib.fast import cuda, cuda_runner, micro_batch
from vitlib.fast.cuda_graphs import CapturedGraph


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> ViT:
    return small(**FAMILIES[request.param])


# --- captures, by a stand-in that computes --------------------------------------------------------


class Computed:
    """A stand-in for a CUDA graph: a replay overwrites the output of the capture."""

    def __init__(self, function: Callable[[Tensor], Tensor], pixels: Tensor) -> None:
        self.function, self.pixels, self.replays = function, pixels, 0
        self.output = function(pixels)

    def replay(self) -> None:
        self.replays += 1
        self.output.copy_(self.function(self.pixels))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Computed]:
    captured: list[Computed] = []

    def capture(function: Callable[[Tensor], Tensor], pixels: Tensor, _: Any) -> CapturedGraph:
        captured.append(Computed(function, pixels))
        return CapturedGraph(captured[-1].replay, captured[-1].output)

    monkeypatch.setattr(cuda_runner, "capture_graph", capture)
    return captured


def make_capturing(model: ViT, **options: Any) -> cuda.CudaViT:
    quick = optimize_on_cpu(model, **options)
    quick.runner.captures = True
    return quick


def test_small_batches_are_captured_once_for_each_size(graphs: list[Computed]) -> None:
    model = small()
    quick = make_capturing(model)
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
    """With photos in their own shapes every batch would be a capture of four runs."""
    monkeypatch.setattr(cuda_runner, "EARLY_GRAPHS", 2)
    quick = make_capturing(small(depth=1))
    for width in (32, 40, 48):
        for _ in range(cuda_runner.LATE - 1):
            quick(torch.randn(1, 3, 32, width))
    assert len(graphs) == 2
    quick(torch.randn(1, 3, 32, 48))
    assert len(graphs) == 3


def test_batch_with_many_tokens_is_not_captured(graphs: list[Computed]) -> None:
    quick = make_capturing(small())
    quick.runner.graph_tokens = 4 * 17
    for count in (4, 4, 8, 8):
        quick(torch.randn(count, 3, 32, 32))
    assert [len(graph.pixels) for graph in graphs] == [4]


def test_more_images_of_narrow_models_are_captured() -> None:
    """In ViT-Ti at 224 even 128 images compute for less time than Python launches their kernels."""
    captured = {}
    for width in (192, 384, 768, 1024):
        tokens = micro_batch.max_graph_tokens(width)
        sizes = (*micro_batch.GRAPH_SIZES, micro_batch.TILE)
        captured[width] = max(size for size in sizes if size * 197 <= tokens)
    assert captured == {192: 128, 384: 128, 768: 64, 1024: 64}


def test_a_large_size_that_is_few_tokens_is_captured(graphs: list[Computed]) -> None:
    quick = make_capturing(small(depth=1))
    for _ in range(2):
        quick(torch.randn(micro_batch.TILE, 3, 32, 32))
    assert [len(graph.pixels) for graph in graphs] == [micro_batch.TILE]


def test_caches_are_bounded(graphs: list[Computed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_runner, "CACHE_SIZE", 2)
    quick = make_capturing(small())
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
def test_function_that_cannot_be_captured_runs_eagerly(
    error: Exception, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    def fails(*_: Any) -> Any:
        attempts.append(1)
        raise error

    monkeypatch.setattr(cuda_runner, "capture_graph", fails)
    model, images = small(), torch.randn(9, 3, 32, 32)
    quick = make_capturing(model)
    with torch.no_grad():
        exact = model(images)
    for count in (2, 1, 4, 8):
        for _ in range(3):
            assert distance(quick(images[:count]), exact[:count]) <= 5e-6
    (record,) = caplog.records
    assert record.getMessage().startswith("CUDA graphs are not used, and small batches are slower")
    assert why in record.getMessage()
    assert "more" not in record.getMessage()
    assert len(attempts) == cuda_runner.MAX_FAILURES  # one failure does not end all


@pytest.mark.usefixtures("graphs")
def test_inference_mode_changes_nothing() -> None:
    model, images = small(), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        quick = make_capturing(model)
        inside = [quick(images.clone()) for _ in range(2)]
    outside = quick(images)
    assert all(torch.equal(answer, outside) for answer in inside)
    probe = torch.ones(5, requires_grad=True)
    (inside[0] * probe).sum().backward()  # what it gives may be learned from
    assert probe.grad is not None


@pytest.mark.usefixtures("graphs")
def test_deepcopy_captures_its_own_graphs() -> None:
    quick, images = make_capturing(small()), torch.randn(2, 3, 32, 32)
    first = [quick(images) for _ in range(2)]
    twin = copy.deepcopy(quick)
    assert torch.equal(twin(images), first[0])
    assert twin.runner is not quick.runner
    assert len(twin.runner.functions_by_size) == 1


# --- the real capture, on a recording torch.cuda --------------------------------------------------


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> RecordedCuda:
    return RecordedCuda(monkeypatch)


def runner() -> cuda_runner.BatchRunner:
    return cuda_runner.BatchRunner(CPU, torch.float32, False, micro_batch.MAX_GRAPH_TOKENS)


def test_capture_uses_the_stream_of_the_runner(recorder: RecordedCuda) -> None:
    """The stream that torch.cuda.graph takes belongs to the device of the process's first capture.

    On another device nothing would be captured, and replays would give the first output forever.
    """
    first, second = runner(), runner()
    for first_runner in (first, second, first, second):
        cuda_runner.capture_graph(lambda x: x * 2, torch.ones(2), first_runner)
    streams = [options["stream"] for options in recorder.options]
    assert streams[0] is streams[2] is not streams[1] is streams[3]  # a pool wants one stream
    assert recorder.options[0]["pool"] == recorder.options[2]["pool"]
    assert all(options["capture_error_mode"] == "thread_local" for options in recorder.options)
    # cuBLAS keeps a workspace, 32 MiB on Hopper, for each stream that it was called on.
    assert len(recorder.streams) == 4
    assert recorder.current is recorder.user


def test_capture_warms_up_on_another_stream(recorder: RecordedCuda) -> None:
    """A workspace that a product allocates before a capture lies outside the graph's pool."""
    on: list[Any] = []
    first_runner = runner()
    cuda_runner.capture_graph(
        lambda x: (on.append(recorder.current), x * 2)[1], torch.ones(2), first_runner
    )
    assert first_runner.capture_streams is not None
    assert on[:2] == [first_runner.capture_streams.warmup] * 2
    assert first_runner.capture_streams.warmup is not first_runner.capture_streams.capture
    assert first_runner.capture_streams.warmup.waited is recorder.user  # type: ignore[attr-defined]
    assert recorder.user.waited is first_runner.capture_streams.warmup


def test_failed_capture_restores_the_stream(recorder: RecordedCuda) -> None:
    runs: list[int] = []

    def function(x: Tensor) -> Tensor:
        runs.append(1)
        if len(runs) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x * 2

    with pytest.raises(RuntimeError):
        cuda_runner.capture_graph(function, torch.ones(2), runner())
    assert recorder.current is recorder.user


def test_captures_of_two_threads_do_not_overlap(recorder: RecordedCuda) -> None:
    """A process may capture one graph at a time, also on two devices."""
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
    assert len(recorder.options) == 3
    assert recorder.most_capturing == 1


def test_replay_gives_the_output(recorder: RecordedCuda) -> None:
    quick, images = make_capturing(small()), torch.randn(2, 3, 32, 32)
    first = quick(images)
    assert recorder.log == []
    assert torch.equal(quick(images), first)
    quick(images)
    assert recorder.log == ["replay"] * 2


# --- compiling ------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Count compilations, and run the graph eagerly."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, real = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: real(f, backend=counter, **k))
    monkeypatch.setattr(micro_batch, "TILE", 4)
    monkeypatch.setattr(micro_batch, "GRAPH_SIZES", (1,))
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_forward_compiles_without_a_graph_break(family: ViT, precision: str) -> None:
    quick = optimize_on_cpu(family, precision)
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
        assert torch.equal(whole(normalise(images)), on_pixels(normalise(images)))
    torch._dynamo.reset()


def test_equal_blocks_are_compiled_once(compiler: Any) -> None:
    model, images = small(depth=6), torch.randn(4, 3, 32, 32)
    quick = optimize_on_cpu(model, "bf16", 4, compiles=True)
    expected = optimize_on_cpu(model, "bf16", 4)(images)
    for _ in range(3):
        assert torch.equal(quick(images), expected)
    assert compiler.frame_count == 1
    assert quick.runner.compiles


def test_nothing_is_compiled_by_default(compiler: Any) -> None:
    quick = optimize_on_cpu(small(depth=1), "bf16", 4)
    for _ in range(2):
        quick(torch.randn(4, 3, 32, 32))
    assert compiler.frame_count == 0


def test_more_than_eight_grids_compile(compiler: Any) -> None:
    """The compiler gives up after 8 variants of one code object (recompile_limit)."""
    quick = optimize_on_cpu(small(depth=1), "bf16", 4, compiles=True)
    for height in range(1, 12):
        quick(torch.randn(4, 3, 8 * height, 32))
    assert quick.runner.compiles
    assert compiler.frame_count == 11


@pytest.mark.usefixtures("compiler")
def test_failed_recompile_falls_back_to_eager(caplog: pytest.LogCaptureFixture) -> None:
    quick = optimize_on_cpu(small(depth=1), "bf16", 4, compiles=True)
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


def test_callers_modes_cause_no_recompile(compiler: Any) -> None:
    quick = optimize_on_cpu(small(depth=1), "bf16", 4, compiles=True)
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


def test_missing_compiler_falls_back_to_eager(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = small(depth=1)
    images = torch.randn(129, 3, 32, 32)

    def raise_error(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: raise_error)
    quick = optimize_on_cpu(model, "fp32", 128, compiles=True)
    with caplog.at_level(logging.WARNING, logger="vitlib"), torch.no_grad():
        for name in ("forward", "embed"):
            assert distance(getattr(quick, name)(images), getattr(model, name)(images)) <= 5e-6
    assert len(caplog.records) == 1
    assert "Failed to find C compiler." in caplog.text
    assert "CC" not in caplog.text
