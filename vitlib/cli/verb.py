"""Command of a verb: help in groups with examples, and the options that every verb has.

The help of a verb is its first sentence, examples that run, the rest of its text, and its options
in groups. Options that state what a checkpoint's files do not say fill a page, and few people need
them: `--help` names them in one line, and `--help-all` lists them.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from vitlib.cli.printing import echo, print_help, set_quiet
from vitlib.cli.values import PathOrName
from vitlib.errors import VitlibError, count_noun

F = TypeVar("F", bound=Callable[..., Any])
LOADING, GENERAL = "Loading", "General"
PATHS = ("MODEL", "FILE", "FOLDER")  # placeholders of values that may be paths
SHOWS_ALL = "vitlib.shows_all"  # in ctx.meta, True if the help lists options of every heading
# Options of each heading, by the name of their parameter, in the order of the help.
GROUPS = {
    "Input": (
        *(
            "levels",
            "input_kind",
            "column",
            "root",
            "exclude_query",
            "class_map",
            "multi_label",
            "unlabelled",
            "other",
            "regression",
        ),
        *("validation", "tune", "on_bad_image", "max_errors", "settings_file", "exclude"),
    ),
    "Model": (
        *("model", "models", "size", "from_scratch", "against", "photos", "task", "device"),
        *("image_size", "dynamic_size", "calibrated"),
    ),
    "Probe": ("pools", "methods", "few_shot", "k"),
    "Explanation": ("method", "class_", "layers", "heads", "patch"),
    "Output": (
        *(
            "out",
            "into",
            "fix_list",
            "next_count",
            "next_by",
            "overwrite",
            "file_format",
            "outputs",
            "layout",
            "allow_drift",
            "form",
            "top_k",
            "threshold",
            "positive",
            "bootstrap",
            "seed",
        ),
        *("plot", "show_profiles", "show_fast", "as_json", "resume"),
    ),
    "Speed": (
        *(
            "precision",
            "precisions",
            "calibrate",
            "compile",
            "opset",
            "batch_size",
            "batch_sizes",
            "threads",
            "rounds",
        ),
        *("shard_size", "workers", "engine", "address", "draft", "features", "embeddings"),
    ),
    LOADING: (
        *("source_layout", "profile", "prefix", "architecture", "num_heads", "activation", "pool"),
        *("revision", "local_files_only", "preprocess", "labels"),
    ),
}
HEADING_OF = {name: heading for heading, names in GROUPS.items() for name in names}


class _EchoHandler(logging.Handler):
    """Handler that prints log lines as the command line prints its own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line on stderr."""
        echo(self.format(record), err=True)


def _be_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    """Print the log lines of loading, which are hidden otherwise, until the verb ends."""
    if not value or ctx.resilient_parsing:
        return
    logger, handler = logging.getLogger("vitlib"), _EchoHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    ctx.call_on_close(lambda: logger.removeHandler(handler))
    ctx.call_on_close(lambda: logger.setLevel(level))


def _be_quiet(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    """Print the answer and errors alone, until the verb ends."""
    if not value or ctx.resilient_parsing:
        return
    logger = logging.getLogger("vitlib")
    level = logger.level
    set_quiet(True)
    logger.setLevel(logging.ERROR)
    ctx.call_on_close(lambda: logger.setLevel(level))
    ctx.call_on_close(lambda: set_quiet(False))


def _show_all_help(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    """Print the help with every group, and end."""
    if value and not ctx.resilient_parsing:
        ctx.meta[SHOWS_ALL] = True
        print_help(ctx.get_help())
        ctx.exit()


def output_options() -> list[click.Option]:
    """Make the options of the command line as a whole, which also each verb has.

    Returns:
        --verbose and --quiet.
    """
    return [
        click.Option(
            ["--verbose", "-v"],
            is_flag=True,
            expose_value=False,
            callback=_be_verbose,
            help="Print what is read and assumed as well.",
        ),
        click.Option(
            ["--quiet", "-q"],
            is_flag=True,
            expose_value=False,
            callback=_be_quiet,
            help="Print the answer and errors only: no notes, no progress.",
        ),
    ]


class Verb(click.Command):
    """Command of a verb.

    Attributes:
        examples: Lines of the help to type, which a test runs.
        headings: Heading of options that GROUPS lacks, by the name of the parameter.
    """

    def __init__(
        self,
        *args: Any,
        examples: Sequence[str] = (),
        headings: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        """Make the command.

        Args:
            *args: as for click.Command.
            examples: lines of the help to type, which a test runs.
            headings: heading of options that GROUPS lacks, by the name of the parameter.
            **settings: as for click.Command.
        """
        super().__init__(*args, **settings)
        for param in self.params:
            is_path = isinstance(param, click.Argument) or param.metavar in PATHS
            if param.type is click.STRING and is_path and param.name != "pattern":
                param.type = PathOrName()
        self.examples = tuple(examples)
        self.headings = dict(headings or {})

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the verb's parameters, and those that every verb has.

        Args:
            ctx: context of the command.

        Returns:
            The parameters.
        """
        help_all = click.Option(
            ["--help-all"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_all_help,
            help="Show every option.",
        )
        return [*super().get_params(ctx), help_all, *output_options()]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb, with packages and a folder that it can use.

        Args:
            ctx: context of the command.

        Raises:
            InstallationError: A package that vitlib needs is absent or too old.
            VitlibError: The current folder was deleted.
        """
        try:
            Path.cwd()
        except OSError as error:  # torch's libraries end the process then
            raise VitlibError(
                f"the current folder cannot be used ({error.strerror}): cd to another"
            ) from error
        if self.name != "doctor":  # which says what else is wrong
            from vitlib.system.requirements import check_core  # takes longer than all of --help

            check_core()
        return super().invoke(ctx)

    def format_help_text(
        self,
        ctx: click.Context,  # noqa: ARG002
        formatter: click.HelpFormatter,
    ) -> None:
        """Write the first sentence, the examples and the rest of the text.

        Args:
            ctx: context of the command.
            formatter: receives the text.
        """
        first, _, rest = inspect.cleandoc(self.help or "").partition("\n\n")
        self._write_text(formatter, first)
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
        if rest:
            self._write_text(formatter, rest)

    @staticmethod
    def _write_text(formatter: click.HelpFormatter, text: str) -> None:
        """Write paragraphs, indented."""
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(text)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in groups; those of loading as one line, unless all are to be shown.

        Args:
            ctx: context of the command.
            formatter: receives the text.
        """
        rows: dict[str, list[tuple[str, str]]] = {heading: [] for heading in GROUPS}
        for option in self.get_params(ctx):
            row = option.get_help_record(ctx)
            if row is not None and isinstance(option, click.Option):
                rows.setdefault(self.heading(option.name or ""), []).append(row)
        general, shows_all = rows.pop(GENERAL), ctx.meta.get(SHOWS_ALL, False)
        last = rows.pop(LOADING)
        for heading, lines in [*rows.items(), (LOADING, last if shows_all else [])]:
            if lines:
                with formatter.section(heading):
                    formatter.write_dl(lines)
        if last and not shows_all:
            loading = [row[0].split()[0] for row in last]
            formatter.write_paragraph()
            formatter.write_text(
                f"Where the model's files do not say it, --help-all has {', '.join(loading)}."
            )
        with formatter.section(GENERAL):
            formatter.write_dl(general)

    def heading(self, name: str) -> str:
        """Return the heading of an option.

        Args:
            name: name of its parameter.

        Returns:
            The heading in the help.
        """
        return self.headings.get(name) or HEADING_OF.get(name, GENERAL)


def positional_arguments(*names: str, **flags: str) -> Callable[[F], F]:
    """Take arguments by position, each of which an option may give instead.

    `vitlib evaluate MODEL DATA` may so be written `vitlib evaluate DATA -m MODEL`.

    Args:
        *names: the arguments in order, in capitals. A name in brackets may be absent.
        **flags: parameter of the option that may give an argument, by the argument's name in small
            letters; the command has such an option already.

    Returns:
        A decorator. The command takes each argument by its name in small letters, or by that of the
        option.
    """

    def decorate(command: F) -> F:
        @wraps(command)
        def call(arguments: tuple[str, ...], **values: Any) -> Any:
            return command(**values | _assign(names, flags, arguments, values))

        metavar = " ".join(names)
        return cast("F", click.argument("arguments", nargs=-1, metavar=metavar)(call))

    return decorate


def _assign(
    names: Sequence[str], flags: Mapping[str, str], arguments: Sequence[str], values: dict[str, Any]
) -> dict[str, Any]:
    """Assign positional arguments to their names; raise UsageError for too few or too many."""
    pending = [name for name in names if values.get(_key(name, flags)) is None]
    spare = len(arguments) - sum(not name.startswith("[") for name in pending)
    if spare < 0 or len(arguments) > len(pending):
        more = f": {arguments[len(pending)]!r} is one too many" if spare > 0 else ""
        raise click.UsageError(
            f"expected {' '.join(pending) or 'no more'}, got {_count(len(arguments))}{more}"
        )
    remaining, assigned = iter(arguments), dict[str, Any]()
    for name in pending:
        absent = name.startswith("[") and not spare
        assigned[_key(name, flags)] = None if absent else next(remaining)
        spare -= name.startswith("[") and not absent
    return assigned


def _key(name: str, flags: Mapping[str, str]) -> str:
    """Return the parameter of an argument."""
    key = name.strip("[]").lower()
    return flags.get(key, key)


def _count(number: int) -> str:
    """Return "no argument", "1 argument" or "2 arguments"."""
    return "no argument" if not number else count_noun(number, "argument")
