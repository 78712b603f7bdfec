"""Tests of scores and calibration: classify, batch, serve and evaluate give the same."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitlib import ImageProcessor, Predictor, ViT, ViTConfig, explain
from vitlib.batch import run
from vitlib.batch.manifest import read_settings
from vitlib.batch.options import make_worker_factory
from vitlib.config import ProblemType
from vitlib.data import LabelledPhotos, Photo
from vitlib.errors import BatchError, ConfigError, SourceError
from vitlib.evaluate import evaluate
from vitlib.predict.calibration import FILE, Calibration
from vitlib.scores import logits_to_scores, task_of

Cli = Callable[..., tuple[int, str, str]]
MULTI: ProblemType = "multi_label_classification"
LABELS = ("a", "b", "c")


def make_tiny(labels: tuple[str, ...] = LABELS, problem: ProblemType = "regression") -> Predictor:
    torch.manual_seed(0)
    cfg = ViTConfig(
        image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=len(labels),
        labels=labels, problem_type=problem,
    )  # fmt: skip
    model = ViT(cfg)
    torch.nn.init.normal_(model.head.weight, std=3)
    return Predictor(model, ImageProcessor(size=(16, 16)))


def make_calibration(**changes: Any) -> Calibration:
    fields = {
        "labels": LABELS, "multi_label": True, "temperature": 2.0, "thresholds": (0.5, 0.25, 0.75),
        "source": "a set", "photos": 9, "counts": (3, 2, 0), "log_loss": (0.5, 0.4),
    }  # fmt: skip
    return Calibration(**fields | changes)  # type: ignore[arg-type]


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    folder, random = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i in range(4):
        pixels = random.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def logits(vit: Predictor, photos: list[Path]) -> np.ndarray:
    with torch.inference_mode():
        return vit.model(vit.image_processor(photos)).numpy()  # type: ignore[no-any-return]


def ask_server(vit: Predictor, route: str, photo: Path, **params: Any) -> Any:
    """Return the answer of a server."""
    testing = pytest.importorskip("starlette.testclient")
    from vitlib.serve.run import build
    from vitlib.serve.settings import Settings

    app = build(lambda _: vit, [None], Settings(), "tiny")
    with testing.TestClient(app) as client:
        if route in ("/version", "/openapi.json"):
            return client.get(route).json()
        return client.post(
            route, params=params, content=photo.read_bytes(), headers={"content-type": "image/png"}
        ).json()


# --- the task -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "classes", "task"),
    [
        (None, 3, "single_label_classification"),
        (None, 1, MULTI),
        (MULTI, 3, MULTI),
        ("single_label_classification", 1, MULTI),
        ("regression", 1, "regression"),
        ("regression", 3, "regression"),
    ],
)
def test_task_of_head(problem: ProblemType, classes: int, task: str) -> None:
    assert task_of(ViTConfig(num_classes=classes, problem_type=problem)) == task


def test_regression_scores_are_the_logits() -> None:
    z = torch.tensor([[-3.5, 120.0]])
    assert torch.equal(logits_to_scores(z, "regression"), z)


@pytest.mark.parametrize("outputs", [1, 2])
def test_regression_equals_transformers(tmp_path: Path, photos: list[Path], outputs: int) -> None:
    from transformers import ViTConfig as TheirConfig
    from transformers import ViTForImageClassification

    names = ("age", "height")[:outputs]
    torch.manual_seed(0)
    reference = ViTForImageClassification(
        TheirConfig(
            image_size=16,
            patch_size=8,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            problem_type="regression",
            id2label=dict(enumerate(names)),
            label2id={n: i for i, n in enumerate(names)},
        )
    ).eval()
    torch.nn.init.normal_(reference.classifier.weight, std=3)
    reference.save_pretrained(tmp_path / "model")
    vit = Predictor.load(
        tmp_path / "model", image_processor=ImageProcessor(size=(16, 16)), device="cpu"
    )
    with torch.inference_mode():
        expected = reference(vit.image_processor(photos)).logits.numpy()
    assert np.abs(expected).max() > 1  # not probabilities
    assert vit.task == "regression"
    assert vit.probabilities(photos) == pytest.approx(expected, rel=2e-5)
    for row, answer in zip(expected, vit.classify(photos), strict=True):
        assert [p.label for p in answer or ()] == list(names)  # in the outputs' order
        assert [p.score for p in answer or ()] == pytest.approx(row.tolist(), rel=2e-5)
    for choice in ({"top_k": 1}, {"threshold": 0.5}):
        with pytest.raises(ConfigError, match="is for classes, and this model gives numbers"):
            vit.classify(photos, **choice)  # type: ignore[arg-type]


def test_regression_on_the_command_line(tmp_path: Path, photos: list[Path], run_cli: Cli) -> None:
    vit = make_tiny(("age", "height"))
    vit.save(tmp_path / "model")
    expected = logits(vit, photos)
    status, out, _ = run_cli("classify", photos[0], "--model", tmp_path / "model", "--json")
    [row] = json.loads(out)
    assert (status, row["task"]) == (0, "regression")
    assert [p["score"] for p in row["predictions"]] == pytest.approx(expected[0].tolist(), rel=2e-5)
    _, out, _ = run_cli(
        "classify", *photos[:2], "--model", tmp_path / "model", "--plot", tmp_path / "p.png"
    )
    number, name = out.splitlines()[1].split()
    assert (float(number), name) == (pytest.approx(expected[0, 0], rel=2e-5), "age")
    status, _, err = run_cli("classify", photos[0], "--model", tmp_path / "model", "--top-k", 2)
    assert (status, err.count("\n")) == (1, 1)
    assert "top_k is for classes" in err


@pytest.mark.parametrize("form", ["jsonl", "csv", "npy"])
def test_regression_in_batch(tmp_path: Path, photos: list[Path], form: Any) -> None:
    vit = make_tiny(("age", "height"))
    expected = logits(vit, photos)
    run(photos[0].parent, model=vit, out=tmp_path / "out", format=form)
    if form == "npy":
        values = np.load(tmp_path / "out/part-00000.npy")
    elif form == "csv":
        with (tmp_path / "out/part-00000.csv").open() as file:
            rows = list(csv.DictReader(file))
        values = [[float(row["value_0"]), float(row["value_1"])] for row in rows]
    else:
        lines = (tmp_path / "out/part-00000.jsonl").read_text().splitlines()
        values = [json.loads(line)["values"] for line in lines]
    assert np.array(values) == pytest.approx(expected, rel=2e-5)
    with pytest.raises(ConfigError, match="top_k is for classes"):
        run(photos[0].parent, model=vit, out=tmp_path / "other", top_k=1)
    with pytest.raises(ConfigError, match="azure-csv has probabilities"):
        run(photos[0].parent, model=vit, out=tmp_path / "other", format="azure-csv")


def test_regression_over_http(photos: list[Path]) -> None:
    vit = make_tiny(("age", "height"))
    expected = logits(vit, photos)[0].tolist()
    [answer] = ask_server(vit, "/classify", photos[0])["predictions"]
    assert [p["label"] for p in answer] == ["age", "height"]
    assert [p["score"] for p in answer] == pytest.approx(expected, rel=2e-5)
    refused = ask_server(vit, "/classify", photos[0], threshold=0.5)["error"]
    assert "this model gives numbers" in refused["message"]
    about = ask_server(vit, "/version", photos[0])
    assert (about["task"], about["calibration"]) == ("regression", None)
    operation = ask_server(vit, "/openapi.json", photos[0])["paths"]["/classify"]["post"]
    assert [parameter["name"] for parameter in operation["parameters"]] == ["on_error"]


def test_explanation_of_regression_uses_its_numbers(photos: list[Path]) -> None:
    from vitlib.explain.attribution import probabilities

    vit = make_tiny(("age",))
    pixels = vit.image_processor(photos)
    assert isinstance(vit.model, ViT)
    with torch.inference_mode():
        assert torch.equal(probabilities(vit.model, pixels), vit.model(pixels))
    assert explain is not None


# --- calibration.json -----------------------------------------------------------------------------


def test_calibration_is_the_same_in_every_command(
    tmp_path: Path, photos: list[Path], run_cli: Cli
) -> None:
    raw = make_tiny(problem=MULTI)
    raw.calibration = make_calibration()
    limits = np.median(raw.probabilities(photos), axis=0)  # half of the photos reach each
    raw.calibration = make_calibration(thresholds=tuple(limits.tolist()))
    raw.save(tmp_path / "model")  # with calibration.json
    vit = Predictor.load(tmp_path / "model", device="cpu")
    assert vit.calibration is not None
    assert vit.calibration.summary() == raw.calibration.summary()

    data = LabelledPhotos(tuple(Photo(p, ("a",)) for p in photos), LABELS, True, "a set")
    report = evaluate(vit, data, tmp_path / "report", bootstrap=0)
    assert report.thresholds == raw.calibration.thresholds
    with (tmp_path / "report/predictions.csv").open() as file:
        table = list(csv.DictReader(file))
    expected = [set(json.loads(row["predicted"])) for row in table]
    scores = [[float(row[f"score:{label}"]) for label in LABELS] for row in table]
    assert 6 <= sum(map(len, expected)) < 12  # equal scores all reach their median

    predictions = vit.classify(photos)
    assert [{p.label for p in row or ()} for row in predictions] == expected
    assert vit.probabilities(photos) == pytest.approx(np.array(scores), rel=1e-6)
    run(photos[0].parent, model=vit, out=tmp_path / "out")
    lines = (tmp_path / "out/part-00000.jsonl").read_text().splitlines()
    assert [set(json.loads(line)["labels"]) for line in lines] == expected
    assert json.loads((tmp_path / "out/manifest.json").read_bytes())["settings"]["calibration"]
    [answer] = ask_server(vit, "/classify", photos[0])["predictions"]
    assert {p["label"] for p in answer} == expected[0]
    assert ask_server(vit, "/version", photos[0])["calibration"] == vit.calibration.summary()

    status, out, err = run_cli("classify", photos[0], "--model", tmp_path / "model", "--json")
    [row] = json.loads(out)
    assert {p["label"] for p in row["predictions"]} == expected[0]
    assert row["calibration"]["temperature"] == 2
    assert (status, err.count("\n")) == (0, 1)
    assert "calibrated: temperature 2" in err


def test_calibration_can_be_left_out(tmp_path: Path, photos: list[Path], run_cli: Cli) -> None:
    raw = make_tiny(problem=MULTI)
    expected = raw.probabilities(photos)
    raw.calibration = make_calibration()
    raw.save(tmp_path / "model")
    vit = Predictor.load(tmp_path / "model", device="cpu", calibrated=False)
    assert vit.calibration is None
    assert vit.probabilities(photos) == pytest.approx(expected)
    calibrated = Predictor.load(tmp_path / "model", device="cpu")
    assert np.abs(calibrated.probabilities(photos) - expected).max() > 0.01
    assert calibrated.probabilities(photos, calibrated=False) == pytest.approx(expected)
    assert (
        len(calibrated.classify(photos[0], threshold=0.0)[0] or ()) == 3
    )  # in place of the calibration's
    args = ("classify", photos[0], "--model", tmp_path / "model", "--no-calibration", "--json")
    status, out, err = run_cli(*args)
    assert (status, err, len(json.loads(out)[0]["predictions"])) == (0, "", 3)


def test_batch_run_refuses_another_calibration(tmp_path: Path, photos: list[Path]) -> None:
    vit = make_tiny(problem=MULTI)
    vit.calibration = make_calibration()
    run(photos[0].parent, model=vit, out=tmp_path / "out")
    begun = read_settings(tmp_path / "out/manifest.json")
    worker = make_worker_factory(vit, begun, tmp_path / "other")(0)  # for another process
    assert worker.engine.calibration is not None
    assert worker.engine.calibration.summary() == begun.calibration == make_calibration().summary()
    for other in (
        None,
        make_calibration(temperature=3.0),
        make_calibration(thresholds=(0.1, 0.1, 0.1)),
    ):
        vit.calibration = other
        with pytest.raises(BatchError, match="whose scores have another calibration"):
            run(photos[0].parent, model=vit, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"temperature": 0}, SourceError, "expected 0.05 to 20"),
        ({"temperature": -1}, SourceError, "expected 0.05 to 20"),
        ({"temperature": float("nan")}, SourceError, "expected 0.05 to 20"),
        ({"task": "regression"}, SourceError, "expected one of single_label"),
        ({"classes": []}, ConfigError, "is for 0 classes, the model has 3"),
        (
            {"weights": {"model.safetensors": "0"}},
            ConfigError,
            "tuned for other weights",
        ),
    ],
)
def test_calibration_that_does_not_fit_is_refused(
    tmp_path: Path, photos: list[Path], run_cli: Cli,
    change: dict[str, Any], error: type[Exception], match: str,
) -> None:  # fmt: skip
    vit = make_tiny(problem=MULTI)
    vit.save(tmp_path / "model")
    text = json.dumps(make_calibration().as_dict() | change)
    (tmp_path / "model" / FILE).write_text(text)
    with pytest.raises(error, match=match):
        Predictor.load(tmp_path / "model", device="cpu")
    args = ("classify", photos[0], "--model", tmp_path / "model")
    status, _, err = run_cli(*args)
    assert (status, err.count("\n")) == (1, 1)
    assert "--no-calibration" in err  # the remedy works:
    assert run_cli(*args, "--no-calibration")[0] == 0
    to = ("--out", tmp_path / "vectors.npy")  # a calibration does not affect vectors
    assert run_cli("embed", photos[0], "--model", tmp_path / "model", *to)[0] == 0


def test_calibration_of_other_labels_is_refused(tmp_path: Path) -> None:
    vit = make_tiny(("a", "b", "other"), MULTI)
    vit.save(tmp_path)
    make_calibration().write(tmp_path)
    with pytest.raises(ConfigError, match="its class 2 is 'c', the model's 'other'"):
        Predictor.load(tmp_path, device="cpu")
    assert Predictor.load(tmp_path, device="cpu", num_classes=5).calibration is None  # a new head


def test_info_shows_calibration_and_unused_labels(tmp_path: Path, run_cli: Cli) -> None:
    vit = make_tiny(problem=MULTI)
    vit.calibration = make_calibration()
    vit.save(tmp_path)
    assert "calibration    temperature 2, a threshold" in run_cli("info", tmp_path)[1]
    assert json.loads(run_cli("info", tmp_path, "--json")[1])["notes"] == []
    make_calibration(labels=("a", "b", "z")).write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["id2label"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_labels": 3}))
    fields = json.loads(run_cli("info", tmp_path, "--json")[1])
    assert "refused: calibration.json is for other classes" in fields["calibration"]
    assert "label2id is not used" in fields["notes"][0]


def test_calibration_of_another_file_in_the_folder_is_not_used(tmp_path: Path) -> None:
    vit = make_tiny(problem=MULTI)
    vit.calibration = make_calibration()
    vit.save(tmp_path)
    other = tmp_path / "last.safetensors"
    other.write_bytes((tmp_path / "model.safetensors").read_bytes())
    assert Predictor.load(tmp_path / "model.safetensors", device="cpu").calibration is not None
    assert Predictor.load(other, device="cpu").calibration is None


def test_relevance_of_regression_needs_a_class(
    tmp_path: Path, photos: list[Path], run_cli: Cli
) -> None:
    make_tiny(("age", "height")).save(tmp_path / "model")
    args = ("attend", photos[0], "--model", tmp_path / "model", "--method", "relevance")
    out = ("--out", tmp_path / "a.png")
    status, _, err = run_cli(*args, *out)
    assert (status, err.count("\n")) == (1, 1)
    assert "none is the best: say which is meant, target= or --class (age, height)" in err
    assert run_cli(*args, *out, "--class", "height")[0] == 0
