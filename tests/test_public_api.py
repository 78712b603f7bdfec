"""Test that no public name or signature changes unnoticed, and the form of the changelog."""

from __future__ import annotations

import difflib
import re

from public_api import SNAPSHOT, describe, snapshot

import vitlib
from paths import ROOT

CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_public_names_are_those_of_the_snapshot() -> None:
    expected, actual = SNAPSHOT.read_text(encoding="utf-8"), snapshot()
    changes = difflib.unified_diff(expected.splitlines(), actual.splitlines(), lineterm="", n=0)
    changed = [line for line in changes if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert not changed, (
        "public names changed: add an entry to CHANGELOG.md, then run `cd tests && python "
        "public_api.py`:\n" + "\n".join(changed)
    )


def test_snapshot_sees_a_changed_signature() -> None:
    def load(source: str, *, strict: bool = True) -> None: ...

    (line,) = describe("vitlib.load", load)
    assert line == "vitlib.load(source, *, strict=True)"
    assert line not in snapshot().splitlines()
    assert any(text.startswith("vitlib.load(source, ") for text in snapshot().splitlines())


def test_snapshot_holds_every_name() -> None:
    text = SNAPSHOT.read_text(encoding="utf-8")
    for name in vitlib.__all__:
        assert re.search(rf"^vitlib\.{name}\b", text, flags=re.MULTILINE), name
    assert "vitlib.Predictor.classify(" in text
    assert "vitlib.train.finetune(" in text


def test_changelog_has_the_sections_of_each_version() -> None:
    versions = re.split(r"^## ", CHANGELOG, flags=re.MULTILINE)[1:]
    assert versions[0].startswith("[Unreleased]")
    assert any(version.startswith(f"[{vitlib.__version__}]") for version in versions)
    allowed = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Numbers"}
    for version in versions:
        assert set(re.findall(r"^### (.*)$", version, flags=re.MULTILINE)) <= allowed
    assert "### Numbers" in versions[0]


def test_versions_agree() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    for text in (f'version = "{vitlib.__version__}"', f"version: {vitlib.__version__}"):
        assert text in pyproject + citation
    assert re.search(rf"^version: {re.escape(vitlib.__version__)}$", citation, flags=re.MULTILINE)
