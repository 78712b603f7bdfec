"""Tests that the Ray engine computes the rows of the local one, even if an actor is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.synthetic_photos import BROKEN, DEMO, write_photos
from vitlib import Predictor, batch
from vitlib.errors import ConfigError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]


def read_rows(out: Path) -> list[dict[str, Any]]:
    return [
        json.loads(x) for p in sorted(out.glob("part-*.jsonl")) for x in p.read_text().splitlines()
    ]


def check_equal_runs(first: Path, second: Path) -> None:
    names = [{p.name for p in out.iterdir()} for out in (first, second)]
    assert names[0] == names[1]
    for name in ("errors.jsonl", "ignored.txt", "duplicates.jsonl"):
        assert (first / name).exists() == (second / name).exists()
        if (first / name).exists():
            assert (first / name).read_bytes() == (second / name).read_bytes()
    pairs = list(zip(read_rows(first), read_rows(second), strict=True))
    for a, b in pairs:
        assert {k: a[k] for k in ("file", "row", "labels", "error")} == {
            k: b[k] for k in ("file", "row", "labels", "error")
        }
        if not a["error"]:
            assert np.allclose(a["probs"], b["probs"], atol=1e-5)
            assert np.allclose(a["embedding"], b["embedding"], atol=1e-4)


def find_actors() -> list[int]:
    """Return the process ids of the actors."""
    process_ids = []
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"ray::" in command and b"_Actor" in command:
            process_ids.append(int(folder.name))
    return process_ids


@pytest.mark.parametrize("killed", [False, True])
def test_ray_engine_writes_equal_rows(tmp_path: Path, killed: bool) -> None:
    write_photos(tmp_path / "in", 3000 if killed else 300, "JPEG")
    for number, make in enumerate(BROKEN.values()):
        make(tmp_path / "in" / f"x{number}.jpg")
    (tmp_path / "in" / "copy.jpg").write_bytes((tmp_path / "in" / "0000.jpeg").read_bytes())
    (tmp_path / "in" / "notes.txt").write_text("none")
    settings: dict[str, Any] = {
        "model": Predictor.load(DEMO), "task": "both", "shard_size": 128, "batch_size": 16,
    }  # fmt: skip
    batch.run(tmp_path / "in", out=tmp_path / "local", **settings)
    killed_processes: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed_processes:
            time.sleep(0.2)
            if list((tmp_path / "ray" / ".run").glob("*.rows")):  # the first rows are written
                for process in find_actors()[:1]:
                    killed_processes.append(process)
                    os.kill(process, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    if killed:
        thread.start()
    result = batch.run(tmp_path / "in", out=tmp_path / "ray", engine="ray", workers=2, **settings)
    if killed:
        thread.join()
        assert killed_processes
    assert result.complete
    assert result.failed == len(BROKEN)
    check_equal_runs(tmp_path / "local", tmp_path / "ray")


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "127.0.0.1:70000"])
def test_missing_cluster_is_reported_before_work(tmp_path: Path, address: str) -> None:
    with socket.socket() as sock:  # a port without a listener
        sock.bind(("127.0.0.1", 0))
        resolved = address.format(sock.getsockname()[1])
        with pytest.raises(ConfigError, match=f"no Ray cluster at {resolved}"):
            batch.run(write_photos(tmp_path / "in", 1), model=DEMO, out=tmp_path / "out",
                      engine="ray", address=resolved)  # fmt: skip
    assert not (tmp_path / "out").exists()
