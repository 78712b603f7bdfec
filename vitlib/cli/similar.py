"""The verb `vitlib similar`: find the photos most like another."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from vitlib.cli.options import (
    DEFAULT_MODEL,
    ModelOptions,
    features_option,
    json_option,
    model_options,
    precision_options,
    top_k_option,
)
from vitlib.cli.photos import (
    STDIN,
    ImageErrors,
    Photos,
    expand_photos,
    list_inputs,
    report_errors,
)
from vitlib.cli.predictors import load_predictor
from vitlib.cli.printing import echo, echo_json, is_terminal
from vitlib.cli.verb import Verb

if TYPE_CHECKING:
    from vitlib.predict.predictor import Predictor

DEFAULT_COUNT = 5
Pairs = list[tuple[str, float]]
# Tiles of unreadable photos in a picture; stderr names all of them.
MAX_UNREADABLE = 7


@click.command(
    cls=Verb,
    examples=(
        "vitlib similar -m demo photo.jpg photos",
        "vitlib similar photo.jpg photos.npy -k 3 --plot near.png",
    ),
)
@click.argument("query")
@click.argument("photos", nargs=-1, required=True, metavar="PHOTOS...")
@click.option(
    "--exclude-query", is_flag=True, help="Leave QUERY itself out, where PHOTOS contain it."
)
@model_options
@precision_options
@features_option
@top_k_option("Photos to list")
@click.option(
    "--plot",
    metavar="PICTURE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw QUERY and the photos found: .png, .svg, .pdf, .jpg or .webp.",
)
@json_option
def similar(
    query: str,
    photos: tuple[str, ...],
    exclude_query: bool,
    options: ModelOptions,
    features: Path | None,
    top_k: int | Literal["all"] | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Find the PHOTOS that are most like QUERY, by the cosine of their embeddings.

    PHOTOS are files, folders (the photos in and below each), patterns in quotes, or - for a list of
    paths on stdin. In place of them, a file of `vitlib embed` or the folder of a `vitlib batch
    --task embed` may be given. Then QUERY is embedded by the model that made it.

    A file that is not an image is named on stderr, and the exit status is 1.
    """
    search = _Search(query, photos, options, features)
    if plot is not None:
        from vitlib import plots
        from vitlib.system.atomic import refuse_input

        inputs = list_inputs([query, *search.list_files()], options)
        refuse_input(plots.check_figure_path(plot), inputs)
    count = search.count() if top_k == "all" else top_k or DEFAULT_COUNT
    with report_errors() as errors:
        neighbours = search.find(count + exclude_query, errors)
        if exclude_query:
            neighbours = [pair for pair in neighbours if not _is_same(pair[0], query)][:count]
        if plot is not None:
            _draw(search, neighbours, options, plot, errors)
        if as_json:
            echo_json([{"image": photo, "cosine": cosine} for photo, cosine in neighbours])
            return
        for photo, cosine in neighbours:
            echo(f"{cosine:.3f}  {photo}")


class _Search:
    """Photos to search: read now, in a file of embeddings, or in a batch run.

    Attributes:
        query: the photo, or the bytes of stdin.
        query_name: its name on the command line.
    """

    def __init__(
        self, query: str, sources: tuple[str, ...], options: ModelOptions, features: Path | None
    ) -> None:
        from vitlib.batch.embedding_file import read_embeddings
        from vitlib.batch.search import read_run_settings
        from vitlib.features import open_store

        self.store = open_store(features)
        self.options, self.path = options, Path(sources[0])
        single = len(sources) == 1
        self.file = (
            read_embeddings(self.path) if single and self.path.suffix.lower() == ".npy" else None
        )
        self.run = read_run_settings(self.path) if single else None
        self.photos = Photos([], [])
        if self.file is None and self.run is None:
            self.photos = expand_photos(sources, "PHOTOS")
            if not any(map(os.path.exists, self.photos.names)) and STDIN not in sources:
                raise click.UsageError(f"PHOTOS {sources[0]}: no such file or folder")
        self.query_name = query
        self.query = expand_photos([query], "QUERY").images[0] if query == STDIN else query

    def list_files(self) -> list[str]:
        """List every file that is read."""
        if self.run is not None:
            return [str(path) for path in self.path.rglob("*") if path.is_file()]
        return [str(self.path)] if self.file is not None else self.photos.names

    def count(self) -> int:
        """Count the photos."""
        if self.run is not None:
            from vitlib.batch.search import iter_embeddings

            return max(sum(len(rows) for rows, _ in iter_embeddings(self.path)), 1)
        return len(self.photos if self.file is None else self.file.images)

    def find(self, count: int, errors: ImageErrors) -> Pairs:
        """Find the nearest photos, as (photo, cosine), best first."""
        from vitlib.features.extraction import embed
        from vitlib.retrieval import nearest

        if self.run is not None:
            from vitlib.batch.search import find

            predictor = self._load(self.run.model, self.run.model_digest)
            found = find(self.path, predictor.embed(self.query)[0], count)
            return [(near.file, near.cosine) for near in found]
        if self.file is not None:
            predictor = self._load(self.file.model, self.file.model_digest)
            names, vectors = self.file.images, self.file.vectors
            queries = predictor.embed(self.query)
        else:
            predictor = load_predictor([self.query, *self.photos.images], self.options)
            names, queries = self.photos.names, predictor.embed(self.query)
            vectors = embed(
                predictor,
                self.photos.images,
                self.store,
                batch_size=self.options.batch_size,
                on_error=errors.note,
                progress=is_terminal(),
            )
        return [(names[n.index], n.cosine) for n in nearest(queries, vectors, count)[0]]

    def _load(self, model: str, digest: str) -> Predictor:
        """Load the model that made the embeddings; raise BatchError for another."""
        from vitlib.errors import BatchError
        from vitlib.predict.model_digest import compute_model_digest

        options = self.options
        if options.model == DEFAULT_MODEL:
            options = replace(options, model=model)
        predictor = load_predictor([self.query], options)
        if compute_model_digest(predictor) != digest:
            raise BatchError(
                f"{self.path} was made by another model ({model}) than {options.model}, or with "
                "other --levels or --image-size: give those"
            )
        return predictor


def _is_same(photo: str, query: str) -> bool:
    """Return True if two paths lead to the same file."""
    return query != STDIN and os.path.realpath(photo) == os.path.realpath(query)


def _draw(
    search: _Search, neighbours: Pairs, options: ModelOptions, plot: Path, errors: ImageErrors
) -> None:
    """Draw the query and the nearest photos, and a tile for each of the first unreadable ones."""
    from vitlib import plots
    from vitlib.image.processor import ImageProcessor

    photos: list[str | bytes] = [search.query, *(photo for photo, _ in neighbours)]
    names = [search.query_name, *(photo for photo, _ in neighbours)]
    captions = ["query", *(f"cosine {cosine:.3f}" for _, cosine in neighbours)]
    reasons: dict[int, str] = {}
    for index, error in list(errors.errors.items())[:MAX_UNREADABLE]:
        reasons[len(photos)] = str(error)
        photos.append(search.photos.images[index])
        names.append(search.photos.names[index])
        captions.append("")
    more = len(errors.errors) - len(reasons)
    captions[-1] = f"and {more} more unreadable" if more else captions[-1]
    figure = plots.contact_sheet(
        photos,
        captions,
        processor=ImageProcessor(levels=options.levels),
        errors=reasons,
        names=[plots.file_name(name) for name in names],
    )
    plots.save(figure, plot)
