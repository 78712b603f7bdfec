"""Tests of vitlib evaluate: its output, its files and its errors."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitlib import ImageProcessor, Predictor, ViT, ViTConfig
from vitlib.evaluate import Calibration

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'vitlib[plot]'")
pytest.importorskip("sklearn", reason="metrics need scikit-learn: pip install 'vitlib[eval]'")

Run = Callable[..., tuple[int, str, str]]
LABELS = ("blue", "green", "red")
TASKS = ("single_label_classification", "multi_label_classification")


def draw_photo(index: int, noise: int) -> Image.Image:
    """Draw a photo of mostly one colour."""
    pixels = np.random.default_rng(noise).integers(0, 120, (20, 24, 3), dtype=np.uint8)
    pixels[..., 2 - index] += 130
    return Image.fromarray(pixels)


def save_model(folder: Path, task: int = 0) -> Path:
    cfg = ViTConfig(
        image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3,
        labels=LABELS, problem_type=TASKS[task],
    )  # fmt: skip
    vit = ViT(cfg)
    predictor = Predictor(vit, ImageProcessor(size=(16, 16)))
    with torch.no_grad():  # fit the head by least squares, on photos that no test uses
        photos = [draw_photo(i % 3, 1000 + i) for i in range(60)]
        features = predictor.embed(photos)
        targets = np.eye(3)[np.arange(60) % 3] * 8 - 4
        solution = np.linalg.lstsq(np.c_[features, np.ones(60)], targets, rcond=None)[0]
        vit.head.weight.copy_(torch.from_numpy(solution[:-1].T))
        vit.head.bias.copy_(torch.from_numpy(solution[-1]))
    predictor.save(folder)
    return folder


def draw_class_folders(root: Path, count: int = 10, start: int = 0) -> Path:
    """Draw a folder of photos for each class."""
    for index, label in enumerate(LABELS):
        (root / label).mkdir(parents=True)
        for i in range(count):
            draw_photo(index, start + i).save(root / label / f"{label} {i}.png")
    return root


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return draw_class_folders(tmp_path / "data")


def test_evaluate_writes_report(run_cli: Run, single: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    status, stdout, err = run_cli("evaluate", single, data, "--out", out, "--bootstrap", 20)
    assert (status, err) == (0, "")
    lines = dict(line.split("  ", 1) for line in stdout.splitlines())
    assert lines["report"].strip() == str(out / "report.html")
    assert lines["measured on"].strip() == f"30 photos of {data}"
    report = json.loads((out / "metrics.json").read_text())
    assert report["metrics"]["accuracy"] > 0.8
    assert lines["accuracy"].strip().startswith(f"{report['metrics']['accuracy']:.4f}  (")
    assert report["model"]["name"] == str(single)
    status, stdout, err = run_cli("evaluate", single, data, "-o", out, "--bootstrap", 0, "--json")
    assert (status, err) == (0, "")
    printed = json.loads(stdout)
    assert printed["report"] == str(out / "report.html")
    assert printed["metrics"] == report["metrics"]
    assert printed["intervals"] == {}


def test_evaluate_names_bad_photos(run_cli: Run, single: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    (data / "red" / "red 0.png").write_bytes(b"no photo")
    photo = (data / "red" / "red 1.png").read_bytes()
    (data / "red" / "red 1.png").write_bytes(photo[: len(photo) // 2])  # the header stays valid
    args = ("evaluate", single, data, "-o", out, "--bootstrap", 0)
    status, _, err = run_cli(*args, "--on-bad-image", "fail")
    assert status == 1
    assert "red 0.png" in err
    assert not out.exists()
    status, stdout, err = run_cli(*args)
    assert status == 1
    assert len(err.splitlines()) == 2
    assert all(f"red {i}.png" in err for i in (0, 1))
    assert "28 photos" in stdout
    report = json.loads((out / "metrics.json").read_text())
    assert (report["data"]["photos"], report["data"]["failed"]) == (30, 2)
    with (out / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    assert [Path(row["file"]).name for row in rows if row["error"]] == ["red 1.png", "red 0.png"]
    status, stdout, err = run_cli(*args, "--json")
    assert status == 1
    assert len(json.loads(stdout)["failed"]) == 2


def test_tuned_calibration_changes_later_evaluations(
    run_cli: Run, single: Path, data: Path, tmp_path: Path
) -> None:
    held_out, out = draw_class_folders(tmp_path / "held out", start=500), tmp_path / "report"
    args = ("evaluate", single, data, "-o", out, "--bootstrap", 0)
    original = json.loads(run_cli(*args, "--json")[1])
    assert original["calibration"] is None
    status, stdout, err = run_cli(*args, "--tune", held_out)
    assert (status, err) == (0, "")
    stored = single / "calibration.json"
    assert str(stored) in stdout
    calibration = Calibration.read(single)
    assert calibration is not None
    assert calibration.photos == 30
    calibrated = json.loads(run_cli(*args, "--json")[1])
    assert calibrated["calibration"]["temperature"] == calibration.temperature
    assert calibrated["metrics"]["accuracy"] == original["metrics"]["accuracy"]
    if calibration.temperature != 1:
        assert calibrated["metrics"]["log_loss"] != original["metrics"]["log_loss"]
    uncalibrated = json.loads(run_cli(*args, "--no-calibration", "--json")[1])
    assert uncalibrated["metrics"] == original["metrics"]
    stored.write_text("{}")
    status, _, err = run_cli(*args)
    assert status == 1
    assert "is not a calibration of version 1" in err
    assert len(err.splitlines()) == 1
    assert run_cli(*args, "--no-calibration")[0] == 0


def test_evaluate_measures_multi_label_model(run_cli: Run, data: Path, tmp_path: Path) -> None:
    multi_label, out = save_model(tmp_path / "several", task=1), tmp_path / "report"
    table = tmp_path / "labels.csv"
    rows = [f"{p.relative_to(tmp_path)},{p.parent.name}" for p in sorted(data.rglob("*.png"))]
    table.write_text("filename,labels\n" + "\n".join(rows[::-1]) + "\n")
    args = ("evaluate", multi_label, table, "-o", out, "--bootstrap", 0)
    status, stdout, err = run_cli(*args, "--json")
    assert (status, err) == (0, "")
    report = json.loads(stdout)
    assert (report["task"], report["primary_metric"]) == (TASKS[1], "iou")
    assert report["per_class"][0]["threshold"] == 0.5
    held_out = draw_class_folders(tmp_path / "held out", start=500)
    assert run_cli(*args, "--tune", held_out)[0] == 0
    calibration = Calibration.read(multi_label)
    assert calibration is not None
    assert calibration.thresholds is not None
    report = json.loads(run_cli(*args, "--json")[1])
    assert [row["threshold"] for row in report["per_class"]] == list(calibration.thresholds)
    report = json.loads(run_cli(*args, "--threshold", 0.9, "--positive", "red", "--json")[1])
    assert [row["threshold"] for row in report["per_class"]] == [0.9] * 3
    assert report["metrics"]["AUC_binary"] > 0.8
    status, stdout, err = run_cli(*args, "--single-label", "--no-calibration", "--json")
    assert (status, err) == (0, "")
    assert json.loads(stdout)["task"] == TASKS[0]


def test_task_is_that_of_model_or_option(
    run_cli: Run, single: Path, data: Path, tmp_path: Path
) -> None:
    args = ("evaluate", single, data, "-o", tmp_path / "report", "--bootstrap", 0, "--json")
    assert json.loads(run_cli(*args)[1])["task"] == TASKS[0]
    report = json.loads(run_cli(*args, "--multi-label")[1])
    assert report["task"] == report["model"]["problem_type"] == TASKS[1]
    table = tmp_path / "labels.csv"
    lines = [f"data/{name}/{name} 0.png,{name}" for name in LABELS]
    table.write_text("\n".join(["filename,labels", *lines, "data/red/red 1.png,red blue", ""]))
    status, _, err = run_cli("evaluate", single, table, "-o", tmp_path / "report")
    assert status == 1
    assert "--multi-label" in err
    assert len(err.splitlines()) == 1


def test_evaluate_rejects_wrong_options_and_data(
    run_cli: Run, single: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    args = ("evaluate", single, data, "-o", out)
    for options, match in (
        (("--tune", data, "--no-calibration"), "leave --no-calibration out"),
        (("--calibrate", data), "--calibrate is for --precision int8 or auto"),
        (("--bootstrap", -1), "--bootstrap"),
        (("--threshold", 2), "--threshold"),
    ):
        status, _, err = run_cli(*args, *options)
        assert status == 2
        assert match in " ".join(err.split())
    for options, match in (
        (("--tune", data), "30 photos of the tuning set are also in the evaluation set"),
        (("--threshold", 0.4), "several labels a photo"),
        (("--positive", "pink"), "expected the name of one class"),
    ):
        status, _, err = run_cli(*args, *options)
        assert status == 1
        assert match in err
        assert len(err.splitlines()) == 1
    (data / "red").rename(data / "pink")
    status, _, err = run_cli(*args)
    assert status == 1
    assert "pink" in err
    status, _, err = run_cli("evaluate", single, tmp_path / "nowhere", "-o", out)
    assert status == 1
    assert "is not there" in err
    assert not out.exists()
    status, _, err = run_cli("evaluate", single, data, "-o", data)
    assert status == 1
    assert "no report of vitlib evaluate" in err
    assert {path.name for path in data.iterdir()} == {"blue", "green", "pink"}


def test_evaluate_reports_chosen_precision(
    run_cli: Run, single: Path, data: Path, tmp_path: Path
) -> None:
    args = ("evaluate", single, data, "-o", tmp_path / "report", "--bootstrap", 0, "--json")
    status, stdout, err = run_cli(*args, "--precision", "auto", "--device", "cpu")
    assert status == 0
    assert err  # states the choice and its reason
    assert json.loads(stdout)["model"]["precision"] in ("fp32", "bf16", "int8")


def test_evaluate_measures_optimized_model(
    run_cli: Run, single: Path, data: Path, tmp_path: Path
) -> None:
    fast = tmp_path / "fast"
    Predictor.load(single, device="cpu").fast().save(fast)  # type: ignore[union-attr]
    args = (data, "-o", tmp_path / "report", "--bootstrap", 0, "--json")
    expected = json.loads(run_cli("evaluate", single, *args)[1])
    actual = json.loads(run_cli("evaluate", fast, *args)[1])
    assert actual["metrics"]["accuracy"] == expected["metrics"]["accuracy"]
    held_out = draw_class_folders(tmp_path / "held out", start=500)
    assert run_cli("evaluate", fast, *args, "--tune", held_out)[0] == 0
    assert (fast / "calibration.json").exists()
    assert json.loads(run_cli("evaluate", fast, *args)[1])["calibration"] is not None


def test_evaluate_accepts_photos_of_single_class(
    run_cli: Run, single: Path, data: Path, tmp_path: Path
) -> None:
    for label in ("red", "green"):
        for path in (data / label).iterdir():
            path.unlink()
        (data / label).rmdir()
    out = tmp_path / "report"
    status, stdout, err = run_cli("evaluate", single, data, "-o", out, "--bootstrap", 5)
    assert (status, err) == (0, "")
    assert "undefined" in stdout
    assert "2 of 3 classes have no photo: green, red" in stdout
    assert json.loads((out / "metrics.json").read_text())["metrics"]["AUC_macro"] is None
