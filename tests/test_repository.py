"""Test the files of the repository that other programs read: workflows, issue forms, hooks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from paths import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def load(path: Any) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_hash(path: Any) -> None:
    """A tag can be moved to other code, a commit cannot."""
    used = re.findall(r"uses:\s*(\S+)(.*)", path.read_text(encoding="utf-8"))
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action
        assert re.search(r"# v\d+\.\d+\.\d+$", comment), f"{action}: no version in a comment"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_read_alone_and_end(path: Any) -> None:
    content = load(path)
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        assert job["timeout-minutes"] <= 120, name


def test_one_job_alone_may_publish_and_only_a_release() -> None:
    """It uses no secret and runs no code of the repository: it has files that others built."""
    for path in WORKFLOWS:
        jobs = load(path)["jobs"]
        privileged = {name for name, job in jobs.items() if "permissions" in job}
        assert privileged == ({"publish"} if path.name == "wheels.yml" else set()), path.name
        assert "secrets." not in path.read_text(encoding="utf-8")
    publish = load(ROOT / ".github/workflows/wheels.yml")["jobs"]["publish"]
    assert publish["if"] == "github.event_name == 'release'"
    assert {*publish["needs"]} == {"build", "test", "install"}
    assert not [step for step in publish["steps"] if "run" in step or "checkout" in step["uses"]]
    assert publish["permissions"] == {
        "contents": "read",
        "id-token": "write",
        "attestations": "write",
    }


def test_code_of_conduct_says_where_to_report() -> None:
    text = (ROOT / "CODE_OF_CONDUCT.md").read_text(encoding="utf-8")
    assert "(SECURITY.md)" in text
    assert "(CODE_OF_CONDUCT.md)" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_workflow_selects_the_tests_of_make_test() -> None:
    """The selection is written in the Makefile, and here for systems without make."""
    (selection,) = re.findall(r"^SELECTION := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    jobs = load(ROOT / ".github/workflows/tests.yml")["jobs"]
    runs = [
        step.get("run", "") for name in ("newest", "oldest-torch") for step in jobs[name]["steps"]
    ]
    commands = [run for run in runs if "pytest" in run]
    assert len(commands) == 2
    for command in commands:
        assert " ".join(command.split()).endswith(f'-m "{selection}"')


def test_matrix_begins_with_the_oldest_python_of_the_package() -> None:
    matrix = load(ROOT / ".github/workflows/tests.yml")["jobs"]["newest"]["strategy"]["matrix"]
    (oldest,) = re.findall(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert matrix["python"][0] == oldest


@pytest.mark.parametrize(
    "path", [form for form in FORMS if form.name != "config.yml"], ids=lambda path: path.name
)
def test_issue_forms_ask_for_what_is_needed(path: Any) -> None:
    form = load(path)
    assert {"name", "description", "body"} <= form.keys()
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(part["attributes"]["label"] for part in form["body"])
    text = path.read_text(encoding="utf-8")
    assert "vitlib " in text
    if path.name == "wrong-numbers.yml":
        assert "vitlib verify" in text
