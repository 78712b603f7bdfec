"""Batches of many requests: when they start, what is in them, and what is not."""

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
from vitlib.serve.parallel import ParallelCompute


class Slow:
    """A core that says which images it was given, when it is let go."""

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


class Desk:
    """A batcher with one slow core, and what it answered."""

    def __init__(self, **more: Any) -> None:
        self.core = Slow()
        self.rows: queue.Queue[Any] = queue.Queue()
        given: dict[str, Any] = {"max_batch": 4, "max_wait": 0.5, "on_batch": lambda *_: None}
        self.batcher = Batcher([lambda: self.core], ComputeLock(is_open=True), **{**given, **more})  # type: ignore[list-item]

    def put(
        self, number: int, kind: Any = "classify", side: int = 2, late: float = 60,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        image = torch.full((1, side, side), number)
        until = time.monotonic() + late
        self.batcher.put(Item(kind, image, self.rows.put, until, cancelled))

    def promised(self, *numbers: int, **more: Any) -> None:
        self.batcher.reserve(len(numbers))
        for number in numbers:
            self.put(number, **more)

    def answers(self, count: int) -> list[Any]:
        return [self.rows.get(timeout=5) for _ in range(count)]


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.core.go.release(100)
    made.batcher.close()


@pytest.mark.parametrize("late", [False, True])
def test_an_image_behind_others_that_is_dropped_ends_nothing(desk: Desk, late: bool) -> None:
    """Where it was looked for by comparing images the thread that computes ended, and every later
    request waited without an end."""
    desk.promised(0)
    assert desk.core.begun.get(timeout=5) == 1
    desk.batcher.reserve(3)
    desk.put(1)
    desk.put(2, late=-1 if late else 60, cancelled=lambda: not late)
    desk.put(3)
    desk.core.go.release(9)
    answers = desk.answers(4 if late else 3)
    assert [a for a in answers if not isinstance(a, DeadlineError)] == [
        ("classify", 0), ("classify", 1), ("classify", 3)
    ]  # fmt: skip
    assert sum(isinstance(a, DeadlineError) for a in answers) == late
    desk.promised(4)
    assert desk.answers(1) == [("classify", 4)]


def test_a_lone_image_starts_at_once(desk: Desk) -> None:
    start = time.monotonic()
    desk.promised(1)
    assert desk.core.begun.get(timeout=5) == 1
    assert time.monotonic() - start < 0.4  # not max_wait, 0.5
    desk.core.go.release()
    assert desk.answers(1) == [("classify", 1)]


def test_it_waits_for_what_was_promised(desk: Desk) -> None:
    desk.batcher.reserve(3)
    desk.put(1)
    desk.put(2)
    with pytest.raises(queue.Empty):
        desk.core.begun.get(timeout=0.1)
    desk.put(3)
    assert desk.core.begun.get(timeout=0.3) == 3


def test_a_promise_taken_back(desk: Desk) -> None:
    desk.batcher.reserve(2)
    desk.put(1)
    desk.batcher.reserve(-1)  # the other was no image
    assert desk.core.begun.get(timeout=0.3) == 1


def test_no_longer_than_max_wait() -> None:
    desk = Desk(max_wait=0.1)
    desk.batcher.reserve(2)
    start = time.monotonic()
    desk.put(1)
    assert desk.core.begun.get(timeout=5) == 1
    assert 0.05 < time.monotonic() - start < 0.5
    desk.core.go.release(9)
    desk.put(2)
    desk.batcher.close()


def test_at_most_max_batch_in_order(desk: Desk) -> None:
    desk.promised(0)
    desk.core.begun.get(timeout=5)
    desk.promised(*range(1, 11))
    desk.core.go.release(100)
    assert [number for _, number in desk.answers(11)] == list(range(11))
    assert desk.core.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]


def test_only_what_is_alike(desk: Desk) -> None:
    desk.promised(0)
    desk.core.begun.get(timeout=5)
    desk.batcher.reserve(6)
    for number, kind, side in (
        (1, "classify", 2), (2, "embed", 2), (3, "classify", 3), (4, "classify", 2),
        (5, "embed", 2), (6, "classify", 3),
    ):  # fmt: skip
        desk.put(number, kind, side)
    desk.core.go.release(100)
    rows = desk.answers(7)
    assert desk.core.batches == [[0], [1, 4], [2, 5], [3, 6]]
    assert rows.index(("embed", 2)) > rows.index(("classify", 4))


def test_too_late_is_not_begun(desk: Desk) -> None:
    desk.promised(0)
    desk.core.begun.get(timeout=5)
    desk.promised(1, late=-1)
    desk.promised(2)
    desk.core.go.release(100)
    rows = desk.answers(3)
    assert isinstance(rows[1], DeadlineError)
    assert rows[2] == ("classify", 2)
    assert desk.core.batches == [[0], [2]]


def test_nobody_waits_for_it(desk: Desk) -> None:
    desk.promised(0)
    desk.core.begun.get(timeout=5)
    desk.promised(1, cancelled=lambda: True)
    desk.promised(2)
    desk.core.go.release(100)
    assert desk.answers(2) == [("classify", 0), ("classify", 2)]
    assert desk.core.batches == [[0], [2]]
    assert desk.batcher.backlog == 0


