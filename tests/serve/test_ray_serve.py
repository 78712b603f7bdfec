"""Tests of two replicas behind Ray Serve, one of which is killed under load: make test-ray."""

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
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.server import SAMPLES, encode_base64
from paths import ROOT
from vitlib import Predictor

pytestmark = pytest.mark.ray

SCRIPT = ROOT / "examples/serve/ray_serve.py"
TEXTS = [encode_base64(path.read_bytes()) for path in SAMPLES]


def replicas() -> list[int]:
    """Return the process ids of the model's replicas."""
    processes = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::ServeReplica:default:Vit" in path.read_bytes():
                processes.append(int(path.parent.name))
        except OSError:
            continue  # the process ended meanwhile
    return processes


def send_request(address: str, payload: Any) -> Any:
    body = json.dumps(payload).encode()
    request = urllib.request.Request(address, data=body)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def probs(address: str, number: int) -> Any:
    return send_request(address, {"input_data": [TEXTS[number % len(TEXTS)]]})[0]["probs"]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("ray", reason="make test-ray installs it")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, str(SCRIPT), "demo", "--replicas", "2", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}/"
        deadline = time.monotonic() + 180
        while True:
            try:
                probs(url, 0)
                break
            except OSError:
                waits = process.poll() is None and time.monotonic() < deadline
                assert waits, (tmp_path / "log").read_text()[-2000:]
                time.sleep(1)
        yield url
        process.terminate()
        process.wait(timeout=60)


def test_killed_replica_loses_no_request(address: str) -> None:
    expected = Predictor.load("demo").probabilities([str(path) for path in SAMPLES])
    right, wrong = [0], []
    stop = threading.Event()

    def client(number: int) -> None:
        while not stop.is_set():
            try:
                row = np.array(probs(address, number))
                if np.abs(row - expected[number % len(TEXTS)]).max() > 1e-5:
                    wrong.append(f"image {number}: {row}")
            except OSError as error:
                wrong.append(str(error))
            right[0] += 1
            number += 8

    threads = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(3)
    both = replicas()
    before = right[0]
    os.kill(both[0], signal.SIGKILL)
    deadline = time.monotonic() + 90
    while len(set(replicas()) - {both[0]}) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(3)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(both) == 2
    assert not wrong
    assert right[0] > before > 0
    assert len(replicas()) == 2  # a new one replaced it


def test_bad_image_gets_400(address: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        send_request(address, {"input_data": [TEXTS[0], "AAAA"]})
    with caught.value as error:
        assert error.code == 400
        assert json.load(error)["error"]["index"] == 1
