"""The verb `vitlib similar`: find the photos most like another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vitlib.cli.options import DEFAULT_MODEL, ModelOptions, model_options, precision_options
from vitlib.cli.photos import ImageErrors, list_inputs, list_photos, report_errors
from vitlib.cli.predictors import load_predictor
from vitlib.cli.printing import echo, echo_json, is_terminal

if TYPE_CHECKING:
    from vitlib.batch.manifest import Settings

MAX_UNREADABLE = 7  # tiles of unreadable photos in a picture; stderr names all of them


@click.command()
@click.argument("query")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@model_options
@precision_options
@click.option(
    "--top-k", "-k", type=click.IntRange(1), default=5, show_default=True, help="Photos to list."
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw them into F.png."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def similar(
    query: str,
    folder: Path,
    options: ModelOptions,
    top_k: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Find the photos in FOLDER that are most like QUERY, by the cosine of their embeddings.

    FOLDER may be the DIR of `vitlib batch --task embed`. Then its embeddings are read, and QUERY is
    embedded by the model that made them.

    A file that is not an image is named on stderr, and the exit status is 1.
    """
    if plot is not None:
        from vitlib import plots
        from vitlib.image.processor import ImageProcessor
        from vitlib.system.atomic import refuse_input

        files = [path for path in folder.rglob("*") if path.is_file()]
        refuse_input(plots.check_figure_path(plot), list_inputs([query, *map(str, files)], options))

    with report_errors() as errors:
        from vitlib.batch.search import read_run_settings

        settings = read_run_settings(folder)
        if settings is None:
            neighbours = _find_in_photos(query, folder, options, top_k, errors)
        else:
            neighbours = _find_in_run(query, folder, settings, options, top_k)
        if plot is not None:
            photos = [query, *(photo for photo, _ in neighbours)]
            captions = ["query", *(f"cosine {cosine:.3f}" for _, cosine in neighbours)]
            reasons = {}
            if errors.errors:
                listed = list_photos(folder, "FOLDER")
                for index, error in list(errors.errors.items())[:MAX_UNREADABLE]:
                    reasons[len(photos)] = str(error)
                    photos.append(str(listed[index]))
                    captions.append("")
                more = len(errors.errors) - len(reasons)
                captions[-1] = f"and {more} more unreadable" if more else ""
            figure = plots.contact_sheet(
                photos,
                captions,
                processor=ImageProcessor(levels=options.levels),
                errors=reasons,
                names=[plots.file_name(photo) for photo in photos],
            )
            plots.save(figure, plot)
        if as_json:
            rows = [{"image": photo, "cosine": cosine} for photo, cosine in neighbours]
            echo_json(rows)
            return
        for photo, cosine in neighbours:
            echo(f"{cosine:.3f}  {photo}")


def _find_in_photos(
    query: str, folder: Path, options: ModelOptions, top_k: int, errors: ImageErrors
) -> list[tuple[str, float]]:
    """Find the nearest photos of a folder, as (photo, cosine), best first."""
    from vitlib.retrieval import nearest

    photos = [str(path) for path in list_photos(folder, "FOLDER")]
    predictor = load_predictor((query, *photos), options)
    query_vector = predictor.embed(query)
    vectors = predictor.embed(
        photos, batch_size=options.batch_size, on_error=errors.note, progress=is_terminal()
    )
    return [(photos[n.index], n.cosine) for n in nearest(query_vector, vectors, top_k)[0]]


def _find_in_run(
    query: str, out: Path, settings: Settings, options: ModelOptions, top_k: int
) -> list[tuple[str, float]]:
    """Find the nearest photos of a batch run, as (photo, cosine), best first."""
    from vitlib.batch.manifest import compute_model_digest
    from vitlib.batch.search import find
    from vitlib.errors import BatchError

    if options.model == DEFAULT_MODEL:
        options = replace(options, model=settings.model)
    predictor = load_predictor((query,), options)
    if compute_model_digest(predictor) != settings.model_digest:
        raise BatchError(
            f"{out} was made by another model ({settings.model}) than {options.model}, or with "
            "other --levels: give those"
        )
    return [(near.file, near.cosine) for near in find(out, predictor.embed(query)[0], top_k)]
