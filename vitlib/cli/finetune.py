"""vitlib finetune"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click

from vitlib.cli.levels import levels_option
from vitlib.cli.options import (
    DEFAULT_MODEL,
    SourceOptions,
    on_terminal,
    report_bad,
    source_options,
    table,
    unlogged,
)
from vitlib.cli.printing import echo, echo_json
from vitlib.errors import ConfigError, DataError
from vitlib.train.config import PARTS, TrainConfig, read_yaml, unwrap_optional

F = TypeVar("F", bound=Callable[..., Any])
MAX_SETTINGS = 1 << 20  # bytes of a settings file
AUGMENTS = ("none", "light", "strong", "card")  # of Augment.named
HEADINGS = {
    "optim": "How weights move",
    "tune": "Which weights move",
    "loss": "What is made small",
    "run": "How long, and from what",
    "augment": "What is changed in photos",
}


class Grouped(click.Command):
    """Its help has the settings under headings, a part each, after the options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write them."""
        parts: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            row = parameter.get_help_record(ctx)
            if row is not None and isinstance(parameter, click.Option):
                part = PART_OF.get(parameter.name or "")
                parts.setdefault(HEADINGS[part] if part else "Options", []).append(row)
        for heading, rows in parts.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


PART_OF = {one.name: part for part, kind in PARTS.items() for one in fields(kind)} | {
    "augment": "augment"
}


def setting_options(command: F) -> F:
    """A flag for every setting of TrainConfig; one that is not given is None."""
    made = []
    for part, kind in PARTS.items():
        if part == "augment":
            about = "A whole set of the following; single ones count beside it."
            made.append(click.option("--augment", type=click.Choice(AUGMENTS), help=about))
        hints = get_type_hints(kind)
        made += [_option(one, hints[one.name]) for one in fields(kind)]
    for option in reversed(made):
        command = option(command)
    return command


def _option(one: Any, hint: Any) -> Callable[[F], F]:
    """The flag of a setting."""
    flag, kind = "--" + one.name.replace("_", "-"), unwrap_optional(hint)
    about, default = one.metadata["help"], one.default
    if not (default is None or default == () or default == ""):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default).lower()
        about = f"{about}  [default: {shown}]" if about else f"[default: {shown}]"
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", one.name, default=None, help=about)
    if get_origin(kind) is tuple:
        return click.option(flag, one.name, metavar="LIST", help=about)
    if kind != hint:  # or none, which a flag must be able to say over a file
        return click.option(flag, one.name, metavar=kind.__name__.upper(), help=about)
    if get_origin(kind) is Literal:
        return click.option(flag, one.name, type=click.Choice(get_args(kind)), help=about)
    return click.option(flag, one.name, type=kind, help=about)


@click.command(cls=Grouped)
@click.argument("data", metavar="DATA", type=click.Path(path_type=Path))
@click.option("--model", "-m", help=f"Hub id, folder or weights file.  [default: {DEFAULT_MODEL}]")
@click.option(
    "--out",
    "-o",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder that becomes the new checkpoint: new, or empty, or with --resume.",
)
@click.option(
    "--validation",
    type=click.Path(path_type=Path),
    help="Labelled photos like DATA. Default: a part of DATA (--validation-split).",
)
@click.option(
    "--class-map",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A table from the photos' labels to classes, such as synsets: .json, .csv or .txt.",
)
@click.option("--multi-label", is_flag=True, help="Photos have any number of labels each.")
@click.option(
    "--regression",
    is_flag=True,
    help="Photos have numbers in place of labels: the other columns of a CSV, or a JSONL's label.",
)
@click.option(
    "--from-scratch",
    metavar="SIZE",
    help="A new model: S/16, B/16 ..., or 96x6x4/4: width x blocks x heads / patch.",
)
@click.option("--resume", is_flag=True, help="Go on with the run that OUT holds.")
@click.option(
    "--config",
    "-c",
    "settings_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A YAML file of settings, by the names below or the model card's; flags come before it.",
)
@click.option("--device", help="As torch names it. Default: CUDA where there is one.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@source_options
@levels_option
@setting_options
def finetune(
    data: Path,
    model: str | None,
    out: Path,
    validation: Path | None,
    class_map: Path | None,
    multi_label: bool,
    regression: bool,
    from_scratch: str | None,
    resume: bool,
    settings_file: Path | None,
    device: str | None,
    as_json: bool,
    reading: SourceOptions,
    levels: float | tuple[float, float] | None,
    **flags: Any,
) -> None:
    """Train a classifier of labelled photos; OUT becomes a checkpoint that knows their labels.

    With --regression it gives their numbers in place of classes.

    DATA is a folder with a folder per class or labels.csv, a .csv or a .jsonl. The model is a hub
    id, folder or file; its head is replaced. OUT is a Hugging Face checkpoint with its card, its
    settings (train_config.yaml), history (metrics.jsonl, metrics.csv) and curves.png.

    A run that was killed goes on with the same command and --resume, to the same weights. Several
    processes: torchrun --nproc-per-node N -m vitlib finetune ...

    With --on-bad-image skip, photos left out are named on stderr and the exit status is 1.
    """
    if multi_label and regression:
        raise click.UsageError("--multi-label and --regression: leave one out")
    if from_scratch is not None and (model is not None or any(reading.values())):
        raise click.UsageError("--from-scratch goes without --model and what says how to read one")
    config = resolved(settings_file, flags)
    from vitlib.train import finetune as train

    with unlogged():  # what is left out is named below
        done = train(
            data,
            None if from_scratch is not None else model or DEFAULT_MODEL,
            out,
            config=config,
            validation=validation,
            multi_label=multi_label,
            class_map=class_map,
            regression=regression,
            from_scratch=from_scratch,
            levels=levels,
            resume=resume,
            device=device,
            progress=on_terminal(),
            reading=None if from_scratch is not None else reading,
        )
    if not done.first:
        return
    with report_bad() as bad:
        for index, (file, why) in enumerate(done.left_out):
            bad.note(index, DataError(why if file in why else f"{file}: {why}"))
        for note in done.notes:
            echo(f"note: {note}", err=True)
        if as_json:
            echo_json(done.as_dict())
        else:
            table(rows(done))


def resolved(file: Path | None, flags: dict[str, Any]) -> TrainConfig:
    """The settings of a file with the flags over it. Raises ConfigError for what cannot be."""
    config = TrainConfig()
    if file is not None:
        try:
            with file.open("rb") as opened:
                read = opened.read(MAX_SETTINGS + 1)
            if len(read) > MAX_SETTINGS:
                raise ConfigError(f"{file} has more than {MAX_SETTINGS} bytes: no settings file")
            config = read_yaml(read.decode(), str(file))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is no UTF-8 text: expected a YAML file") from error
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from error
    asked = {name: value for name, value in flags.items() if value is not None}
    return config.with_changes(asked) if asked else config


def rows(done: Any) -> list[tuple[str, str]]:
    """The table, as (what, value)."""
    early = ", stopped early" if done.stopped_early else ""
    about = json.loads((done.out / "run.json").read_text(encoding="utf-8"))
    sets = {name: about[name] for name in ("training", "validation") if about[name]}
    told = [(name, f"{one['photos']} photos of {one['source']}") for name, one in sets.items()]
    names = ", ".join(done.labels[:12]) + (" ..." if len(done.labels) > 12 else "")
    told += [
        ("outputs" if about.get("regression") else "labels", names),
        ("steps", f"{done.steps}{early}, {done.seconds:.0f} s"),
    ]
    if done.metrics:
        told.append(("best", f"step {done.best_step}, on the validation set:"))
        told += [(name, number(value)) for name, value in done.metrics.items()]
    return [*told, ("checkpoint", str(done.out))]


def number(value: float | None) -> str:
    """A metric; None: such as R2 of one photo."""
    return "undefined" if value is None else f"{value:.4f}"
