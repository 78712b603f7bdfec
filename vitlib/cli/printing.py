"""What the command line prints: the only file of it that writes to stdout or stderr."""

from __future__ import annotations

import sys
from typing import Any

import click

from vitlib.system.terminal import json_text, printable


def echo(text: object = "", *, err: bool = False) -> None:
    """Print one line; what a terminal would obey, or a console cannot show, becomes its escape."""
    _write(printable(text), err=err)


def echo_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a value as JSON, which is valid whatever it holds."""
    _write(json_text(value, indent), err=False, in_json=True)


def fail(error: object) -> None:
    """Print an error as one line on stderr."""
    echo(f"vitlib: error: {' '.join(str(error).split())}", err=True)


def _write(text: str, *, err: bool, in_json: bool = False) -> None:
    """In the console's encoding; a character that it has not, as an escape of Python or JSON.

    JSON is UTF-8 or ASCII: programs read it as that, whatever the console's encoding is.
    """
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    if in_json and encoding.lower().replace("-", "").replace("_", "") != "utf8":
        encoding = "ascii"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = "".join(c if _fits(c, encoding) else _escaped(c, in_json) for c in text)
    click.echo(text, err=err)


def _fits(character: str, encoding: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _escaped(character: str, in_json: bool) -> str:
    if not in_json:
        return character.encode("ascii", "backslashreplace").decode()
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))
