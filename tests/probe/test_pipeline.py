"""Whole probes of small sets: protocol, choices inside the training part, resuming, files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.tiny_probes import draw_folders, draw_photo, draw_several, save_tiny, tiny_predictor
from vitlib import Predictor, probe
from vitlib.data import folds, read_photos
from vitlib.errors import ConfigError, DataError, SourceError
from vitlib.features import Feature, extract
from vitlib.probe import measure, pipeline
from vitlib.probe.division import divide_photos, draw_few

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'vitlib[plot]'")
pytest.importorskip("sklearn", reason="probes need scikit-learn: pip install 'vitlib[eval]'")

FAST: dict[str, Any] = {"methods": ("knn", "logistic"), "k": (3, 5)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return draw_folders(tmp_path / "data")


def test_run_measures_by_folds_and_writes_the_report(
    model: Path, data: Path, tmp_path: Path
) -> None:
    report = probe.run(
        data, str(model), tmp_path / "out", layers="all", pools=("cls", "mean"), few_shot=(1, 3),
        **FAST,
    )  # fmt: skip
    assert len(report.rows) == 3 * 2 * 2
    assert len(report.few_shot) == 3 * 2 * 2 * 2
    for row in report.rows:
        assert len(row.choices) == 5
        assert row.interval[0] <= row.value == row.metrics["accuracy"] <= row.interval[1]
        assert row.milliseconds > 0
        assert row.spread is not None
    best = max(report.rows, key=lambda row: row.inner if row.method == "logistic" else -1)
    assert (report.best.layer, report.best.pool) == (best.layer, best.pool)
    assert best.value > 0.6
    out = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert (out["format"], out["complete"]) == ("vitlib-probe", True)
    assert out["rows"][0]["value"] == report.rows[0].value
    rows = list(csv.DictReader((tmp_path / "out" / "probe.csv").read_text().splitlines()))
    assert len(rows) == len(report.rows) + len(report.few_shot)
    assert {row["photos_per_class"] for row in rows} == {"all", "1", "3"}
    for name in ("report.html", "layers.png", "few_shot.png", "classes.png"):
        assert (tmp_path / "out" / name).stat().st_size > 5000
    assert not list((tmp_path / "out").glob(".vitlib-*"))


def test_folds_measure_each_photo_by_a_head_that_did_not_see_it(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """The table's accuracy is that of scikit-learn on the same folds with the chosen C."""
    from sklearn.linear_model import LogisticRegression

    report = probe.run(data, str(model), tmp_path / "out", **FAST)
    photos = read_photos(data)
    feature = Feature(3, "cls")
    x = extract(Predictor.load(model), [p.path for p in photos.photos], [feature]).vectors[feature]
    row = next(row for row in report.rows if row.method == "logistic")
    hits = 0
    for (train, test), choice in zip(folds(photos, 5, 0), row.choices, strict=True):
        peer = LogisticRegression(C=choice["C"], max_iter=1000)
        peer.fit(x[train].astype(float), photos.targets()[train])
        hits += int((peer.predict(x[test]) == photos.targets()[test]).sum())
    assert row.value == hits / len(photos)


def test_test_photos_measure_and_choose_nothing(model: Path, tmp_path: Path) -> None:
    """Other labels of the test photos change the measure, and no choice."""
    root = tmp_path / "split"
    draw_folders(root / "train", 12)
    draw_folders(root / "test", 4, start=50)
    options: dict[str, Any] = {"layers": "all", "few_shot": (2,), "k": (3, 5)}
    first = probe.run(root, str(model), tmp_path / "a", **options)
    red, blue = root / "test" / "red", root / "test" / "blue"
    red.rename(root / "test" / "x")
    blue.rename(red)
    (root / "test" / "x").rename(blue)
    second = probe.run(root, str(model), tmp_path / "b", **options)
    assert first.about["protocol"]["kind"] == "split"
    assert first.about["protocol"]["held_out_photos"] == 12
    for one, two in zip(first.rows, second.rows, strict=True):
        assert (one.choices, one.inner) == (two.choices, two.inner)
        assert one.spread is None
    assert [row.value for row in first.rows] != [row.value for row in second.rows]
    assert first.best.c == second.best.c
    assert {len(row.tries) for row in first.few_shot} == {5}


