"""Tests of parts of a batch on threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
import torch

import vitlib
from vitlib.fast import FastViT
from vitlib.image.prefetch import stack as stack_images
from vitlib.system.parallel import ParallelCompute


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Contexts of a test."""
    with ExitStack() as contexts:
        yield contexts


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_parts_equal_one_pass(count: int, stack: ExitStack) -> None:
    """Results equal one pass, and the process has as many threads as before."""
    before = torch.get_num_threads()
    parallel = stack.enter_context(ParallelCompute(2))
    calls: list[tuple[int, int]] = []

    def compute(batch: torch.Tensor) -> torch.Tensor:
        calls.append((len(batch), torch.get_num_threads()))
        return batch.float() * 2 + 1

    images = torch.arange(count * 3, dtype=torch.uint8).reshape(count, 3)
    torch.set_num_threads(2)
    try:
        assert torch.equal(parallel.run(compute, images), images.float() * 2 + 1)
        assert torch.get_num_threads() == 2
        parts = {1: [1], 2: [2], 3: [3], 4: [2, 2], 5: [2, 3], 9: [4, 5]}[count]
        assert sorted(size for size, _ in calls) == parts
        assert {threads for _, threads in calls} == {1 if count >= 4 else 2}

        def fail(batch: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(f"{len(batch)}")

        with pytest.raises(RuntimeError):
            parallel.run(fail, images)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_that_start_later_compute_with_all_cores() -> None:
    """Threads of the parts have one core each; no other thread of the process loses any."""
    with ParallelCompute(2) as parallel:
        parallel.run(lambda part: part + torch.get_num_threads(), torch.zeros(8))
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == 2
        numbers = parallel.run(lambda part: part * 0 + torch.get_num_threads(), torch.zeros(8))
        assert numbers.tolist() == [1] * 8
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_calls_of_several_threads_do_not_mix() -> None:
    with ParallelCompute(2) as parallel, ThreadPoolExecutor(4) as callers:
        batches = [torch.arange(i, i + 9) for i in range(20)]
        results = callers.map(lambda batch: parallel.run(lambda part: part * 3, batch), batches)
        for batch, result in zip(batches, results, strict=True):
            assert torch.equal(result, batch * 3)


@pytest.mark.usefixtures("two_threads")
def test_threads_end_with_the_context() -> None:
    with ParallelCompute(2) as parallel:
        parallel.run(lambda part: part, torch.zeros(8))
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("vitlib-compute") for name in names)


def run_counted(predictor: vitlib.Predictor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Classify nine images; return the sizes of the batches that the model got."""
    model, sizes = predictor.fast(), []
    name = "forward_uint8" if isinstance(model, FastViT) else "forward"
    forward = getattr(type(model), name)

    def count(self: object, images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(type(model), name, count)
    images = [np.full((40, 50, 3), shade, np.uint8) for shade in range(0, 90, 10)]
    rows = predictor.probabilities(images)
    monkeypatch.undo()
    alone = np.concatenate([predictor.probabilities(image) for image in images])
    np.testing.assert_allclose(rows, alone, atol=1e-5)
    return sorted(sizes)


@pytest.mark.usefixtures("two_threads")
def test_predictor_divides_a_batch_among_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_counted(vitlib.Predictor.load("demo", device="cpu"), monkeypatch) == [4, 5]


@pytest.mark.usefixtures("two_threads")
def test_predictor_calls_a_hooked_model_from_one_thread() -> None:
    """A hook sees the whole batch, in the caller's thread."""
    predictor = vitlib.Predictor.load("demo", device="cpu")
    threads = set()
    predictor.model.blocks[1].register_forward_hook(  # type: ignore[union-attr, index]
        lambda *_: threads.add(threading.current_thread())
    )
    assert predictor.engine().num_parts == 1
    predictor.probabilities([np.full((40, 50, 3), shade, np.uint8) for shade in range(9)])
    assert threads == {threading.current_thread()}


def test_stacked_batch_does_not_start_threads_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.stack wakes a thread on each core, which costs more than the copy."""
    images = [torch.full((8, 9, 3), i, dtype=torch.uint8).permute(2, 0, 1) for i in range(3)]
    expected = torch.stack(images)
    monkeypatch.delattr(torch, "stack")
    batch = stack_images(images, torch.device("cpu"))
    assert torch.equal(batch, expected)
    assert batch.is_contiguous()
    assert batch.dtype == torch.uint8
