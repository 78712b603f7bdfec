"""vitlib similar"""

from __future__ import annotations

import json
from pathlib import Path

import click

from vitlib.cli.options import (
    ModelOptions,
    load_predictor,
    model_options,
    on_terminal,
    photos_in,
    precision_options,
    printable,
    report_bad,
)


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

    A file that is no image is named on stderr, the others go on, and the exit status is 1.
    """
    from vitlib.similar import nearest

    if plot is not None:
        from vitlib import plots

        plots.named(plot)

    photos = [str(path) for path in photos_in(folder, "FOLDER")]
    predictor = load_predictor((query, *photos), asked)
    wanted = predictor.embed(query)
    with report_bad() as bad:
        vectors = predictor.embed(
            photos, batch_size=asked.batch_size, on_error=bad.note, progress=on_terminal()
        )
        found = nearest(wanted, vectors, top_k)[0]
        if plot is not None:
            names = ["query", *(f"{n.cosine:.3f}  {Path(photos[n.index]).name}" for n in found)]
            pictures = [query, *(photos[n.index] for n in found)]
            plots.save(plots.contact_sheet(pictures, names), plot)
        if as_json:
            rows = [{"image": photos[n.index], "cosine": n.cosine} for n in found]
            click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
            return
        for neighbour in found:
            click.echo(f"{neighbour.cosine:.3f}  {printable(photos[neighbour.index])}")
