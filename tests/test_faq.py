"""Tests that the answers of docs/faq.md run: Python blocks, commands, and what blocks print."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fixtures import staged_models
from paths import ROOT

PAGE = (ROOT / "docs/faq.md").read_text(encoding="utf-8")
START, *PARTS = re.split(r"^### ", PAGE, flags=re.MULTILINE)
QUESTIONS = {part.partition("\n")[0]: part for part in PARTS}
Block = tuple[str, str]
# Questions whose blocks use names of another one.
AFTER = {
    "Can I continue DINO's or MAE's training on my own photos without labels?": "without a config",
    "Can vitlib classify by texts, without training?": "QuickGELU",
}


def list_blocks(text: str) -> list[Block]:
    """List the language and the text of the code blocks of a part of the page."""
    return re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run_python(code: str, names: dict[str, Any]) -> str:
    """Run a block; return what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "faq.md", "exec"), names)
    return printed.getvalue()


def run_blocks(
    blocks: list[Block], names: dict[str, Any], run_cli: Callable[..., tuple[int, str, str]]
) -> Iterator[tuple[str, str]]:
    """Run the blocks of an answer; yield what is printed and what the page says of it."""
    printed: str | None = None
    for language, text in blocks:
        if language == "python":
            printed = run_python(text, names)
        elif language == "sh":
            for line in text.strip().splitlines():
                status, out, err = run_cli(*shlex.split(line)[1:])
                assert line.startswith("vitlib ")
                assert (status, bool(out)) == (0, True), f"{line}: {err}"
        else:
            assert printed is not None
            yield printed, text
            printed = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the folder of the page, with small models under the ids that it uses."""
    path = tmp_path_factory.mktemp("faq")
    staged_models.stage_photos(path)
    staged_models.stage_transformers(path)
    staged_models.stage_timm(path)
    return path


def test_forty_questions_have_answers_that_run() -> None:
    assert len(QUESTIONS) == len(PARTS) == 40
    for question, text in QUESTIONS.items():
        assert question.endswith(("?", ".")), question
        assert {language for language, _ in list_blocks(text)} & {"python", "sh"}, question


@pytest.mark.parametrize(
    "question",
    [
        pytest.param(question, marks=[pytest.mark.onnx] if "--format onnx" in text else [])
        for question, text in QUESTIONS.items()
    ],
)
def test_answer(
    question: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_cli: Callable[..., tuple[int, str, str]],
) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    [(_, setup)] = list_blocks(START)
    run_python(setup, names)
    if question in AFTER:
        [earlier] = [text for other, text in QUESTIONS.items() if AFTER[question] in other]
        list(run_blocks([b for b in list_blocks(earlier) if b[0] == "python"], names, run_cli))
    for printed, expected in run_blocks(list_blocks(QUESTIONS[question]), names, run_cli):
        assert printed == expected
