"""The report: what is tuned, what is measured, what is written, and what a bad set gets."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize_scalar
from sklearn import metrics as sk

from vitlib import ImageProcessor, Predictor, ViT, ViTConfig
from vitlib.data import LabelledPhotos, Photo, read_photos, split
from vitlib.errors import ConfigError, DataError, ImageError, SourceError
from vitlib.evaluate import Calibration, Report, evaluate, fit
from vitlib.evaluate import folder as folders
from vitlib.evaluate.html_report import SCRIPT
from vitlib.evaluate.intervals import bootstrap
from vitlib.evaluate.tuning import (
    apply_temperature,
    scores_to_logits,
    temperature,
    threshold,
    thresholds,
)
from vitlib.metrics import per_photo, quick

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'vitlib[plot]'")

TASKS: Any = ("single_label_classification", "multi_label_classification")
HOSTILE = (
    "<script>alert(1)</script>",
    '"quoted", comma\nline',
    "a$b$_c^{d",
    "\u202egnp.exe",
    "漢字",
    "</style><img src=x onerror=alert(1)>",
)


ALLOWED = """html head meta title style body main h1 h2 p ul li div b i span section table thead
tbody tr th td button wbr img script"""


class Tags(HTMLParser):
    """The tags of a page, and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs


class Said(Predictor):
    """Says what it is told to of each path; decodes nothing."""

    said: dict[str, np.ndarray]

    def probabilities(self, images: Any, **_: Any) -> np.ndarray:  # type: ignore[override]
        return np.stack([self.said[str(image)] for image in images])


def tiny(labels: tuple[str, ...], multi_label: bool = False, kind: type = Predictor) -> Any:
    cfg = ViTConfig(
        image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=len(labels),
        labels=labels, problem_type=TASKS[multi_label],
    )  # fmt: skip
    model = ViT(cfg)
    torch.nn.init.normal_(model.head.weight, std=3)
    return kind(model, ImageProcessor(size=(16, 16)))


def draw(folder: Path, count: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(count)]
    for path in paths:
        Image.fromarray(random.integers(0, 255, (12, 18, 3), dtype=np.uint8)).save(path)
    return paths


def told(
    folder: Path, labels: tuple[str, ...], count: int, multi_label: bool = False, *,
    of: int | None = None, signal: float = 2.0, unknown: bool = False,
) -> tuple[Said, LabelledPhotos]:  # fmt: skip
    """A predictor that is right more often than not, and the set it was told of."""
    random, classes = np.random.default_rng(1), of or len(labels)
    predictor = tiny(labels, multi_label, Said)
    predictor.said, photos = {}, []
    for path in draw(folder, count):
        z = random.normal(size=len(labels))
        if multi_label:
            has = random.random(len(labels)) < 0.4
            has[classes:] = False
            lost = (random.random(len(labels)) < 0.2) & ~has if unknown else has & False
            scores = 1 / (1 + np.exp(-(z + signal * has - signal / 2)))
            own, lack = (tuple(np.array(labels, object)[x]) for x in (has, lost))
        else:
            own, lack = (labels[int(random.integers(classes))],), ()
            z[labels.index(own[0])] += signal
            scores = np.exp(z) / np.exp(z).sum()
        predictor.said[str(path)] = scores.astype(np.float32)
        photos.append(Photo(path, own, lack))
    return predictor, LabelledPhotos(tuple(photos), labels, multi_label, "a set")


