"""Long single jobs show that they live."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from fixtures.command_line import Run, make_workplace
from vitlib import explain
from vitlib.cli import predictors
from vitlib.cli.printing import show_life
from vitlib.source import hub


def test_long_job_prints_a_line_and_a_short_one_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with show_life("computing", after=5):
        pass
    assert capsys.readouterr().err == ""
    with show_life("computing\x1b[31m", after=0.05):
        time.sleep(0.3)
    assert capsys.readouterr().err == "computing\\x1b[31m ...\n"


def test_terminal_counts_the_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with show_life("computing", after=0.05):
        time.sleep(1.3)
    err = capsys.readouterr().err
    assert err.startswith("\rcomputing ... 1 s")
    assert err.endswith("\r\x1b[K")


def test_hub_that_does_not_answer_is_named_at_once(
    run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_workplace(tmp_path))

    def wait() -> bool:
        time.sleep(1.5)
        return True

    monkeypatch.setattr(hub, "is_hub_unreachable", wait)
    _, _, err = run_cli("classify", "photo.jpg", "-m", "no/such-model")
    assert err.splitlines()[0] == (
        "asking the hub for no/such-model; --model demo needs no network ..."
    )
    with predictors.asking_hub("demo"), predictors.asking_hub(str(tmp_path)):
        time.sleep(1.2)


def test_slow_explanation_prints_a_line(
    run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_workplace(tmp_path))
    compute = explain.occlusion

    def slow(*arguments: object, **options: object) -> object:
        time.sleep(3.2)
        return compute(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(explain, "occlusion", slow)
    command = ("attend", "-m", "demo", "photo.jpg", "--method", "occlusion", "-o", "map.png")
    assert run_cli(*command)[2] == "computing occlusion of photo.jpg ...\n"
