"""Tests of the tutorials: their form, their names, and that each runs end to end."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from public_api import public_modules, public_names

import vitlib
from paths import ROOT

TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.py"))
PUBLIC = dict(public_modules())
each = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


def cells(path: Path) -> list[tuple[bool, str]]:
    """List the cells of a file in jupytext's percent format: is it Markdown, and its text."""
    _, *parts = re.split(r"^# %%(.*)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    kinds, texts = parts[::2], parts[1::2]
    assert set(kinds) <= {"", " [markdown]"}, path
    pairs = [(kind != "", text.strip("\n")) for kind, text in zip(kinds, texts, strict=True)]
    return [
        (is_markdown, re.sub(r"^# ?", "", text, flags=re.MULTILINE) if is_markdown else text)
        for is_markdown, text in pairs
    ]


def is_public(module: ModuleType, name: str) -> bool:
    """Return True for a name that users may take from vitlib or a package of it."""
    if module is vitlib:
        return name in {*dir(vitlib), "__file__"}
    if name in public_names(module):
        return True
    # Without __all__, a package exports what its file imports under the same name.
    return not hasattr(module, "__all__") and not name.startswith("_") and name in vars(module)


def private_names(code: str) -> Iterator[str]:
    """Yield the names of vitlib in a code that are not public."""
    tree = ast.parse(code)
    modules: dict[str, ModuleType] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            # Only `import vitlib` itself: its packages are loaded on first use.
            imported = [alias for alias in node.names if alias.name.split(".")[0] == "vitlib"]
            yield from (a.name for a in imported if a.name != "vitlib" or a.asname)
            modules |= {"vitlib": vitlib}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vitlib":
            module = PUBLIC.get(node.module or "")
            for alias in node.names:
                if module is None or not is_public(module, alias.name):
                    yield f"{node.module}.{alias.name}"
                elif f"{node.module}.{alias.name}" in PUBLIC:
                    modules[alias.name] = PUBLIC[f"{node.module}.{alias.name}"]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        parent = ast.unparse(node.value)
        module = modules.get(parent) or PUBLIC.get(parent)
        if module is not None and not is_public(module, node.attr):
            yield f"{parent}.{node.attr}"
        elif module is None and node.attr.startswith("_"):
            yield ast.unparse(node)


def test_there_are_five_tutorials() -> None:
    assert [path.name[:2] for path in TUTORIALS] == ["1-", "2-", "3-", "4-", "5-"]


@each
def test_tutorial_has_title_and_short_cells(path: Path) -> None:
    (first_is_markdown, title), *rest = cells(path)
    assert first_is_markdown
    assert re.match(r"# \w.*\n\n\S", title), "a title, and a line of what it is for"
    assert len(re.findall(r"^# ", "\n".join(t for m, t in rest if m), flags=re.MULTILINE)) == 0
    assert "pip install" in title
    assert rest[-1][0], "the last cell says where to go on"
    assert "## More" in rest[-1][1]
    for is_markdown, text in rest:
        assert len(text.splitlines()) <= 40, text
        if not is_markdown:
            ast.parse(text)


@each
def test_tutorial_uses_public_names(path: Path) -> None:
    assert list(private_names(path.read_text(encoding="utf-8"))) == []


def test_private_names_are_noticed() -> None:
    code = """
import numpy as np
import vitlib.plots.draw
from vitlib import plots
from vitlib.plots.draw import new_figure
from vitlib.data import read_photos, hidden
vitlib.load("demo")._private
vitlib.plots.new_figure, plots.save, vitlib.Predictor, vitlib.encode
"""
    assert sorted(private_names(code)) == [
        "vitlib.data.hidden",
        "vitlib.encode",
        "vitlib.load('demo')._private",
        "vitlib.plots.draw",
        "vitlib.plots.draw.new_figure",
        "vitlib.plots.new_figure",
    ]


@each
def test_links_of_tutorial_exist(path: Path) -> None:
    text = "\n".join(text for is_markdown, text in cells(path) if is_markdown)
    links = re.findall(r"\]\(([^)#\s]+)(#[^)]*)?\)", text)
    assert links
    for target, anchor in links:
        page = path.parent / target
        assert page.is_file(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor[1:] in slugs, f"{target}{anchor}"


@pytest.mark.tutorials
@each
def test_tutorial_runs(path: Path, tmp_path: Path) -> None:
    """Run a tutorial as a script, in an empty folder, without a display or a network."""
    own = {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    environment = {**os.environ, **own, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert "Exception ignored" not in done.stderr, done.stderr
