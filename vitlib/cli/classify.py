"""vitlib classify"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitlib.cli.options import (
    ModelOptions,
    calibration_option,
    inputs_of,
    load_predictor,
    model_options,
    on_terminal,
    precision_options,
    report_bad,
    tell_calibration,
)
from vitlib.cli.printing import echo, echo_json

if TYPE_CHECKING:
    from vitlib.predict.predictor import Predictor
    from vitlib.scores import Prediction


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@model_options
@precision_options
@calibration_option
@click.option("--top-k", "-k", type=click.IntRange(1), help="Labels an image.  [default: 5]")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    help="Only labels that score this much. Default: the calibration's thresholds, or any score.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A picture: the photo and its labels as bars; of several photos, a sheet. F.png",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def classify(
    images: tuple[str, ...],
    asked: ModelOptions,
    top_k: int | None,
    threshold: float | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Label photos: for each IMAGE the labels that the model gives it, best first.

    Of a model for regression the numbers that it gives, without --top-k and --threshold.

    A file that is no image is named on stderr, the others go on, and the exit status is 1.
    """
    if plot is not None:
        from vitlib import plots
        from vitlib.system.atomic import refuse_input

        refuse_input(plots.named(plot), inputs_of(images, asked))
    predictor = load_predictor(images, asked)
    tell_calibration(predictor)
    with report_bad() as bad:
        found = predictor.classify(
            list(images),
            top_k=top_k,
            threshold=threshold,
            batch_size=asked.batch_size,
            on_error=bad.note,
            progress=on_terminal() and len(images) > 1,
        )
        if plot is not None:
            _draw(predictor, images, found, threshold, plot)
        if as_json:
            rows: list[dict[str, Any]] = [
                {"image": image, "error": str(bad.errors[index])}
                if predictions is None
                else {"image": image, "predictions": [p._asdict() for p in predictions]}
                for index, (image, predictions) in enumerate(zip(images, found, strict=True))
            ]
            if asked.precision is not None:
                runs = getattr(predictor.fast(), "precision", "fp16")
                rows = [row | {"precision": runs} for row in rows]
            if predictor.calibration is not None:
                said = predictor.calibration.summary()
                rows = [row | {"calibration": said} for row in rows]
            if predictor.task == "regression":
                rows = [row | {"task": predictor.task} for row in rows]
            echo_json(rows)
            return
        for image, predictions in zip(images, found, strict=True):
            if predictions is None:
                continue
            if len(images) > 1:
                echo(image)
            form = ".6g" if predictor.task == "regression" else ".3f"
            for prediction in predictions:
                echo(f"{prediction.score:{form}}  {prediction.label}")
            if not predictions:
                least = "its threshold" if threshold is None else threshold
                echo(f"no label scores {least}")


def _draw(
    predictor: Predictor,
    images: tuple[str, ...],
    found: list[list[Prediction] | None],
    threshold: float | None,
    plot: Path,
) -> None:
    """The picture of one photo, or of those of several that could be read; of none, none."""
    from vitlib import plots

    pairs = [(i, p) for i, p in zip(images, found, strict=True) if p is not None]
    if not pairs:
        return
    numbers, rule = predictor.task == "regression", predictor.image_processor
    if len(pairs) == 1:
        line = threshold if predictor.multi_label else None
        figure = plots.labels(*pairs[0], threshold=line, numbers=numbers, processor=rule)
    else:
        form = ".4g" if numbers else ".2f"
        captions = [
            f"{p[0].label.split(',')[0]} {p[0].score:{form}}" if p else "-" for _, p in pairs
        ]
        photos = [image for image, _ in pairs]
        figure = plots.contact_sheet(photos, captions, processor=rule)
    plots.save(figure, plot)
