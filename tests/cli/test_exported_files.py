"""Exported files as MODEL of every verb."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures.exported import PROCESSOR, tiny_predictor, write_pt2
from vitlib import Predictor, save
from vitlib.checks.compare import list_demo_photos

Run = Callable[..., tuple[int, str, str]]
LABELS = ("bag", "coat", "dress", "shirt", "sandal")
REPORT = json.dumps({"verdict": "equal", "comparisons": [{"error": 3e-7}, {"error": 1e-7}]})
PHOTOS = list_demo_photos()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and its file with both outputs."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    predictor = tiny_predictor(labels=LABELS)
    save(predictor.model, folder / "checkpoint", image_processor=predictor.image_processor)  # type: ignore[arg-type]
    write_pt2(folder / "model.pt2", predictor, verification=REPORT)
    return folder


@pytest.fixture
def model(folder: Path) -> str:
    return str(folder / "model.pt2")


def test_classify_embed_and_similar(run_cli: Run, folder: Path, model: str, tmp_path: Path) -> None:
    answers = [
        json.loads(run_cli("classify", "-m", name, PHOTOS[0], PHOTOS[1], "--json")[1])
        for name in (model, folder / "checkpoint")
    ]
    labels = [[[p["label"] for p in photo["predictions"]] for photo in rows] for rows in answers]
    assert labels[0] == labels[1]
    out = tmp_path / "x.npy"
    code, _, err = run_cli("embed", "-m", model, PHOTOS[0].parent, "-o", out)
    assert (code, err) == (0, "")
    expected = Predictor.load(folder / "checkpoint").embed(PHOTOS)
    np.testing.assert_allclose(np.load(out), expected, atol=1e-5)
    code, text, _ = run_cli("similar", PHOTOS[3], out, "-k", 1, "-m", model)
    assert code == 0
    assert PHOTOS[3].name in text


def test_batch_and_its_search(run_cli: Run, model: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, text, err = run_cli("batch", "-m", model, PHOTOS[0].parent, "-o", out, "--task", "both")
    assert (code, err) == (0, "")
    assert "10 ok" in text
    code, _, _ = run_cli("batch", "-m", model, PHOTOS[0].parent, "-o", out, "--task", "both")
    assert code == 0
    lines = [line for path in sorted(out.glob("part*")) for line in path.read_text().splitlines()]
    best = [json.loads(line)["labels"][0] for line in lines]
    expected = Predictor.load(model).classify(PHOTOS, top_k=1)
    assert best == [row[0].label for row in expected]


def test_evaluate(run_cli: Run, model: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the extra evaluate is not installed")
    pytest.importorskip("matplotlib", reason="the extra plots is not installed")
    rows = [f"{PHOTOS[i]},{LABELS[i % 5]}" for i in range(10)]
    data = tmp_path / "set.csv"
    data.write_text("image,label\n" + "\n".join(rows) + "\n")
    code, text, err = run_cli("evaluate", data, "-m", model, "-o", tmp_path / "report")
    assert code == 0, err
    assert "accuracy" in text
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["model"]["precision"] == "fp32"


def test_info_shows_what_the_file_says(run_cli: Run, model: str) -> None:
    code, text, _ = run_cli("info", model)
    assert code == 0
    for words in (
        "uint8, any x 3 x 32 x 32", "logits, embedding", "5 (bag; coat; dress; …)",
        "minus 0.5 0.4 0.3", "equal in 2 comparisons with the model, at most 3e-07",
    ):  # fmt: skip
        assert words in text
    value = json.loads(run_cli("info", model, "--json")[1])
    assert value["format"] == "pt2"
    assert value["info"]["labels"] == list(LABELS)
    assert value["verification"]["verdict"] == "equal"
    assert run_cli("info", model, "--fast")[0] == 2


def test_bench_times_the_file(run_cli: Run, model: str) -> None:
    arguments = ("bench", "-m", model, "--rounds", 1, "--batch-size", 2)
    code, text, _ = run_cli(*arguments)
    assert code == 0
    assert "torch" in text
    assert "as loaded (fp32)" in text
    value = json.loads(run_cli(*arguments, "--json")[1])
    assert [timing["batch_size"] for timing in value["timings"]] == [2]
    assert value["timings"][0]["images_per_second"] > 0
    code, _, err = run_cli(*arguments, "--precision", "int8")
    assert code == 2
    assert "one precision" in err


def test_verify_is_equal_to_its_checkpoint(run_cli: Run, folder: Path, model: str) -> None:
    code, text, _ = run_cli("verify", model, "--against", folder / "checkpoint")
    assert code == 0
    assert "equal" in text
    code, _, err = run_cli("verify", model)
    assert code == 1
    assert "--against" in err
    photos = ("--photos", PHOTOS[0].parent)
    assert run_cli("verify", "demo", *photos)[0] == 2
    value = json.loads(
        run_cli("verify", model, "--against", folder / "checkpoint", *photos, "--json")[1]
    )
    assert (value["verdict"], value["photos"], len(value["errors"])) == ("equal", 10, 30)


def test_verify_names_the_first_difference(run_cli: Run, folder: Path, model: str) -> None:
    reference = Predictor.load(folder / "checkpoint")
    with torch.no_grad():
        reference.model.head.bias[2] += 0.01  # type: ignore[union-attr]
    reference.save(folder / "other-head")
    code, text, _ = run_cli("verify", model, "--against", folder / "other-head")
    assert code == 1
    assert f"diverges at logits of {PHOTOS[0]}" in text
    reference.image_processor = replace(PROCESSOR, image_mean=(0.5, 0.5, 0.5))
    reference.save(folder / "other-pixels")
    code, text, _ = run_cli("verify", model, "--against", folder / "other-pixels")
    assert code == 1
    assert f"diverges at pixels of {PHOTOS[0]}" in text
    assert "the preprocessing of the file gives other pixels" in text


def test_refused_with_one_line(run_cli: Run, folder: Path, model: str, tmp_path: Path) -> None:
    checkpoint, photo = folder / "checkpoint", PHOTOS[0]
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\n")
    refused = [
        (("attend", "-m", model, photo, "-o", tmp_path / "a.png"), "name the checkpoint"),
        (("classify", "-m", model, photo, "--image-size", 64), "takes images of 32x32"),
        (("classify", "-m", model, photo, "--precision", "bf16"), "computes in fp32"),
        (("classify", "-m", model, photo, "--labels", labels), "2 labels for num_classes=5"),
        (("classify", "-m", checkpoint, photo, "--labels", labels), "a checkpoint has its own"),
        (("classify", "-m", tmp_path / "no.onnx", photo), "no such file"),
    ]
    for arguments, words in refused:
        code, _, err = run_cli(*arguments)
        assert code == 1
        assert words in err
        assert err.count("\n") == 1


def test_preprocess_replaces_the_preprocessing(run_cli: Run, folder: Path, model: str) -> None:
    code, _, err = run_cli(
        "classify", "-m", model, PHOTOS[0], "--preprocess", folder / "checkpoint"
    )
    assert (code, err) == (0, "")
