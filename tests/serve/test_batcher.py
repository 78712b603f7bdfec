"""Tests of the batcher: start and content of batches, the compute lock."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vitlib.errors import ConfigError
from vitlib.serve.batcher import Batcher, DeadlineError, Item
from vitlib.serve.compute_lock import ComputeLock


class SlowCore:
    """A core that notes its batches, and computes each only when `go` is released."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Semaphore(0)
        self.begun: queue.Queue[int] = queue.Queue()

    def answer(self, kind: str, images: list[torch.Tensor]) -> list[Any]:
        numbers = [int(image.flatten()[0]) for image in images]
        self.batches.append(numbers)
        self.begun.put(len(numbers))
        assert self.go.acquire(timeout=5)
        if 666 in numbers:
            raise RuntimeError("the model failed")
        return [(kind, number) for number in numbers]


class BatcherHarness:
    """A batcher with one slow core, and the rows of its images."""

    def __init__(self, **more: Any) -> None:
        self.core = SlowCore()
        self.rows: queue.Queue[Any] = queue.Queue()
        settings: dict[str, Any] = {"max_batch": 4, "max_wait": 0.5, "on_batch": lambda *_: None}
        self.batcher = Batcher(
            [lambda: self.core], ComputeLock(is_open=True), **{**settings, **more}
        )  # type: ignore[list-item]

    def put(
        self, number: int, kind: Any = "classify", side: int = 2, late: float = 60,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        image = torch.full((1, side, side), number)
        until = time.monotonic() + late
        self.batcher.put(Item(kind, image, self.rows.put, until, cancelled))

    def reserve_and_put(self, *numbers: int, **more: Any) -> None:
        self.batcher.reserve(len(numbers))
        for number in numbers:
            self.put(number, **more)

    def answers(self, count: int) -> list[Any]:
        return [self.rows.get(timeout=5) for _ in range(count)]


@pytest.fixture
def harness() -> Iterator[BatcherHarness]:
    running = BatcherHarness()
    yield running
    running.core.go.release(100)
    running.batcher.close()


@pytest.mark.parametrize("late", [False, True])
def test_removed_item_behind_others_does_not_end_the_thread(
    harness: BatcherHarness, late: bool
) -> None:
    """Items are removed by identity: comparing their images would end the thread."""
    harness.reserve_and_put(0)
    assert harness.core.begun.get(timeout=5) == 1
    harness.batcher.reserve(3)
    harness.put(1)
    harness.put(2, late=-1 if late else 60, cancelled=lambda: not late)
    harness.put(3)
    harness.core.go.release(9)
    answers = harness.answers(4 if late else 3)
    assert [a for a in answers if not isinstance(a, DeadlineError)] == [
        ("classify", 0), ("classify", 1), ("classify", 3)
    ]  # fmt: skip
    assert sum(isinstance(a, DeadlineError) for a in answers) == late
    harness.reserve_and_put(4)
    assert harness.answers(1) == [("classify", 4)]


def test_single_image_starts_at_once(harness: BatcherHarness) -> None:
    start = time.monotonic()
    harness.reserve_and_put(1)
    assert harness.core.begun.get(timeout=5) == 1
    assert time.monotonic() - start < 0.4  # less than max_wait, 0.5
    harness.core.go.release()
    assert harness.answers(1) == [("classify", 1)]


def test_batch_waits_for_reserved_images(harness: BatcherHarness) -> None:
    harness.batcher.reserve(3)
    harness.put(1)
    harness.put(2)
    with pytest.raises(queue.Empty):
        harness.core.begun.get(timeout=0.1)
    harness.put(3)
    assert harness.core.begun.get(timeout=0.3) == 3


def test_batch_starts_when_a_reservation_is_taken_back(harness: BatcherHarness) -> None:
    harness.batcher.reserve(2)
    harness.put(1)
    harness.batcher.reserve(-1)  # the other cannot be read
    assert harness.core.begun.get(timeout=0.3) == 1


def test_batch_starts_after_max_wait() -> None:
    harness = BatcherHarness(max_wait=0.1)
    harness.batcher.reserve(2)
    start = time.monotonic()
    harness.put(1)
    assert harness.core.begun.get(timeout=5) == 1
    assert 0.05 < time.monotonic() - start < 0.5
    harness.core.go.release(9)
    harness.put(2)
    harness.batcher.close()


def test_batches_have_at_most_max_batch_images_in_order(harness: BatcherHarness) -> None:
    harness.reserve_and_put(0)
    harness.core.begun.get(timeout=5)
    harness.reserve_and_put(*range(1, 11))
    harness.core.go.release(100)
    assert [number for _, number in harness.answers(11)] == list(range(11))
    assert harness.core.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]


def test_batch_holds_one_kind_and_shape(harness: BatcherHarness) -> None:
    harness.reserve_and_put(0)
    harness.core.begun.get(timeout=5)
    harness.batcher.reserve(6)
    for number, kind, side in (
        (1, "classify", 2), (2, "embed", 2), (3, "classify", 3), (4, "classify", 2),
        (5, "embed", 2), (6, "classify", 3),
    ):  # fmt: skip
        harness.put(number, kind, side)
    harness.core.go.release(100)
    rows = harness.answers(7)
    assert harness.core.batches == [[0], [1, 4], [2, 5], [3, 6]]
    assert rows.index(("embed", 2)) > rows.index(("classify", 4))


