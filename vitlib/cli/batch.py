"""The verb `vitlib batch`: label or embed any number of images."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from vitlib.cli.compiling import compile_option, print_compiling
from vitlib.cli.options import (
    DEFAULT_MODEL,
    ModelOptions,
    calibration_option,
    device_options,
    features_option,
    json_option,
    model_option,
    precision_options,
    top_k_option,
)
from vitlib.cli.photos import STDIN, parse_list, read_stdin
from vitlib.cli.predictors import open_predictor, print_calibration
from vitlib.cli.printing import advise_after_interrupt, echo, echo_json, fail, is_terminal
from vitlib.cli.verb import Verb
from vitlib.errors import count_noun

if TYPE_CHECKING:
    from vitlib.batch import Outcome

# A copy of batch.formats.FORMATS, whose module needs torch.
FORMATS = ("jsonl", "csv", "parquet", "npy", "azure-csv")


@click.command(
    cls=Verb,
    examples=(
        "vitlib batch -m demo photos -o labels",
        "vitlib batch -m mine 'photos/*/*.jpg' --task embed --format npy -o vectors",
    ),
)
@click.argument("source", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--out", "-o", required=True, metavar="DIR", type=click.Path(path_type=Path),
    help="A new folder, or the folder of an interrupted run, which continues.",
)  # fmt: skip
@model_option
@device_options
@precision_options
@compile_option("Half a minute passes for each size of batch: for runs of an hour and more.")
@calibration_option
@click.option(
    "--task", type=click.Choice(("classify", "embed", "both")),
    help="Default: classify, or embed for a model without a head.",
)  # fmt: skip
@top_k_option("Labels of an image")
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="Format of the part files.  [default: jsonl]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    metavar="N",
    help="Images per pass. Default: 8; on a GPU found by trial.",
)
@click.option(
    "--shard-size",
    type=click.IntRange(1),
    metavar="N",
    help="Inputs per part file.  [default: 1024]",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    metavar="N",
    help="Processes, each with its share of the cores or a GPU. Default: one.",
)
@click.option(
    "--max-errors", metavar="N|P%",
    help="Inputs that may fail with exit status 0; the run stops at more. Default: the run never "
    "stops, and the exit status is 1 if an input failed.",
)  # fmt: skip
@click.option(
    "--column",
    metavar="NAME",
    help="Column of a list that names the images. Default: image, path or file.",
)
@click.option(
    "--root",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Folder that a list's paths are relative to. Default: the list's own.",
)
@click.option(
    "--engine", type=click.Choice(("local", "ray")), default="local", show_default=True,
    help="Run on this machine, or on a Ray cluster.",
)  # fmt: skip
@click.option(
    "--address",
    metavar="HOST:PORT",
    help="Address of the Ray cluster. Default: a new one on this machine.",
)
@click.option(
    "--draft",
    type=click.FloatRange(2, 8),
    metavar="MARGIN",
    help="Decode large JPEGs at 1/2, 1/4 or 1/8 of their size, at least MARGIN times as large as "
    "the model's image: faster, and close at 2. Default: at their size.",
)
@features_option
@json_option
def batch(
    source: tuple[str, ...],
    out: Path,
    options: ModelOptions,
    top_k: int | Literal["all"] | None,
    form: str | None,
    max_errors: str | None,
    draft: float | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Label or embed every image of SOURCE into part files in DIR, and account for each.

    SOURCE: images; folders, with their subfolders; tar files; patterns in quotes
    ('photos/**/*.jpg', 'x-{000..099}.tar'); lists (.txt, .csv, .jsonl, .parquet) of paths or of
    encoded images; or - for a list of paths on stdin.

    After a kill, the same command continues the run, to the same files. An image that cannot be
    read has a row with its error, and is named in errors.jsonl.
    """
    from vitlib.batch import run
    from vitlib.system.atomic import refuse_input

    refuse_input(out, source)
    if STDIN in source:
        source = (_store_list(source, out),)
        choices["root"] = choices["root"] or Path.cwd()
    limit = _error_limit(max_errors)
    predictor = open_predictor(_continue_model(options, out))
    if draft is not None:
        predictor.image_processor = predictor.image_processor.with_draft(draft)
    advise_after_interrupt("the same command continues the run, to the same files")
    if choices["task"] != "embed":
        print_calibration(predictor)
    if options.compile:
        print_compiling("at the first batch of each size, half a minute each")
    outcome = run(
        source,
        model=predictor,
        batch_size=options.batch_size,
        out=out,
        top_k=top_k,
        format=form,  # type: ignore[arg-type]
        max_errors=limit,
        progress=is_terminal(),
        **choices,
    )
    for row, file, error in outcome.errors:
        fail(f"row {row}, {file}: {error}")
    if outcome.failed > len(outcome.errors) and outcome.complete:
        fail(f"and {outcome.failed - len(outcome.errors)} more: {outcome.out / 'errors.jsonl'}")
    if as_json:
        echo_json(asdict(outcome) | {"out": str(outcome.out), "rate": outcome.rate})
    else:
        _print_outcome(outcome)
    if outcome.failed and limit is None:
        sys.exit(1)


