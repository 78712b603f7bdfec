"""Output of the command line: the only file that writes to stdout or stderr."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from vitlib.errors import VitlibError
from vitlib.system.terminal import dump_json, escape_unprintable

# Of the process, as stdout and stderr are: threads and libraries print under the same options.
_quiet = False
# What the line after Ctrl-C tells to type.
_advice = ""


def set_quiet(quiet: bool) -> None:
    """Hide notes and progress, or show them again; errors and answers are always shown.

    Args:
        quiet: True hides them.
    """
    global _quiet
    _quiet = quiet


def advise_after_interrupt(advice: str) -> None:
    """Set what the line after Ctrl-C tells to do.

    Args:
        advice: words such as "the same command continues the run".
    """
    global _advice
    _advice = f": {advice}" if advice else ""


def interrupt_advice() -> str:
    """Return what to do after Ctrl-C, with a colon before it; empty where there is nothing."""
    return _advice


def echo(text: object = "", *, err: bool = False) -> None:
    """Print a line, with control characters as escapes.

    Args:
        text: converted to text.
        err: print to stderr, as a note that --quiet hides.
    """
    if not (err and _quiet):
        _write(escape_unprintable(text), err=err)


def echo_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a value as JSON, valid whatever text it contains.

    Args:
        value: the value, in types that JSON has.
        indent: spaces of indentation; None prints one line.
    """
    _write(dump_json(value, indent), err=False, in_json=True)


def print_help(text: str) -> None:
    """Print the help of a command.

    Args:
        text: the help, in lines.
    """
    for line in text.splitlines():
        echo(line)


def print_table(rows: list[tuple[str, str]]) -> None:
    """Print a name and a value a line, with the values in a column.

    Args:
        rows: (name, value) of each line.
    """
    width = max((len(name) for name, _ in rows), default=0)
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
    _write(escape_unprintable(f"vitlib: error: {' '.join(str(error).split())}"), err=True)


def is_terminal() -> bool:
    """Return True if a progress bar would be seen: stderr is a terminal, and not --quiet."""
    return sys.stderr is not None and sys.stderr.isatty() and not _quiet  # None under pythonw


@contextmanager
def show_life(what: str, after: float = 3.0) -> Iterator[None]:
    """Show that a long job lives: a line on stderr, and on a terminal the seconds it takes.

    Args:
        what: the job, such as "computing occlusion".
        after: seconds without a word; a shorter job prints nothing.

    Yields:
        Nothing.
    """
    ended, start = threading.Event(), time.monotonic()

    def tick() -> None:
        if ended.wait(after):
            return
        if not is_terminal():
            echo(f"{what} ...", err=True)
            return
        while not ended.wait(1.0):
            seconds = f"\r{escape_unprintable(what)} ... {time.monotonic() - start:.0f} s"
            click.echo(seconds, err=True, nl=False)
        # Clear the line for what follows.
        click.echo("\r\033[K", err=True, nl=False)

    thread = threading.Thread(target=tick, name="vitlib-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def flush_output() -> None:
    """Write what is buffered for stdout.

    Raises:
        VitlibError: stdout is closed or full.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        raise output_error(error) from error


def output_error(error: OSError) -> VitlibError:
    """Return the error for a stdout that cannot be written, and drop what is still buffered.

    Args:
        error: what writing to stdout raised.
    """
    # Python flushes stdout once more at its end, and would print a second error.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    reason = "its reader has ended" if error.errno == errno.EPIPE else error.strerror
    return VitlibError(f"stdout cannot be written: {reason}")


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
    if err:
        click.echo(text, err=True)
        return
    # Python sets stdout to None where the shell closed it, and both to None under pythonw.
    if sys.stdout is None and sys.stderr is not None:
        raise VitlibError("stdout is closed: expected a terminal, a file or a pipe to print to")
    try:
        click.echo(text)
    except OSError as error:
        raise output_error(error) from error


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
