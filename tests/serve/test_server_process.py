"""Tests of `vitlib serve` as a process: overload, shutdown, workers, and errors at the start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fixtures.hostile_requests import GOOD, PHOTOS, request
from fixtures.server import (
    Response,
    Server,
)
from vitlib import ViT, ViTConfig, save
from vitlib.errors import ServeError
from vitlib.image.processor import ImageProcessor
from vitlib.serve import run


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes about 50 ms for an image."""
    folder = tmp_path_factory.mktemp("slow")
    cfg = ViTConfig(
        image_size=224, patch_size=8, embed_dim=192, depth=10, num_heads=3, num_classes=3
    )
    half = (0.5,) * 3
    rule = ImageProcessor(shortest_edge=224, crop_size=(224, 224), image_mean=half, image_std=half)
    save(ViT(cfg), folder, image_processor=rule)
    return folder


def test_overload_gets_429_and_sigterm_loses_no_request(slow_model: Path) -> None:
    """Under overload each request gets 200 or 429; after SIGTERM accepted ones are answered."""
    server = Server("--max-backlog-ms", 1000, "--max-batch", 4, model=str(slow_model))
    answers: list[Response | OSError] = []
    stop = threading.Event()

    def send(number: int) -> None:
        while not stop.is_set():
            try:
                answers.append(server.photo("/classify", PHOTOS[number % 10]))
            except OSError as error:  # not accepted: the server ends
                answers.append(error)
                return

    threads = [threading.Thread(target=send, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    before = len(answers)
    start = time.monotonic()
    assert server.end() == 0
    took = time.monotonic() - start
    stop.set()
    for thread in threads:
        thread.join()
    received = [answer for answer in answers if isinstance(answer, Response)]
    assert {answer.status for answer in received} == {200, 429}
    assert all(isinstance(answer, Response) for answer in answers[:before])
    late = next(answer for answer in received if answer.status == 429)
    assert late.code == "overloaded"
    assert int(late.headers["retry-after"]) >= 1
    assert took < 20  # the drain ends by itself, before its 30 s
    assert "Traceback" not in server.final_log


def test_accepted_request_is_answered_after_sigterm(slow_model: Path) -> None:
    with Server("--max-batch", 2, model=str(slow_model)) as server:
        answers: list[Response] = []
        payload = {"input_data": [GOOD] * 16}
        thread = threading.Thread(target=lambda: answers.append(server.post("/score", payload)))
        thread.start()
        time.sleep(0.5)
        server.process.terminate()
        thread.join()
        assert answers[0].status == 200
        assert len(answers[0].json()) == 16
        with pytest.raises(urllib.error.URLError):
            server.get("/health")


def test_workers_share_port_and_metrics() -> None:
    with Server("--workers", 2) as server:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda i: server.photo("/classify", PHOTOS[i % 10]), range(40)))
        assert {answer.status for answer in answers} == {200}
        text = server.get("/metrics").body.decode()
        (line,) = (x for x in text.splitlines() if x.startswith("vitlib_images_total"))
        assert float(line.split()[-1]) >= 40  # the sum of both workers


def test_workers_refuse_connections_after_sigterm() -> None:
    """An accepted request is answered; a later connection is refused and does not hang."""
    server = Server("--workers", 2)
    try:
        body = json.dumps({"input_data": [GOOD]}).encode()
        with socket.create_connection(server.address) as sock:
            sock.sendall(request("/score", body)[:-10])
            time.sleep(0.3)
            server.process.terminate()
            time.sleep(1)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(server.address, timeout=5)
            sock.sendall(body[-10:])
            assert b" 200 " in sock.recv(1000)
    finally:
        assert server.end() == 0


# --- errors at the start --------------------------------------------------------------------------


LOADS_FOREVER = """
import signal, sys
import torch
from vitlib.__main__ import main
from vitlib.cli import serve

signal.signal(signal.SIGINT, signal.default_int_handler)

def load(*_):
    x = torch.randn(800, 800)
    print("loading", flush=True)
    while True:
        x = (x @ x).clamp(-1, 1)

serve._load = load
sys.argv[1:] = ["serve", "--model", "demo", "--port", "0"]
main()
"""


def test_interrupt_during_load_gives_one_line() -> None:
    """The thread that loads the model is in torch, which aborts if Python ends around it."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOADS_FOREVER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.strip()) == (130, "vitlib: error: interrupted")


def run_serve(*options: Any) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "vitlib", "serve", *map(str, options)],
        capture_output=True, text=True, timeout=60, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_serve_rejects_port_in_use() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        status, output = run_serve("--model", "demo", "--port", port)
    assert status == 1
    assert output.count("\n") == 1
    assert f"127.0.0.1:{port}" in output
    assert "in use" in output


def test_listen_rejects_port_taken_during_load() -> None:
    with run.bind("127.0.0.1", 0) as sock, run.bind(*sock.getsockname()) as other:
        other.listen()
        with pytest.raises(ServeError, match="in use"):
            run._listen(sock)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--api-key-file", "absent"], 1, "'absent' cannot be read: No such file"),
        (["--model", "absent"], 1, "absent"),
        (["--model", "absent", "--workers", 2], 1, "absent"),
        (["--host", "no.such.host.invalid"], 1, "cannot listen on no.such.host.invalid"),
        (["--allow-urls", "http://a/b"], 1, "expected a host"),
        (["--allow-urls", "a.com:99999"], 1, "expected a host"),
        (["--allow-urls", "*.*.com"], 1, "expected a host"),
        (["--max-batch", 0], 2, "0 is not in the range"),
        (["--device", "cuda:0", "--workers", 2], 1, "several workers are for a CPU"),
        (["--precision", "auto"], 2, "--calibrate"),
    ],
)
def test_serve_rejects_bad_options(options: list[Any], status: int, words: str) -> None:
    arguments = options if "--model" in options else ["--model", "demo", *options]
    code, output = run_serve("--port", 0, *arguments)
    assert (code, words in output) == (status, True), output
    assert "Traceback" not in output
    if code == 1:  # one line, after that of a slow machine which waits
        lines = [line for line in output.splitlines() if not line.startswith("asking the hub")]
        assert len(lines) == 1, output


def test_serve_rejects_empty_key_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none\n")
    code, output = run_serve("--model", "demo", "--port", 0, "--api-key-file", tmp_path / "keys")
    assert code == 1
    assert "has no key" in output
