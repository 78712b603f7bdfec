"""Test the pages without Sphinx: links, anchors, tables of contents, and what docstrings say."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from public_api import SNAPSHOT, public_modules, public_names

from paths import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("benchmarks/*.md")])
PAGES += sorted([*ROOT.glob("examples/**/*.md"), *ROOT.glob("vitlib/**/*.md")])
LINK = re.compile(r"(?<!\\)\]\(\s*<?([^)\s>]+)>?[^)]*\)")


def without_code(text: str) -> str:
    """Return a page without its blocks and spans of code, in which a link is none."""
    text = re.sub(r"^( *)(`{3,}).*?^\1\2`* *$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(`+)[^`].*?\1", "", text)


@cache
def list_anchors(page: Path) -> frozenset[str]:
    """List the anchors of a page's headings, as GitHub and MyST make them."""
    anchors: set[str] = set()
    fenced = False
    for line in page.read_text(encoding="utf-8").splitlines():
        fenced ^= line.lstrip().startswith("```")
        heading = re.fullmatch(r"#{1,4} +(.*?)[ #]*", line)
        if heading is None or fenced:
            continue
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading[1]).replace("`", "")
        slug = base = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        number = 0
        while slug in anchors:
            number += 1
            slug = f"{base}-{number}"
        anchors.add(slug)
    return frozenset(anchors)


def list_dead_links(page: Path) -> list[str]:
    """List the links of a page that lead to no file or to no heading."""
    dead = []
    for target in LINK.findall(without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        is_dead_anchor = anchor and (file.suffix != ".md" or anchor not in list_anchors(file))
        if not file.exists() or is_dead_anchor:
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_anchors_exist(page: Path) -> None:
    assert not list_dead_links(page)


def test_dead_links_are_seen(tmp_path: Path) -> None:
    other, page = tmp_path / "other.md", tmp_path / "page.md"
    other.write_text("# A `title`, twice\n```\n# no heading\n```\n## A title, twice\n")
    good = "[a](other.md) [b](other.md#a-title-twice-1) [c](#here) [d](https://x.org) `[e](f)`\n"
    page.write_text(f"# Here\n{good}```\n[g](h.md)\n```\n")
    assert not list_dead_links(page)
    page.write_text("# Here\n[a](no.md) ![b](no.png) [c](other.md#no-heading) [d](#there)\n")
    assert list_dead_links(page) == ["no.md", "no.png", "other.md#no-heading", "#there"]


def toctree_entries(page: Path) -> Iterator[str]:
    """Yield the entries of a page's tables of contents: names and patterns of pages."""
    for block in re.findall(r"```{toctree}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.splitlines():
            if line and not line.startswith((":", "/build/")):  # `make docs` writes those of build
                yield re.sub(r"^.*<(.*)>$", r"\1", line)


def test_each_page_is_in_a_table_of_contents() -> None:
    listed: set[Path] = set()
    for page in DOCS.rglob("*.md"):
        for entry in toctree_entries(page):
            found = {path.resolve() for path in page.parent.glob(f"{entry}.md")}
            assert found or "*" in entry, (page, entry)
            listed |= found
    assert not set(DOCS.rglob("*.md")) - listed - {DOCS / "index.md"}


def public_objects() -> Iterator[tuple[str, Any]]:
    """Yield each public name and its object: what public_api.txt lists."""
    for prefix, module in public_modules():
        for name in public_names(module):
            value = getattr(module, name)
            yield f"{prefix}.{name}", value
            if inspect.isclass(value) and value.__module__.startswith("vitlib"):
                own = [kind for kind in value.__mro__ if kind.__module__.startswith("vitlib")]
                members = {key: part for kind in reversed(own) for key, part in vars(kind).items()}
                for member, part in members.items():
                    target = inspect.unwrap(getattr(part, "__func__", part))
                    is_documented = isinstance(target, property) or inspect.isfunction(target)
                    if not member.startswith("_") and is_documented:
                        yield f"{prefix}.{name}.{member}", target


def missing_sections(value: Any) -> list[str]:
    """List what a docstring lacks: a text, Args, Returns, and types in the signature."""
    if isinstance(value, property):
        text, hints = inspect.getdoc(value) or "", getattr(value.fget, "__annotations__", {})
        missing = ["text"] * (not text) + ["type"] * ("return" not in hints)
        # A colon would make a type of what precedes it.
        return missing + ["no colon in its first line"] * (": " in text.partition("\n")[0])
    if not callable(value) or typing.get_origin(value) is not None:
        return []
    text, is_class = inspect.getdoc(value) or "", inspect.isclass(value)
    if is_class:
        text += "\n" + (inspect.getdoc(value.__init__) or "")
    try:
        signature = inspect.signature(value)
    except ValueError:  # an exception's
        return ["text"] * (not text)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    returns = signature.return_annotation
    nothing = ("None", None, "NoReturn", typing.NoReturn)
    result = re.search(r"^(Returns|Yields):\n +(.*)", text, flags=re.MULTILINE)
    missing = ["text"] * (not text)
    missing += ["Args"] * (bool(parameters) and not re.search(r"^(Args|Attributes):$", text, re.M))
    if not is_class:
        missing += [f"type of {p.name}" for p in parameters if p.annotation is p.empty]
        missing += ["type of the result"] * (returns is signature.empty)
        missing += ["Returns"] * (returns not in nothing and result is None)
        missing += ["no colon in Returns"] * (result is not None and ": " in result[2])
    return missing


def test_public_docstrings_have_their_sections() -> None:
    lacking = {name: missing_sections(value) for name, value in public_objects()}
    assert not {name: missing for name, missing in lacking.items() if missing}


def test_missing_sections_are_seen() -> None:
    def bare(a, b: int): ...  # type: ignore[no-untyped-def]

    def typed(a: int) -> int:
        """Add.

        Args:
            a: A number.

        Returns:
            A number: one more.
        """
        return a + 1

    everything = ["text", "Args", "type of a", "type of the result", "Returns"]
    assert missing_sections(bare) == everything
    assert missing_sections(typed) == ["no colon in Returns"]


def reference_entries() -> list[str]:
    """List the names of which the API reference makes pages."""
    names = []
    for page in sorted((DOCS / "api").glob("*.md")):
        for block in re.findall(r"```{eval-rst}\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            module = re.search(r"currentmodule:: (\S+)", block)
            if module and "autosummary::" in block:
                names += [
                    f"{module[1]}.{name}" for name in re.findall(r"^   (\w\S*)$", block, re.M)
                ]
    return names


def test_each_public_name_has_a_page() -> None:
    lines = SNAPSHOT.read_text(encoding="utf-8").splitlines()
    snapshot = {re.split(r"[( ]", line)[0] for line in lines}
    objects = {f"{prefix}.{name}" for prefix, m in public_modules() for name in public_names(m)}
    assert objects <= snapshot
    entries = reference_entries()
    assert not objects - set(entries)
    assert len(entries) == len(set(entries))
