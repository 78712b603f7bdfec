"""Tests of regression: data, loss, metrics, fine-tuning and report.

The loss is compared with transformers, the metrics with scikit-learn.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitlib import ImageProcessor, Predictor, ViT, ViTConfig, metrics
from vitlib.data import LabelledPhotos, folds, read_photos, split
from vitlib.errors import ConfigError, DataError, VitlibError
from vitlib.evaluate import evaluate
from vitlib.fast.auto_precision import outputs_agree
from vitlib.train import finetune
from vitlib.train.config import TrainConfig
from vitlib.train.losses import build_criterion
from vitlib.train.settings import Loss

Cli = Callable[..., tuple[int, str, str]]
VALUES = [(20.5, -1.0), (31.0, 2.5), (18.0, 0.0), (64.25, 7.0), (40.0, -3.0), (55.0, 1.0)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write grey photos, and their numbers in each file format."""
    for i, (age, _) in enumerate(VALUES):
        Image.new("L", (20, 20), int(3 * age)).save(tmp_path / f"{i}.png")
    rows = [f"{i}.png,{a},{b}" for i, (a, b) in enumerate(VALUES)]
    (tmp_path / "two.csv").write_text("\n".join(["filename,age,height", *rows]))
    rows_by_name = [f"{a},{i}.png" for i, (a, _) in enumerate(VALUES)]
    (tmp_path / "named.csv").write_text("\n".join(["age,file", *rows_by_name]))
    (tmp_path / "bare.csv").write_text("\n".join(row.rpartition(",")[0] for row in rows))
    forms: dict[str, Callable[[float, float], Any]] = {
        "one": lambda a, _: a,
        "list": lambda a, b: [a, b],
        "object": lambda a, b: {"age": a, "height": b},
    }
    for name, form in forms.items():
        lines = [
            json.dumps({"image_url": f"{i}.png", "label": form(a, b)})
            for i, (a, b) in enumerate(VALUES)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def make_predictor(
    labels: tuple[str, ...] = ("age", "height"), problem: Any = "regression"
) -> Predictor:
    torch.manual_seed(0)
    cfg = ViTConfig(
        image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=len(labels),
        labels=labels, problem_type=problem,
    )  # fmt: skip
    return Predictor(ViT(cfg), ImageProcessor(size=(16, 16)))


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("two.csv", ("age", "height")),
        ("named.csv", ("age",)),
        ("bare.csv", ("value",)),
        ("one.jsonl", ("value",)),
        ("list.jsonl", ("value_0", "value_1")),
        ("object.jsonl", ("age", "height")),
    ],
)
def test_read_photos_reads_numbers(folder: Path, name: str, labels: tuple[str, ...]) -> None:
    photos = read_photos(folder / name, regression=True)
    assert (photos.labels, photos.task) == (labels, "regression")
    expected = np.array(VALUES, np.float32)[:, : len(labels)]
    assert photos.targets() == pytest.approx(expected)
    training, validation = split(photos, 0.5, seed=1)
    assert len(training) == len(validation) == 3
    assert np.array_equal(
        np.sort(np.concatenate([training.targets(), validation.targets()]), axis=0),
        np.sort(expected, axis=0),
    )
    assert sorted(i for _, fold in folds(photos, 3, 0) for i in fold.tolist()) == list(range(6))


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("x.csv", "0.png,cat\n", r"line 1 has 'cat' in the column 'value': expected a number"),
        ("x.csv", "file,age\n0.png,\n", "line 2 has '' in the column 'age'"),
        ("x.csv", "file,age\n0.png,nan\n", "line 2 has 'nan'"),
        ("x.csv", "file,age\n0.png,inf\n", "line 2 has 'inf'"),
        ("x.csv", "file,age\n0.png,1e300\n", "line 2 has '1e300'"),
        ("x.csv", "file,age\n0.png,1_000\n", "line 2 has '1_000'"),
        ("x.csv", "0.png,1\n0.png,2\n", "has the numbers 1 in line 1 and 2 in line 2: keep one"),
        ("x.jsonl", '{"file": "0.png", "label": "cat"}', "line 1 has a text in place of a number"),
        ("x.jsonl", '{"file": "0.png", "label": true}', "true or false in place of a number"),
        ("x.jsonl", '{"file": "0.png", "label": NaN}', "in place of a number"),
        ("x.jsonl", '{"file": "0.png"}', "nothing in place of a number"),
        ("x.jsonl", '{"file": "0.png", "label": [1, null]}', "nothing in place of a number"),
        ("x.jsonl", '{"file": "0.png", "label": [1]}\n{"file": "1.png", "label": [1, 2]}',
         "line 2 and line 1 give other outputs"),
    ],
)  # fmt: skip
def test_read_photos_rejects_values_that_are_not_numbers(
    folder: Path, name: str, text: str, match: str
) -> None:
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=match):
        read_photos(folder / name, regression=True)


