"""What hands type by mistake, each with one line that says what to do."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

import vitlib
from fixtures.command_line import Run, make_workplace
from vitlib.errors import ConfigError
from vitlib.train import TrainConfig


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_workplace(tmp_path))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("predict", "photo.jpg"), "vitlib has no verb 'predict': did you mean classify?"),
        (("train", "photos"), "did you mean finetune?"),
        (("version",), "did you mean --version?"),
        (("finetune", "--resume", "--out", "nosuch"), "nosuch holds no run to resume"),
        (
            ("finetune", "photos/cat", "-m", "demo", "-o", "a"),
            "photos/cat: 4 photos and no folder of a class in it: expected a folder with a folder",
        ),
        (
            ("classify", "photo.jpg", "-m", "mine", "--device", "gpu"),
            "device='gpu' cannot be had on this machine with this torch: expected cpu",
        ),
    ],
)
def test_mistake_is_one_line(run_cli: Run, command: tuple[str, ...], message: str) -> None:
    status, _, err = run_cli(*command)
    assert status != 0
    assert message in err
    assert "Traceback" not in err


def test_list_on_stdin_whose_first_path_is_not_there(
    run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stdin(io.StringIO):
        buffer: Any = io.BytesIO(b"nosuch.jpg\nphoto.jpg\n")

    monkeypatch.setattr(sys, "stdin", Stdin())
    status, _, err = run_cli("classify", "-", "-m", "demo")
    assert status == 1
    assert "stdin is text, and its first line 'nosuch.jpg' names no file" in err


def test_short_names_are_settings_everywhere() -> None:
    short = TrainConfig.from_dict({"epochs": 2, "lr": 1e-3, "batch_size": 4})
    assert short.run.num_train_epochs == 2
    assert short.optim.learning_rate == 1e-3
    assert short.run.per_device_train_batch_size == 4
    with pytest.raises(ConfigError, match="num_train_epochs"):
        TrainConfig.from_dict({"epochs": 2, "num_train_epochs": 3})


def test_labels_with_commas_are_told_apart(run_cli: Run) -> None:
    err = run_cli("evaluate", "demo", "photos", "-o", "report")[2]
    first = vitlib.Predictor.load("demo").labels[0]
    assert f"are not among the classes ({first!r}, " in err


def test_saving_over_a_run_drops_its_lists(run_cli: Run) -> None:
    run_cli("finetune", "photos", "-m", "demo", "-o", "run")
    assert Path("run/training.csv").exists()
    vitlib.Predictor.load("demo").save("run")
    assert not Path("run/training.csv").exists()
