"""--precision and --calibrate of classify and embed, and that what runs is the optimized model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures.command_line import Run, save_tiny_classifier
from fixtures.fast_models import tiny
from vitlib import ImageProcessor, Predictor
from vitlib.errors import ConfigError
from vitlib.fast import FastViT
from vitlib.fast.cpu import kernel_plan

needs_int8 = pytest.mark.skipif(kernel_plan("int8") is None, reason="this CPU has no VNNI")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Folder of a tiny classifier."""
    return save_tiny_classifier(tmp_path / "model")


@pytest.fixture
def photos(photo: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        shutil.copy(photo, folder / f"{index}.jpg")
    (folder / "notes.txt").write_text("no photo")
    return folder


def test_precision(run_cli: Run, model: Path, photo: Path) -> None:
    for precision in ("fp32", "bf16"):
        status, out, _ = run_cli(
            "classify", photo, "-m", model, "-k", 1, "--json", "--precision", precision
        )
        [row] = json.loads(out)
        assert (status, row["precision"]) == (0, precision)
    status, out, _ = run_cli("classify", photo, "-m", model, "--json")
    assert "precision" not in json.loads(out)[0]


@needs_int8
def test_int8(run_cli: Run, model: Path, photos: Path, photo: Path, tmp_path: Path) -> None:
    for more in ([], ["--calibrate", photos]):
        out = tmp_path / "vectors.npy"
        status, _, err = run_cli(
            "embed", photo, photo, "-m", model, "--precision", "int8", *more, "-o", out
        )
        assert (status, err) == (0, "")
        assert np.load(out).shape == (2, 48)


def test_auto_says_what_it_chose(run_cli: Run, model: Path, photos: Path, photo: Path) -> None:
    status, out, err = run_cli(
        "classify", photo, "nope.jpg", "-m", model, "--precision", "auto", "--json"
    )
    assert status == 1
    assert "nope.jpg" in err
    assert "auto chose" in err
    assert "on 1 photo" in err
    assert json.loads(out)[0]["precision"] in ("fp32", "bf16")
    status, _, err = run_cli(
        "classify", photo, "-m", model, "--precision", "auto", "--calibrate", photos
    )
    assert (status, "on 2 photos" in err) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "status", "match"),
    [
        (["--precision", "int4"], 2, "'int4' is not one of"),
        (["--calibrate", "."], 2, "--calibrate is for --precision int8 or auto"),
        (["--precision", "int8", "--calibrate", "nowhere"], 2, "does not exist"),
        (["--precision", "fp8", "--device", "cpu"], 1, "fp8 needs a GPU"),
    ],
)
def test_precision_options_reject_wrong_values(
    run_cli: Run,
    model: Path,
    photo: Path,
    arguments: list[str],
    status: int,
    match: str,
) -> None:
    actual_status, out, err = run_cli("classify", photo, "-m", model, *arguments)
    assert (actual_status, out) == (status, "")
    assert match in err


@needs_int8
def test_photos_that_are_none(run_cli: Run, model: Path, photos: Path, photo: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"no image")
    arguments = ["classify", photo, "-m", model, "--precision", "int8", "--calibrate", photos]
    status, _, err = run_cli(*arguments)
    assert status == 1
    assert "broken.jpg" in err
    assert len(err.splitlines()) == 1
    for path in photos.iterdir():
        path.unlink()
    assert run_cli(*arguments)[0] == 2


def test_a_predictor_runs_the_optimized_model(photo: Path) -> None:
    vit = Predictor(tiny(), ImageProcessor(size=(32, 32)))
    before = vit.classify(photo)
    fast = vit.fast()
    assert isinstance(fast, FastViT)
    assert fast.precision == "fp32"
    assert vit.fast() is fast
    with torch.no_grad():
        vit.model.head.bias[2] += 100  # a change of the model is not missed
    assert vit.classify(photo) != before
    assert vit.classify(photo)[0][0].index == 2
    vit.model.reset_classifier(7)
    assert vit.probabilities(photo).shape == (1, 7)
    hooked = []
    vit.model.blocks[0].register_forward_hook(lambda *_: hooked.append(1))
    vit.classify(photo)
    assert hooked


def test_levels_or_pixels(photo: Path) -> None:
    """8-bit photos go in as levels and others as pixels, with the same answer."""
    processor = ImageProcessor(size=(32, 32), image_mean=(0.4,) * 3, image_std=(0.3,) * 3)
    vit = Predictor(tiny(), processor)
    assert processor.to_uint8_or_float(photo).dtype == torch.uint8
    photo16 = np.asarray(np.random.default_rng(0).integers(0, 65536, (40, 40)), np.uint16)
    assert processor.to_uint8_or_float(photo16).dtype in (torch.uint8, torch.float32)
    with torch.inference_mode():
        expected = vit.model.embed(processor([photo, photo16])).numpy()
    assert vit.embed([photo, photo16]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_auto_needs_photos() -> None:
    vit = Predictor(tiny(), tiny().image_processor, precision="auto")
    with pytest.raises(ConfigError, match="chooses by photos"):
        vit.fast()