def test_read_photos_distinguishes_classes_from_numbers(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "set/a").mkdir(parents=True)
    with pytest.raises(DataError, match=r"has no \.csv or \.jsonl: regression takes a number"):
        read_photos(tmp_path / "set", regression=True)
    with pytest.raises(DataError, match=r"all labels are numbers with fractions, such as '18\.0'"):
        read_photos(folder / "bare.csv")
    with pytest.raises(DataError, match="vitlib finetune --regression"):
        read_photos(folder / "one.jsonl")
    with pytest.raises(ConfigError, match="multi_label and regression"):
        read_photos(folder / "one.jsonl", multi_label=True, regression=True)
    classes = "".join(f"{i}.png,{i % 2}\n" for i in range(6))  # whole numbers may name classes
    (folder / "whole.csv").write_text(classes)
    assert read_photos(folder / "whole.csv").labels == ("0", "1")


def test_with_labels_matches_outputs_by_name(folder: Path) -> None:
    two = read_photos(folder / "two.csv", regression=True)
    reordered = two.with_labels(("height", "age"))
    assert np.array_equal(reordered.targets(), two.targets()[:, ::-1])
    unnamed = read_photos(folder / "list.jsonl", regression=True)
    assert unnamed.with_labels(("a", "b")).labels == ("a", "b")
    single = read_photos(folder / "named.csv", regression=True)
    assert single.with_labels(("LABEL_0",)).labels == ("LABEL_0",)
    with pytest.raises(DataError, match="expected the same names"):
        two.with_labels(("age", "weight"))
    with pytest.raises(DataError, match="2 numbers a photo"):
        two.with_labels(("age",))


# --- loss and metrics -----------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 2])
def test_loss_equals_transformers(outputs: int) -> None:
    from transformers import ViTConfig as ReferenceConfig
    from transformers import ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(
        ReferenceConfig(
            image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=32, problem_type="regression",
            num_labels=outputs,
        )
    ).eval()  # fmt: skip
    targets = torch.tensor(VALUES)[:, :outputs]
    with torch.no_grad():
        output = model(torch.randn(6, 3, 16, 16), labels=targets)
    loss = build_criterion(Loss(), targets, "regression")
    actual = loss.sum(output.logits, targets) / loss.weight(targets)
    assert actual.item() == pytest.approx(output.loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    "option", [{"label_smoothing_factor": 0.1}, {"weighted_loss": 1}, {"class_weights": (1.0, 2.0)}]
)
def test_loss_rejects_options_of_classification(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="for classes, and regression has none"):
        build_criterion(Loss(**option), torch.tensor(VALUES), "regression")


def test_metrics_equal_scikit_learn() -> None:
    sk = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    y_true = random.normal(size=(50, 3)) * [1, 10, 100] + [0, 5, -70]
    y_pred = y_true + random.normal(size=(50, 3)) * [2, 3, 40]
    y_pred[:, 2] = y_true[:, 2]  # an exact prediction
    weights = random.integers(0, 3, 50).astype(float)
    names = ("mean_absolute_error", "root_mean_squared_error", "r2_score")
    for sample_weight in (None, weights):
        actual = metrics.regression(y_true, y_pred, sample_weight)
        for name in names:
            expected = getattr(sk, name)(y_true, y_pred, sample_weight=sample_weight)
            assert actual[name] == pytest.approx(expected, rel=1e-12)
    rows = metrics.per_output(y_true, y_pred, ("a", "b", "c"))
    for index, row in enumerate(rows):
        for name in names:
            expected = getattr(sk, name)(y_true[:, index], y_pred[:, index])
            assert getattr(row, name) == pytest.approx(expected, rel=1e-12)
    constant = np.ones((4, 1))
    for y_pred in (constant, constant + 1):
        assert metrics.regression(constant, y_pred)["r2_score"] == sk.r2_score(constant, y_pred)
    assert np.isnan(metrics.regression(constant[:1], constant[:1])["r2_score"])


# --- fine-tuning ----------------------------------------------------------------------------------


