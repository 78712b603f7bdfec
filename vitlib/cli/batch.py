"""vitlib batch"""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitlib.cli.options import (
    DEFAULT_MODEL,
    ModelOptions,
    calibration_option,
    model_option,
    on_terminal,
    open_predictor,
    place_options,
    precision_options,
    tell_calibration,
)
from vitlib.cli.printing import echo, echo_json, fail

if TYPE_CHECKING:
    from vitlib.batch import Outcome

FORMATS = ("jsonl", "csv", "parquet", "npy", "azure-csv")  # of batch.formats, which needs torch


@click.command()
@click.argument("source", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--out", "-o", required=True, metavar="DIR", type=click.Path(path_type=Path),
    help="A new folder, or that of a run that was ended, which goes on.",
)  # fmt: skip
@model_option
@place_options
@precision_options
@calibration_option
@click.option(
    "--task", type=click.Choice(("classify", "embed", "both")),
    help="Default: classify, or embed for a model without a head.",
)  # fmt: skip
@click.option(
    "--top-k",
    "-k",
    metavar="K",
    help="Labels an image, or all.  [default: 5]",
)
@click.option("--format", "form", type=click.Choice(FORMATS), help="Of the rows.  [default: jsonl]")
@click.option("--batch-size", type=click.IntRange(1), help="Default: 8; on a GPU by trial.")
@click.option(
    "--shard-size", type=click.IntRange(1), help="Inputs of a part file.  [default: 1024]"
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Processes, each with a core or a GPU. Default: one, with every core.",
)
@click.option(
    "--max-errors", metavar="N|P%",
    help="So many inputs may fail: the exit status is 0. With more the run stops. Default: it goes "
    "on whatever fails, and the exit status is 1.",
)  # fmt: skip
@click.option("--column", help="Of a list, the column of the images. Default: image, path, file.")
@click.option(
    "--root", type=click.Path(path_type=Path), help="What a list's paths are relative to."
)
@click.option(
    "--engine", type=click.Choice(("local", "ray")), default="local", show_default=True,
    help="ray: on a Ray cluster.",
)  # fmt: skip
@click.option("--address", help="Of the Ray cluster. Default: a new one on this machine.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def batch(
    source: tuple[str, ...],
    out: Path,
    asked: ModelOptions,
    top_k: str | None,
    form: str | None,
    max_errors: str | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Label or embed every image of SOURCE into part files in DIR, and account for each.

    SOURCE: folders, and what is below them; patterns in quotes ('photos/**/*.jpg',
    'x-{000..099}.tar'); lists (.txt, .csv, .jsonl, .parquet), of paths or of the images themselves;
    tars; images.

    Killed at any moment, the same command goes on, and the files are the same in the end. What
    cannot be read has a row that says why, and is named in errors.jsonl.
    """
    from vitlib.batch import run
    from vitlib.system.atomic import refuse_input

    refuse_input(out, source)
    most, k = _most(max_errors), _top_k(top_k)
    predictor = open_predictor(_as_begun(asked, out))
    if choices["task"] != "embed":
        tell_calibration(predictor)
    found = run(
        source,
        model=predictor,
        batch_size=asked.batch_size,
        out=out,
        top_k=k,  # type: ignore[arg-type]
        format=form,  # type: ignore[arg-type]
        max_errors=most,
        progress=on_terminal(),
        **choices,
    )
    for row, file, error in found.errors:
        fail(f"row {row}, {file}: {error}")
    if found.failed > len(found.errors) and found.complete:
        fail(f"and {found.failed - len(found.errors)} more: {found.out / 'errors.jsonl'}")
    if as_json:
        said = asdict(found) | {"out": str(found.out), "rate": found.rate}
        echo_json(said)
    else:
        _say(found)
    if found.failed and most is None:
        sys.exit(1)


def _as_begun(asked: ModelOptions, out: Path) -> ModelOptions:
    """With the model of the run in the folder, where none is named."""
    from vitlib.batch.search import run_of

    begun = run_of(out) if asked.model == DEFAULT_MODEL else None
    return asked if begun is None or not begun.model else replace(asked, model=begun.model)


def _say(found: Outcome) -> None:
    """The account, for people."""
    name = found.out
    echo(f"{name}: {found.inputs} inputs = {found.ok} ok + {found.failed} failed")
    if not found.complete:
        left = found.inputs - found.ok - found.failed
        echo(f"{left} rows are other processes' to do")
    if found.duplicates:
        echo(f"{found.duplicates} are copies of others: {name}/duplicates.jsonl")
    if found.ignored:
        echo(f"{found.ignored} files are no images: {name}/ignored.txt")
    if found.computed:
        echo(f"{found.computed} rows in {found.seconds:.1f} s: {found.rate:.1f} a second")
    else:
        echo("nothing was left to do")


def _most(text: str | None) -> int | float | None:
    """N or P%."""
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


def _top_k(text: str | None) -> int | str | None:
    if text is None or text == "all":
        return text
    if not (text.isdecimal() and int(text) >= 1):
        raise click.UsageError(f"--top-k {text}: expected a number from 1, or all")
    return int(text)
