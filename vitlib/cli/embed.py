"""The verb `vitlib embed`: turn photos into vectors."""

from __future__ import annotations

from pathlib import Path

import click

from vitlib.cli.options import (
    ModelOptions,
    features_option,
    json_option,
    model_options,
    precision_options,
)
from vitlib.cli.photos import expand_photos, list_inputs, report_errors
from vitlib.cli.predictors import load_predictor
from vitlib.cli.printing import echo, echo_json, is_terminal
from vitlib.cli.verb import Verb


@click.command(
    cls=Verb,
    examples=(
        "vitlib embed -m demo photos -o photos.npy",
        "vitlib embed -m mine a.jpg b.jpg -o pair.npy --json",
    ),
)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--out",
    "-o",
    required=True,
    metavar="FILE.npy",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of the vectors; FILE.json beside it gets the names of the photos.",
)
@model_options
@precision_options
@features_option
@json_option
def embed(
    images: tuple[str, ...], out: Path, options: ModelOptions, features: Path | None, as_json: bool
) -> None:
    """Turn photos into vectors: a float32 row for each photo, in order, in a .npy file.

    IMAGE is a file, a folder (the photos in and below it, by name), a pattern in quotes, or - for
    stdin: a photo, or a list of paths. `vitlib similar QUERY FILE.npy` searches the vectors.

    The vector is the input of the model's head. The row of a file that is not an image is NaN; the
    file is named on stderr, and the exit status is 1. Without any image, no file is written.
    """
    from vitlib.batch.embedding_file import check_target, names_path, write_embeddings
    from vitlib.errors import ConfigError
    from vitlib.features import open_store
    from vitlib.features.extraction import embed as embed_photos
    from vitlib.system.atomic import refuse_input

    if out.suffix.lower() != ".npy":
        raise ConfigError(f"{out.name!r}: expected a name that ends in .npy")
    photos = expand_photos(images)
    inputs = list_inputs(photos.names, options)
    refuse_input(out, inputs)
    refuse_input(names_path(out), inputs)
    check_target(out)
    store = open_store(features)
    predictor = load_predictor(photos.images, options)
    with report_errors() as failed:
        vectors = embed_photos(
            predictor,
            photos.images,
            store,
            batch_size=options.batch_size,
            on_error=failed.note,
            progress=is_terminal() and len(photos) > 1,
        )
        any_read = len(failed.errors) < len(photos)
        if any_read:
            write_embeddings(out, vectors, photos.names, predictor)
        if as_json:
            rows = [
                {"image": photos.names[i], "row": i, "error": str(e)}
                for i, e in failed.errors.items()
            ]
            shape = list(vectors.shape) if any_read else None
            echo_json({"out": str(out), "shape": shape, "images": photos.names, "failed": rows})
        elif any_read:
            count, width = vectors.shape
            nan = f", NaN in row {', '.join(map(str, failed.errors))}" if failed.errors else ""
            echo(f"{out}: {count} x {width} float32{nan}")
