"""vitlib evaluate: what it prints, what it leaves, and what a mistake gets."""

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


def colour(index: int, noise: int) -> Image.Image:
    """A photo that is mostly of one colour."""
    pixels = np.random.default_rng(noise).integers(0, 120, (20, 24, 3), dtype=np.uint8)
    pixels[..., 2 - index] += 130
    return Image.fromarray(pixels)


def model(folder: Path, task: int = 0) -> Path:
    cfg = ViTConfig(
        image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3,
        labels=LABELS, problem_type=TASKS[task],
    )  # fmt: skip
    vit = ViT(cfg)
    predictor = Predictor(vit, ImageProcessor(size=(16, 16)))
    with torch.no_grad():  # the head of the least squares, on photos of its own
        of = [colour(i % 3, 1000 + i) for i in range(60)]
        features = predictor.embed(of)
        wanted = np.eye(3)[np.arange(60) % 3] * 8 - 4
        solved = np.linalg.lstsq(np.c_[features, np.ones(60)], wanted, rcond=None)[0]
        vit.head.weight.copy_(torch.from_numpy(solved[:-1].T))
        vit.head.bias.copy_(torch.from_numpy(solved[-1]))
    predictor.save(folder)
    return folder


def folders(root: Path, count: int = 10, start: int = 0) -> Path:
    """A folder per class."""
    for index, label in enumerate(LABELS):
        (root / label).mkdir(parents=True)
        for i in range(count):
            colour(index, start + i).save(root / label / f"{label} {i}.png")
    return root


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return model(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return folders(tmp_path / "data")


def test_a_report(run_cli: Run, single: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    status, said, err = run_cli("evaluate", single, data, "--out", out, "--bootstrap", 20)
    assert (status, err) == (0, "")
    told = dict(line.split("  ", 1) for line in said.splitlines())
    assert told["report"].strip() == str(out / "report.html")
    assert told["measured on"].strip() == f"30 photos of {data}"
    found = json.loads((out / "metrics.json").read_text())
    assert found["metrics"]["accuracy"] > 0.8
    assert told["accuracy"].strip().startswith(f"{found['metrics']['accuracy']:.4f}  (")
    assert found["model"]["name"] == str(single)
    status, said, err = run_cli("evaluate", single, data, "-o", out, "--bootstrap", 0, "--json")
    assert (status, err) == (0, "")
    again = json.loads(said)
    assert again["report"] == str(out / "report.html")
    assert again["metrics"] == found["metrics"]
    assert again["intervals"] == {}


def test_bad_photos_are_named(run_cli: Run, single: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    (data / "red" / "red 0.png").write_bytes(b"no photo")
    whole = (data / "red" / "red 1.png").read_bytes()
    (data / "red" / "red 1.png").write_bytes(whole[: len(whole) // 2])  # its header is all right
    args = ("evaluate", single, data, "-o", out, "--bootstrap", 0)
    status, _, err = run_cli(*args, "--on-bad-image", "fail")
    assert status == 1
    assert "red 0.png" in err
    assert not out.exists()
    status, said, err = run_cli(*args)
    assert status == 1
    assert len(err.splitlines()) == 2
    assert all(f"red {i}.png" in err for i in (0, 1))
    assert "28 photos" in said
    found = json.loads((out / "metrics.json").read_text())
    assert (found["data"]["photos"], found["data"]["failed"]) == (30, 2)
    with (out / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    assert [Path(row["file"]).name for row in rows if row["error"]] == ["red 1.png", "red 0.png"]
    status, said, err = run_cli(*args, "--json")
    assert status == 1
    assert len(json.loads(said)["failed"]) == 2


def test_tune_and_use(run_cli: Run, single: Path, data: Path, tmp_path: Path) -> None:
    held_out, out = folders(tmp_path / "held out", start=500), tmp_path / "report"
    args = ("evaluate", single, data, "-o", out, "--bootstrap", 0)
    plain = json.loads(run_cli(*args, "--json")[1])
    assert plain["calibration"] is None
    status, said, err = run_cli(*args, "--tune", held_out)
    assert (status, err) == (0, "")
    stored = single / "calibration.json"
    assert str(stored) in said
    held = Calibration.read(single)
    assert held is not None
    assert held.photos == 30
    used = json.loads(run_cli(*args, "--json")[1])
    assert used["calibration"]["temperature"] == held.temperature
    assert used["metrics"]["accuracy"] == plain["metrics"]["accuracy"]
    if held.temperature != 1:
        assert used["metrics"]["log_loss"] != plain["metrics"]["log_loss"]
    unread = json.loads(run_cli(*args, "--no-calibration", "--json")[1])
    assert unread["metrics"] == plain["metrics"]
    stored.write_text("{}")
    status, _, err = run_cli(*args)
    assert status == 1
    assert "is not a calibration of version 1" in err
    assert len(err.splitlines()) == 1
    assert run_cli(*args, "--no-calibration")[0] == 0


def test_several_labels(run_cli: Run, data: Path, tmp_path: Path) -> None:
    several, out = model(tmp_path / "several", task=1), tmp_path / "report"
    table = tmp_path / "labels.csv"
    rows = [f"{p.relative_to(tmp_path)},{p.parent.name}" for p in sorted(data.rglob("*.png"))]
    table.write_text("filename,labels\n" + "\n".join(rows[::-1]) + "\n")
    args = ("evaluate", several, table, "-o", out, "--bootstrap", 0)
    status, said, err = run_cli(*args, "--json")
    assert (status, err) == (0, "")
    found = json.loads(said)
    assert (found["task"], found["primary_metric"]) == (TASKS[1], "iou")
    assert found["per_class"][0]["threshold"] == 0.5
    held_out = folders(tmp_path / "held out", start=500)
    assert run_cli(*args, "--tune", held_out)[0] == 0
    held = Calibration.read(several)
    assert held is not None
    assert held.thresholds is not None
    found = json.loads(run_cli(*args, "--json")[1])
    assert [row["threshold"] for row in found["per_class"]] == list(held.thresholds)
    found = json.loads(run_cli(*args, "--threshold", 0.9, "--positive", "red", "--json")[1])
    assert [row["threshold"] for row in found["per_class"]] == [0.9] * 3
    assert found["metrics"]["AUC_binary"] > 0.8
    status, said, err = run_cli(*args, "--single-label", "--no-calibration", "--json")
    assert (status, err) == (0, "")
    assert json.loads(said)["task"] == TASKS[0]


def test_the_task_is_the_models_or_what_is_asked_for(
    run_cli: Run, single: Path, data: Path, tmp_path: Path
) -> None:
    args = ("evaluate", single, data, "-o", tmp_path / "report", "--bootstrap", 0, "--json")
    assert json.loads(run_cli(*args)[1])["task"] == TASKS[0]
    found = json.loads(run_cli(*args, "--multi-label")[1])
    assert found["task"] == found["model"]["problem_type"] == TASKS[1]
    table = tmp_path / "labels.csv"
    lines = [f"data/{name}/{name} 0.png,{name}" for name in LABELS]
    table.write_text("\n".join(["filename,labels", *lines, "data/red/red 1.png,red blue", ""]))
    status, _, err = run_cli("evaluate", single, table, "-o", tmp_path / "report")
    assert status == 1
    assert "--multi-label" in err
    assert len(err.splitlines()) == 1


def test_mistakes(run_cli: Run, single: Path, data: Path, tmp_path: Path) -> None:
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


def test_precisions(run_cli: Run, single: Path, data: Path, tmp_path: Path) -> None:
    args = ("evaluate", single, data, "-o", tmp_path / "report", "--bootstrap", 0, "--json")
    status, said, err = run_cli(*args, "--precision", "auto", "--device", "cpu")
    assert status == 0
    assert err  # which was chosen, and why
    assert json.loads(said)["model"]["precision"] in ("fp32", "bf16", "int8")


def test_an_optimized_model(run_cli: Run, single: Path, data: Path, tmp_path: Path) -> None:
    fast = tmp_path / "fast"
    Predictor.load(single, device="cpu").fast().save(fast)  # type: ignore[union-attr]
    args = (data, "-o", tmp_path / "report", "--bootstrap", 0, "--json")
    one = json.loads(run_cli("evaluate", single, *args)[1])
    two = json.loads(run_cli("evaluate", fast, *args)[1])
    assert two["metrics"]["accuracy"] == one["metrics"]["accuracy"]
    held_out = folders(tmp_path / "held out", start=500)
    assert run_cli("evaluate", fast, *args, "--tune", held_out)[0] == 0
    assert (fast / "calibration.json").exists()
    assert json.loads(run_cli("evaluate", fast, *args)[1])["calibration"] is not None


def test_one_class_is_enough(run_cli: Run, single: Path, data: Path, tmp_path: Path) -> None:
    for label in ("red", "green"):
        for path in (data / label).iterdir():
            path.unlink()
        (data / label).rmdir()
    out = tmp_path / "report"
    status, said, err = run_cli("evaluate", single, data, "-o", out, "--bootstrap", 5)
    assert (status, err) == (0, "")
    assert "undefined" in said
    assert "2 of 3 classes have no photo: green, red" in said
    assert json.loads((out / "metrics.json").read_text())["metrics"]["AUC_macro"] is None
