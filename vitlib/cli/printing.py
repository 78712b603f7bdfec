"""Output of the command line: the only file that writes to stdout or stderr."""

from __future__ import annotations

import sys
from typing import Any

import click

from vitlib.system.terminal import dump_json, escape_unprintable


def echo(text: object = "", *, err: bool = False) -> None:
    """Print a line, with control characters as escapes.

    Args:
        text: converted to text.
        err: print to stderr.
    """
    _write(escape_unprintable(text), err=err)


def echo_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a value as JSON, valid whatever text it contains.

    Args:
        value: the value, in types that JSON has.
        indent: spaces of indentation; None prints one line.
    """
    _write(dump_json(value, indent), err=False, in_json=True)


def print_table(rows: list[tuple[str, str]]) -> None:
    """Print a name and a value a line, with the values in a column.

    Args:
        rows: (name, value) of each line.
    """
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        echo(f"{name:<{width}}  {value}")


def print_columns(rows: list[list[str]]) -> None:
    """Print rows of cells, each column as wide as its widest cell.

    Args:
        rows: cells of each row, as many in each.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        echo("  ".join(cells).rstrip())


def fail(error: object) -> None:
    """Print an error as one line on stderr.

    Args:
        error: converted to text.
    """
    echo(f"vitlib: error: {' '.join(str(error).split())}", err=True)


def is_terminal() -> bool:
    """Return True if stderr is a terminal, so that a progress bar would be seen."""
    return sys.stderr is not None and sys.stderr.isatty()  # None under pythonw


def _write(text: str, *, err: bool, in_json: bool = False) -> None:
    """Write text in the console's encoding, with other characters as escapes of Python or JSON.

    JSON is written as UTF-8 or ASCII, since programs read it so whatever the console's encoding is.
    """
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    if in_json and encoding.lower().replace("-", "").replace("_", "") != "utf8":
        encoding = "ascii"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = "".join(c if _fits(c, encoding) else _escape(c, in_json) for c in text)
    click.echo(text, err=err)


def _fits(character: str, encoding: str) -> bool:
    """Return True if an encoding has a character."""
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _escape(character: str, in_json: bool) -> str:
    """Escape a character as Python does, or as JSON does in units of UTF-16."""
    if not in_json:
        return character.encode("ascii", "backslashreplace").decode()
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))
