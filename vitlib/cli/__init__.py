"""Command line `vitlib VERB`: one file a verb, imported when the verb is called."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import click

import vitlib
from vitlib.cli.printing import (
    echo,
    fail,
    flush_output,
    interrupt_advice,
    output_error,
    print_help,
)
from vitlib.cli.verb import SHOWS_ALL, output_options
from vitlib.errors import VitlibError
from vitlib.system.cores import respect_quota
from vitlib.system.terminal import escape_unprintable

VERBS = {
    "classify": "Label photos.",
    "embed": "Turn photos into vectors.",
    "attend": "Draw what a model looks at in a photo.",
    "batch": "Label or embed any number of photos, and account for each.",
    "similar": "Find the photos most like one.",
    "finetune": "Train a classifier of labelled photos.",
    "evaluate": "Measure a classifier on labelled photos.",
    "audit": "Look for what is wrong with a set of photos.",
    "probe": "Measure frozen features on labelled photos, by layer and pooling.",
    "serve": "Answer photos over HTTP, with a page to try it.",
    "info": "Describe a checkpoint, without running it.",
    "list": "List the architectures that vitlib knows by name.",
    "convert": "Write a checkpoint in another layout, and compare its logits.",
    "export": "Write a model as a file for another runtime, checked against the model.",
    "vendor": "Write a model as one file of source that needs torch alone, with its test.",
    "verify": "Compare a checkpoint with a reference, or check its tensors.",
    "doctor": "Check the installation, and say how to mend it.",
    "bench": "Time vitlib on this machine: every precision, and its GEMM rate.",
}
# A file called list.py would hide the builtin in this one.
FILES = {"list": "list_verb"}
# Names that other programs have for a verb.
SYNONYMS = {
    "predict": "classify",
    "inference": "classify",
    "explain": "attend",
    "search": "similar",
    "train": "finetune",
    "fit": "finetune",
    "eval": "evaluate",
    "test": "evaluate",
    "val": "evaluate",
    "validate": "evaluate",
    "calibrate": "evaluate",
    "check": "audit",
    "clean": "audit",
    "duplicates": "audit",
    "benchmark": "bench",
    "version": "--version",
}
# Exit status after Ctrl-C, as shells have it: 128 and the number of SIGINT.
INTERRUPTED = 130


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
        if name == "help":
            return help_command
        if name not in VERBS:
            return None
        file = FILES.get(name, name)
        command = getattr(import_module(f"vitlib.cli.{file}"), file)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of a verb, or name the nearest verb.

        Args:
            ctx: context of the group.
            args: the verb and its arguments.

        Returns:
            The verb, its command and its arguments.

        Raises:
            UsageError: There is no such verb.
        """
        name = args[0]
        if name in VERBS or name == "help" or name.startswith("-"):
            return super().resolve_command(ctx, args)
        close = [SYNONYMS[name]] if name in SYNONYMS else get_close_matches(name, VERBS, 1)
        hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(VERBS)}"
        ctx.fail(f"vitlib has no verb {name!r}: {hint}")

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Parse arguments, with escaped errors; without any, the error is the help."""
        with _escaped_errors() if args else nullcontext():
            return super().make_context(info_name, args, parent, **extra)

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


@click.command("help")
@click.argument(
    "verb",
    required=False,
    shell_complete=lambda _ctx, _param, typed: [name for name in VERBS if name.startswith(typed)],
)
@click.pass_context
def help_command(ctx: click.Context, verb: str | None) -> None:
    """Print the help of a verb with every option, or that of vitlib."""
    group = vitlib_command
    parent = ctx.parent or ctx
    if verb is None:
        print_help(group.get_help(parent))
        return
    _, command, _ = group.resolve_command(parent, [verb])
    assert command is not None
    with command.context_class(command, info_name=verb, parent=parent) as inner:
        inner.meta[SHOWS_ALL] = True
        print_help(command.get_help(inner))


def _print_version(ctx: click.Context, _: click.Parameter, is_set: bool) -> None:
    """Print the version, and the commit where it is known, and exit."""
    if is_set and not ctx.resilient_parsing:
        from vitlib.system.commit import read_commit

        commit = read_commit()
        echo(f"vitlib, version {vitlib.__version__}{f' (commit {commit})' * bool(commit)}")
        ctx.exit()


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="VERB [ARGS]...",
    params=output_options(),
)
@click.option(
    "-V", "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version,
    help="Show the version and exit.",
)  # fmt: skip
def vitlib_command() -> None:
    """Vision Transformers: exact, readable, fast.

    A model is a hub id, a folder or a weights file. The model demo comes with vitlib and needs no
    network. `vitlib help VERB` shows every option of a verb.

    Exit status: 0 done, 1 the work failed, 2 wrong use, 130 interrupted.
    """


def main() -> None:
    """Run the command line; an error of the user prints one line on stderr.

    Raises:
        SystemExit: Always, with the exit status.
    """
    respect_quota()
    status = _run()
    try:
        flush_output()
    except VitlibError as error:
        fail(error)
        status = 1
    sys.exit(status)


def _run() -> int:
    """Run the verb, and return the exit status."""
    try:
        return int(vitlib_command.main(prog_name="vitlib", standalone_mode=False) or 0)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (click.Abort, KeyboardInterrupt):
        fail(f"interrupted{interrupt_advice()}")
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except VitlibError as error:
        fail(error)
    except Exception as error:
        explained = _explain(error)
        if not explained:
            raise
        fail(explained)
    return 1


def _explain(error: Exception) -> str:
    """Explain an error that no code of vitlib raised; "" for one that is a bug."""
    if is_memory(error):
        first = (str(error).splitlines() or ["no details"])[0]
        return f"out of memory ({first}): a smaller image, --image-size or --batch-size takes less"
    if isinstance(error, OSError) and _is_of_echo(error):
        return str(output_error(error))
    from vitlib.system.requirements import explain_import_error

    return str(explain_import_error(error) or "")


def _is_of_echo(error: OSError) -> bool:
    """Return True if click, which prints help and completion by itself, could not print."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__") == "click.utils"


def is_memory(error: Exception) -> bool:
    """Return True if an error means that memory ran out, in numpy or torch, on a CPU or a GPU.

    Args:
        error: the error.
    """
    phrases = ("can't allocate memory", "out of memory")
    if not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    return any(phrase in str(error) for phrase in phrases)
