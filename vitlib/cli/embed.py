"""The verb `vitlib embed`: turn photos into vectors."""

from __future__ import annotations

from pathlib import Path

import click

from vitlib.cli.options import ModelOptions, model_options, precision_options
from vitlib.cli.photos import expand_folders, list_inputs, report_errors
from vitlib.cli.predictors import load_predictor
from vitlib.cli.printing import echo, echo_json, is_terminal


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--out", "-o", required=True, type=click.Path(dir_okay=False, path_type=Path), help="F.npy"
)
@model_options
@precision_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def embed(
    images: tuple[str, ...],
    out: Path,
    options: ModelOptions,
    as_json: bool,
) -> None:
    """Turn photos into vectors: a float32 row for each IMAGE, in order, in a .npy file.

    A folder stands for the photos in and below it, by name; --json lists them.

    The vector is the input of the model's head. The row of a file that is not an image is NaN; the
    file is named on stderr, and the exit status is 1. Without any image, no file is written.
    """
    from vitlib.errors import ConfigError
    from vitlib.system.atomic import check_writable, refuse_input, write_npy

    if out.suffix.lower() != ".npy":
        raise ConfigError(f"{out.name!r}: expected a name that ends in .npy")
    photos = expand_folders(images)
    refuse_input(check_writable(out), list_inputs(photos, options))
    predictor = load_predictor(photos, options)
    with report_errors() as failed:
        vectors = predictor.embed(
            photos,
            batch_size=options.batch_size,
            on_error=failed.note,
            progress=is_terminal() and len(photos) > 1,
        )
        if len(failed.errors) < len(photos):
            write_npy(out, vectors)
        if as_json:
            rows = [
                {"image": photos[i], "row": i, "error": str(e)} for i, e in failed.errors.items()
            ]
            shape = list(vectors.shape) if len(failed.errors) < len(photos) else None
            echo_json({"out": str(out), "shape": shape, "images": photos, "failed": rows})
        elif len(failed.errors) < len(photos):
            count, width = vectors.shape
            nan = f", NaN in row {', '.join(map(str, failed.errors))}" if failed.errors else ""
            echo(f"{out}: {count} x {width} float32{nan}")