def test_transformers_loads_finetuned_model(folder: Path, tmp_path: Path) -> None:
    from transformers import ViTForImageClassification

    config = TrainConfig.from_dict(
        {"num_train_epochs": 4, "image_size": 16, "learning_rate": 0.05, "validation_split": 0.34,
         "augment": "none", "warmup_ratio": 0}
    )  # fmt: skip
    run = finetune(
        folder / "two.csv", None, tmp_path / "out", config=config, regression=True,
        from_scratch="32x1x2/8", device="cpu",
    )  # fmt: skip
    events = [json.loads(x) for x in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    errors = {e["step"]: e["root_mean_squared_error"] for e in events if e["event"] == "eval"}
    assert len(errors) == 4
    assert run.metrics["root_mean_squared_error"] == min(errors.values())
    assert {"loss", "mean_absolute_error", "r2_score"} <= run.metrics.keys()
    reference_model = ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert reference_model.config.problem_type == "regression"
    assert reference_model.config.id2label == {0: "age", 1: "height"}
    vit = Predictor.load(tmp_path / "out", device="cpu")
    pixels = vit.image_processor([folder / "0.png", folder / "3.png"])
    with torch.inference_mode():
        expected = reference_model(pixels).logits.numpy()
    actual = vit.probabilities([folder / "0.png", folder / "3.png"])
    assert actual == pytest.approx(expected, rel=1e-4)
    # The head starts at the mean of the targets.
    assert np.abs(actual.mean(axis=0) - np.mean(VALUES, axis=0)).max() < 20
    assert "| age | " in (tmp_path / "out/README.md").read_text()


def test_finetune_rejects_data_of_another_task(folder: Path, tmp_path: Path, run_cli: Cli) -> None:
    args = ("--out", tmp_path / "out", "--from-scratch", "32x1x2/8", "--image-size", 16)
    (folder / "classes.csv").write_text("".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(6)))
    for data, options, match in (
        ("classes.csv", ("--regression",), "expected a number"),
        ("bare.csv", (), "all labels are numbers with fractions"),
        ("bare.csv", ("--regression", "--class-weights", "1"), "for classes"),
        (
            "bare.csv",
            ("--regression", "--metric-for-best-model", "iou"),
            "expected one of loss",
        ),
    ):
        status, _, err = run_cli("finetune", folder / data, *options, *args)
        assert (status, err.count("\n")) == (1, 1)
        assert match in err
    assert run_cli("finetune", folder / "bare.csv", "--regression", "--multi-label", *args)[0] == 2
    numbers = read_photos(folder / "bare.csv", regression=True)
    classes = read_photos(folder / "classes.csv")
    with pytest.raises(DataError, match="expected two of one task"):
        finetune(numbers, None, tmp_path / "out", validation=classes, from_scratch="S/16")
    with pytest.raises(ConfigError, match="was read for single_label"):
        finetune(classes, None, tmp_path / "out", regression=True, from_scratch="S/16")


# --- report ---------------------------------------------------------------------------------------


def test_evaluate_writes_report_of_regression(folder: Path, tmp_path: Path, run_cli: Cli) -> None:
    sk = pytest.importorskip("sklearn.metrics")
    vit = make_predictor()
    vit.save(tmp_path / "model")
    out = tmp_path / "report"
    arguments = ("evaluate", tmp_path / "model", folder / "two.csv", "--out", out)
    status, text, _ = run_cli(*arguments, "--bootstrap", 20, "--json")
    assert status == 0
    report = json.loads(text)
    assert (report["task"], report["primary_metric"]) == ("regression", "root_mean_squared_error")
    assert "per_class" not in report
    # Of random weights, whose numbers have nothing to do with the photos.
    note = "no better than the mean as the answer to every photo: age, height"
    assert note in report["notes"]
    y_pred = vit.probabilities([folder / f"{i}.png" for i in range(6)])
    for name, value in report["metrics"].items():
        assert value == pytest.approx(getattr(sk, name)(np.float32(VALUES), y_pred), rel=1e-5)
        assert report["intervals"][name][0] <= value <= report["intervals"][name][1]
    assert [row["label"] for row in report["per_output"]] == ["age", "height"]
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["true:age"]) for row in rows] == [a for a, _ in VALUES]
    assert [float(row["predicted:height"]) for row in rows] == pytest.approx(y_pred[:, 1].tolist())
    page = (out / "report.html").read_text()
    for part in ("Each output", "Predicted and true", "Errors", "root mean squared error"):
        assert part in page
    assert "Each class" not in page
    assert {p.name for p in out.glob("*.png")} == {"predicted.png", "errors.png", "mistakes.png"}
    for option in (("--threshold", 0.5), ("--positive", "age"), ("--tune", folder / "list.jsonl"),
                   ("--multi-label",), ("--single-label",)):  # fmt: skip
        status, _, err = run_cli(*arguments, *option)
        assert (status, err.count("\n")) == (1, 1)
        assert "this model is a regression" in err or "this model gives numbers" in err


def test_evaluate_rejects_data_of_another_task(folder: Path, tmp_path: Path) -> None:
    numbers = read_photos(folder / "two.csv", regression=True)
    photos = tuple(photo._replace(labels=("a",), values=()) for photo in numbers.photos)
    classes = LabelledPhotos(photos, ("a", "b"), False, "a set")
    for vit, data, match in (
        (make_predictor(), classes, "was read with labels, the model gives numbers"),
        (
            make_predictor(("a", "b"), None),
            numbers,
            "was read with numbers, the model gives labels",
        ),
    ):
        with pytest.raises(DataError, match=match):
            evaluate(vit, data, tmp_path / "report")
    with pytest.raises(VitlibError, match="2 numbers a photo"):
        evaluate(make_predictor(("age",)), numbers, tmp_path / "report")
    with pytest.raises(DataError, match="has 1 values: expected 2"):
        replace(numbers, photos=(numbers.photos[0]._replace(values=(1.0,)),)).targets()


def test_outputs_agree_compares_numbers_of_regression() -> None:
    expected = torch.tensor([[10.0], [20.0], [30.0]])
    assert outputs_agree(expected + 0.01, expected, "regression")
    # The argmax of a single output is always equal, so classification accepts any difference.
    assert not outputs_agree(expected + 1, expected, "regression")
    assert outputs_agree(expected + 1, expected, "single_label_classification")
