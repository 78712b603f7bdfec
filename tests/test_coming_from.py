"""Tests that run the tables of docs/coming-from-*.md, which say what one wrote and writes.

A cell holds code spans, which run in order. Each column has names of its own, which last for the
page, and a folder of its own with small models under published ids. A span that begins with
`vitlib` is a command. Where both cells end in a value that can be compared, it is.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import vitlib
from fixtures import staged_models
from paths import ROOT

HEADER = "| what you wrote | what you write |"
RunCli = Callable[..., tuple[int, str, str]]
# Code of the left column that the tests' environment cannot run, and why.
NOT_RUN = {"peft.": "needs peft", "Trainer(": "needs accelerate"}
MISSING = object()


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


class Row(NamedTuple):
    """A row of a table: the code spans of both cells, and its line in the page."""

    left: list[str]
    right: list[str]
    line: int


def read_page(name: str) -> list[str | Row]:
    """List the code blocks of a page and the rows of its tables, in their order."""
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    items: list[str | Row] = []
    block: list[str] | None = None
    in_table = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            if block is not None:
                items.append("\n".join(block))
            block = [] if line == "```python" else None
        elif block is not None:
            block.append(line)
        elif line == HEADER:
            in_table = True
        elif not line.startswith("|"):
            in_table = False
        elif in_table and not line.startswith("|---"):
            left, right = line.strip("|").split(" | ")
            items.append(Row(re.findall(r"`(.+?)`", left), re.findall(r"`(.+?)`", right), number))
    return items


def run_code(code: str, names: dict[str, Any], where: str) -> Any:
    """Run statements; return the value of the last one where it is an expression."""
    tree = ast.parse(code)
    last = tree.body[-1]
    if not isinstance(last, ast.Expr):
        exec(compile(tree, where, "exec"), names)
        return MISSING
    exec(compile(ast.Module(tree.body[:-1], []), where, "exec"), names)
    return eval(compile(ast.Expression(last.value), where, "eval"), names)


def run_cell(spans: list[str], names: dict[str, Any], where: str, run_cli: RunCli) -> Any:
    """Run the code spans of a cell; return the value of the last one."""
    value: Any = MISSING
    for span in spans:
        if span.startswith("vitlib "):
            status, out, err = run_cli(*shlex.split(span)[1:])
            assert status == 0, f"{where}: {err}"
            value = MISSING
            assert out, where
        else:
            value = run_code(span, names, where)
    return value


def simplify(value: Any) -> Any:
    """Return numbers, texts and arrays of a result, in lists; MISSING for anything else."""
    if isinstance(value, vitlib.Prediction):
        return [value.label, value.score]
    if isinstance(value, dict):
        return [value["label"], value["score"]] if value.keys() == {"label", "score"} else MISSING
    if isinstance(value, list | tuple):
        return [simplify(item) for item in value]
    if isinstance(value, Tensor | np.ndarray):
        return torch.as_tensor(value).detach()
    return value if isinstance(value, int | float | str | torch.dtype) else MISSING


def compare(result: Any, expected: Any, where: str) -> int:
    """Compare two results; return how many values were compared."""
    if result is MISSING or expected is MISSING:
        return 0
    if isinstance(expected, Tensor):
        assert result.shape == expected.shape, where
        bound = 1e-5 * expected.abs().max()
        assert (result - expected).abs().max() <= bound, where
        return 1
    if isinstance(expected, list):
        assert len(result) == len(expected), where
        return sum(compare(a, b, where) for a, b in zip(result, expected, strict=True))
    assert result == (pytest.approx(expected) if isinstance(expected, float) else expected), where
    return 1


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
        expected = MISSING
        monkeypatch.chdir(left_folder)
        if not any(part in span for span in item.left for part in NOT_RUN):
            expected = simplify(run_cell(item.left, left_names, where, run_cli))
        monkeypatch.chdir(right_folder)
        assert item.right, where
        result = simplify(run_cell(item.right, right_names, where, run_cli))
        compared += compare(result, expected, where) > 0
        rows += 1
    assert rows > 50
    assert compared > 42
