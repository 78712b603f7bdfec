"""The verb `vitlib finetune`: train a classifier of labelled photos."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click

from vitlib.cli.levels import levels_option
from vitlib.cli.options import (
    DEFAULT_MODEL,
    SourceOptions,
    device_option,
    features_option,
    json_option,
    source_options,
)
from vitlib.cli.photos import report_errors
from vitlib.cli.predictors import logs_muted
from vitlib.cli.printing import (
    advise_after_interrupt,
    echo,
    echo_json,
    is_terminal,
    print_columns,
    print_table,
    show_life,
)
from vitlib.cli.verb import Verb
from vitlib.errors import ConfigError, SourceError, TrainError, count_noun
from vitlib.train.config import PARTS, SHORT_NAMES, TrainConfig, read_yaml, unwrap_optional
from vitlib.train.evaluations import make_table
from vitlib.train.settings import NEUTRAL

if TYPE_CHECKING:
    from vitlib.train import Finetuned
    from vitlib.train.evaluations import Evaluation

F = TypeVar("F", bound=Callable[..., Any])
MAX_SETTINGS_BYTES = 1 << 20
AUGMENTS = ("none", "light", "strong", "card")  # of Augment.from_preset
METAVARS = {int: "N", float: "NUMBER", str: "NAME"}
HEADINGS = {
    "optim": "Optimizer",
    "tune": "Trainable weights",
    "loss": "Loss",
    "run": "Length and data",
    "augment": "Augmentation",
}


PART_OF = {field.name: part for part, kind in PARTS.items() for field in fields(kind)}
PART_OF["augment"] = "augment"


def setting_options(command: F) -> F:
    """Add an option for every setting of TrainConfig, None where the command line lacks it.

    Args:
        command: function of the verb.

    Returns:
        The command with the options.
    """
    options = []
    for part, kind in PARTS.items():
        if part == "augment":
            about = "Preset of the following settings; single ones override it."
            options.append(click.option("--augment", type=click.Choice(AUGMENTS), help=about))
        hints = get_type_hints(kind)
        options += [_option(field, hints[field.name]) for field in fields(kind)]
    for option in reversed(options):
        command = option(command)
    return command


def _option(field: Any, hint: Any) -> Callable[[F], F]:
    """Make the option of a setting."""
    flag, kind = "--" + field.name.replace("_", "-"), unwrap_optional(hint)
    short = [f"--{s.replace('_', '-')}" for s, name in SHORT_NAMES.items() if name == field.name]
    about, default = field.metadata["help"], field.default
    if not (default is None or default == () or default == ""):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default).lower()
        about = f"{about}  [default: {shown}]" if about else f"[default: {shown}]"
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=about)
    if get_origin(kind) is tuple:
        return click.option(flag, field.name, metavar="LIST", help=about)
    # A setting that may be None takes text, so that a flag can override a file with "none".
    if kind != hint:
        return click.option(flag, field.name, metavar=METAVARS[kind], help=about)
    if get_origin(kind) is Literal:
        return click.option(flag, field.name, type=click.Choice(get_args(kind)), help=about)
    return click.option(flag, *short, field.name, type=kind, metavar=METAVARS[kind], help=about)


@click.command(
    cls=Verb,
    examples=(
        "vitlib finetune photos -m demo -o mine2 --epochs 2",
        "vitlib finetune labels.csv --from-scratch 96x2x3/4 --image-size 28 -o new",
    ),
    headings={name: HEADINGS[part] for name, part in PART_OF.items()},
)
@click.argument("data", metavar="DATA", required=False, type=click.Path(path_type=Path))
@click.option(
    "--model",
    "-m",
    metavar="MODEL",
    help=f"Hub id, folder or weights file.  [default: {DEFAULT_MODEL}]",
)
@click.option(
    "--out",
    "-o",
    required=True,
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the new checkpoint: new or empty, or that of the run to --resume.",
)
@click.option(
    "--validation",
    metavar="DATA",
    type=click.Path(path_type=Path),
    help="Labelled photos like DATA. Default: a share of DATA (--validation-split).",
)
@click.option(
    "--class-map",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Table from the photos' labels, such as synsets, to classes: .json, .csv or .txt.",
)
@click.option("--multi-label", is_flag=True, help="Photos have any number of labels each.")
@click.option(
    "--regression",
    is_flag=True,
    help="Photos have numbers instead of labels: other columns of a CSV, or label of a JSONL.",
)
@click.option(
    "--from-scratch",
    metavar="SIZE",
    help="Train a new model: S/16, B/16, ..., or 96x6x4/4 as width x blocks x heads / patch.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the run in OUT; what is not given is as it was, DATA included.",
)
@click.option(
    "--config",
    "-c",
    "settings_file",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="YAML file of settings, by the names below or those of Azure's model catalog. Flags "
    "override it.",
)
@click.option(
    "--exclude",
    metavar="FILE.csv",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Photos to leave out, as vitlib audit --fix-list writes them.",
)
@features_option
@device_option
@json_option
@source_options
@levels_option
@setting_options
def finetune(
    data: Path | None,
    model: str | None,
    out: Path,
    validation: Path | None,
    class_map: Path | None,
    multi_label: bool,
    regression: bool,
    from_scratch: str | None,
    resume: bool,
    settings_file: Path | None,
    exclude: Path | None,
    features: Path | None,
    device: str | None,
    as_json: bool,
    reading: SourceOptions,
    levels: float | tuple[float, float] | None,
    **flags: Any,
) -> None:
    """Train a classifier of labelled photos; OUT becomes a checkpoint with their labels.

    Without settings the photos choose them: by their number, classes and labels. What was chosen
    and why is a line on stderr. One such as --epochs turns this off: the rest are the defaults
    below. With --regression the model predicts numbers instead of classes.

    DATA is a folder with a folder per class or labels.csv, a .csv or a .jsonl. The model is a hub
    id, folder or file; its head is replaced. OUT is a Hugging Face checkpoint with its card, its
    settings (train_config.yaml), history (metrics.jsonl, metrics.csv) and curves.png. Photos that
    were held out are in OUT/validation.csv, for vitlib evaluate.

    Ctrl-C ends the run after its step, with a checkpoint. After that or a kill, `vitlib finetune
    --resume --out OUT` continues it, to the same weights. Several processes: torchrun
    --nproc-per-node N -m vitlib finetune ...

    With --on-bad-image skip, photos left out are named on stderr and the exit status is 1.
    """
    if multi_label and regression:
        raise click.UsageError("--multi-label and --regression: leave one out")
    if from_scratch is not None and (model is not None or any(reading.values())):
        raise click.UsageError(
            "--from-scratch trains a new model: leave --model and its options out"
        )
    given = {
        "data": data, "model": model, "validation": validation, "class_map": class_map,
        "multi_label": multi_label, "regression": regression, "from_scratch": from_scratch,
        "levels": levels, "exclude": exclude, "reading": reading if any(reading.values()) else None,
    }  # fmt: skip
    run = _read_run(out) if resume else {}
    stored = run.get("arguments") or {}
    arguments = {
        name: stored.get(name) if value is None or value is False else value
        for name, value in given.items()
    }
    if arguments["data"] is None:
        if resume and not run:
            raise TrainError(f"{out} holds no run to resume: expected the --out of an earlier one")
        raise click.UsageError("Missing argument 'DATA'.")
    if arguments["from_scratch"] is None:
        arguments["model"] = arguments["model"] or DEFAULT_MODEL
    result = _train(
        arguments,
        out,
        _read_settings(settings_file, flags, run, arguments["from_scratch"] is not None),
        resume,
        device,
        features,
    )
    if not result.first:
        return
    with report_errors() as failed:
        failed.note_files(result.left_out)
        for note in result.notes:
            echo(f"note: {note}", err=True)
        if as_json:
            echo_json(result.as_dict())
        else:
            table = make_table(result.evaluations)
            if table:
                print_columns(table)
                echo()
            print_table(_rows(result))


def _read_run(out: Path) -> dict[str, Any]:
    """Read the run in a folder; empty where there is none."""
    from vitlib.source.locate import read_json
    from vitlib.train.run_folder import RUN

    try:
        return read_json(out / RUN)
    except SourceError:  # the run's own error says what to do
        return {}


def _train(
    arguments: dict[str, Any],
    out: Path,
    config: TrainConfig,
    resume: bool,
    device: str | None,
    features: Path | None,
) -> Finetuned:
    """Train, with a line for each evaluation; after Ctrl-C say how to continue."""
    from vitlib.system.progress import above_bars
    from vitlib.train import finetune as train
    from vitlib.train.resume import list_checkpoints

    begins = ExitStack()

    def print_line(evaluation: Evaluation) -> None:
        begins.close()
        with above_bars():
            echo(evaluation.line(), err=True)

    data, model = arguments.pop("data"), arguments.pop("model")
    try:
        # Photos left out are named in the end.
        with logs_muted(), begins:
            if not is_terminal():
                begins.enter_context(show_life("reading photos; a line follows each evaluation"))
            return train(
                data,
                model,
                out,
                config=config,
                resume=resume,
                device=device,
                features=features,
                progress=is_terminal(),
                on_evaluation=print_line,
                **arguments,
            )
    except KeyboardInterrupt:
        if list_checkpoints(out):
            command = f"vitlib finetune --resume --out {shlex.quote(str(out))}"
            advise_after_interrupt(f"`{command}` continues the run")
        raise


def _read_settings(
    file: Path | None, flags: dict[str, Any], run: dict[str, Any], from_scratch: bool
) -> TrainConfig:
    """Read a file of settings, or those of a run that continues, and override them by the flags.

    Without a setting that changes the training, the photos will choose all of them.

    Raises ConfigError for a file that cannot be read or settings out of range.
    """
    config = TrainConfig.from_dict(run.get("config") or {})
    if file is not None:
        try:
            with file.open("rb") as stream:
                content = stream.read(MAX_SETTINGS_BYTES + 1)
            if len(content) > MAX_SETTINGS_BYTES:
                raise ConfigError(
                    f"{file} has more than {MAX_SETTINGS_BYTES} bytes: expected a file of settings"
                )
            config = read_yaml(content.decode(), str(file))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is not UTF-8 text: expected a YAML file") from error
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from error
    changes = {name: value for name, value in flags.items() if value is not None}
    if file is None and not run and not from_scratch and changes.keys() <= NEUTRAL:
        changes.setdefault("auto", True)
    return config.with_changes(changes) if changes else config


def _rows(result: Finetuned) -> list[tuple[str, str]]:
    """List sets, labels, steps and metrics as (name, value)."""
    early = ", stopped early" if result.stopped_early else ""
    run = json.loads((result.out / "run.json").read_text(encoding="utf-8"))
    rows = [
        (name, f"{count_noun(count, 'photo')} of {run[name]['source']}")
        for name, count in result.counts.items()
    ]
    names = ", ".join(result.labels[:12]) + (" ..." if len(result.labels) > 12 else "")
    rows += [
        ("outputs" if run.get("regression") else "labels", names),
        ("steps", f"{result.steps or 'a fitted head'}{early}, {result.seconds:.0f} s"),
    ]
    if result.metrics:
        rows.append(("best", f"step {result.best_step}, on the validation set:"))
        rows += [(name, _format_metric(value)) for name, value in _distinct(result.metrics)]
    elif result.fold_metrics:
        rows.append(("folds", "linear heads, each measured on photos that it did not see:"))
        rows += [(name, _format_metric(value)) for name, value in _distinct(result.fold_metrics)]
    return [*rows, ("checkpoint", str(result.out))]


def _distinct(metrics: dict[str, float]) -> list[tuple[str, float]]:
    """List metrics without those that repeat the number of an earlier one, as log_loss the loss."""
    rows: list[tuple[str, float]] = []
    for name, value in metrics.items():
        if value is None or not any(abs(value - (other or 0)) < 1e-6 for _, other in rows):
            rows.append((name, value))
    return rows


def _format_metric(value: float | None) -> str:
    """Format a metric; None, such as R2 of one photo, is undefined."""
    return "undefined" if value is None else f"{value:.4f}"
