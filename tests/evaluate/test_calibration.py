"""The file calibration.json: round trips, other weights, hostile content."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fixtures.reports import (
    TASKS,
    make_calibration,
    make_predictor,
)
from vitlib import Predictor
from vitlib.errors import ConfigError, SourceError
from vitlib.evaluate import Calibration


def test_calibration_round_trip(tmp_path: Path) -> None:
    predictor = make_predictor(("a", "a", "c"), multi_label=True)
    predictor.save(tmp_path)
    assert Calibration.read(tmp_path) is None
    path = make_calibration().store(tmp_path)
    assert path == tmp_path / "calibration.json"
    read = Calibration.read(tmp_path)
    assert read is not None
    assert read.weights.keys() == {"model.safetensors"}
    assert dataclasses.replace(read, weights={}) == make_calibration()
    assert Calibration.read(tmp_path / "model.safetensors") == read
    Predictor.load(tmp_path, device="cpu")  # ignores the file
    read.check(("a", "a", "c"), TASKS[True])
    for labels, task, match in (
        (("a", "a"), TASKS[True], "is for 3 classes, the model has 2"),
        (("a", "b", "c"), TASKS[True], "its class 1 is 'a', the model's 'b'"),
        (("a", "a", "c"), TASKS[False], "the model's task is single_label"),
        (("a", "a", "c"), "regression", "the model's task is regression"),
    ):
        with pytest.raises(ConfigError, match=match):
            read.check(labels, task)
    calibration = make_calibration(multi_label=False, thresholds=None)
    calibration.store(tmp_path)
    assert Calibration.read(tmp_path) == dataclasses.replace(calibration, weights=read.weights)


def test_calibration_rejects_other_weights(tmp_path: Path) -> None:
    """Saving over a model deletes its calibration; a calibration of other weights is refused."""
    make_predictor(("a", "b")).save(tmp_path)
    make_calibration(labels=("a", "b"), thresholds=(0.5, 0.5), counts=(1, 1)).store(tmp_path)
    content = (tmp_path / "calibration.json").read_bytes()
    make_predictor(("a", "b")).save(tmp_path)
    assert Calibration.read(tmp_path) is None
    (tmp_path / "calibration.json").write_bytes(content)
    with pytest.raises(ConfigError, match="tuned for other weights"):
        Calibration.read(tmp_path)
    with pytest.raises(SourceError, match="no weights"):
        make_calibration().store(tmp_path / "..")


def test_calibration_of_an_optimized_model(tmp_path: Path) -> None:
    predictor = make_predictor(("a", "b"))
    predictor.fast().save(tmp_path)
    made = make_calibration(labels=("a", "b"), multi_label=False, thresholds=None, counts=(1, 1))
    made.store(tmp_path)
    read = Calibration.read(tmp_path)
    assert read is not None
    assert read.weights.keys() == {"fast.safetensors"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "format 'other'"),
        ({"task": "regression"}, "expected one of single_label"),
        ({"temperature": 0}, "expected 0.05 to 20"),
        ({"temperature": True}, "expected a number"),
        ({"temperature": float("nan")}, "expected 0.05 to 20"),
        ({"temperature": 10**400}, "not a calibration"),
        ({"classes": {}}, "expected a list"),
        ({"classes": [1]}, "expected an object"),
        ({"classes": [{"label": 1, "photos": 0, "threshold": 0.5}]}, "expected text"),
        ({"classes": [{"label": "a", "photos": 0, "threshold": 2}]}, "expected 0 to 1"),
        ({"classes": [{"label": "a", "photos": 0}]}, "no 'threshold'"),
        ({"weights": {"model.safetensors": 1}}, "expected text"),
        ({"log_loss": {"before": 1}}, "no 'after'"),
    ],
)
def test_calibration_rejects_hostile_file(
    tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    make_predictor(("a",)).save(tmp_path)
    value = make_calibration().as_dict() | change
    (tmp_path / "calibration.json").write_text(json.dumps(value))
    with pytest.raises(SourceError, match=match):
        Calibration.read(tmp_path)


def test_calibration_with_keys_that_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_predictor(("a",)).save(tmp_path)
    value = make_calibration(labels=("a",), thresholds=(0.5,), counts=(1,)).as_dict()
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(value | {"weights": {}}))
    read = Calibration.read(tmp_path)
    assert not caplog.records
    value["classes"][0]["temperature"] = 2.0
    value["tuned_on"]["by"] = "hand"
    path.write_text(json.dumps(value | {"weights": {}, "bias": [1.0]}))
    assert Calibration.read(tmp_path) == read
    [record] = caplog.records
    assert record.getMessage().endswith(
        "calibration.json has keys that are not used: 'classes.temperature', 'tuned_on.by', 'bias'"
    )


def test_calibration_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    make_predictor(("a",)).save(tmp_path)
    for text in ("{", "[]", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(SourceError):
            Calibration.read(tmp_path)
    with path.open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(SourceError, match="expected at most"):
        Calibration.read(tmp_path)
