"""The demo model inside the package: present, small, right on its samples, without a network."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

import vitlib
from paths import ROOT
from vitlib.source.locate import DEMO

SAMPLES = sorted((DEMO / "samples").glob("*.png"))


def test_demo_config() -> None:
    model = vitlib.load("demo")
    weights = sum(p.numel() for p in model.parameters())
    assert 600_000 < weights < 750_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(model.config.labels) == 10
    assert sum(f.stat().st_size for f in DEMO.rglob("*") if f.is_file()) < 3e6
    measured = re.search(r"\| accuracy \| (0\.\d+) \| ", (DEMO / "README.md").read_text("utf-8"))
    assert measured
    assert float(measured[1]) > 0.92


def test_demo_classifies_its_samples() -> None:
    result = vitlib.Predictor.load("demo").classify(list(SAMPLES), top_k=1)
    content = {
        path.stem: top[0].label.replace(" ", "-") for path, top in zip(SAMPLES, result, strict=True)
    }
    assert len(content) == 10
    assert content == {name: name for name in content}


def test_demo_opens_in_transformers() -> None:
    from transformers import AutoModelForImageClassification

    reference = AutoModelForImageClassification.from_pretrained(DEMO)
    actual = vitlib.Predictor.load("demo")
    pixels = actual.image_processor(SAMPLES)
    with torch.inference_mode():
        expected, logits = reference(pixels).logits, actual.model(pixels)
    assert (logits - expected).abs().max() / expected.abs().max() < 2e-6  # numerics.md
    assert reference.config.id2label == dict(enumerate(actual.labels))


def test_demo_loads_from_any_folder(
    run_cli: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, out, err = run_cli("classify", str(SAMPLES[0]), "--model", "demo", "--top-k", "1")
    assert (status, err) == (0, "")
    assert SAMPLES[0].stem in out.strip().replace(" ", "-")
    (tmp_path / "demo").mkdir()
    assert run_cli("classify", str(SAMPLES[0]), "--model", "demo", "--top-k", "1") == (0, out, "")
    status, _, err = run_cli("classify", str(SAMPLES[0]), "--model", "./demo")
    assert status == 1
    assert "demo" in err


def test_demo_is_packaged() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    listed = re.search(r"^vitlib = \[(.*)\]$", text, flags=re.MULTILINE)
    assert listed
    patterns = re.findall(r'"([^"]+)"', listed[1])
    for file in DEMO.rglob("*"):
        name = file.relative_to(ROOT / "vitlib").as_posix()
        assert file.is_dir() or any(
            fnmatch(name, p) and name.count("/") == p.count("/") for p in patterns
        ), name
