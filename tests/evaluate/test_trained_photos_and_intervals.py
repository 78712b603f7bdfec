"""Wilson's interval of shares, and the note about photos that trained the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fixtures.command_line import Run, make_workplace
from vitlib.evaluate.intervals import bootstrap, wilson
from vitlib.metrics import per_photo


def test_all_correct_has_wilsons_interval() -> None:
    targets = np.arange(18) % 2
    scores = np.where(targets[:, None] == np.arange(2), 0.9, 0.1)
    intervals = bootstrap(per_photo(targets, scores, False), 50)
    # Wilson 1927 for 18 of 18 at 95 %.
    assert intervals["accuracy"] == pytest.approx((0.8241, 1.0), abs=1e-4)
    assert intervals["f1_score_micro"] == intervals["accuracy"]
    # Every draw has a balanced accuracy of 1: that is no interval.
    assert "balanced_accuracy" not in intervals
    assert all(low < high for low, high in intervals.values())


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    [(0.5, 10, (0.2366, 0.7634)), (0.0, 20, (0.0, 0.1611)), (0.81, 263, (0.7583, 0.8528))],
)
def test_wilson_equals_published_values(
    share: float, count: int, expected: tuple[float, float]
) -> None:
    assert wilson(share, count) == pytest.approx(expected, abs=3e-4)


def test_multi_label_accuracy_is_a_share_of_photos() -> None:
    targets = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], np.float64)
    intervals = bootstrap(per_photo(targets, targets * 0.9 + 0.05, True), 50)
    assert intervals["accuracy"] == pytest.approx(wilson(1.0, 4))


def test_evaluating_on_training_photos_is_a_note(
    run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_workplace(tmp_path))
    run_cli("finetune", "photos", "-m", "demo", "--epochs", 1, "-o", "mine2")
    out = run_cli("evaluate", "mine2", "photos", "-o", "all", "--bootstrap", 5)[1]
    note = "6 of 8 photos trained this model (mine2/training.csv): the metrics are too good"
    assert note in out
    assert "mine2/validation.csv lists photos that did not train" in out
    assert any(note in n for n in json.loads(Path("all/metrics.json").read_text())["notes"])
    assert note in Path("all/report.html").read_text()
    out = run_cli("evaluate", "mine2", "mine2/validation.csv", "-o", "held", "--bootstrap", 5)[1]
    assert "trained this model" not in out
    Path("mine2/training.csv").write_bytes(b"\xff\xfe broken")
    out = run_cli("evaluate", "mine2", "photos", "-o", "broken", "--bootstrap", 5)[1]
    assert "it is unknown if these photos trained" in out


def test_copies_and_tuning_photos_that_trained_are_notes(
    run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_workplace(tmp_path))
    run_cli("finetune", "photos", "-m", "demo", "-o", "mine2")
    shutil.copytree("photos", "copy")
    # As large as a photo that trained, and another photo.
    changed = Path("copy/cat/0.jpg").read_bytes()
    Path("copy/cat/0.jpg").write_bytes(changed[:-1] + bytes([changed[-1] ^ 1]))
    out = run_cli("evaluate", "mine2", "copy", "-o", "all", "--bootstrap", 5)[1]
    assert "7 of 8 photos trained this model (mine2/training.csv): the metrics" in out
    shutil.rmtree("photos/dog")
    out = run_cli("evaluate", "mine2", "copy", "-o", "gone", "--bootstrap", 5)[1]
    assert "3 of 8 photos trained this model" in out
    command = ("evaluate", "mine2", "copy", "--tune", "photos", "-o", "tuned", "--bootstrap", 5)
    out = run_cli(*command)[1]
    assert "4 of 4 tuning photos trained this model (mine2/training.csv): the calibration" in out
    assert "3 copies of tuning photos, such as " in out
