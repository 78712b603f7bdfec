"""vitlib similar"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitlib.cli.options import (
    DEFAULT_MODEL,
    Bad,
    ModelOptions,
    inputs_of,
    load_predictor,
    model_options,
    on_terminal,
    photos_in,
    precision_options,
    report_bad,
)
from vitlib.cli.printing import echo, echo_json

if TYPE_CHECKING:
    from vitlib.batch.manifest import Settings


@click.command()
@click.argument("query")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@model_options
@precision_options
@click.option(
    "--top-k", "-k", type=click.IntRange(1), default=5, show_default=True, help="Photos to find."
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="A picture of them: F.png"
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def similar(
    query: str,
    folder: Path,
    asked: ModelOptions,
    top_k: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Find the photos in FOLDER that are most like QUERY, by the cosine of their embeddings.

    FOLDER may be the DIR of `vitlib batch --task embed`: then its embeddings are read, and QUERY is
    embedded by the model that made them.

    A file that is no image is named on stderr, the others go on, and the exit status is 1.
    """
    if plot is not None:
        from vitlib import plots
        from vitlib.image.processor import ImageProcessor
        from vitlib.system.atomic import refuse_input

        there = [path for path in folder.rglob("*") if path.is_file()]
        refuse_input(plots.named(plot), inputs_of([query, *map(str, there)], asked))

    with report_bad() as bad:
        from vitlib.batch.search import run_of

        settings = run_of(folder)
        if settings is None:
            found = _in_photos(query, folder, asked, top_k, bad)
        else:
            found = _in_run(query, folder, settings, asked, top_k)
        if plot is not None:
            names = ["query", *(f"{cosine:.3f}  {Path(photo).name}" for photo, cosine in found)]
            rule = ImageProcessor(levels=asked.levels)
            photos = [query, *(photo for photo, _ in found)]
            plots.save(plots.contact_sheet(photos, names, processor=rule), plot)
        if as_json:
            rows = [{"image": photo, "cosine": cosine} for photo, cosine in found]
            echo_json(rows)
            return
        for photo, cosine in found:
            echo(f"{cosine:.3f}  {photo}")


def _in_photos(
    query: str, folder: Path, asked: ModelOptions, top_k: int, bad: Bad
) -> list[tuple[str, float]]:
    """(photo, cosine), best first, of the photos in a folder."""
    from vitlib.retrieval import nearest

    photos = [str(path) for path in photos_in(folder, "FOLDER")]
    predictor = load_predictor((query, *photos), asked)
    wanted = predictor.embed(query)
    vectors = predictor.embed(
        photos, batch_size=asked.batch_size, on_error=bad.note, progress=on_terminal()
    )
    return [(photos[n.index], n.cosine) for n in nearest(wanted, vectors, top_k)[0]]


def _in_run(
    query: str, out: Path, settings: Settings, asked: ModelOptions, top_k: int
) -> list[tuple[str, float]]:
    """The same, of what a batch run embedded."""
    from vitlib.batch.manifest import digest_of
    from vitlib.batch.search import find
    from vitlib.errors import BatchError

    if asked.model == DEFAULT_MODEL:
        asked = replace(asked, model=settings.model)
    predictor = load_predictor((query,), asked)
    if digest_of(predictor) != settings.model_digest:
        raise BatchError(
            f"{out} was made by another model ({settings.model}) than {asked.model}, or with other "
            "--levels: give those"
        )
    return [(near.file, near.cosine) for near in find(out, predictor.embed(query)[0], top_k)]
