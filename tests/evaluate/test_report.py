"""Tests of the report of an evaluation: metrics, files, page and bad photos."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as sk

from fixtures.reports import (
    ALLOWED,
    HOSTILE,
    TASKS,
    Tags,
    draw_photos,
    make_predictor,
    make_scored_set,
    read_metrics,
    read_predictions,
)
from vitlib import ImageProcessor, Predictor, ViT, ViTConfig
from vitlib.data import LabelledPhotos, Photo, read_photos, split
from vitlib.errors import ConfigError, DataError, ImageError
from vitlib.evaluate import Report, evaluate
from vitlib.evaluate.page_style import SCRIPT

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'vitlib[plot]'")


@pytest.mark.parametrize("multi_label", [False, True])
def test_report_has_metrics_of_scikit_learn(tmp_path: Path, multi_label: bool) -> None:
    labels = ("can", "carton", "milk bottle", "water, still")
    predictor, photos = make_scored_set(tmp_path / "photos", labels, 50, multi_label, num_classes=3)
    out = tmp_path / "report"
    report = evaluate(predictor, photos, out, model="my model", bootstrap=50)
    names = {"metrics.json", "predictions.csv", "report.html", "mistakes.png", "confusion.png"}
    names |= {"precision_recall.png", "roc.png", "reliability.png"}
    names |= {"accuracy_table.json", "confusion_matrix.json"}
    assert {path.name for path in out.iterdir()} == names
    stored = read_metrics(out)
    assert stored == json.loads(json.dumps(report.as_dict()))
    assert (stored["format"], stored["complete"]) == ("vitlib-evaluation", True)
    assert stored["data"] == {"source": "a set", "photos": 50, "evaluated": 50, "failed": 0}
    assert stored["model"]["name"] == "my model"
    assert stored["versions"]["scikit-learn"]
    scores = np.stack([predictor.scores[str(p.path)] for p in photos.photos])
    targets = photos.targets()
    if multi_label:
        expected = sk.jaccard_score(targets, scores >= 0.5, average="samples", zero_division=0)
    else:
        expected = sk.accuracy_score(targets, scores.argmax(axis=1))
    primary = stored["primary_metric"]
    assert primary == ("iou" if multi_label else "accuracy")
    assert stored["metrics"][primary] == pytest.approx(expected)
    low, high = stored["intervals"][primary]
    assert low < expected < high
    assert stored["per_class"][3]["support"] == 0
    assert stored["per_class"][3]["AUC"] is None
    assert any("no photo: water, still" in note for note in stored["notes"])
    matrix = json.loads((out / "confusion_matrix.json").read_text())
    assert matrix["schema_type"] == "confusion_matrix"
    assert np.sum(matrix["data"]["matrix"]) == (200 if multi_label else 50)
    tables = json.loads((out / "accuracy_table.json").read_text())
    assert tables["data"]["class_labels"] == list(labels)
    assert len(tables["data"]["probability_tables"]) == 4
    rows = read_predictions(out)
    assert [row["file"] for row in rows] == [str(p.path) for p in photos.photos]
    for row, photo, score in zip(rows, photos.photos, scores, strict=True):
        assert float(row["score:water, still"]) == pytest.approx(score[3], rel=1e-6)
        if multi_label:
            predicted = [label for label, s in zip(labels, score, strict=True) if s >= 0.5]
            assert (json.loads(row["true"]), json.loads(row["predicted"])) == (
                list(photo.labels), predicted
            )  # fmt: skip
        else:
            assert (row["true"], row["predicted"]) == (photo.labels[0], labels[score.argmax()])
    if not multi_label:
        true, predicted, count = report.confused[0]
        pairs = [(r["true"], r["predicted"]) for r in rows if r["true"] != r["predicted"]]
        assert count == pairs.count((true, predicted)) == max(map(pairs.count, pairs))


def test_report_is_reproducible(tmp_path: Path) -> None:
    predictor, photos = make_scored_set(tmp_path / "photos", ("a", "b", "c"), 20)
    for name in ("one", "two"):
        evaluate(predictor, photos, tmp_path / name, bootstrap=20, seed=3)
    first, second = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    for report in (first, second):
        del report["date"], report["seconds"]
    assert first == second
    for name in ("predictions.csv", "roc.png", "mistakes.png", "accuracy_table.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("multi_label", [False, True])
def test_hostile_labels(tmp_path: Path, multi_label: bool) -> None:
    predictor, photos = make_scored_set(tmp_path / "<b>p&", HOSTILE, 60, multi_label)
    photos = dataclasses.replace(photos, source="<i>set", left_out=(("<b>x.jpg", "<u>why\udc80"),))
    out = tmp_path / "report"
    report = evaluate(predictor, photos, out, bootstrap=5, model="</title>")
    page = (out / "report.html").read_text("utf-8")
    for raw in ("<script>alert", "<b>p", "<b>x", "<i>set", "<u>", "</title></title>", "<img src=x"):
        assert raw not in page, raw
    assert "\u202e" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src"
    assert f"{policy} 'sha256-{digest}'" in page
    assert f"<script>{SCRIPT}</script>" in page
    tags = Tags()
    tags.feed(page)
    assert set(tags.names) <= set(ALLOWED.split())
    assert not [name for name, _ in tags.attributes if name.startswith("on") or name == "href"]
    sources = [value or "" for name, value in tags.attributes if name == "src"]
    assert sources
    assert all(re.match(r"data:image/(png|jpeg);base64,[\w+/=]+$", source) for source in sources)
    shown = [base64.b64decode(source.split(",")[1]) for source in sources]
    for name in ("roc.png", "confusion.png"):
        assert (out / name).read_bytes() in shown
    rows = read_predictions(out)
    assert len(rows) == 61
    assert rows[-1]["file"] == "<b>x.jpg"
    assert rows[-1]["error"] == "<u>why\\udc80"
    if not multi_label:
        assert {row["true"] for row in rows[:-1]} <= set(HOSTILE)
    assert read_metrics(out)["failed"] == [{"file": "<b>x.jpg", "error": "<u>why\udc80"}]
    assert report.failed == (("<b>x.jpg", "<u>why\udc80"),)


@pytest.mark.parametrize(
    ("classes", "count", "multi_label", "of"),
    [
        (2, 8, False, 2), (2, 8, False, 1), (2, 1, True, 2), (1, 9, True, 1), (30, 60, False, 30),
        (300, 40, False, 300), (60, 40, True, 60), (300, 300, True, 3),
    ],
)  # fmt: skip
def test_any_number_of_classes(
    tmp_path: Path, classes: int, count: int, multi_label: bool, of: int
) -> None:
    labels = tuple(f"class {i}" for i in range(classes))
    predictor, photos = make_scored_set(
        tmp_path / "photos", labels, count, multi_label, num_classes=of
    )
    report = evaluate(predictor, photos, tmp_path / "report", bootstrap=5)
    assert len(report.per_class) == classes
    for name in ("confusion.png", "precision_recall.png", "roc.png", "reliability.png"):
        with Image.open(tmp_path / "report" / name) as image:
            assert 400 <= image.width <= 1600
            assert 200 <= image.height <= 2400


def test_report_without_mistakes(tmp_path: Path) -> None:
    predictor, photos = make_scored_set(tmp_path / "photos", ("a", "b"), 10, signal=50)
    out = tmp_path / "report"
    report = evaluate(predictor, photos, out, bootstrap=0)
    assert report.metrics["accuracy"] == 1
    assert report.intervals == {}
    assert not (out / "mistakes.png").exists()
    assert "every prediction is correct" in (out / "report.html").read_text()


def test_tables_of_counts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitlib.evaluate.report.MOST_CLASSES", 3)
    predictor, photos = make_scored_set(tmp_path / "photos", tuple("abcd"), 10)
    report = evaluate(predictor, photos, tmp_path / "report", bootstrap=0)
    assert not (tmp_path / "report" / "accuracy_table.json").exists()
    assert any("accuracy_table.json" in note for note in report.notes)


def test_unknown_labels_are_not_counted(tmp_path: Path) -> None:
    predictor, photos = make_scored_set(tmp_path / "photos", tuple("abc"), 40, True, unknown=True)
    report = evaluate(predictor, photos, tmp_path / "report", bootstrap=5)
    lost = int(np.isnan(photos.targets()).sum())
    assert f"{lost} of 120 labels are unknown and are not counted" in report.notes
    rows = read_predictions(tmp_path / "report")
    assert [json.loads(row["unknown"]) for row in rows] == [list(p.unknown) for p in photos.photos]


def test_positive_class_against_the_rest(tmp_path: Path) -> None:
    predictor, photos = make_scored_set(tmp_path / "photos", tuple("abc"), 30)
    report = evaluate(predictor, photos, tmp_path / "report", positive="b", bootstrap=0)
    scores = np.stack([predictor.scores[str(p.path)] for p in photos.photos])
    expected = sk.roc_auc_score(photos.targets() == 1, scores[:, 1])
    assert report.metrics["AUC_binary"] == pytest.approx(expected)
    with pytest.raises(ConfigError, match="expected the name of one class"):
        evaluate(predictor, photos, tmp_path / "report", positive="x")


def test_bad_photos_are_counted_and_named(tmp_path: Path) -> None:
    paths = draw_photos(tmp_path / "photos", 6)
    paths[1].write_bytes(b"no photo")
    paths[4].unlink()
    predictor = make_predictor(("a", "b"))
    photos = LabelledPhotos(
        tuple(Photo(p, ("ab"[i % 2],)) for i, p in enumerate(paths)), ("a", "b"), False, "a set",
        left_out=(("gone.jpg", "is not there"),),
    )  # fmt: skip
    out = tmp_path / "report"
    with pytest.raises(ImageError, match="image 1"):
        evaluate(predictor, photos, out)
    assert not out.exists()
    report = evaluate(predictor, photos, out, on_bad_image="skip", bootstrap=5)
    assert [file for file, _ in report.failed] == [str(paths[1]), str(paths[4]), "gone.jpg"]
    assert read_metrics(out)["data"] == {
        "source": "a set",
        "photos": 7,
        "evaluated": 4,
        "failed": 3,
    }
    assert "3 of 7 photos could not be used and are not counted" in report.notes
    rows = read_predictions(out)
    assert [bool(row["error"]) for row in rows] == [False, True, False, False, True, False, True]
    assert rows[1]["true"] == "b"
    assert rows[1]["score:a"] == rows[1]["predicted"] == ""
    good = photos.subset([0, 2, 3, 5])
    scores = predictor.probabilities([p.path for p in good.photos])
    assert report.metrics["accuracy"] == np.mean(scores.argmax(axis=1) == good.targets())
    page = (out / "report.html").read_text()
    assert "3 photos could not be used" in page
    for path in paths:
        path.unlink(missing_ok=True)
    with pytest.raises(DataError, match="none of 6 photos can be read"):
        evaluate(predictor, photos, out, on_bad_image="skip")
    assert read_metrics(out)["data"]["evaluated"] == 4  # the earlier report is unchanged


def test_scores_that_are_not_finite_raise(tmp_path: Path) -> None:
    _, photos = make_scored_set(tmp_path / "photos", ("a", "b"), 4)
    for index, photo in enumerate(photos.photos):
        Image.new("RGB", (16, 16), (255, 255, 255) if index == 2 else (0, 0, 0)).save(photo.path)
    model = ViT(ViTConfig(image_size=16, patch_size=8, num_classes=2, labels=("a", "b"), depth=1))
    rule = ImageProcessor(size=(16, 16), rescale_factor=3e36)  # makes white infinite
    for option, kind in (("skip", ConfigError), ("fail", ImageError)):
        with pytest.raises(kind, match=r"2.*the model gives numbers that are not finite"):
            evaluate(Predictor(model, rule), photos, tmp_path / "report", on_bad_image=option)


@pytest.mark.parametrize("multi_label", [False, True])
def test_real_model_on_real_photos(
    tmp_path: Path, deit_tiny: Path, fridge_photos: list[Path], multi_label: bool
) -> None:
    data = fridge_photos[0].parents[1]
    if not multi_label:
        data = data.with_name("fridge_multiclass")
    photos = read_photos(data, multi_label=multi_label)
    train, test = split(photos, 0.3, seed=0)
    predictor = Predictor.load(deit_tiny, num_classes=4, device="cpu")
    model = predictor.model
    assert isinstance(model, ViT)
    model.config = dataclasses.replace(
        model.config, labels=photos.labels, problem_type=TASKS[multi_label]
    )
    features = torch.from_numpy(predictor.embed([p.path for p in train.photos]))
    targets = torch.from_numpy(train.targets())
    loss = torch.nn.BCEWithLogitsLoss() if multi_label else torch.nn.CrossEntropyLoss()
    with torch.enable_grad():
        optimizer = torch.optim.Adam(model.head.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            loss(model.head(features), targets).backward()
            optimizer.step()
    report: Report = evaluate(predictor, test, tmp_path / "report", bootstrap=100)
    low, high = report.intervals[report.primary]
    assert low <= report.metrics[report.primary] <= high
    assert report.metrics[report.primary] > 0.7
    assert report.metrics["AUC_macro"] > 0.85
    assert all(row.support > 0 for row in report.per_class)
