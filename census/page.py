"""Writer of docs/census.md: the counts of a census by verdict, the reasons and the names."""

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
FAILURES = ("wrong", "crash")
_TITLES = {"timm": "timm", "transformers": "transformers", "openclip": "open_clip"}
# Parts of a reason that name one architecture. Without them, equal reasons share a row.
_ARCHITECTURE_NAMES = (
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
    """Print the counts, and write the page if all cases of all zoos have run.

    Args:
        results: Folder of the result files.
        page: Path of the page.
        only: Pattern of the cases that ran; any pattern but "*" writes no page.

    Returns:
        1 if the verdict of a row is wrong or crash, else 0.
    """
    rows = {zoo: newest_rows(results, zoo) for zoo in ZOOS}
    failures = [row for zoo in ZOOS for row in rows[zoo] if row.get("verdict") in FAILURES]
    for zoo in ZOOS:
        for form in FORMS:
            counts = Counter(row["verdict"] for row in rows[zoo] if row["form"] == form)
            if counts:
                print(f"{zoo:12} {form:8}", dict(counts), flush=True)
    if only == "*" and all(rows.values()):
        page.write_text(render(rows), encoding="utf-8")
    for row in failures[:40]:
        print(f"WRONG {row['name']} {row['form']}: {row['reason']}")
    return int(bool(failures))


def newest_rows(results: Path, zoo: str) -> list[dict[str, Any]]:
    """Return the last row of each name and form that the present code wrote, sorted by name."""
    code = fingerprint(zoo)
    rows = {
        (row["name"], row["form"]): row
        for path in sorted(results.glob(f"{zoo}.*.jsonl"))
        for row in read_rows(path)
        if row["code"] == code
    }
    expanded = {
        (name, form): row | {"name": name}
        for (case_name, form), row in rows.items()
        for name in (case_name, *row.get("also", ()))
    }
    return [expanded[key] for key in sorted(expanded)]


def render(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return the text of the page.

    Args:
        rows: Newest rows by zoo.
    """
    parts = [_INTRO, f"Versions: {', '.join(_versions())}; Python {platform.python_version()}.\n"]
    for zoo, zoo_rows in rows.items():
        parts.append(f"## {_TITLES[zoo]}\n")
        parts.append(_format_counts(zoo_rows))
        parts.append(_format_reasons(zoo_rows))
        parts.append(_format_names(zoo_rows))
    return "\n".join(parts)


def _versions() -> list[str]:
    """Return the versions of the installed packages."""
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {version(package).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return versions


def _format_counts(rows: list[dict[str, Any]]) -> str:
    """Return the table of the counts by form and verdict."""
    cases = sum(row["form"] == "end" for row in rows)
    lines = [f"| {cases} models | {' | '.join(VERDICTS)} |", "|---|" + "--:|" * len(VERDICTS)]
    for form, title in FORMS.items():
        counts = Counter(row["verdict"] for row in rows if row["form"] == form)
        lines.append(
            f"| {title} | " + " | ".join(str(counts[verdict]) for verdict in VERDICTS) + " |"
        )
    unmade = sum(row.get("verdict") == "unmade" for row in rows)
    if unmade:
        lines.append(f"\n{unmade} could not be made by the library itself.")
    return "\n".join(lines) + "\n"


def _format_reasons(rows: list[dict[str, Any]]) -> str:
    """Return the table of refusals of folders: a reason and its architectures in a row."""
    by_reason: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["form"] == "config" and row["verdict"] not in ("equal", "unmade"):
            # A message may open with the name of the folder, which is a temporary one.
            reason = row["reason"].partition("': ")[2] or row["reason"]
            for pattern in _ARCHITECTURE_NAMES:
                reason = pattern.sub("", reason)
            by_reason[f"{row['verdict']}: {reason}".replace("|", "/")].add(row["architecture"])
    if not by_reason:
        return ""
    lines = ["| refused | architectures |", "|---|---|"]
    lines += [
        f"| {reason} | {', '.join(shorten(sorted(names)))} |" for reason, names in by_reason.items()
    ]
    return "\n".join(lines) + "\n"


def _format_names(rows: list[dict[str, Any]]) -> str:
    """Return the names by verdict: all of the folders, and the exceptions among other forms."""
    lines = []
    for form in FORMS:
        for verdict in VERDICTS:
            names = [
                row["name"] for row in rows if row["form"] == form and row["verdict"] == verdict
            ]
            if names and (form == "config" or verdict not in ("equal", "refused")):
                lines += [f"<details><summary>{FORMS[form]}, {verdict}: {len(names)}</summary>\n"]
                lines += [", ".join(f"`{name}`" for name in shorten(names)), "\n</details>\n"]
    return "\n".join(lines) + "\n"


def shorten(names: list[str]) -> list[str]:
    """Join names that differ in a number at their end: "vit/odd 0-4,6"."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        stem, space, number = name.rpartition(" ")
        if space and number.isdecimal():
            numbers.setdefault(stem, []).append(int(number))
        else:
            numbers[name] = []
    return [f"{stem} {ranges(ends)}" if ends else stem for stem, ends in numbers.items()]
