"""Arguments of evaluate, tuning in a report, and the folder of a report."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.reports import (
    make_calibration,
    make_scored_set,
    read_metrics,
    read_predictions,
)
from vitlib import ImageProcessor, Predictor, ViT, ViTConfig
from vitlib.data import Photo
from vitlib.errors import ConfigError, DataError, SourceError
from vitlib.evaluate import Calibration, evaluate
from vitlib.evaluate import folder as folders
from vitlib.metrics import quick

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'vitlib[plot]'")


def test_bad_arguments_are_refused_before_the_model_runs(tmp_path: Path) -> None:
    predictor, photos = make_scored_set(tmp_path / "photos", ("a", "b"), 8)
    out = tmp_path / "report"

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    predictor.probabilities = never
    wrong = dataclasses.replace(
        photos, labels=("a", "b", "z"), photos=(*photos.photos[1:], Photo(Path("x.png"), ("z",)))
    )
    with pytest.raises(DataError, match="'z'"):
        evaluate(predictor, wrong, out)
    with pytest.raises(DataError, match="was read with several labels a photo"):
        evaluate(predictor, dataclasses.replace(photos, multi_label=True), out)
    with pytest.raises(DataError, match="no photo to evaluate on"):
        evaluate(predictor, photos.subset([]), out)
    with pytest.raises(DataError, match="2 photos of the tuning set are also"):
        evaluate(predictor, photos, out, tune=photos.subset([0, 5]))
    half = photos.subset([0, 1])
    made = make_calibration(labels=("a", "b"), multi_label=False, thresholds=None, counts=(1, 1))
    for settings, match in (
        ({"tune": half, "calibration": made}, "leave calibration= out"),
        ({"calibration": make_calibration()}, "is for a multi_label"),
        ({"threshold": 0.3}, "several labels a photo"),
        ({"bootstrap": -1}, "expected 0"),
        ({"on_bad_image": "ignore"}, "expected 'fail' or 'skip'"),
    ):
        with pytest.raises(ConfigError, match=match):
            evaluate(predictor, photos.subset(range(2, 8)), out, **settings)
    several = make_scored_set(tmp_path / "several", ("a", "b"), 4, True)
    with pytest.raises(ConfigError, match="expected a number from 0 to 1"):
        evaluate(*several, out, threshold=2)
    headless = Predictor(ViT(ViTConfig(num_classes=0, depth=1)), ImageProcessor(size=(224, 224)))
    with pytest.raises(ConfigError, match="no head"):
        evaluate(headless, photos, out)
    assert not out.exists()


def test_label_of_two_classes_is_refused(tmp_path: Path) -> None:
    predictor, photos = make_scored_set(tmp_path / "photos", ("crane", "b", "c"), 30)
    predictor.model.config = dataclasses.replace(
        predictor.model.config, labels=("crane", "crane", "c")
    )
    both = [i for i, photo in enumerate(photos.photos) if photo.labels == ("crane",)]
    with pytest.raises(DataError, match=r"'crane' .*two"):
        evaluate(predictor, photos.subset(both), tmp_path / "report")


def test_missing_extras_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, photos = make_scored_set(tmp_path / "photos", ("a", "b"), 4)

    def lacking(*_: object) -> None:
        raise ConfigError("pip install 'vitlib[eval]'")

    monkeypatch.setattr("vitlib.evaluate.evaluation.import_sklearn_metrics", lacking)
    predictor.probabilities = lacking
    with pytest.raises(ConfigError, match="eval"):
        evaluate(predictor, photos, tmp_path / "report")


@pytest.mark.parametrize("multi_label", [False, True])
def test_tune_fits_and_stores_calibration(tmp_path: Path, multi_label: bool) -> None:
    labels = tuple("abc")
    predictor, photos = make_scored_set(tmp_path / "photos", labels, 200, multi_label, signal=1.5)
    tune, test = photos.subset(range(100)), photos.subset(range(100, 200))
    model, out = tmp_path / "model", tmp_path / "report"
    predictor.save(model)
    report = evaluate(predictor, test, out, model=model, tune=tune, bootstrap=5)
    fitted = report.calibration
    assert fitted is not None
    assert (fitted.photos, fitted.source, sum(fitted.counts) > 0) == (100, "a set", True)
    assert fitted.log_loss[1] < fitted.log_loss[0]
    assert (fitted.thresholds is not None) == multi_label
    assert report.stored == model / "calibration.json"
    stored = Calibration.read(model)
    assert stored is not None
    assert dataclasses.replace(stored, weights={}) == fitted
    assert Calibration.read(model / "model.safetensors") == stored
    scores = np.stack([predictor.scores[str(p.path)] for p in test.photos])
    limits = np.array(fitted.thresholds) if fitted.thresholds else 0.5
    expected = quick(test.targets(), fitted.apply(scores), multi_label, limits)
    for name, value in expected.items():
        assert report.metrics[name] == pytest.approx(value, abs=1e-6), name
    before = quick(test.targets(), scores, multi_label)
    assert report.uncalibrated["log_loss"] == pytest.approx(before["log_loss"])
    assert any("the scores are calibrated" in note for note in report.notes)
    assert "before calibration" in (out / "report.html").read_text()
    again = evaluate(predictor, test, out, calibration=stored, bootstrap=5)
    assert again.metrics == report.metrics
    assert again.stored is None
    assert (out / "calibration.json").exists()
    uncalibrated = evaluate(predictor, test, out, bootstrap=5)
    assert uncalibrated.calibration is None
    assert uncalibrated.metrics["log_loss"] == pytest.approx(before["log_loss"], abs=1e-6)
    assert not (out / "calibration.json").exists()  # nothing of the earlier report is left


def test_threshold_replaces_calibration(tmp_path: Path) -> None:
    predictor, photos = make_scored_set(tmp_path / "photos", tuple("abc"), 40, True)
    tune, test = photos.subset(range(20)), photos.subset(range(20, 40))
    report = evaluate(predictor, test, tmp_path / "r", tune=tune, threshold=0.3, bootstrap=0)
    assert report.thresholds == (0.3, 0.3, 0.3)
    assert not any("threshold for each class" in note for note in report.notes)


def test_folder_with_other_content_is_refused(tmp_path: Path) -> None:
    predictor, photos = make_scored_set(tmp_path / "photos", ("a", "b"), 4)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for text in (None, "{", '{"format": "mine"}', "[]"):
        if text is not None:
            (out / "metrics.json").write_text(text)
        with pytest.raises(SourceError, match="no report of vitlib evaluate"):
            evaluate(predictor, photos, out)
    assert (out / "thesis.txt").read_text() == "years of work"
    with pytest.raises(SourceError, match="cannot be a folder"):
        evaluate(predictor, photos, out / "thesis.txt")
    with pytest.raises(SourceError, match="cannot be a folder"):
        evaluate(predictor, photos, out / "thesis.txt" / "below")


def test_earlier_report_is_replaced(tmp_path: Path) -> None:
    predictor, photos = make_scored_set(tmp_path / "photos", ("a", "b"), 12, signal=0)
    out = tmp_path / "deep" / "out"
    evaluate(predictor, photos, out, bootstrap=0)
    assert (out / "mistakes.png").exists()
    (out / "notes.txt").write_text("mine")
    predictor, photos = make_scored_set(tmp_path / "photos", ("a", "b"), 9, signal=50)
    evaluate(predictor, photos, out, bootstrap=0)
    assert read_metrics(out)["data"]["evaluated"] == 9
    assert len(read_predictions(out)) == 9
    assert not (out / "mistakes.png").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("after", range(9))
def test_kill_leaves_no_report_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    predictor, photos = make_scored_set(tmp_path / "photos", ("a", "b"), 12, signal=0)
    out = tmp_path / "out"
    evaluate(predictor, photos, out, bootstrap=0)
    done, real = [], Path.replace

    def kill(self: Path, target: Any) -> Path:
        if Path(target).parent == out:
            if len(done) == after:
                raise KeyboardInterrupt
            done.append(target)
        return real(self, target)

    _, more = make_scored_set(tmp_path / "photos", ("a", "b"), 5, signal=0)
    monkeypatch.setattr(Path, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        evaluate(predictor, more, out, bootstrap=0)
    monkeypatch.undo()
    stored = read_metrics(out)
    if after == 0:
        assert stored["data"]["evaluated"] == 12
    else:
        assert stored == {"format": "vitlib-evaluation", "format_version": 1, "complete": False}
    evaluate(predictor, more, out, bootstrap=0)  # a second evaluation completes the report
    assert read_metrics(out)["data"]["evaluated"] == 5


def test_leftovers_of_a_kill_are_ignored(tmp_path: Path) -> None:
    predictor, photos = make_scored_set(tmp_path / "photos", ("a", "b"), 4)
    (tmp_path / "out" / ".vitlib-report-abc").mkdir(parents=True)
    evaluate(predictor, photos, tmp_path / "out", bootstrap=0)
    assert folders.is_report(tmp_path / "out")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_refused(tmp_path: Path) -> None:
    predictor, photos = make_scored_set(tmp_path / "photos", ("a", "b"), 4)
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(SourceError, match="cannot be written"):
        evaluate(predictor, photos, tmp_path / "out" / "below")
