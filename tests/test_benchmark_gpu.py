"""Tests of the GPU benchmark, small and on the CPU: every part, the limits, the summary."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from paths import ROOT

sys.path.append(str(ROOT))  # python -m adds the current folder instead

from benchmarks.gpu import hazards, run, summary
from benchmarks.gpu.experiment import Experiment

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python from the root of the checkout."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def read_rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_part_runs_without_error(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = run_python("-m", "benchmarks.gpu", "--dry", "--out", str(out))
    assert process.returncode == 0, process.stderr
    rows = read_rows(out)
    assert not [row for row in rows if "error" in row]
    assert sorted(row["part"] for row in rows if row["kind"] == "parts") == sorted(
        part.name for part in run.PARTS
    )
    assert all(row["passed"] for row in rows if row["kind"] == "hazards")
    assert [row["code"] for row in rows if row["kind"] == "tests"] == [0]
    assert len(list(out.iterdir())) <= 6
    text = (out / "summary.md").read_text()
    assert process.stdout.strip() == text[: run.MAX_PRINTED].strip()
    # Each goal finds its figure, except for libraries that are not installed here.
    absent = {"timm": "timm", "Trainer": "accelerate"}
    for goal in summary.GOALS:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {goal.name} |")]
        needs = next((package for name, package in absent.items() if name in goal.name), "torch")
        status = "dry run" if importlib.util.find_spec(needs) else "not measured"
        assert line.endswith(f"| {status} |"), line


LIMITS = """
import multiprocessing, os, subprocess, sys, time, types
from pathlib import Path
from benchmarks.gpu.experiment import Experiment
from benchmarks.gpu.run import PartRunner, Part

def sleep(experiment):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    experiment.record("child", pid=child.pid)
    time.sleep(60)

def fail(experiment):
    raise ValueError("not a number")

if __name__ == "__main__":
    sys.modules["benchmarks.gpu.fake"] = types.SimpleNamespace(
        sleep=sleep, fail=fail, exit=lambda experiment: os._exit(3))
    experiment = Experiment(Path(sys.argv[1]), Path(sys.argv[1]), is_dry=True)
    runner = PartRunner(experiment, budget=600)
    runner.run([Part(name, "fake:" + name, limit) for name, limit in
                (("sleep", 1), ("fail", 60), ("exit", 60))], side_by_side=True)
    runner.context = multiprocessing.get_context("spawn")  # as on a GPU
    runner.run([Part("environment", "environment:record_environment", 60)])
    runner.end = time.monotonic() + 5
    runner.run([Part("late", "fake:sleep", 60)])
"""


def test_interrupted_part_does_not_affect_others(tmp_path: Path) -> None:
    script, out = tmp_path / "limits.py", tmp_path / "out"
    script.write_text(LIMITS)
    out.mkdir()
    process = run_python(str(script), str(out))
    assert process.returncode == 0, process.stderr
    rows = read_rows(out)
    errors = {row["part"]: row["error"] for row in rows if "error" in row}
    assert errors == {
        "sleep": "killed: the time limit was exceeded",
        "fail": "ValueError: not a number",
        "exit": "exited with code 3",
    }
    assert [row["part"] for row in rows if "seconds" in row] == ["environment"]
    assert [row["what"] for row in rows if row["kind"] == "left out"] == ["late"]
    (child,) = [row["pid"] for row in rows if row["kind"] == "child"]
    state = Path(f"/proc/{child}/stat")  # the part's child is killed too
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert "not a number" in (out / "log.txt").read_text()


def make_rows(gpu: str, **changes: float) -> list[dict[str, Any]]:
    """Return rows whose figures equal each goal's bound on an H200, except for changes."""
    figure = {"bf16": 17_500.0, "fp8": 21_000.0, "ms": 0.45, "transformers": 1.8, "timm": 1.25}
    figure |= {"training": 1.3, "photos": 0.95, "memory": 0.7} | changes
    models = {"kind": "models", "batch": 512, "input": "uint8"}
    turns = {"kind": "turns", "batch": 512}
    memory = {"kind": "memory", "batch": 512}
    return [
        {"kind": "environment", "gpu": gpu, "largest_batch": 512},
        {**models, "side": "vitlib bf16", "img_s": figure["bf16"]},
        {**models, "side": "vitlib fp8", "img_s": figure["fp8"]},
        {**models, "side": "vitlib bf16", "input": "pixels", "batch": 1, "p50_ms": figure["ms"]},
        {**models, "side": "vitlib bf16", "batch": 1, "img_s": 1e9},  # another batch size
        {**turns, "side": "transformers bf16", "times_vitlib": figure["transformers"]},
        {**turns, "side": "timm bf16 compiled", "times_vitlib": figure["timm"]},
        {"kind": "training", "side": "Trainer", "img_s": 1000.0},
        {"kind": "training", "side": "vitlib", "img_s": 1000 * figure["training"]},
        {"kind": "photos", "workload": "decoding alone", "photos_s": 500.0},
        {"kind": "photos", "workload": "decoding alone", "photos_s": 1000.0},
        {"kind": "photos", "workload": "model alone", "photos_s": 9000.0},
        {"kind": "photos", "workload": "Predictor", "photos_s": 1000 * figure["photos"]},
        {"kind": "photos", "workload": "vitlib.batch", "photos_s": 1000 * figure["photos"]},
        {**memory, "side": "transformers bf16", "allocated_mib": 1000},
        {**memory, "side": "vitlib bf16", "allocated_mib": 1000 * figure["memory"]},
    ]


