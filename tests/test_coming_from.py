"""Tests that run the tables of docs/coming-from-*.md, which say what one wrote and writes.

The left column of the page on timm runs in tests/ecosystem/test_timm_page.py, where timm is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import vitlib
from fixtures import staged_models
from fixtures.doc_tables import MISSING, RunCli, compare, read_page, run_cell, run_code, simplify
from fixtures.layout_files import make_pixels
from paths import FIXTURES, ROOT
from vitlib.train import TrainConfig
from vitlib.train.config import setting_parts

# Code of transformers that the tests' environment cannot run, and why.
NOT_RUN = {"peft.": "needs peft", "Trainer(": "needs accelerate"}
# Settings of the same meaning whose neutral values are written differently.
SAME = {"optim", "gradient_checkpointing", "fsdp", "metric_for_best_model"}


@pytest.fixture
def staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that makes a folder with the models of a page; no network is asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def make(kind: str, name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        staged_models.stage_photos(folder)
        getattr(staged_models, f"stage_{kind}")(folder)
        return folder

    return make


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_transformers_page(
    staged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    left_folder, right_folder = staged("transformers", "left"), staged("transformers", "right")
    left_names: dict[str, Any] = {}
    right_names: dict[str, Any] = {}
    compared, rows = 0, 0
    for item in read_page("coming-from-transformers"):
        if isinstance(item, str):
            monkeypatch.chdir(right_folder)
            run_code(item, left_names, "page")
            run_code(item, right_names, "page")
            continue
        where = f"coming-from-transformers.md:{item.line}"
        assert item.left, where
        assert item.right, where
        expected = MISSING
        monkeypatch.chdir(left_folder)
        if not any(part in span for span in item.left for part in NOT_RUN):
            expected = simplify(run_cell(item.left, left_names, where, run_cli))
        monkeypatch.chdir(right_folder)
        result = simplify(run_cell(item.right, right_names, where, run_cli))
        compared += compare(result, expected, where) > 0
        rows += 1
    assert rows >= 55
    assert compared >= 45


def test_defaults_of_settings_are_those_of_the_page() -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(transformers.TrainingArguments)}
    config = TrainConfig()
    expected = {
        name: (str(getattr(defaults[name], "value", defaults[name])), config.value(name))
        for name in setting_parts()
        if name in defaults and name not in SAME and defaults[name] != config.value(name)
    }
    page = (ROOT / "docs/coming-from-transformers.md").read_text(encoding="utf-8")
    table = page.split("| setting | TrainingArguments | vitlib |\n|---|---|---|\n")[1]
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \|$", table, flags=re.MULTILINE)
    assert {name: other for name, other, _ in rows} == {
        name: other.replace("5e-05", "5e-5") for name, (other, _) in expected.items()
    }
    for name, _, value in rows:
        assert value == str(expected[name][1]).replace("0.0001", "1e-4")
    assert "warmup_ratio" not in defaults
    assert f"`warmup_ratio` of {config.value('warmup_ratio')}" in page
    assert f"`layer_decay` of {config.value('layer_decay')}" in page


def run_right_column(page: str, names: dict[str, Any], run_cli: RunCli) -> dict[int, Any]:
    """Run the code blocks and the right cells of a page; return the values of cells by line."""
    values = {}
    for item in read_page(page):
        if isinstance(item, str):
            run_code(item, names, page)
        else:
            where = f"{page}.md:{item.line}"
            assert item.right, where
            values[item.line] = run_cell(item.right, names, where, run_cli)
    return values


def test_right_column_of_timm_page(
    staged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    monkeypatch.chdir(staged("timm", "right"))
    assert len(run_right_column("coming-from-timm", {}, run_cli)) >= 40


def test_right_column_of_dino_page(
    staged: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    monkeypatch.chdir(staged("meta", "right"))
    with torch.no_grad():
        values = run_right_column("coming-from-dino", {}, run_cli)
    assert len(values) >= 30


@pytest.mark.parametrize(("name", "variable"), [("dinov2_reg", "model"), ("dinov3", "dinov3")])
@torch.no_grad()
def test_tokens_of_dino_page_equal_outputs_of_the_authors_code(
    name: str, variable: str, run_cli: RunCli
) -> None:
    path = FIXTURES / "meta" / f"{name}.pth"
    outputs = load_file(path.with_suffix(".expected.safetensors"))
    tokens = outputs["features@16x16"]
    model = vitlib.load(path, num_heads=2)
    names = {variable: model, "model": model, "pixels": make_pixels(16, 16)}
    expected = {
        'forward_features(pixels)["x_norm_clstoken"]': tokens[:, 0],
        'forward_features(pixels)["x_norm_patchtokens"]': tokens[:, 5:],
        "get_intermediate_layers(pixels, n=": [tokens[:, 5:]],
    }
    registers = "x_storage_tokens" if name == "dinov3" else "x_norm_regtokens"
    expected[f'{variable}.forward_features(pixels)["{registers}"]'] = tokens[:, 1:5]
    rows = [item for item in read_page("coming-from-dino") if not isinstance(item, str)]
    for left, value in expected.items():
        row = next(row for row in rows if left in row.left[0])
        cell = [row.right[0].replace("n=4", "n=1")]  # the fixtures have one block
        result = simplify(run_cell(cell, names, left, run_cli))
        assert compare(result, simplify(value), left)
    assert compare(simplify(model(names["pixels"])), outputs["logits@16x16"], name)