def _store_list(source: tuple[str, ...], out: Path) -> str:
    """Write the list of paths on stdin to the run's folder, for a run that continues to read it."""
    from vitlib.batch.manifest import STDIN_LIST, read_earlier_run
    from vitlib.system.atomic import open_atomic

    if source != (STDIN,):
        raise click.UsageError("- is the list of all images: leave the other SOURCE out")
    paths = parse_list(read_stdin())
    if paths is None:
        raise click.UsageError(
            "-: expected a list of paths on stdin, a line each, whose first one exists; vitlib "
            "classify - labels a photo"
        )
    content = "".join(f"{path}\n" for path in paths).encode(errors="surrogateescape")
    target = out / STDIN_LIST
    is_same = target.is_file() and target.read_bytes() == content
    if read_earlier_run(out) is not None and not is_same:
        raise click.UsageError(f"-: {out} has a run of another list: name a new folder")
    # A file that is written again would be newer than the run, which is then refused.
    if not is_same:
        with open_atomic(target) as file:
            file.write(content)
    return str(target)


def _continue_model(options: ModelOptions, out: Path) -> ModelOptions:
    """Take the model of the run in the folder, where the command line does not name one."""
    from vitlib.batch.search import read_run_settings

    settings = read_run_settings(out) if options.model == DEFAULT_MODEL else None
    if settings is None or not settings.model:
        return options
    return replace(options, model=settings.model)


def _print_outcome(outcome: Outcome) -> None:
    """Print the numbers of inputs by outcome."""
    name = outcome.out
    inputs = count_noun(outcome.inputs, "input")
    echo(f"{name}: {inputs} = {outcome.ok} ok + {outcome.failed} failed")
    if not outcome.complete:
        left = outcome.inputs - outcome.ok - outcome.failed
        echo(f"{count_noun(left, 'row')} left to other processes")
    if outcome.duplicates:
        echo(f"{count_noun(outcome.duplicates, 'copy')} of other inputs: {name}/duplicates.jsonl")
    if outcome.ignored:
        echo(f"{count_noun(outcome.ignored, 'file')} left out, not of images: {name}/ignored.txt")
    if outcome.computed:
        rows = count_noun(outcome.computed, "row")
        echo(f"{rows} in {outcome.seconds:.1f} s: {outcome.rate:.1f} a second")
    else:
        echo("every row was done before")


def _error_limit(text: str | None) -> int | float | None:
    """Parse N or P%, as a count or a share."""
    if text is None:
        return None
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if 0 <= share <= 1:
                return share
        elif (count := int(text)) >= 0:
            return count
    except ValueError:
        pass
    raise click.UsageError(f"--max-errors {text}: expected a number, or a share such as 5%")
