"""The Ray engine gives the local one's rows, and an actor that is killed loses none."""

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


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [
        json.loads(x) for p in sorted(out.glob("part-*.jsonl")) for x in p.read_text().splitlines()
    ]


def check_same(one: Path, other: Path) -> None:
    names = [{p.name for p in out.iterdir()} for out in (one, other)]
    assert names[0] == names[1]
    for name in ("errors.jsonl", "ignored.txt", "duplicates.jsonl"):
        assert (one / name).exists() == (other / name).exists()
        if (one / name).exists():
            assert (one / name).read_bytes() == (other / name).read_bytes()
    pairs = list(zip(rows_of(one), rows_of(other), strict=True))
    for a, b in pairs:
        assert {k: a[k] for k in ("file", "row", "labels", "error")} == {
            k: b[k] for k in ("file", "row", "labels", "error")
        }
        if not a["error"]:
            assert np.allclose(a["probs"], b["probs"], atol=1e-5)
            assert np.allclose(a["embedding"], b["embedding"], atol=1e-4)


def actors() -> list[int]:
    """Processes that are an actor of ours."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"ray::" in command and b"_Actor" in command:
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize("killed", [False, True])
def test_the_same_rows(tmp_path: Path, killed: bool) -> None:
    write_photos(tmp_path / "in", 3000 if killed else 300, "JPEG")
    for number, make in enumerate(BROKEN.values()):
        make(tmp_path / "in" / f"x{number}.jpg")
    (tmp_path / "in" / "copy.jpg").write_bytes((tmp_path / "in" / "0000.jpeg").read_bytes())
    (tmp_path / "in" / "notes.txt").write_text("none")
    settings: dict[str, Any] = {
        "model": Predictor.load(DEMO), "task": "both", "shard_size": 128, "batch_size": 16,
    }  # fmt: skip
    batch.run(tmp_path / "in", out=tmp_path / "local", **settings)
    victims: list[int] = []

    def kill() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and not victims:
            time.sleep(0.2)
            if list((tmp_path / "ray" / ".run").glob("*.rows")):  # rows have come
                for process in actors()[:1]:
                    victims.append(process)
                    os.kill(process, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    if killed:
        thread.start()
    found = batch.run(tmp_path / "in", out=tmp_path / "ray", engine="ray", workers=2, **settings)
    if killed:
        thread.join()
        assert victims
    assert found.complete
    assert found.failed == len(BROKEN)
    check_same(tmp_path / "local", tmp_path / "ray")


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "127.0.0.1:70000"])
def test_no_cluster_is_told_before_any_work(tmp_path: Path, address: str) -> None:
    with socket.socket() as taken:  # a port at which nobody listens
        taken.bind(("127.0.0.1", 0))
        where = address.format(taken.getsockname()[1])
        with pytest.raises(ConfigError, match=f"no Ray cluster at {where}"):
            batch.run(write_photos(tmp_path / "in", 1), model=DEMO, out=tmp_path / "out",
                      engine="ray", address=where)  # fmt: skip
    assert not (tmp_path / "out").exists()