def numbers(out: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads((out / "metrics.json").read_text("utf-8"), parse_constant=refuse)


def table(out: Path) -> list[dict[str, str]]:
    with (out / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- what is tuned --------------------------------------------------------------------------------


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("hot", [0.4, 1.0, 3.0])
def test_temperature_has_the_least_loss(multi_label: bool, hot: float) -> None:
    random = np.random.default_rng(2)
    z = random.normal(size=(400, 5)) * 2
    if multi_label:
        targets = (random.random(z.shape) < 1 / (1 + np.exp(-z))).astype(np.float32)
        targets[random.random(z.shape) < 0.1] = np.nan
        scores = 1 / (1 + np.exp(-z * hot))
    else:
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        targets = np.array([random.choice(5, p=row) for row in p])
        scores = np.exp(z * hot) / np.exp(z * hot).sum(axis=1, keepdims=True)
    found = temperature(targets, scores, multi_label)
    assert found is not None

    def loss(log_t: float) -> float:
        return quick(targets, apply_temperature(scores, np.exp(log_t), multi_label), multi_label)[
            "log_loss"
        ]

    best = minimize_scalar(loss, bounds=(-3, 3), method="bounded")
    assert found == pytest.approx(np.exp(best.x), rel=0.01)
    assert loss(np.log(found)) <= best.fun + 1e-6
    assert found == pytest.approx(hot, rel=0.25)  # the noise was drawn at temperature 1


def test_temperature_acts_on_logits() -> None:
    z = np.random.default_rng(0).normal(size=(20, 4)) * 3
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    cooled = np.exp(z / 1.7) / np.exp(z / 1.7).sum(axis=1, keepdims=True)
    assert np.allclose(apply_temperature(p, 1.7, False), cooled, atol=1e-6)
    assert np.allclose(
        apply_temperature(1 / (1 + np.exp(-z)), 1.7, True), 1 / (1 + np.exp(-z / 1.7))
    )
    assert (apply_temperature(p.astype(np.float32), 1, False) == p.astype(np.float32)).all()
    for certain in (np.eye(3, dtype=np.float32), np.zeros((2, 3), np.float32)):
        for multi_label in (False, True):
            assert np.isfinite(scores_to_logits(certain, multi_label)).all()
            assert np.isfinite(apply_temperature(certain, 0.05, multi_label)).all()


def test_what_no_temperature_helps() -> None:
    right = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    assert temperature(np.array([0, 1]), right, False) is None  # ever sharper
    assert temperature(np.array([1, 0]), right, False) is None  # ever flatter
    assert temperature(np.array([0, 1]), np.full((2, 2), 0.5, np.float32), False) is None
    made = fit(np.array([0, 1]), right, ("a", "b"), False)
    assert made.temperature == 1
    assert "temperature stays 1" in made.notes[0]


def test_thresholds_have_the_greatest_f1() -> None:
    random = np.random.default_rng(3)
    for round_ in range(60):
        count = int(random.integers(1, 30))
        has = random.random(count) < 0.4
        has[0] = True
        sure = random.random(count).astype(np.float32)
        if round_ % 2:
            sure = sure.round(1)
        chosen = threshold(has, sure)
        grid = np.unique(np.concatenate([np.linspace(0, 1, 401), sure.astype(float), [chosen]]))
        said = sure >= grid[:, None]
        scores = 2 * (said & has).sum(axis=1) / (said.sum(axis=1) + has.sum())
        best = scores.max()
        assert sk.f1_score(has, sure >= chosen) == pytest.approx(best)
        if scores[grid == 0.5][0] == best:
            assert chosen == 0.5


def test_thresholds_nearest_to_a_half() -> None:
    sure = np.array([0.9, 0.8, 0.2, 0.1], np.float32)
    assert threshold(np.array([True, True, False, False]), sure) == 0.5
    assert threshold(np.array([True, False, False, False]), sure) == pytest.approx(0.85)
    assert threshold(np.array([True, True, True, False]), sure) == pytest.approx(0.15)
    # {0.9} and all four both give 2/3: 0.05 is farther from 0.5 than 0.85.
    assert threshold(np.array([True, False, False, True]), sure) == pytest.approx(0.85)
    targets = np.array([[1, 0, np.nan], [0, 0, 1], [np.nan, 0, 0]], np.float32)
    scores = np.array([[0.3, 0.9, 0.1], [0.1, 0.8, 0.9], [0.99, 0.1, 0.2]], np.float32)
    assert thresholds(targets, scores).tolist() == pytest.approx([0.2, 0.5, 0.5])


def test_bootstrap() -> None:
    predictor = np.random.default_rng(4)
    targets = predictor.integers(0, 3, 80)
    scores = predictor.dirichlet((1, 1, 1), 80).astype(np.float32)
    rows = per_photo(targets, scores, False)
    found = bootstrap(rows, 300, seed=5)
    random, drawn = np.random.default_rng(5), []
    for _ in range(300):
        taken = random.integers(0, 80, 80)
        drawn.append(sk.f1_score(targets[taken], scores[taken].argmax(axis=1), average="macro"))
    assert found["f1_score_macro"] == pytest.approx(np.percentile(drawn, (2.5, 97.5)).tolist())
    assert found.keys() == quick(targets, scores, False).keys()
    assert found == bootstrap(rows, 300, seed=5)
    assert found != bootstrap(rows, 300, seed=6)
    low, high = found["accuracy"]
    assert low <= quick(targets, scores, False)["accuracy"] <= high
    assert bootstrap(rows, 0) == {}


# --- calibration.json -----------------------------------------------------------------------------


def calibration(**changes: Any) -> Calibration:
    made = Calibration(
        ("a", "a", "c"), True, 1.5, (0.5, 0.25, 0.75), "a set", 9, (3, 2, 0), (0.5, 0.4),
        ("note",), "2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def test_calibration_round_trip(tmp_path: Path) -> None:
    predictor = tiny(("a", "a", "c"), multi_label=True)
    predictor.save(tmp_path)
    assert Calibration.read(tmp_path) is None
    path = calibration().store(tmp_path)
    assert path == tmp_path / "calibration.json"
    read = Calibration.read(tmp_path)
    assert read is not None
    assert read.weights.keys() == {"model.safetensors"}
    assert dataclasses.replace(read, weights={}) == calibration()
    assert Calibration.read(tmp_path / "model.safetensors") == read
    Predictor.load(tmp_path, device="cpu")  # which the file does not disturb
    read.check(("a", "a", "c"), TASKS[True])
    for labels, task, match in (
        (("a", "a"), TASKS[True], "is for 3 classes, the model has 2"),
        (("a", "b", "c"), TASKS[True], "its class 1 is 'a', the model's 'b'"),
        (("a", "a", "c"), TASKS[False], "the model's task is single_label"),
        (("a", "a", "c"), "regression", "the model's task is regression"),
    ):
        with pytest.raises(ConfigError, match=match):
            read.check(labels, task)
    one = calibration(multi_label=False, thresholds=None)
    one.store(tmp_path)
    assert Calibration.read(tmp_path) == dataclasses.replace(one, weights=read.weights)


def test_calibration_of_other_weights(tmp_path: Path) -> None:
    """Saving over a model takes its calibration away; one that is put beside others is refused."""
    tiny(("a", "b")).save(tmp_path)
    calibration(labels=("a", "b"), thresholds=(0.5, 0.5), counts=(1, 1)).store(tmp_path)
    kept = (tmp_path / "calibration.json").read_bytes()
    tiny(("a", "b")).save(tmp_path)
    assert Calibration.read(tmp_path) is None
    (tmp_path / "calibration.json").write_bytes(kept)
    with pytest.raises(ConfigError, match="tuned for other weights"):
        Calibration.read(tmp_path)
    with pytest.raises(SourceError, match="no weights"):
        calibration().store(tmp_path / "..")


def test_calibration_of_an_optimized_model(tmp_path: Path) -> None:
    predictor = tiny(("a", "b"))
    predictor.fast().save(tmp_path)
    made = calibration(labels=("a", "b"), multi_label=False, thresholds=None, counts=(1, 1))
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
        ({"temperature": 10**400}, "no calibration"),
        ({"classes": {}}, "expected a list"),
        ({"classes": [1]}, "expected an object"),
        ({"classes": [{"label": 1, "photos": 0, "threshold": 0.5}]}, "expected text"),
        ({"classes": [{"label": "a", "photos": 0, "threshold": 2}]}, "expected 0 to 1"),
        ({"classes": [{"label": "a", "photos": 0}]}, "no 'threshold'"),
        ({"weights": {"model.safetensors": 1}}, "expected text"),
        ({"log_loss": {"before": 1}}, "no 'after'"),
    ],
)
def test_calibration_is_hostile(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    tiny(("a",)).save(tmp_path)
    value = calibration().as_dict() | change
    (tmp_path / "calibration.json").write_text(json.dumps(value))
    with pytest.raises(SourceError, match=match):
        Calibration.read(tmp_path)


def test_calibration_with_keys_that_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny(("a",)).save(tmp_path)
    value = calibration(labels=("a",), thresholds=(0.5,), counts=(1,)).as_dict()
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
    tiny(("a",)).save(tmp_path)
    for text in ("{", "[]", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(SourceError):
            Calibration.read(tmp_path)
    with path.open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(SourceError, match="expected at most"):
        Calibration.read(tmp_path)


# --- the report -----------------------------------------------------------------------------------


@pytest.mark.parametrize("multi_label", [False, True])
def test_report(tmp_path: Path, multi_label: bool) -> None:
    labels = ("can", "carton", "milk bottle", "water, still")
    predictor, photos = told(tmp_path / "photos", labels, 50, multi_label, of=3)
    out = tmp_path / "report"
    report = evaluate(predictor, photos, out, model="my model", bootstrap=50)
    names = {"metrics.json", "predictions.csv", "report.html", "mistakes.png", "confusion.png"}
    names |= {"precision_recall.png", "roc.png", "reliability.png"}
    names |= {"accuracy_table.json", "confusion_matrix.json"}
    assert {path.name for path in out.iterdir()} == names
    found = numbers(out)
    assert found == json.loads(json.dumps(report.as_dict()))
    assert (found["format"], found["complete"]) == ("vitlib-evaluation", True)
    assert found["data"] == {"source": "a set", "photos": 50, "evaluated": 50, "failed": 0}
    assert found["model"]["name"] == "my model"
    assert found["versions"]["scikit-learn"]
    scores = np.stack([predictor.said[str(p.path)] for p in photos.photos])
    targets = photos.targets()
    if multi_label:
        expected = sk.jaccard_score(targets, scores >= 0.5, average="samples", zero_division=0)
    else:
        expected = sk.accuracy_score(targets, scores.argmax(axis=1))
    first = found["primary_metric"]
    assert first == ("iou" if multi_label else "accuracy")
    assert found["metrics"][first] == pytest.approx(expected)
    low, high = found["intervals"][first]
    assert low < expected < high
    assert found["per_class"][3]["support"] == 0
    assert found["per_class"][3]["AUC"] is None
    assert any("no photo: water, still" in note for note in found["notes"])
    matrix = json.loads((out / "confusion_matrix.json").read_text())
    assert matrix["schema_type"] == "confusion_matrix"
    assert np.sum(matrix["data"]["matrix"]) == (200 if multi_label else 50)
    tables = json.loads((out / "accuracy_table.json").read_text())
    assert tables["data"]["class_labels"] == list(labels)
    assert len(tables["data"]["probability_tables"]) == 4
    rows = table(out)
    assert [row["file"] for row in rows] == [str(p.path) for p in photos.photos]
    for row, photo, score in zip(rows, photos.photos, scores, strict=True):
        assert float(row["score:water, still"]) == pytest.approx(score[3], rel=1e-6)
        if multi_label:
            said = [label for label, s in zip(labels, score, strict=True) if s >= 0.5]
            assert (json.loads(row["true"]), json.loads(row["predicted"])) == (
                list(photo.labels), said
            )  # fmt: skip
        else:
            assert (row["true"], row["predicted"]) == (photo.labels[0], labels[score.argmax()])
    if not multi_label:
        true, said, count = report.confused[0]
        pairs = [(r["true"], r["predicted"]) for r in rows if r["true"] != r["predicted"]]
        assert count == pairs.count((true, said)) == max(map(pairs.count, pairs))


def test_the_same_twice(tmp_path: Path) -> None:
    predictor, photos = told(tmp_path / "photos", ("a", "b", "c"), 20)
    for name in ("one", "two"):
        evaluate(predictor, photos, tmp_path / name, bootstrap=20, seed=3)
    one, two = numbers(tmp_path / "one"), numbers(tmp_path / "two")
    for found in (one, two):
        del found["date"], found["seconds"]
    assert one == two
    for name in ("predictions.csv", "roc.png", "mistakes.png", "accuracy_table.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("multi_label", [False, True])
def test_hostile_labels(tmp_path: Path, multi_label: bool) -> None:
    predictor, photos = told(tmp_path / "<b>p&", HOSTILE, 60, multi_label)
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
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    shown = [base64.b64decode(source.split(",")[1]) for source in sources]
    for name in ("roc.png", "mistakes.png", "confusion.png"):
        assert (out / name).read_bytes() in shown
    rows = table(out)
    assert len(rows) == 61
    assert rows[-1]["file"] == "<b>x.jpg"
    assert rows[-1]["error"] == "<u>why\\udc80"
    if not multi_label:
        assert {row["true"] for row in rows[:-1]} <= set(HOSTILE)
    assert numbers(out)["failed"] == [{"file": "<b>x.jpg", "error": "<u>why\udc80"}]
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
    predictor, photos = told(tmp_path / "photos", labels, count, multi_label, of=of)
    report = evaluate(predictor, photos, tmp_path / "report", bootstrap=5)
    assert len(report.per_class) == classes
    for name in ("confusion.png", "precision_recall.png", "roc.png", "reliability.png"):
        with Image.open(tmp_path / "report" / name) as image:
            assert 400 <= image.width <= 1600
            assert 200 <= image.height <= 1600


def test_no_mistakes(tmp_path: Path) -> None:
    predictor, photos = told(tmp_path / "photos", ("a", "b"), 10, signal=50)
    out = tmp_path / "report"
    report = evaluate(predictor, photos, out, bootstrap=0)
    assert report.metrics["accuracy"] == 1
    assert report.intervals == {}
    assert not (out / "mistakes.png").exists()
    assert "every prediction is correct" in (out / "report.html").read_text()


def test_the_tables_of_counts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitlib.evaluate.report.MOST_CLASSES", 3)
    predictor, photos = told(tmp_path / "photos", tuple("abcd"), 10)
    report = evaluate(predictor, photos, tmp_path / "report", bootstrap=0)
    assert not (tmp_path / "report" / "accuracy_table.json").exists()
    assert any("accuracy_table.json" in note for note in report.notes)


def test_unknown_labels(tmp_path: Path) -> None:
    predictor, photos = told(tmp_path / "photos", tuple("abc"), 40, True, unknown=True)
    report = evaluate(predictor, photos, tmp_path / "report", bootstrap=5)
    lost = int(np.isnan(photos.targets()).sum())
    assert f"{lost} of 120 labels are unknown and are not counted" in report.notes
    rows = table(tmp_path / "report")
    assert [json.loads(row["unknown"]) for row in rows] == [list(p.unknown) for p in photos.photos]


def test_one_class_against_the_rest(tmp_path: Path) -> None:
    predictor, photos = told(tmp_path / "photos", tuple("abc"), 30)
    report = evaluate(predictor, photos, tmp_path / "report", positive="b", bootstrap=0)
    scores = np.stack([predictor.said[str(p.path)] for p in photos.photos])
    expected = sk.roc_auc_score(photos.targets() == 1, scores[:, 1])
    assert report.metrics["AUC_binary"] == pytest.approx(expected)
    with pytest.raises(ConfigError, match="expected the name of one class"):
        evaluate(predictor, photos, tmp_path / "report", positive="x")


# --- photos that fail -----------------------------------------------------------------------------


def test_bad_photos_are_counted_and_named(tmp_path: Path) -> None:
    paths = draw(tmp_path / "photos", 6)
    paths[1].write_bytes(b"no photo")
    paths[4].unlink()
    predictor = tiny(("a", "b"))
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
    assert numbers(out)["data"] == {"source": "a set", "photos": 7, "evaluated": 4, "failed": 3}
    assert "3 of 7 photos could not be used and are not counted" in report.notes
    rows = table(out)
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
    assert numbers(out)["data"]["evaluated"] == 4  # the earlier report is still there, whole


def test_scores_that_are_no_numbers(tmp_path: Path) -> None:
    _, photos = told(tmp_path / "photos", ("a", "b"), 4)
    for index, photo in enumerate(photos.photos):
        Image.new("RGB", (16, 16), (255, 255, 255) if index == 2 else (0, 0, 0)).save(photo.path)
    model = ViT(ViTConfig(image_size=16, patch_size=8, num_classes=2, labels=("a", "b"), depth=1))
    rule = ImageProcessor(size=(16, 16), rescale_factor=3e36)  # white times it is infinite
    for given, kind in (("skip", ConfigError), ("fail", ImageError)):
        with pytest.raises(kind, match=r"2.*the model gives numbers that are not finite"):
            evaluate(Predictor(model, rule), photos, tmp_path / "report", on_bad_image=given)


# --- sets that do not fit -------------------------------------------------------------------------


def test_what_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    predictor, photos = told(tmp_path / "photos", ("a", "b"), 8)
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
    made = calibration(labels=("a", "b"), multi_label=False, thresholds=None, counts=(1, 1))
    for settings, match in (
        ({"tune": half, "calibration": made}, "leave calibration= out"),
        ({"calibration": calibration()}, "is for a multi_label"),
        ({"threshold": 0.3}, "several labels a photo"),
        ({"bootstrap": -1}, "expected 0"),
        ({"on_bad_image": "ignore"}, "expected 'fail' or 'skip'"),
    ):
        with pytest.raises(ConfigError, match=match):
            evaluate(predictor, photos.subset(range(2, 8)), out, **settings)
    several = told(tmp_path / "several", ("a", "b"), 4, True)
    with pytest.raises(ConfigError, match="expected a number from 0 to 1"):
        evaluate(*several, out, threshold=2)
    headless = Predictor(ViT(ViTConfig(num_classes=0, depth=1)), ImageProcessor(size=(224, 224)))
    with pytest.raises(ConfigError, match="no head"):
        evaluate(headless, photos, out)
    assert not out.exists()


def test_a_label_of_two_classes(tmp_path: Path) -> None:
    predictor, photos = told(tmp_path / "photos", ("crane", "b", "c"), 30)
    predictor.model.config = dataclasses.replace(
        predictor.model.config, labels=("crane", "crane", "c")
    )
    both = [i for i, photo in enumerate(photos.photos) if photo.labels == ("crane",)]
    with pytest.raises(DataError, match=r"'crane' .*two"):
        evaluate(predictor, photos.subset(both), tmp_path / "report")


def test_without_the_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, photos = told(tmp_path / "photos", ("a", "b"), 4)

    def lacking(*_: object) -> None:
        raise ConfigError("pip install 'vitlib[eval]'")

    monkeypatch.setattr("vitlib.evaluate.evaluation.import_sklearn_metrics", lacking)
    predictor.probabilities = lacking
    with pytest.raises(ConfigError, match="eval"):
        evaluate(predictor, photos, tmp_path / "report")


# --- tuning in a report ---------------------------------------------------------------------------


@pytest.mark.parametrize("multi_label", [False, True])
def test_tuned_on_other_photos(tmp_path: Path, multi_label: bool) -> None:
    labels = tuple("abc")
    predictor, photos = told(tmp_path / "photos", labels, 200, multi_label, signal=1.5)
    tune, test = photos.subset(range(100)), photos.subset(range(100, 200))
    model, out = tmp_path / "model", tmp_path / "report"
    predictor.save(model)
    report = evaluate(predictor, test, out, model=model, tune=tune, bootstrap=5)
    held = report.calibration
    assert held is not None
    assert (held.photos, held.source, sum(held.counts) > 0) == (100, "a set", True)
    assert held.log_loss[1] < held.log_loss[0]
    assert (held.thresholds is not None) == multi_label
    assert report.stored == model / "calibration.json"
    stored = Calibration.read(model)
    assert stored is not None
    assert dataclasses.replace(stored, weights={}) == held
    assert Calibration.read(model / "model.safetensors") == stored
    scores = np.stack([predictor.said[str(p.path)] for p in test.photos])
    limits = np.array(held.thresholds) if held.thresholds else 0.5
    expected = quick(test.targets(), held.apply(scores), multi_label, limits)
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
    plain = evaluate(predictor, test, out, bootstrap=5)
    assert plain.calibration is None
    assert plain.metrics["log_loss"] == pytest.approx(before["log_loss"], abs=1e-6)
    assert not (out / "calibration.json").exists()  # nothing of the earlier report is left


def test_a_threshold_asked_for(tmp_path: Path) -> None:
    predictor, photos = told(tmp_path / "photos", tuple("abc"), 40, True)
    tune, test = photos.subset(range(20)), photos.subset(range(20, 40))
    report = evaluate(predictor, test, tmp_path / "r", tune=tune, threshold=0.3, bootstrap=0)
    assert report.thresholds == (0.3, 0.3, 0.3)
    assert not any("threshold for each class" in note for note in report.notes)


# --- the folder -----------------------------------------------------------------------------------


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    predictor, photos = told(tmp_path / "photos", ("a", "b"), 4)
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


def test_an_earlier_report_is_replaced(tmp_path: Path) -> None:
    predictor, photos = told(tmp_path / "photos", ("a", "b"), 12, signal=0)
    out = tmp_path / "deep" / "out"
    evaluate(predictor, photos, out, bootstrap=0)
    assert (out / "mistakes.png").exists()
    (out / "notes.txt").write_text("mine")
    predictor, photos = told(tmp_path / "photos", ("a", "b"), 9, signal=50)
    evaluate(predictor, photos, out, bootstrap=0)
    assert numbers(out)["data"]["evaluated"] == 9
    assert len(table(out)) == 9
    assert not (out / "mistakes.png").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("after", range(9))
def test_a_kill_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    predictor, photos = told(tmp_path / "photos", ("a", "b"), 12, signal=0)
    out = tmp_path / "out"
    evaluate(predictor, photos, out, bootstrap=0)
    done, real = [], Path.replace

    def killed(self: Path, target: Any) -> Path:
        if Path(target).parent == out:
            if len(done) == after:
                raise KeyboardInterrupt
            done.append(target)
        return real(self, target)

    _, more = told(tmp_path / "photos", ("a", "b"), 5, signal=0)
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(predictor, more, out, bootstrap=0)
    monkeypatch.undo()
    found = numbers(out)
    if after == 0:
        assert found["data"]["evaluated"] == 12
    else:
        assert found == {"format": "vitlib-evaluation", "format_version": 1, "complete": False}
    evaluate(predictor, more, out, bootstrap=0)  # and it can be made again
    assert numbers(out)["data"]["evaluated"] == 5


def test_leftovers_of_a_kill_are_no_obstacle(tmp_path: Path) -> None:
    predictor, photos = told(tmp_path / "photos", ("a", "b"), 4)
    (tmp_path / "out" / ".vitlib-report-abc").mkdir(parents=True)
    evaluate(predictor, photos, tmp_path / "out", bootstrap=0)
    assert folders.is_report(tmp_path / "out")


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    predictor, photos = told(tmp_path / "photos", ("a", "b"), 4)
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(SourceError, match="cannot be written"):
        evaluate(predictor, photos, tmp_path / "out" / "below")


# --- real photos ----------------------------------------------------------------------------------


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_real_model_on_real_photos(
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
