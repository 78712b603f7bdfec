"""Test the page of supported versions: its table is that of the runs, and claims no other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import vitlib
from paths import ROOT
from support.page import PAGE, fill, make_table, read_rows
from support.run import (
    PACKAGES,
    constraints_without_torch,
    count_outcomes,
    main,
    oldest_python,
)
from vitlib.system.requirements import parse_version

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="one" time="1"/>
<testcase classname="tests.a" name="two"><failure message="x"/></testcase>
<testcase classname="tests.a" name="three"><error message="x"/><failure message="y"/></testcase>
<testcase classname="tests.a" name="four"><skipped message="/some/where/shared/m is absent"/>
</testcase><testcase classname="tests.a" name="five"><skipped message="no CUDA"/></testcase>
</testsuite></testsuites>"""


def test_page_has_the_table_of_the_runs() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert fill(text, make_table(read_rows())) == text, "run: python -m support.page"


def test_runs_state_what_they_ran() -> None:
    rows = read_rows()
    assert len({row["suite"] for row in rows}) == len(rows)
    for row in rows:
        assert row["passed"] > 3000, row["suite"]
        assert row["failed"] == len(row["failures"])
        assert row["skipped"] == sum(row["skips"].values())
        assert {*row["versions"]} == {*PACKAGES}
        kind, _, version = row["suite"].partition(" ")
        stated = {"torch": row["versions"]["torch"], "python": row["python"]}.get(kind, "")
        assert stated.startswith(version), row["suite"]


def test_oldest_versions_ran_or_are_said_not_to_have() -> None:
    suites = {row["suite"]: row for row in read_rows()}
    if "lowest" not in suites:
        _, not_run = PAGE.read_text(encoding="utf-8").split("## Not run\n")
        assert "oldest version of each dependency" in not_run
        return
    lowest = suites["lowest"]
    assert lowest["python"].startswith(oldest_python() + ".")
    core = vitlib.REQUIRES
    assert {*core} <= {*PACKAGES}
    # transformers, the oracle, needs newer ones of these than vitlib does.
    for name in {*core} - {"huggingface-hub", "safetensors", "click"}:
        assert parse_version(lowest["versions"][name]) == parse_version(core[name]), name


def test_outcomes_of_a_report_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    counts, failed, reasons = count_outcomes(path)
    assert counts == {"passed": 1, "failed": 2, "skipped": 2}
    assert failed == ["tests.a::two", "tests.a::three"]
    assert reasons == {"m is absent": 1, "no CUDA": 1}


def test_constraints_leave_torch_to_the_run() -> None:
    assert "torch==" in constraints_without_torch(False)
    text = constraints_without_torch(True)
    assert not re.search(r"^(torch|triton)==", text, re.MULTILINE)
    assert "numpy==" in text


@pytest.mark.parametrize("arguments", [["torch"], ["lowest", "3.10"], ["cuda"]])
def test_wrong_use_makes_no_environment(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["support.run", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "expected a version" in (text := capsys.readouterr().err) or "invalid choice" in text


@pytest.mark.parametrize(
    ("target", "command"),
    [
        (("test-torch", "VERSION=2.10.0"), 'support.run torch "2.10.0"'),
        (("test-python", "PYTHON_VERSION=3.13"), 'support.run python "3.13"'),
        (("test-lowest",), "support.run lowest"),
    ],
)
def test_targets_run_the_selection_of_make_test(target: tuple[str, ...], command: str) -> None:
    done = subprocess.run(
        ["make", "-n", *target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (line,) = [line for line in done.stdout.splitlines() if "support.run" in line]
    assert command in line
    assert '--select "not hub and ' in line
