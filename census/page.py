"""docs/census.md from the rows of a census: counts by verdict, and the list."""

from __future__ import annotations

import platform
import re
from collections import Counter, defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from census.run import ZOOS, fingerprint, read_rows
from vitlib.checkpoint.layouts.table import ranges

FORMS = {
    "config": "the library's own folder",
    "bare": "the weights file alone",
    "written": "written by vitlib, opened by the library",
}
VERDICTS = ("equal", "asked", "refused", "wrong", "crash")
_TITLES = {"timm": "timm", "transformers": "transformers", "openclip": "open_clip"}
# What of a reason is one architecture's own: with it no two rows would be together.
_OWN_OF_A_ROW = (
    re.compile(r"; the nearest that is read is '[^']*'"),
    re.compile(r"(?<=architecture )'[^']*' "),
)
_PACKAGES = ("torch", "timm", "transformers", "open_clip_torch", "torchvision")
_INTRO = """# Census

Every plain ViT of timm, transformers and open_clip: made by its own library with two blocks (all
else as published), random weights with every gain, bias and position non-trivial, saved by the
library, read by vitlib. `make census` makes this page and fails where a number is wrong.

- equal: logits, the vector that the head reads, and all tokens are within 2e-6 of the library's.
- asked: no file says which of several published models it is, and vitlib asks for it; with the
  name it was right or refused.
- refused: one message says which architecture, and why.
- wrong: numbers that differ. crash: an error that is not one of vitlib's.
"""


def write(results: Path, page: Path, only: str = "*") -> int:
    """Write the page from the newest rows; none where only a part was run.

    Returns:
        1 where a row is wrong or a crash, else 0.
    """
    rows = {zoo: newest(results, zoo) for zoo in ZOOS}
    bad = [r for zoo in ZOOS for r in rows[zoo] if r.get("verdict") in ("wrong", "crash")]
    for zoo in ZOOS:
        for form in FORMS:
            counts = Counter(r["verdict"] for r in rows[zoo] if r["form"] == form)
            if counts:
                print(f"{zoo:12} {form:8}", dict(counts), flush=True)
    if only == "*" and all(rows.values()):
        page.write_text(render(rows), encoding="utf-8")
    for r in bad[:40]:
        print(f"WRONG {r['name']} {r['form']}: {r['reason']}")
    return int(bool(bad))


def newest(results: Path, zoo: str) -> list[dict[str, Any]]:
    """Return the rows of a zoo that this code made, of each name the last, in order of names."""
    code = fingerprint(zoo)
    rows = {
        (r["name"], r["form"]): r
        for path in sorted(results.glob(f"{zoo}.*.jsonl"))
        for r in read_rows(path)
        if r["code"] == code
    }
    named = {
        (name, form): row | {"name": name}
        for (first, form), row in rows.items()
        for name in (first, *row.get("also", ()))
    }
    return [named[key] for key in sorted(named)]


def render(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return the page's text."""
    parts = [_INTRO, f"Versions: {', '.join(_versions())}; Python {platform.python_version()}.\n"]
    for zoo, of_zoo in rows.items():
        parts.append(f"## {_TITLES[zoo]}\n")
        parts.append(_counts(of_zoo))
        parts.append(_reasons(of_zoo))
        parts.append(_lists(of_zoo))
    return "\n".join(parts)


def _versions() -> list[str]:
    names = []
    for package in _PACKAGES:
        try:
            names.append(f"{package} {version(package).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return names


def _counts(rows: list[dict[str, Any]]) -> str:
    cases = sum(r["form"] == "end" for r in rows)
    lines = [f"| {cases} models | {' | '.join(VERDICTS)} |", "|---|" + "--:|" * len(VERDICTS)]
    for form, title in FORMS.items():
        counts = Counter(r["verdict"] for r in rows if r["form"] == form)
        lines.append(f"| {title} | " + " | ".join(str(counts[v]) for v in VERDICTS) + " |")
    unmade = sum(r.get("verdict") == "unmade" for r in rows)
    if unmade:
        lines.append(f"\n{unmade} could not be made by the library itself.")
    return "\n".join(lines) + "\n"


def _reasons(rows: list[dict[str, Any]]) -> str:
    """Return every refusal of a folder, the architectures with one reason together."""
    by_reason: dict[str, set[str]] = defaultdict(set)
    for r in rows:
        if r["form"] == "config" and r["verdict"] not in ("equal", "unmade"):
            reason = r["reason"].partition("': ")[2] or r["reason"]  # without the folder's name
            for pattern in _OWN_OF_A_ROW:
                reason = pattern.sub("", reason)
            by_reason[f"{r['verdict']}: {reason}".replace("|", "/")].add(r["architecture"])
    if not by_reason:
        return ""
    lines = ["| refused | architectures |", "|---|---|"]
    lines += [
        f"| {reason} | {', '.join(shorten(sorted(names)))} |" for reason, names in by_reason.items()
    ]
    return "\n".join(lines) + "\n"


def _lists(rows: list[dict[str, Any]]) -> str:
    """Return the names by verdict: of the folder, then what differs for the bare file."""
    lines = []
    for form in FORMS:
        for verdict in VERDICTS:
            names = [r["name"] for r in rows if r["form"] == form and r["verdict"] == verdict]
            if names and (form == "config" or verdict not in ("equal", "refused")):
                lines += [f"<details><summary>{FORMS[form]}, {verdict}: {len(names)}</summary>\n"]
                lines += [", ".join(f"`{name}`" for name in shorten(names)), "\n</details>\n"]
    return "\n".join(lines) + "\n"


def shorten(names: list[str]) -> list[str]:
    """Return names with a number at their end as ranges: "vit/odd 0-4,6"."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        stem, space, number = name.rpartition(" ")
        if space and number.isdecimal():
            numbers.setdefault(stem, []).append(int(number))
        else:
            numbers[name] = []
    return [f"{stem} {ranges(of)}" if of else stem for stem, of in numbers.items()]
