"""Make the table of docs/support.md from docs/support.jsonl: python -m support.page."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "support.jsonl"
PAGE = ROOT / "docs" / "support.md"
BEGIN = "<!-- made from support.jsonl: python -m support.page -->\n"
END = "<!-- end -->\n"
HEADER = ("run", "Python", "torch", "numpy", "Pillow", "transformers", "date", "commit",
          "passed", "failed", "skipped", "minutes")  # fmt: skip
# One run: suite, date, commit, python, system, versions, passed, failed, skipped, seconds,
# failures (names of tests) and skips (number by reason).
Row = dict[str, Any]


def read_rows(path: Path = RESULTS) -> list[Row]:
    """Read the runs.

    Args:
        path: file with a run a line.

    Returns:
        The runs.
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_table(rows: list[Row]) -> str:
    """Write the runs as a table; below it, failed tests by file and the reasons of skips.

    Args:
        rows: the runs.

    Returns:
        Markdown.
    """
    if not rows:
        return "No run of the whole suite is recorded yet.\n"
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    for row in rows:
        versions = row["versions"]
        names = ("torch", "numpy", "pillow", "transformers")
        cells = [row["suite"], row["python"], *(versions[name] for name in names)]
        cells += [row["date"], f"`{row['commit']}`", row["passed"], row["failed"], row["skipped"]]
        cells.append(round(row["seconds"] / 60))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    failed = [
        f"- {row['suite']}: {count_by_file(row['failures'])}" for row in rows if row["failed"]
    ]
    reasons = sorted({reason for row in rows for reason in row["skips"]})
    lines += ["", "Failed:", "", *failed] if failed else ["", "No test failed in these runs."]
    lines += ["", "Reasons of the skips:", "", *(f"- {reason}" for reason in reasons)]
    return "\n".join(lines) + "\n"


def count_by_file(names: list[str]) -> str:
    """Count failed tests by their files, the most first.

    Args:
        names: names of tests, such as tests.fast.test_linears::test_one.

    Returns:
        Text such as "`tests.fast.test_linears` 3".
    """
    counts = Counter(name.split("::")[0] for name in names)
    return ", ".join(f"`{file}` {count}" for file, count in counts.most_common())


def fill(page: str, table: str) -> str:
    """Put a table into the page, between its two marks.

    Args:
        page: text of the page.
        table: the table.

    Returns:
        The page with the table.
    """
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def write_page() -> None:
    """Write the table into docs/support.md."""
    text = fill(PAGE.read_text(encoding="utf-8"), make_table(read_rows()))
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_page()
