"""Test that the commands of docs/start.md and of the how-to pages print what the pages show."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from how_to_pages import HOW_TO, START, clean, list_pages, read_blocks

from vitlib.cli import VERBS

EXPORT = HOW_TO / "export.md"  # takes long: the other pages do not need its file


def mask(output: str) -> Counter[str]:
    """Count the lines of an output, its numbers and spaces aside: machines differ in digits."""
    lines = (re.sub(r"\d[\d.,]*(e[-+]\d+)?", "#", line) for line in output.splitlines())
    # One C for all folds, or a range of them: versions of scikit-learn tell equal ones apart.
    lines = (line.replace("C # to #", "C #") for line in lines)
    return Counter(" ".join(line.split()) for line in lines if line.strip())


@pytest.fixture
def run_pages(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    run_cli: Callable[..., tuple[int, str, str]],
) -> Callable[[list[Path]], str]:
    """Make a function that runs pages in one folder, and returns what their Python prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # a page imports the file that `vendor` wrote

    def run(pages: list[Path]) -> str:
        printed = io.StringIO()
        for page in pages:
            for block in read_blocks(page):
                if block.language == "python":
                    with redirect_stdout(printed):
                        exec(compile(block.body, page.name, "exec"), {})
                    continue
                for arguments, expected in block.commands():
                    caplog.clear()
                    status, out, err = run_cli(*arguments)
                    # pytest takes the log, which a shell has on stderr.
                    log = "".join(f"{record.getMessage()}\n" for record in caplog.records)
                    assert status == 0, (page.name, arguments, err)
                    if not block.varies:
                        actual = mask(clean(out + err + log))
                        assert actual == mask(expected), (page.name, arguments)
        return printed.getvalue()

    return run


def test_start_prints_what_it_shows(run_pages: Callable[[list[Path]], str]) -> None:
    assert run_pages([START]).splitlines() == ["shirt 0.96", "(1, 10)", "(1, 50, 96)"]


def test_how_to_pages_print_what_they_show(run_pages: Callable[[list[Path]], str]) -> None:
    run_pages([page for page in list_pages() if page != EXPORT])


@pytest.mark.export
def test_export_page_prints_what_it_shows(run_pages: Callable[[list[Path]], str]) -> None:
    run_pages([list_pages()[0], EXPORT])


def test_each_verb_has_a_page() -> None:
    assert {page.stem for page in list_pages()} == {"index", *VERBS}
    assert {page.name for page in HOW_TO.glob("*.md")} == {page.name for page in list_pages()}