def test_expired_item_gets_deadline_error(harness: BatcherHarness) -> None:
    harness.reserve_and_put(0)
    harness.core.begun.get(timeout=5)
    harness.reserve_and_put(1, late=-1)
    harness.reserve_and_put(2)
    harness.core.go.release(100)
    rows = harness.answers(3)
    assert isinstance(rows[1], DeadlineError)
    assert rows[2] == ("classify", 2)
    assert harness.core.batches == [[0], [2]]


def test_cancelled_item_is_not_computed(harness: BatcherHarness) -> None:
    harness.reserve_and_put(0)
    harness.core.begun.get(timeout=5)
    harness.reserve_and_put(1, cancelled=lambda: True)
    harness.reserve_and_put(2)
    harness.core.go.release(100)
    assert harness.answers(2) == [("classify", 0), ("classify", 2)]
    assert harness.core.batches == [[0], [2]]
    assert harness.batcher.backlog == 0


def test_error_of_the_model_is_the_row_of_each_image(harness: BatcherHarness) -> None:
    harness.reserve_and_put(666, 1)
    harness.core.go.release(100)
    assert all(isinstance(row, RuntimeError) for row in harness.answers(2))
    harness.reserve_and_put(2)
    assert harness.answers(1) == [("classify", 2)]
    assert harness.batcher.backlog == 0


def test_backlog_counts_reserved_queued_and_running(harness: BatcherHarness) -> None:
    harness.reserve_and_put(0)
    harness.core.begun.get(timeout=5)
    harness.reserve_and_put(1, 2)
    harness.batcher.reserve(3)
    assert (harness.batcher.waiting, harness.batcher.backlog) == (2, 6)
    harness.batcher.reserve(-3)


def test_close_computes_the_queue(harness: BatcherHarness) -> None:
    harness.reserve_and_put(*range(9))
    harness.core.go.release(100)
    harness.batcher.close()
    assert harness.rows.qsize() == 9


def test_each_core_has_its_thread() -> None:
    cores = [SlowCore(), SlowCore()]
    rows: queue.Queue[Any] = queue.Queue()
    makers = [lambda core=core: core for core in cores]
    batcher = Batcher(
        makers, ComputeLock(is_open=True), max_batch=1, max_wait=0, on_batch=lambda *_: None
    )  # type: ignore[arg-type]
    batcher.reserve(2)
    for number in range(2):
        image = torch.full((1, 1, 1), number)
        batcher.put(Item("classify", image, rows.put, float("inf"), lambda: False))
    for core in cores:  # both are computing
        assert core.begun.get(timeout=5) == 1
    for core in cores:
        core.go.release()
    assert len({rows.get(timeout=5), rows.get(timeout=5)}) == 2
    batcher.close()


def test_lock_separates_decoding_and_computing() -> None:
    """On a CPU an image is decoded before or after a batch, not during it."""
    lock, order = ComputeLock(is_open=False), []
    reading, done = threading.Event(), threading.Event()

    def read() -> None:
        with lock.decoding():
            reading.set()
            done.wait(5)
            order.append("read")

    thread = threading.Thread(target=read)
    thread.start()
    assert reading.wait(5)
    threading.Timer(0.005, done.set).start()
    with lock.computing():
        order.append("computed")
    thread.join()
    assert order == ["read", "computed"]


def test_lock_waits_for_a_limited_time() -> None:
    lock, done = ComputeLock(is_open=False), threading.Event()
    reading = threading.Event()

    def read() -> None:
        with lock.decoding():
            reading.set()
            done.wait(5)

    thread = threading.Thread(target=read)
    thread.start()
    assert reading.wait(5)
    start = time.monotonic()
    with lock.computing():  # while a huge image is decoded
        assert time.monotonic() - start < 1
        with lock.decoding():  # while a batch takes long
            assert time.monotonic() - start < 2
    done.set()
    thread.join()


def test_batcher_raises_error_of_making_a_model() -> None:
    def fail() -> Any:
        raise ConfigError("no such model")

    with pytest.raises(ConfigError, match="no such model"):
        Batcher([SlowCore, fail], ComputeLock(), max_batch=1, max_wait=0, on_batch=lambda *_: None)  # type: ignore[list-item]


def test_compute_thread_makes_the_model() -> None:
    """No other thread may, see batcher.py."""
    threads = []

    class NotingCore(SlowCore):
        def __init__(self) -> None:
            super().__init__()
            threads.append(threading.current_thread())
            self.go.release(9)

        def answer(self, kind: str, images: list[torch.Tensor]) -> list[Any]:
            threads.append(threading.current_thread())
            return super().answer(kind, images)

    rows: queue.Queue[Any] = queue.Queue()
    batcher = Batcher(
        [NotingCore], ComputeLock(), max_batch=1, max_wait=0, on_batch=lambda *_: None
    )  # type: ignore[list-item]
    batcher.reserve(1)
    batcher.put(Item("classify", torch.zeros(1, 1, 1), rows.put, float("inf"), lambda: False))
    rows.get(timeout=5)
    batcher.close()
    assert threads[0] is threads[1] is not threading.current_thread()