def test_random_labels_measure_as_chance(model: Path, tmp_path: Path) -> None:
    """Choices of layer, pool and C among many do not reach the held-out photos."""
    root = tmp_path / "noise"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    for i in range(80):
        draw_photo([], i).save(root / "ab"[i % 2] / f"{i}.png")
    report = probe.run(root, str(model), tmp_path / "out", layers="all", pools=("cls", "mean"),
                       methods=("logistic",))  # fmt: skip
    low, high = report.selected[0].interval
    assert low < 0.5 < high


def test_a_killed_run_continues_without_computing_again(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = probe.run(data, str(model), tmp_path / "whole", layers="all", **FAST)
    calls: list[int] = []
    original = measure.measure_feature

    def killed(features: Any, task: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(features, task)

    monkeypatch.setattr(pipeline, "measure_feature", killed)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        probe.run(data, str(model), out, layers="all", **FAST)
    assert json.loads((out / "probe.json").read_text())["complete"] is False
    assert not (out / "report.html").exists()
    stored = {path: path.stat().st_mtime_ns for path in (out / "features").rglob("*.safetensors")}
    again = probe.run(data, str(model), out, layers="all", **FAST)
    assert len(calls) == 4  # the layer that was interrupted, alone
    assert [row.value for row in again.rows] == [row.value for row in whole.rows]
    assert {*stored} == {*(out / "features").rglob("*.safetensors")}
    # Other labels are another result.
    (data / "red" / "red0.png").rename(data / "blue" / "red0.png")
    probe.run(data, str(model), out, layers="all", **FAST)
    assert len(calls) == 7


def test_several_labels_are_measured_by_their_own_metrics(model: Path, tmp_path: Path) -> None:
    data = draw_several(tmp_path / "several")
    report = probe.run(data, str(model), tmp_path / "out", multi_label=True, k=(3,))
    assert report.primary == "iou"
    for row in report.rows:
        assert row.value == pytest.approx(row.metrics["iou"])
        assert {"average_precision_score_macro", "f1_score_macro"} <= row.metrics.keys()
    assert max(row.value for row in report.rows) > 0.6
    assert Predictor.load(report.best.folder).multi_label


def test_several_models_are_compared(model: Path, data: Path, tmp_path: Path) -> None:
    other = tiny_predictor(1, class_token=False, pool="mean")
    report = probe.run(data, [str(model), other], tmp_path / "out", **FAST)
    assert {(row.model, row.pool) for row in report.rows} == {
        (str(model), "cls"),
        ("model 2", "embed"),
    }
    assert [row.model for row in report.selected] == [str(model), "model 2", ""]
    with pytest.raises(ConfigError, match="is given twice"):
        probe.run(data, [str(model), str(model)], tmp_path / "twice", **FAST)


def test_a_photo_that_cannot_be_read_is_left_out_and_named(
    model: Path, data: Path, tmp_path: Path
) -> None:
    broken = data / "red" / "red3.png"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) - 300])  # the header is that of a photo
    report = probe.run(data, str(model), tmp_path / "out", **FAST)
    assert [file for file, _ in report.failed] == [str(broken)]
    assert report.about["data"]["photos"] == 23
    with pytest.raises(DataError, match=r"red3\.png"):
        probe.run(data, str(model), tmp_path / "fail", on_bad_image="fail", **FAST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": (0,)}, "k=0: expected a whole number of at least 1"),
        ({"few_shot": (0,)}, "few_shot=0: expected a whole number of at least 1"),
        ({"methods": ("svm",)}, "'svm': expected one or more of knn, logistic, linear"),
        ({"layers": (4,)}, "layer 4: expected numbers in 1..3"),
        ({"pools": ("map",)}, "has no attention pool"),
    ],
)
def test_run_refuses_what_the_model_lacks_before_the_work(
    model: Path, data: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        probe.run(data, str(model), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_run_refuses_a_folder_of_photos_or_of_something_else(
    model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="lies in"):
        probe.run(data, str(model), data / "out", **FAST)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(SourceError, match="is no report of vitlib probe"):
        probe.run(data, str(model), tmp_path / "mine", **FAST)


def test_photos_without_labels_say_that_audit_works(model: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for i in range(4):
        draw_photo([], i).save(tmp_path / "flat" / f"{i}.png")
    with pytest.raises(DataError, match="vitlib audit needs none"):
        probe.run(tmp_path / "flat", str(model), tmp_path / "out", **FAST)


def test_several_labels_given_as_one_are_refused(model: Path, tmp_path: Path) -> None:
    data = draw_several(tmp_path / "several")
    with pytest.raises(DataError, match=r"have several labels.*--multi-label"):
        probe.run(data, str(model), tmp_path / "out", **FAST)


def test_a_class_with_one_photo_is_told(
    model: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "rare").mkdir()
    draw_photo([], 1).save(data / "rare" / "one.png")
    report = probe.run(data, str(model), tmp_path / "out", **FAST)
    text = "the class 'rare' has one photo, which cannot be both trained on and measured"
    assert any(text in note for note in report.notes)
    assert text in caplog.text


def test_labels_in_two_unicode_forms_are_told(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "forms"
    root.mkdir()
    lines, forms = ["filename,label"], ("caf\u00e9", "cafe\u0301", "tea")
    for i in range(12):
        draw_photo([], i).save(root / f"{i}.png")
        lines.append(f"{i}.png,{forms[i % 3]}")
    (root / "labels.csv").write_text("\n".join(lines))
    report = probe.run(root, str(model), tmp_path / "out", **FAST)
    assert report.labels == ("caf\u00e9", "tea")
    assert "written in two Unicode forms, read as one class" in caplog.text


def test_embeddings_of_an_earlier_run_are_not_computed_again(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitlib.batch.embedding_file import write_embeddings

    predictor = Predictor.load(model)
    names = [str(photo.path) for photo in read_photos(data).photos]
    write_embeddings(tmp_path / "photos.npy", predictor.embed(names), names, predictor)
    expected = probe.run(data, str(model), tmp_path / "a", pools=("embed",), **FAST)

    def fail(*_: Any) -> Any:
        raise AssertionError("a photo passes through the model")

    monkeypatch.setattr("vitlib.features.extraction._compute", fail)
    report = probe.run(data, str(model), tmp_path / "b", embeddings=tmp_path / "photos.npy", **FAST)
    assert [row.pool for row in report.rows] == ["embed", "embed"]
    assert [row.value for row in report.rows] == [row.value for row in expected.rows]
    assert report.rows[0].milliseconds is None
    with pytest.raises(ConfigError, match="is of one model, and 2 are given"):
        probe.run(data, [str(model), tiny_predictor(1)], tmp_path / "c",
                  embeddings=tmp_path / "photos.npy", **FAST)  # fmt: skip


def test_draw_few_draws_so_many_of_each_class() -> None:
    targets = np.repeat([0, 1, 2], [50, 5, 2])
    rows = draw_few(targets, 3, seed=0)
    assert np.bincount(targets[rows]).tolist() == [3, 3, 2]
    assert rows.tolist() != draw_few(targets, 3, seed=1).tolist()
    several = np.array([[1, 1], [1, 0], [0, 1], [np.nan, 1], [0, 0]])
    drawn = several[draw_few(several, 2, seed=0)]
    assert (np.nansum(drawn, axis=0) >= 2).all()


def test_division_holds_every_photo_out_once(data: Path) -> None:
    photos = read_photos(data)
    division = divide_photos(photos, None, 0)
    seen = np.zeros(len(photos), int)
    for r in division.rounds:
        training = division.training(r.excluded)
        test = np.flatnonzero(division.parts == r.test)
        assert not {*training} & {*test}
        assert r.test not in r.measured
        assert {*r.measured} == {*division.parts[training]}
        seen[test] += 1
    assert (seen == 1).all()
    assert len(division.training(division.final.excluded)) == len(photos)
