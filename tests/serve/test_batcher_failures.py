"""Tests of errors in a batcher's thread: every image gets a row, and the thread goes on."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from vitlib.serve.batcher import Batcher, Item
from vitlib.serve.compute_lock import ComputeLock


class EchoCore:
    """A core whose row of an image is the image's number."""

    def answer(self, _: str, images: list[torch.Tensor]) -> list[Any]:
        return [int(image) for image in images]


class FailingOnce:
    """A function that raises an error at its first call only."""

    def __init__(
        self, error: BaseException, function: Callable[..., Any] = lambda *_: None
    ) -> None:
        self.error: BaseException | None = error
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return self.function(*arguments)


def put(batcher: Batcher, number: int, done: Callable[[Any], None], **options: Any) -> None:
    fields = {"deadline": float("inf"), "is_cancelled": lambda: False, **options}
    batcher.put(Item("embed", torch.tensor(number), done, **fields))


@contextmanager
def open_batcher(core: Any, **options: Any) -> Iterator[Batcher]:
    settings = {"max_batch": 4, "max_wait": 5, "on_batch": lambda *_: None, **options}
    batcher = Batcher([lambda: core], ComputeLock(is_open=True), **settings)
    try:
        yield batcher
    finally:
        batcher.close()


def rows_of(batcher: Batcher, *numbers: int, **options: Any) -> list[Any]:
    """Compute images in one batch; each gets its row within 5 seconds."""
    rows: queue.SimpleQueue[Any] = queue.SimpleQueue()
    batcher.reserve(len(numbers))
    for number in numbers:
        put(batcher, number, rows.put, **options)
    return [rows.get(timeout=5) for _ in numbers]


def assert_goes_on(batcher: Batcher) -> None:
    assert rows_of(batcher, 7, 8) == [7, 8]
    assert batcher.backlog == 0


@pytest.mark.parametrize("error", [MemoryError("full"), SystemExit(1)])
def test_thread_goes_on_after_error_of_model(error: BaseException) -> None:
    core = EchoCore()
    core.answer = FailingOnce(error, core.answer)  # type: ignore[method-assign]
    with open_batcher(core) as batcher:
        rows = rows_of(batcher, 1, 2)
        assert all(isinstance(row, Exception) for row in rows)
        assert all(str(error) in str(row) for row in rows)
        assert_goes_on(batcher)


def test_model_that_gives_too_few_rows_is_an_error_of_each_image() -> None:
    core = EchoCore()
    core.answer = lambda *_: [1]  # type: ignore[method-assign]
    with open_batcher(core) as batcher:
        rows = [str(row) for row in rows_of(batcher, 1, 2)]
        assert rows == ["the model gives 1 rows for 2 images"] * 2


def test_receiver_that_fails_gets_the_error_and_no_other_image_does() -> None:
    rows: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with open_batcher(EchoCore()) as batcher:
        batcher.reserve(3)
        put(batcher, 1, rows.put)
        put(batcher, 2, FailingOnce(ValueError("no receiver"), rows.put))
        put(batcher, 3, rows.put)
        first, failed, last = (rows.get(timeout=5) for _ in range(3))
        assert (first, str(failed), last) == (1, "no receiver", 3)
        assert_goes_on(batcher)


def test_images_in_the_queue_get_the_error_where_no_batch_can_be_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with open_batcher(EchoCore()) as batcher:
        broken = FailingOnce(ValueError("no state"), lambda: False)
        rows = rows_of(batcher, 1, is_cancelled=broken)
        assert "no state" in str(rows[0])
        assert_goes_on(batcher)
    assert "the thread of the model failed; it continues" in caplog.text


def test_thread_goes_on_after_error_of_metrics() -> None:
    with open_batcher(EchoCore(), on_batch=FailingOnce(ValueError("no metrics"))) as batcher:
        assert rows_of(batcher, 1, 2) == [1, 2]
        assert_goes_on(batcher)


def test_request_gets_500_and_the_next_one_200(monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("starlette.testclient")
    from fixtures.server import SAMPLES
    from vitlib import Predictor
    from vitlib.serve import batcher
    from vitlib.serve.run import build
    from vitlib.serve.settings import Settings

    failing = FailingOnce(SystemExit(1), batcher._compute_rows)
    app = build(lambda _: Predictor.load("demo"), [None], Settings(), "demo")
    photo, headers = SAMPLES[0].read_bytes(), {"content-type": "image/png"}
    with testing.TestClient(app) as client:
        while not client.get("/ready").json()["ready"]:
            continue
        monkeypatch.setattr(batcher, "_compute_rows", failing)
        answer = client.post("/classify", content=photo, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
        assert client.post("/classify", content=photo, headers=headers).status_code == 200
