"""The verb `vitlib classify`: label photos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from vitlib.cli.options import (
    ModelOptions,
    calibration_option,
    json_option,
    model_options,
    precision_options,
    top_k_option,
)
from vitlib.cli.photos import Photos, expand_photos, list_inputs, report_errors
from vitlib.cli.predictors import load_predictor, print_calibration
from vitlib.cli.printing import echo, echo_json, is_terminal
from vitlib.cli.verb import Verb

if TYPE_CHECKING:
    from vitlib.errors import VitlibError
    from vitlib.predict.predictor import Predictor
    from vitlib.scores import Prediction


@click.command(
    cls=Verb,
    examples=(
        "vitlib classify -m demo photo.jpg",
        "vitlib classify -m mine 'photos/*/*.jpg' -k 3 --plot sheet.png",
    ),
)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@model_options
@precision_options
@calibration_option
@top_k_option("Labels of a photo")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    metavar="0..1",
    help="Least score of a label. Default: the calibration's thresholds, or any score.",
)
@click.option(
    "--plot",
    metavar="PICTURE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the photo and its labels as bars, or a contact sheet of several photos: .png, .svg, "
    ".pdf, .jpg or .webp.",
)
@json_option
def classify(
    images: tuple[str, ...],
    options: ModelOptions,
    top_k: int | Literal["all"] | None,
    threshold: float | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Label photos: print the labels of each IMAGE, best first.

    IMAGE is a file, a folder (the photos in and below it), a pattern in quotes, or - for stdin: a
    photo, or a list of paths.

    A model for regression prints its numbers, without --top-k and --threshold.

    A file that is not an image is named on stderr, and the exit status is 1.
    """
    photos = expand_photos(images)
    if plot is not None:
        from vitlib import plots
        from vitlib.system.atomic import refuse_input

        refuse_input(plots.check_figure_path(plot), list_inputs(photos.names, options))
    predictor = load_predictor(photos.images, options)
    print_calibration(predictor)
    with report_errors() as failed:
        results = predictor.classify(
            photos.images,
            top_k=predictor.model.num_classes if top_k == "all" else top_k,
            threshold=threshold,
            batch_size=options.batch_size,
            on_error=failed.note,
            progress=is_terminal() and len(photos) > 1,
        )
        if plot is not None:
            _draw(predictor, photos, results, threshold, plot, failed.errors)
        if as_json:
            rows: list[dict[str, Any]] = [
                {"image": image, "error": str(failed.errors[index])}
                if predictions is None
                else {"image": image, "predictions": [p._asdict() for p in predictions]}
                for index, (image, predictions) in enumerate(
                    zip(photos.names, results, strict=True)
                )
            ]
            if options.precision is not None:
                precision = getattr(predictor.fast(), "precision", "fp16")
                rows = [row | {"precision": precision} for row in rows]
            if predictor.calibration is not None:
                calibration = predictor.calibration.summary()
                rows = [row | {"calibration": calibration} for row in rows]
            if predictor.task == "regression":
                rows = [row | {"task": predictor.task} for row in rows]
            echo_json(rows)
            return
        for image, predictions in zip(photos.names, results, strict=True):
            if predictions is None:
                continue
            if len(photos) > 1:
                echo(image)
            form = ".6g" if predictor.task == "regression" else ".3f"
            for prediction in predictions:
                echo(f"{prediction.score:{form}}  {prediction.label}")
            if not predictions:
                minimum = "its threshold" if threshold is None else threshold
                echo(f"no label scores {minimum}")


def _draw(
    predictor: Predictor,
    photos: Photos,
    results: list[list[Prediction] | None],
    threshold: float | None,
    plot: Path,
    errors: Mapping[int, VitlibError],
) -> None:
    """Draw a single photo with its labels, or a sheet with a tile for each photo."""
    from vitlib import plots

    if not any(predictions is not None for predictions in results):
        return
    numbers, processor = predictor.task == "regression", predictor.image_processor
    names = [plots.file_name(name) for name in photos.names]
    if len(photos) == 1:
        line = threshold if predictor.multi_label else None
        figure = plots.labels(
            photos.images[0], results[0] or (), threshold=line, numbers=numbers, title=names[0],
            processor=processor,
        )  # fmt: skip
    else:
        captions = [
            "" if p is None else plots.caption_predictions(p, numbers=numbers) for p in results
        ]
        reasons = {index: str(error) for index, error in errors.items()}
        figure = plots.contact_sheet(
            photos.images, captions, processor=processor, errors=reasons, names=names
        )
    plots.save(figure, plot)