def test_a_batch_that_fails(desk: Desk) -> None:
    desk.promised(666, 1)
    desk.core.go.release(100)
    assert all(isinstance(row, RuntimeError) for row in desk.answers(2))
    desk.promised(2)
    assert desk.answers(1) == [("classify", 2)]
    assert desk.batcher.backlog == 0


def test_backlog(desk: Desk) -> None:
    desk.promised(0)
    desk.core.begun.get(timeout=5)
    desk.promised(1, 2)
    desk.batcher.reserve(3)
    assert (desk.batcher.waiting, desk.batcher.backlog) == (2, 6)
    desk.batcher.reserve(-3)


def test_close_answers_all(desk: Desk) -> None:
    desk.promised(*range(9))
    desk.core.go.release(100)
    desk.batcher.close()
    assert desk.rows.qsize() == 9


def test_a_thread_for_each_core() -> None:
    cores = [Slow(), Slow()]
    rows: queue.Queue[Any] = queue.Queue()
    makers = [lambda core=core: core for core in cores]
    batcher = Batcher(
        makers, ComputeLock(is_open=True), max_batch=1, max_wait=0, on_batch=lambda *_: None
    )  # type: ignore[arg-type]
    batcher.reserve(2)
    for number in range(2):
        image = torch.full((1, 1, 1), number)
        batcher.put(Item("classify", image, rows.put, float("inf"), lambda: False))
    for core in cores:  # both have begun, neither has ended
        assert core.begun.get(timeout=5) == 1
    for core in cores:
        core.go.release()
    assert len({rows.get(timeout=5), rows.get(timeout=5)}) == 2
    batcher.close()


def test_turns() -> None:
    """On a CPU an image is read before or after a batch, not beside it."""
    turns, order = ComputeLock(is_open=False), []
    reading, done = threading.Event(), threading.Event()

    def read() -> None:
        with turns.decoding():
            reading.set()
            done.wait(5)
            order.append("read")

    thread = threading.Thread(target=read)
    thread.start()
    assert reading.wait(5)
    threading.Timer(0.005, done.set).start()
    with turns.computing():
        order.append("computed")
    thread.join()
    assert order == ["read", "computed"]


def test_turns_do_not_wait_for_ever() -> None:
    turns, done = ComputeLock(is_open=False), threading.Event()
    reading = threading.Event()

    def read() -> None:
        with turns.decoding():
            reading.set()
            done.wait(5)

    thread = threading.Thread(target=read)
    thread.start()
    assert reading.wait(5)
    start = time.monotonic()
    with turns.computing():  # a huge image is being read
        assert time.monotonic() - start < 1
        with turns.decoding():  # a batch takes long
            assert time.monotonic() - start < 2
    done.set()
    thread.join()


def test_a_model_that_cannot_be_made() -> None:
    def fail() -> Any:
        raise ConfigError("no such model")

    with pytest.raises(ConfigError, match="no such model"):
        Batcher([Slow, fail], ComputeLock(), max_batch=1, max_wait=0, on_batch=lambda *_: None)  # type: ignore[list-item]


def test_the_thread_that_computes_makes_the_model() -> None:
    """And no other: see batcher.py."""
    threads = []

    class Told(Slow):
        def __init__(self) -> None:
            super().__init__()
            threads.append(threading.current_thread())
            self.go.release(9)

        def answer(self, kind: str, images: list[torch.Tensor]) -> list[Any]:
            threads.append(threading.current_thread())
            return super().answer(kind, images)

    rows: queue.Queue[Any] = queue.Queue()
    batcher = Batcher([Told], ComputeLock(), max_batch=1, max_wait=0, on_batch=lambda *_: None)  # type: ignore[list-item]
    batcher.reserve(1)
    batcher.put(Item("classify", torch.zeros(1, 1, 1), rows.put, float("inf"), lambda: False))
    rows.get(timeout=5)
    batcher.close()
    assert threads[0] is threads[1] is not threading.current_thread()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_lanes_give_what_one_pass_gives(count: int) -> None:
    """Whatever the number of images; and the process's threads stay as they were."""
    before = torch.get_num_threads()
    lanes = ParallelCompute(2)
    asked: list[tuple[int, int]] = []

    def ask(batch: torch.Tensor) -> torch.Tensor:
        asked.append((len(batch), torch.get_num_threads()))
        return batch.float() * 2 + 1

    images = torch.arange(count * 3, dtype=torch.uint8).reshape(count, 3)
    torch.set_num_threads(2)
    try:
        assert torch.equal(lanes.run(ask, images), images.float() * 2 + 1)
        assert torch.get_num_threads() == 2
        parts = {1: [1], 2: [2], 3: [3], 4: [2, 2], 5: [2, 3], 9: [4, 5]}[count]
        assert sorted(size for size, _ in asked) == parts
        assert {threads for _, threads in asked} == {1 if count >= 4 else 2}

        def broken(batch: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(f"{len(batch)}")

        with pytest.raises(RuntimeError):
            lanes.run(broken, images)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
