"""vitlib embed"""

from __future__ import annotations

from pathlib import Path

import click

from vitlib.cli.options import (
    ModelOptions,
    inputs_of,
    load_predictor,
    model_options,
    on_terminal,
    photos_of,
    precision_options,
    report_bad,
)
from vitlib.cli.printing import echo, echo_json


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--out", "-o", required=True, type=click.Path(dir_okay=False, path_type=Path), help="F.npy"
)
@model_options
@precision_options
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def embed(
    images: tuple[str, ...],
    out: Path,
    asked: ModelOptions,
    as_json: bool,
) -> None:
    """Turn photos into vectors: one float32 row for each IMAGE, in their order, in a .npy file.

    A folder stands for the photos in it and below, by name; --json lists them.

    The vector is what the model's head reads. A file that is no image is named on stderr, its row
    is NaN, the others go on, and the exit status is 1; where none is an image, nothing is written.
    """
    from vitlib.errors import ConfigError
    from vitlib.system.atomic import refuse_input, writable, write_npy

    if out.suffix.lower() != ".npy":
        raise ConfigError(f"{out.name!r}: expected a name that ends in .npy")
    photos = photos_of(images)
    refuse_input(writable(out), inputs_of(photos, asked))
    predictor = load_predictor(photos, asked)
    with report_bad() as bad:
        vectors = predictor.embed(
            photos,
            batch_size=asked.batch_size,
            on_error=bad.note,
            progress=on_terminal() and len(photos) > 1,
        )
        if len(bad.errors) < len(photos):
            write_npy(out, vectors)
        if as_json:
            failed = [
                {"image": photos[i], "row": i, "error": str(e)} for i, e in bad.errors.items()
            ]
            shape = list(vectors.shape) if len(bad.errors) < len(photos) else None
            said = {"out": str(out), "shape": shape, "images": photos, "failed": failed}
            echo_json(said)
        elif len(bad.errors) < len(photos):
            rows, width = vectors.shape
            nan = f", NaN in row {', '.join(map(str, bad.errors))}" if bad.errors else ""
            echo(f"{out}: {rows} x {width} float32{nan}")
