"""What finetune prints while it runs, its lists of photos, Ctrl-C, and --resume without flags."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fixtures.command_line import Run, make_workplace
from paths import ROOT
from vitlib.data import read_photos
from vitlib.train.evaluations import Evaluation, due_steps, format_seconds, make_table

LINE = re.compile(
    r"epoch \d+ of \d+, training loss \d\.\d{4}, validation loss \d\.\d{4}, accuracy \d\.\d{4}"
    r"( \(best\))?, rate \S+, \d+ s left"
)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(make_workplace(tmp_path))
    return tmp_path


def test_each_evaluation_is_a_line_and_the_end_a_table(run_cli: Run, workplace: Path) -> None:
    command = ("finetune", "photos", "-m", "demo", "--lr", 1e-3, "--batch-size", 3)
    status, out, err = run_cli(*command, "--epochs", 4, "-o", "a")
    assert status == 0
    lines = err.splitlines()
    assert len(lines) == 4
    assert all(LINE.fullmatch(line) for line in lines), err
    table = out.split("\n\n")[0].splitlines()
    assert table[0].split() == ["epoch", "training", "loss", "validation", "loss", "accuracy"]
    assert len(table) == 5
    assert sum("best" in row for row in table) == 1
    # log_loss is the loss: it is not printed again.
    assert "log_loss" not in out
    settings = json.loads((workplace / "a/run.json").read_text())["config"]
    assert settings["optim"]["learning_rate"] == 1e-3
    assert settings["run"]["per_device_train_batch_size"] == 3
    assert run_cli(*command, "--epochs", 1, "-o", "b", "-q")[2] == ""
    status, out, err = run_cli(*command, "--epochs", 2, "-o", "c", "--validation-split", 0)
    assert re.fullmatch(
        r"epoch 1 of 2, training loss \S+, rate \S+, \d+ s left", err.split("\n")[0]
    )
    assert out.splitlines()[0].split() == ["epoch", "training", "loss"]


def test_held_out_photos_are_a_list_for_evaluate(run_cli: Run, workplace: Path) -> None:
    run_cli("finetune", "photos", "-m", "demo", "--epochs", 1, "-o", "mine2")
    held_out, trained = (
        {photo.path for photo in read_photos(workplace / f"mine2/{name}.csv").photos}
        for name in ("validation", "training")
    )
    assert len(held_out) == 2
    assert held_out | trained == set((workplace / "photos").rglob("*.jpg"))
    assert not held_out & trained
    status, out, _ = run_cli("evaluate", "mine2", "mine2/validation.csv", "-o", "r")
    assert (status, "2 photos of mine2/validation.csv" in out) == (0, True)


def test_resume_remembers_settings(run_cli: Run, workplace: Path) -> None:
    flags = ("--epochs", 2, "--lr", 2e-3, "--class-map", "map.json", "--augment", "none")
    (workplace / "map.json").write_text(json.dumps({"cat": "Cat", "dog": "Dog"}))
    run_cli("finetune", "photos", "-m", "demo", *flags, "-o", "whole")
    run_cli("finetune", "photos", "-m", "demo", *flags, "-o", "a")
    weights = Path("a/model.safetensors").read_bytes()
    Path("a/model.safetensors").unlink()
    status, out, err = run_cli("finetune", "--resume", "-o", "a")
    assert status == 0, err
    assert "labels      Cat, Dog" in out
    assert Path("a/model.safetensors").read_bytes() == weights
    assert Path("whole/model.safetensors").read_bytes() == weights
    status, _, err = run_cli("finetune", "--resume", "-o", "a", "--lr", 0.5)
    assert (status, "another config, learning_rate (0.002)" in err) == (1, True)
    status, _, err = run_cli("finetune", "--resume", "-o", "nothing")
    assert (status, "nothing holds no run to resume" in err) == (1, True)


def test_interrupted_run_keeps_a_checkpoint_and_continues(run_cli: Run, workplace: Path) -> None:
    for index in range(64):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(workplace / f"photos/cat/{index}.png")
    command = ["finetune", "photos", "-m", "demo", "--epochs", "40", "--augment", "none"]
    command += ["--batch-size", "4", "--eval-epochs", "40"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vitlib", *command, "-o", "a"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    history = workplace / "a/metrics.jsonl"
    while process.poll() is None and not (history.exists() and history.stat().st_size > 500):
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "`vitlib finetune --resume --out a` continues the run" in err
    [checkpoint] = (workplace / "a/checkpoints").iterdir()
    assert 0 < int(checkpoint.name.split("-")[1]) < 40 * 14
    assert run_cli("finetune", "--resume", "-o", "a")[0] == 0
    assert run_cli(*command, "-o", "b")[0] == 0
    first, second = (Path(name, "model.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_table_of_many_evaluations_keeps_best_and_last() -> None:
    rows = [
        Evaluation(i, float(i), 99.0, 0.5, 0.4, "accuracy", 0.9, 1e-4, i == 7)
        for i in range(1, 100)
    ]
    table = make_table(rows)
    assert len(table) <= 23
    assert [row[0] for row in table if row[-1] == "best"] == ["7"]
    assert table[-1][0] == "99"
    assert make_table([]) == []


@pytest.mark.parametrize(
    ("last", "total", "interval", "expected"),
    [(0, 10, 4, []), (0, 0, 4, []), (9, 10, 4, [4, 8]), (10, 10, 4, [4, 8, 10]), (8, 8, 4, [4, 8])],
)
def test_evaluations_are_due(last: int, total: int, interval: int, expected: list[int]) -> None:
    assert due_steps(last, total, interval) == expected


def test_durations_have_two_units() -> None:
    assert [format_seconds(s) for s in (0.2, 59.4, 80, 7500)] == [
        "0 s",
        "59 s",
        "1 min 20 s",
        "2 h 5 min",
    ]