def goal_statuses(tmp_path: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Return the status of each goal, in the order of GOALS."""
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    goals = summary.summarize(path).partition("## Goals")[2].partition("##")[0].splitlines()
    return [line.split("|")[-2].strip() for line in goals[4:] if line]


@pytest.mark.parametrize(
    ("gpu", "changes", "short"),
    [
        (H200, {}, ()),
        (H200, {"bf16": 16_000}, (0,)),
        (H100, {"bf16": 16_000}, ()),
        (H100, {"bf16": 15_999}, (0,)),
        (H200, {"fp8": 20_999, "ms": 0.4501}, (1, 2)),
        (H200, {"transformers": 1.79, "timm": 1.249, "training": 1.299}, (3, 4, 5)),
        (H200, {"photos": 0.94, "memory": 0.701}, (6, 7, 8)),
    ],
)
def test_goals_are_met_at_their_bounds(
    tmp_path: Path, gpu: str, changes: dict[str, float], short: tuple[int, ...]
) -> None:
    result = goal_statuses(tmp_path, make_rows(gpu, **changes))
    assert result == ["short" if i in short else "met" for i in range(len(summary.GOALS))]


def test_errors_precede_tables(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    tests = {"kind": "tests", "file": "test_a.py", "code": 1, "failed": ["FAILED test_a.py::b"]}
    part = {"kind": "parts", "part": "prepare", "error": "exited with code 3"}
    path.write_text("\n".join(json.dumps(row) for row in (*make_rows(H200), tests, part)))
    text = summary.summarize(path)
    errors = text.partition("## Errors")[2].partition("##")[0]
    assert errors.split("\n")[2:4] == [
        "- kind parts, part prepare, error exited with code 3",
        "- FAILED test_a.py::b",
    ]
    assert text.index("## Goals") < text.index("## Errors") < text.index("## Tests marked cuda")


def test_goal_without_figure_is_not_measured(tmp_path: Path) -> None:
    assert set(goal_statuses(tmp_path, [])) == {"not measured"}
    rows = [row for row in make_rows(H200) if row.get("side") != "Trainer"]
    failed = {"kind": "photos", "workload": "model alone", "error": "RuntimeError: ..."}
    rows = [failed if row.get("workload") == "model alone" else row for row in rows]
    result = goal_statuses(tmp_path, rows)
    assert [i for i, status in enumerate(result) if status == "not measured"] == [5, 6, 7]


def exit_message(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Run the command line, and return its exit message."""
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        run.main()
    return exit_info.value.code


def test_run_without_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = exit_message(monkeypatch, "--out", str(tmp_path / "out"))
    assert str(message).endswith("finds no GPU: use --dry to run everything on a CPU")
    assert not (tmp_path / "out").exists()


def test_results_of_another_run_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.jsonl").touch()
    assert exit_message(monkeypatch, "--dry", "--out", str(tmp_path)) == 2
    message = "has the results of another run: use another --out"
    assert message in capsys.readouterr().err
    out = str(tmp_path / "out")
    assert exit_message(monkeypatch, "--dry", "--out", out, "--parts", "nothing") == 2
    assert (
        "expected words of one of: record environment; prepare checkpoint;"
        in capsys.readouterr().err
    )


def test_environment_sets_photo_and_model_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITLIB_SHARED", str(tmp_path))
    for path in (ROOT / "benchmarks" / "setting.py", ROOT / "tests" / "paths.py"):
        assert runpy.run_path(str(path))["SHARED"] == tmp_path


def test_every_file_with_gpu_tests_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[Path] = []
    monkeypatch.setattr(hazards, "run_test_file", lambda _, path: files.append(path))
    hazards.run_tests(Experiment(tmp_path, tmp_path))
    mark = ".".join(("pytest", "mark", "cuda"))  # in full it would be found here as well
    assert {*files} == {p for p in (ROOT / "tests").rglob("*.py") if mark in p.read_text()}
    assert {path.parent.name for path in files} >= {"tests", "testing"}


def test_failures_are_found_where_pytest_was_killed() -> None:
    lines = ["tests/test_a.py::test_b[x y] PASSED", "tests/test_a.py::test_c FAILED [ 40%]"]
    assert hazards.find_failures(lines) == lines[1:]
    assert hazards.find_outcome(lines) == ""
    ended = [
        *lines,
        "FAILED tests/test_a.py::test_c - ValueError",
        "== 1 failed, 1 passed in 2 s ==",
    ]
    assert hazards.find_failures(ended) == ended[2:3]
    assert hazards.find_outcome(ended) == "1 failed, 1 passed in 2 s"
