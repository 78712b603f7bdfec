"""Warnings about deep images, and the range of a model on the command line."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vitlib
from fixtures.deep_images import RULE, WINDOW, picture, png
from paths import ROOT
from vitlib import ImageProcessor, Predictor
from vitlib.image.depth import WarnOnce
from vitlib.predict.model_digest import compute_model_digest


def test_dark_image_warns_once_a_call(caplog: pytest.LogCaptureFixture) -> None:
    dark = picture("uint16", (20, 30)) >> 4
    files = [png(dark), png(dark), Image.fromarray(dark)]
    RULE(files)
    [line] = caplog.messages
    assert f"an image of {len(files[0])} bytes of uint16 holds values up to 408" in line
    assert "far below 65535" in line
    assert "levels= (--levels), such as 4095" in line
    caplog.clear()
    for quiet in (replace(RULE, levels=4095), replace(RULE, levels=65535)):
        quiet(files)
    RULE([png(picture("uint16", (20, 30))), np.zeros((4, 4), np.uint16)])
    assert not caplog.messages
    bands = picture("float32", (20, 30, 5))
    ImageProcessor(in_channels=5)(bands)
    assert "5 channels (float32" in caplog.text
    assert "rescale_factor=0.00392157" in caplog.text
    caplog.clear()
    replace(RULE, levels=(50, 200))(Image.fromarray(picture("uint8")))
    assert "has 8 bits and is read in 0..255" in caplog.text


def test_predictor_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    predictor = Predictor.load("demo")
    caplog.clear()
    dark = picture("uint16", (40, 40)) >> 4
    predictor.probabilities([dark] * 5, batch_size=2)
    assert len(caplog.messages) == 1
    predictor.attention([dark] * 2)
    assert len(caplog.messages) == 2
    assert pickle.loads(pickle.dumps(copy.deepcopy(WarnOnce()))) is not None


def test_levels_are_saved(tmp_path: Path) -> None:
    number = replace(RULE, levels=4095)
    assert ImageProcessor.from_dict(json.loads(json.dumps(number.to_dict()))) == number
    levels, predictor = WINDOW, Predictor.load("demo")
    baseline = predictor.probabilities(np.zeros((40, 40), np.uint8))
    predictor.image_processor = replace(predictor.image_processor, levels=levels)
    dark = picture("uint16", (40, 40)) >> 4
    scores = predictor.probabilities(dark)
    with_levels = compute_model_digest(predictor)  # by which a batch run knows its model
    assert with_levels != compute_model_digest(Predictor.load("demo"))
    predictor.save(tmp_path / "hf")
    rule = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert rule["levels"] == list(levels)
    predictor.fast().save(tmp_path / "fast")
    for folder in ("hf", "fast"):
        again = Predictor.load(tmp_path / folder)
        assert again.image_processor.levels == levels
        assert np.array_equal(again.probabilities(dark), scores)
        assert np.array_equal(again.probabilities(np.zeros((40, 40), np.uint8)), baseline)
    again.image_processor = replace(again.image_processor, levels=255)
    again.save(tmp_path / "other")
    assert Predictor.load(tmp_path / "other").image_processor.levels == 255
    assert "deeper than 8 bits" in predictor.image_processor.describe()
    assert any("levels" in line for line in predictor.image_processor.unsupported_fields("timm"))


def test_levels_on_the_command_line(
    run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    dark = picture("uint16", (40, 40)) >> 4
    (tmp_path / "dark.png").write_bytes(png(dark))
    requests = ("classify", tmp_path / "dark.png", "--model", "demo", "--json")
    predictor = Predictor.load("demo")
    predictor.image_processor = replace(predictor.image_processor, levels=(0, 4095))
    for levels in ("4095", "0,4095"):
        status, out, err = run_cli(*requests, "--levels", levels)
        assert (status, err) == (0, "")
        [best] = json.loads(out)[0]["predictions"][:1]
        assert best["score"] == pytest.approx(predictor.classify(dark)[0][0].score, abs=1e-6)
    status, _, err = run_cli(*requests, "--levels", "2000")
    assert status == 1
    assert "expected 0 to 2000, as levels=2000 says; give levels= (--levels)" in err
    for wrong in ("abc", "0", "3,2", "1,2,3", "nan"):
        status, _, err = run_cli(*requests, "--levels", wrong)
        assert status == 2
        assert "expected the value of white, such as 4095, or a window BLACK,WHITE" in err


def test_fast_model_with_other_processor(tmp_path: Path) -> None:
    """An optimized model has mean and std in its weights; another rule must not meet those."""
    vitlib.optimize(vitlib.load("demo")).save(tmp_path)
    rule = ImageProcessor(size=(64, 64), image_mean=(0.1,) * 3, image_std=(0.9,) * 3)
    rule = rule.with_image_size(vitlib.load("demo").config.image_size)
    photo = picture("uint8", (64, 64, 3))
    result = Predictor.load(tmp_path, image_processor=rule).probabilities(photo)
    wanted = Predictor(vitlib.load("demo"), rule).probabilities(photo)
    assert np.abs(result - wanted).max() < 1e-5


def test_image_warning_passes_muted_logs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from vitlib.cli.predictors import logs_muted

    with logs_muted():
        RULE(picture("uint16", (20, 30)) >> 4)
        logging.getLogger("vitlib").warning("of loading")
    assert len(caplog.messages) == 1


def test_code_of_pictures_page_runs() -> None:
    text = (ROOT / "docs" / "pictures.md").read_text(encoding="utf-8")
    names: dict[str, object] = {"vitlib": vitlib}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert isinstance(names["vit"], Predictor)
    assert names["vit"].image_processor.levels == 4095
