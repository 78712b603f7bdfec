"""Cores by affinity and by the quota of a control group, tried by pretending."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vitlib.fast.cpu import tokens_at_a_time
from vitlib.system import cores


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of 64 cores; write `cpu.max`, or `quota` and `period`, into the folder."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    files = ((f"{tmp_path}/cpu.max",), (f"{tmp_path}/quota", f"{tmp_path}/period"))
    monkeypatch.setattr(cores, "_QUOTAS", files)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "10000 100000\n"}, 1),
        ({"cpu.max": "9999999 100000\n"}, 64),
        ({"cpu.max": "no numbers\n"}, 64),
        ({"quota": "-1\n", "period": "100000\n"}, 64),
        ({"quota": "400000\n", "period": "100000\n"}, 4),
        ({"quota": "400000\n"}, 64),
    ],
)
def test_cores_are_what_the_process_may_use(
    pretend: Path, files: dict[str, str], expected: int
) -> None:
    for name, text in files.items():
        (pretend / name).write_text(text)
    assert cores.count_cores() == expected


def test_affinity_counts_where_it_is_smaller(
    pretend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pretend / "cpu.max").write_text("800000 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    assert cores.count_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.count_cores() == 1


def test_quota_limits_openmp_unless_its_variable_is_set(
    pretend: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores.respect_quota()
    assert "OMP_NUM_THREADS" not in os.environ
    (pretend / "cpu.max").write_text("300000 100000")
    cores.respect_quota()
    assert os.environ.pop("OMP_NUM_THREADS") == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    cores.respect_quota()
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("threads", "tokens"), [(1, 1600), (2, 1600), (4, 3200), (16, 12_800), (128, 12_800)]
)
def test_micro_batches_grow_with_the_threads(threads: int, tokens: int) -> None:
    assert tokens_at_a_time(threads) == tokens
