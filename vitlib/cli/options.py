"""What several verbs take, and how they treat images that fail."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vitlib.errors import VitlibError

if TYPE_CHECKING:
    from vitlib.predict import Predictor

DEFAULT_MODEL = "google/vit-base-patch16-224"
F = TypeVar("F", bound=Callable[..., Any])


def hub_options(command: F) -> F:
    """Where on the hub."""
    for option in (
        click.option(
            "--local-files-only", is_flag=True, help="Take a hub id from the cache; ask no network."
        ),
        click.option("--revision", help="Branch, tag or commit of a hub id."),
    ):
        command = option(command)
    return command


def model_options(command: F) -> F:
    """Which model, from where, on what."""
    for option in (
        click.option(
            "--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Images."
        ),
        click.option("--device", help="As torch names it. Default: CUDA where there is one."),
        hub_options,
        click.option(
            "--model",
            "-m",
            default=DEFAULT_MODEL,
            show_default=True,
            help="Hub id, folder or weights file.",
        ),
    ):
        command = option(command)
    return command


def load_predictor(model: str, revision: str | None, local: bool, device: str | None) -> Predictor:
    """The Predictor of the options above."""
    from vitlib.predict import Predictor

    quiet()
    return Predictor.load(model, revision=revision, local_files_only=local, device=device)


def quiet() -> None:
    """Leave stderr to what vitlib has to say: Pillow and the hub client also talk to it."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def on_terminal() -> bool:
    """Whether a progress bar would be seen."""
    return sys.stderr.isatty()


class Bad:
    """The images that failed, by their position on the command line."""

    def __init__(self) -> None:
        self.errors: dict[int, VitlibError] = {}

    def note(self, index: int, error: VitlibError) -> None:
        """For Predictor's on_error."""
        self.errors[index] = error


@contextmanager
def report_bad() -> Iterator[Bad]:
    """Collect what fails, print the rest first, then name each failure on stderr and exit 1."""
    bad = Bad()
    yield bad
    for error in bad.errors.values():
        fail(error)
    if bad.errors:
        sys.exit(1)


def fail(error: object) -> None:
    """One line on stderr."""
    click.echo(f"vitlib: error: {' '.join(str(error).split())}", err=True)
