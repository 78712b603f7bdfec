"""The verb `vitlib vendor`: write a model as one file of source that needs torch alone."""

from __future__ import annotations

import click

from vitlib.cli.options import SourceOptions, json_option, source_options, subject_option
from vitlib.cli.predictors import logs_muted, mute_libraries
from vitlib.cli.printing import echo_json, print_table
from vitlib.cli.verb import Verb, positional_arguments


@click.command(
    cls=Verb,
    examples=(
        "vitlib vendor demo --into vit.py",
        "vitlib vendor mine --into flowers_vit.py --json",
    ),
)
@positional_arguments("MODEL")
@subject_option
@click.option("--into", metavar="FILE", required=True, help="File of source to write: vit.py.")
@click.option("--overwrite", is_flag=True, help="Replace files that exist.")
@source_options
@json_option
def vendor(model: str, into: str, overwrite: bool, reading: SourceOptions, as_json: bool) -> None:
    """Write a model as one file of source that needs torch and safetensors alone.

    The file has what this checkpoint needs and no more: load() in it gives the model. Beside FILE
    stand its weights, and a test that compares its logits with pinned ones and with vitlib's.
    """
    from vitlib import load
    from vitlib.vendor import write

    mute_libraries()
    with logs_muted():
        files = write(load(model, **reading), into, name=model, overwrite=overwrite)
    if as_json:
        echo_json(files.as_dict())
        return
    rows = [("source", f"{files.source} ({files.lines} lines)")]
    rows += [("weights", str(files.weights)), ("test", f"{files.test}: pytest {files.test}")]
    print_table(rows)
