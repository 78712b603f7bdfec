"""Pause of the garbage collector: restored afterwards, and no object is walked or exempted."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from vitlib.system.garbage import MAX_IMMORTAL, pause_collection


@pytest.fixture(autouse=True)
def restored_collector() -> Iterator[None]:
    gc.unfreeze()  # what commands of earlier tests froze
    yield
    gc.unfreeze()
    gc.enable()


def collections() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def test_pause_collects_nothing_and_makes_objects_old() -> None:
    gc.collect()
    before = collections()
    with pause_collection():
        assert not gc.isenabled()
        objects = [[index] for index in range(50_000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() < MAX_IMMORTAL
    assert collections() == before
    assert gc.get_count()[0] < 50_000
    assert len(objects) == 50_000


def test_pause_leaves_garbage_to_later_collections() -> None:
    gc.collect()
    with pause_collection():
        cycle: list[object] = []
        cycle.append(cycle)
        del cycle
    assert gc.collect() >= 1
    with pause_collection(permanent=True):
        cycle = []
        cycle.append(cycle)
        del cycle
    assert gc.get_freeze_count() > MAX_IMMORTAL
    assert gc.collect() == 0


def test_pause_keeps_a_disabled_collector_and_frozen_objects() -> None:
    gc.disable()
    with pause_collection():
        pass
    assert not gc.isenabled()
    gc.enable()
    gc.freeze()
    count = gc.get_freeze_count()
    with pause_collection():
        pass
    assert gc.get_freeze_count() >= count - 100
    assert gc.isenabled()


def test_public_names_are_loaded_without_a_collection() -> None:
    script = (
        "import gc, vitlib\n"
        "before = [g['collections'] for g in gc.get_stats()]\n"
        "vitlib.Predictor\n"
        "after = [g['collections'] for g in gc.get_stats()]\n"
        f"assert gc.isenabled() and gc.get_freeze_count() < {MAX_IMMORTAL}\n"
        "print(after[1] - before[1], after[2] - before[2])\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert process.stdout == "0 0\n"
