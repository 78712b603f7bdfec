"""Command line `vitlib VERB`: one file a verb, imported when the verb is called."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

import vitlib
from vitlib.cli.printing import fail
from vitlib.errors import VitlibError
from vitlib.system.terminal import escape_unprintable

VERBS = {
    "classify": "Label photos.",
    "embed": "Turn photos into vectors.",
    "attend": "Draw what a model looks at in a photo.",
    "batch": "Label or embed any number of photos, and account for each.",
    "similar": "Find the photos most like one.",
    "finetune": "Train a classifier of labelled photos.",
    "evaluate": "Measure a classifier on labelled photos.",
    "serve": "Answer photos over HTTP, with a page to try it.",
    "info": "Describe a checkpoint, without running it.",
    "convert": "Write a checkpoint in another layout, and compare its logits.",
    "verify": "Compare a checkpoint with a reference, or check its tensors.",
    "bench": "Time vitlib on this machine: every precision, and its GEMM rate.",
}


@contextmanager
def _escaped_errors() -> Iterator[None]:
    """Escape control characters in click's errors, which quote names of files."""
    try:
        yield
    except click.ClickException as error:
        error.message = escape_unprintable(error.message)  # type: ignore[misc]
        if isinstance(error, click.FileError):
            error.ui_filename = escape_unprintable(error.ui_filename)  # type: ignore[misc]
        raise


class Verbs(click.Group):
    """Group of the verbs, which lists them without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """List the verbs."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        """Import the command of a verb."""
        if name not in VERBS:
            return None
        command = getattr(import_module(f"vitlib.cli.{name}"), name)
        assert isinstance(command, click.Command)
        return command

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Parse arguments, with escaped errors."""
        with _escaped_errors():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb, with escaped errors."""
        with _escaped_errors():
            return super().invoke(ctx)

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002
        formatter: click.HelpFormatter,
    ) -> None:
        """Write the list of verbs."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(vitlib.__version__, prog_name="vitlib")
def vitlib_command() -> None:
    """Vision Transformers: exact, readable, fast.

    A model is a hub id, a folder or a weights file. Exit status: 0 done, 1 the work failed, 2 wrong
    use.
    """


def main() -> None:
    """Run the command line; an error of the user prints one line on stderr and exits 1."""
    try:
        vitlib_command(prog_name="vitlib")
    except VitlibError as error:
        fail(error)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        first = (str(error).splitlines() or ["no details"])[0]
        fail(f"out of memory ({first}): a smaller image, --image-size or --batch-size takes less")
        sys.exit(1)


def is_memory(error: Exception) -> bool:
    """Return True if an error means that memory ran out, in numpy or torch, on a CPU or a GPU.

    Args:
        error: the error.
    """
    phrases = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in phrases)
