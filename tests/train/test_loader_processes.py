"""Reader processes: their order, their death, and what they leave behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from fixtures.training_batches import (
    RULE,
    make_plan,
    read_batches,
)
from paths import ROOT
from vitlib.errors import ConfigError, TrainError
from vitlib.train.augment import Augment
from vitlib.train.loader.loader import PhotoLoader
from vitlib.train.sampler import BatchPlan

pytestmark = pytest.mark.usefixtures("no_leftovers")


def worker_pids(loader: PhotoLoader) -> list[int]:
    assert loader._pool is not None
    return [process.pid or 0 for process in loader._pool._processes]


class SlowPhotos(Sequence[Path]):
    """Photos, one of which takes longer to read than any test."""

    def __init__(self, paths: list[Path], slow: int) -> None:
        self.paths, self.slow = paths, slow

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Path:  # type: ignore[override]
        if index == self.slow:
            time.sleep(600)
        return self.paths[index]


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_worker_raises(paths: list[Path], victim: int) -> None:
    """Either the process whose batch is awaited, or another."""
    loader = PhotoLoader(SlowPhotos(paths, 5), RULE, workers=2)
    batches = loader.batches(
        [
            make_plan(0, [0]),
            make_plan(0, [1]),
            make_plan(0, [5]),
            make_plan(0, [2]),
            make_plan(0, [3]),
        ]
    )
    assert next(batches).samples == (0,)
    assert next(batches).samples == (1,)
    pids = worker_pids(loader)
    killer = threading.Timer(0.3, os.kill, (pids[victim], signal.SIGKILL))
    killer.start()
    start = time.monotonic()
    with pytest.raises(
        TrainError, match=f"loader process {pids[victim]} was killed by SIGKILL: "
    ) as raised:
        next(batches)
    assert time.monotonic() - start < 20
    assert "\n" not in str(raised.value)
    killer.join()
    assert not multiprocessing.active_children()
    with pytest.raises(TrainError, match="closed, or one of its processes has ended"):
        next(loader.batches([make_plan(0, [0])]))
    loader.close()


def test_failed_worker_raises(paths: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    with PhotoLoader(paths, RULE, workers=1) as loader:
        batches = loader.batches([make_plan(0, [0]), make_plan(0, [99])])
        with pytest.raises(TrainError, match="ended with status 1"):
            list(batches)
    assert "IndexError" in capfd.readouterr().err


def test_close_ends_pending_reads(paths: list[Path]) -> None:
    loader = PhotoLoader(SlowPhotos(paths, 3), RULE, workers=2)
    batches = loader.batches(
        [make_plan(0, [0]), make_plan(0, [3]), make_plan(0, [1]), make_plan(0, [3])]
    )
    assert next(batches).samples == (0,)
    pids = worker_pids(loader)
    start = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - start < 20
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with pytest.raises(TrainError, match="the loader is closed"):
        next(batches)
    with pytest.raises(ConfigError, match="the loader is closed"):
        next(loader.batches([make_plan(0, [0])]))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_evaluation_runs_within_an_epoch(paths: list[Path], workers: int) -> None:
    """So do an epoch that is abandoned, and batches that grow."""
    epoch = [make_plan(0, [n, n + 1], step=n) for n in range(0, 12, 2)]
    expected = read_batches(PhotoLoader(paths, RULE, Augment()), epoch)
    exact = RULE(paths)
    with PhotoLoader(paths, RULE, Augment(), workers=workers) as loader:
        left = loader.batches(epoch)
        assert torch.equal(next(left).pixels, expected[0].pixels)
        batches = loader.batches(epoch)
        for number, batch in enumerate(batches):
            assert torch.equal(batch.pixels, expected[number].pixels)
            if number in (1, 2, 4):
                actual = torch.cat([b.pixels for b in loader.evaluation_batches(4 + number)])
                assert torch.equal(actual, exact)
            if number == 2:
                assert torch.equal(next(left).pixels, expected[1].pixels)
                left.close()  # type: ignore[attr-defined]
        assert number == 5
        if loader._pool is not None:
            assert not loader._pool._done


def test_plans_are_taken_a_bounded_number_ahead(paths: list[Path]) -> None:
    for workers, ahead in ((0, 2), (2, 4)):
        num_plans = 0

        def plans() -> Iterator[BatchPlan]:
            nonlocal num_plans
            for number in range(100):
                num_plans += 1
                yield make_plan(0, [number % 12], step=number)

        with PhotoLoader(paths, RULE, workers=workers) as loader:
            batches = loader.batches(plans())
            for taken in range(1, 9):
                next(batches)
                assert num_plans == taken - 1 + ahead
            batches.close()  # type: ignore[attr-defined]


def start_script(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


SCRIPT = """
    import sys, time
    import torch
    from vitlib import ImageProcessor
    from vitlib.train.augment import Augment
    from vitlib.train.sampler import BatchPlan
    from vitlib.train.loader.loader import PhotoLoader
    torch.mm(torch.rand(500, 500), torch.rand(500, 500)).sum()  # threads of torch's own
    loader = PhotoLoader(sys.argv[2:], ImageProcessor(size=(32, 32)), Augment.strong(), workers=2)
    batches = loader.batches(BatchPlan(0, n, (0, 1, 2)) for n in range(20))
    total = next(batches).pixels.sum()
    print(*[p.pid for p in loader._pool._processes], flush=True)
    with open("/proc/self/maps") as file:  # a file with a name would stay after a kill
        named = [line for line in file if "/dev/shm" in line and "(deleted)" not in line]
    assert not named, named
    if sys.argv[1] == "sleep":
        time.sleep(600)
    total = sum(batch.pixels.sum() for batch in batches)
    if sys.argv[1] == "close":
        loader.close()
    print("done", flush=True)
"""


@pytest.mark.parametrize("ending", ["close", "leave"])
def test_script_leaves_no_process_or_file(paths: list[Path], ending: str) -> None:
    """No warning, semaphore, process or temporary file, even if it does not close the loader."""
    process = start_script(SCRIPT, ending, *paths[:3])
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    pids, done = out.splitlines()
    assert done == "done"
    for pid in map(int, pids.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_end_with_killed_parent(paths: list[Path]) -> None:
    process = start_script(SCRIPT, "sleep", *paths[:3])
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    process.communicate(timeout=60)
    end = time.monotonic() + 30
    while any(
        Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
        for pid in pids
    ):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_loader_uses_threads_without_fork(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vitlib.train.loader.loader.can_fork", lambda: False)
    with caplog.at_level("INFO", "vitlib"):
        loader = PhotoLoader(paths, RULE, workers=2)
    assert "this system cannot fork: threads read the photos" in caplog.text
    assert torch.equal(read_batches(loader, [make_plan(0, range(12))])[0].pixels, RULE(paths))
