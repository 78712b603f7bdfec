"""Tests of a running `vitlib serve`: images by URL."""

from __future__ import annotations

import functools
import http.client
import http.server
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fixtures.hostile_requests import GOOD, PHOTOS
from fixtures.server import (
    SAMPLES,
    Server,
    is_close,
)


@pytest.fixture
def store() -> Iterator[str]:
    """A web server of the samples; /slow/ takes two seconds."""

    class Store(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/slow/"):
                time.sleep(2)
                self.path = self.path[5:]
            super().do_GET()

        def log_message(self, *_: Any) -> None:
            """Write no log."""

    handler = functools.partial(Store, directory=str(SAMPLES[0].parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_score_fetches_allowed_urls(store: str, scores: Any) -> None:
    urls = [f"http://{store}/{path.name}" for path in SAMPLES[:2]]
    payload = {"input_data": {"columns": ["image"], "index": [0, 1, 2], "data": [*urls, GOOD]}}
    with Server("--allow-urls", f"a.example,{store}", "--allow-private-urls") as server:
        probs = [entry["probs"] for entry in server.post("/score", payload).json()]
        assert is_close(probs, scores[[0, 1, 0]])
        bad = {"input_data": [GOOD, f"http://{store}/absent.png", "http://b.example/x.png"]}
        error = server.post("/score", bad).json()["error"]
        assert [entry["index"] for entry in error["errors"]] == [1, 2]
        assert error["code"] == "bad_url"
        # A slow store delays no other request.
        slow = {"input_data": [f"http://{store}/slow/{SAMPLES[1].name}"]}
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.post, "/score", slow)
            time.sleep(0.3)
            for _ in range(5):
                assert server.photo("/classify", PHOTOS[0]).status == 200
            assert not waiting.done()
            assert is_close(waiting.result().json()[0]["probs"], scores[1])


def test_private_address_of_allowed_host_is_refused(store: str) -> None:
    with Server("--allow-urls", store) as server:
        answer = server.post("/score", {"input_data": [f"http://{store}/x.png"]})
    assert (answer.status, answer.code) == (400, "bad_url")
    assert "private network" in answer.json()["error"]["message"]
