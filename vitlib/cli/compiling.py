"""The option --compile of verbs that run a model for long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from vitlib.cli.exported import is_exported
from vitlib.cli.printing import echo
from vitlib.cli.values import Size

F = TypeVar("F", bound=Callable[..., Any])


def compile_option(about: str) -> Callable[[F], F]:
    """Make the option --compile.

    Args:
        about: what the verb does with the time that it takes, for the help.

    Returns:
        A decorator that adds the option.
    """
    return click.option(
        "--compile",
        is_flag=True,
        help=f"Compile the model by torch's compiler, where that is faster. {about}",
    )


def check_compile(model: str, image_size: Size | None = None) -> None:
    """Refuse --compile for models that it cannot compile, or not in bounded time.

    Args:
        model: hub id, folder or file.
        image_size: size of the pixels; None for the checkpoint's.

    Raises:
        UsageError: for an exported file, and for photos in shapes of their own.
    """
    if is_exported(model):
        raise click.UsageError(
            f"--compile: {model} is an exported file, which its own runtime computes: leave "
            "--compile out, or give the checkpoint"
        )
    if image_size == "keep":
        raise click.UsageError(
            "--compile is for one size of photos: leave it or --image-size keep out"
        )


def print_compiling(text: str) -> None:
    """Print a line on stderr: compiling takes minutes without output.

    Args:
        text: when the model is compiled.
    """
    echo(f"compiling the model {text}; -v names each program", err=True)
