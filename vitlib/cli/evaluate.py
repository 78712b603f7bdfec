"""The verb `vitlib evaluate`: measure a classifier on labelled photos."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vitlib.cli.options import (
    ModelOptions,
    calibration_option,
    json_option,
    precision_options,
    run_options,
    subject_option,
)
from vitlib.cli.photos import on_bad_image_option, report_errors
from vitlib.cli.predictors import logs_muted, open_predictor, optimize_model
from vitlib.cli.printing import echo_json, is_terminal, print_table
from vitlib.cli.verb import Verb, positional_arguments
from vitlib.errors import ConfigError, count_noun

if TYPE_CHECKING:
    from vitlib.data import LabelledPhotos
    from vitlib.evaluate import Report
    from vitlib.predict.predictor import Predictor

# Metrics of the table; the report has all of them.
SHOWN = (
    "accuracy",
    "top_5_accuracy",
    "iou",
    "balanced_accuracy",
    "f1_score_macro",
    "f1_score_binary",
    "AUC_macro",
    "AUC_binary",
    "average_precision_score_macro",
    "log_loss",
    "expected_calibration_error",
    "mean_absolute_error",
    "root_mean_squared_error",
    "r2_score",
)
SHOWN_OUTPUTS = 12


@click.command(
    cls=Verb,
    examples=(
        "vitlib evaluate mine photos -o report",
        "vitlib evaluate mine photos -o report --tune validation",
    ),
)
@positional_arguments("MODEL", "DATA")
@subject_option
@click.option(
    "--out",
    "-o",
    required=True,
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the report: new, empty, or with an earlier report.",
)
@click.option(
    "--tune",
    metavar="VALIDATION",
    type=click.Path(path_type=Path),
    help="Labelled photos, neither trained on nor in DATA. A temperature and, with several "
    "labels, a threshold for each class are tuned on them and stored as calibration.json beside "
    "the model.",
)
@calibration_option
@click.option(
    "--class-map",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Table from the photos' labels, such as synsets, to classes: .json, .csv or .txt.",
)
@click.option(
    "--multi-label/--single-label",
    default=None,
    help="Several labels per photo, each with its own score, or one. Default: the model's task.",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    metavar="0..1",
    help="Least score of a predicted label, with several labels per photo. Default: the "
    "calibration's, or 0.5.",
)
@click.option("--positive", metavar="LABEL", help="Measure this class against the rest as well.")
@click.option(
    "--bootstrap",
    type=click.IntRange(0),
    metavar="N",
    default=1000,
    show_default=True,
    help="Resamples for the 95 % intervals; 0 computes none.",
)
@click.option(
    "--seed", type=int, metavar="N", default=0, show_default=True, help="Seed of the resamples."
)
@on_bad_image_option
@run_options
@precision_options
@json_option
def evaluate(
    data: str,
    out: Path,
    options: ModelOptions,
    tune: Path | None,
    class_map: Path | None,
    multi_label: bool | None,
    on_bad_image: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure a classifier on labelled photos: a report with every metric, figures and mistakes.

    A model for regression is measured by its errors on photos with numbers.

    DATA is a folder with a folder per class or labels.csv, a .csv or a .jsonl. OUT/report.html
    contains the whole report; metrics.json and predictions.csv are for programs.

    A photo that cannot be read is not counted. It is named on stderr and in the report, and the
    exit status is 1.
    """
    if tune is not None and not options.calibrated:
        raise click.UsageError("--tune makes a calibration: leave --no-calibration out")
    from vitlib.evaluate import evaluate
    from vitlib.evaluate.folder import check_folder
    from vitlib.system.atomic import refuse_input

    check_folder(out)
    refuse_input(out, [data] if tune is None else [data, str(tune)], inside=True)
    # Photos left out are in the report, and named below.
    with logs_muted():
        predictor = open_predictor(replace(options, calibrated=options.calibrated and tune is None))
        if not predictor.model.num_classes:
            raise ConfigError(
                f"{options.model!r} has no head, so no labels to evaluate: train one with vitlib "
                "finetune, or name a classifier"
            )
        _set_task(predictor, multi_label)
        read = _reader(predictor, on_bad_image, class_map)
        photos, tuning = read(Path(data)), None if tune is None else read(tune)
        optimize_model(predictor, (str(photo.path) for photo in photos.photos), options)
        report = evaluate(
            predictor,
            photos,
            out,
            model=options.model,
            tune=tuning,
            batch_size=options.batch_size,
            on_bad_image=on_bad_image,  # type: ignore[arg-type]
            progress=is_terminal(),
            **settings,
        )
    with report_errors() as failed:
        failed.note_files((*report.failed, *report.failed_tuning))
        if as_json:
            echo_json(report.as_dict() | {"report": str(out / "report.html")})
        else:
            print_table(_rows(report))


def _rows(report: Report) -> list[tuple[str, str]]:
    """List the main metrics as (name, value)."""
    data = report.about["data"]
    count = f"{count_noun(data['evaluated'], 'photo')} of {data['source']}"
    rows = [("model", report.about["model"]["name"]), ("measured on", count)]
    for name in SHOWN:
        value = report.metrics.get(name)
        if value is None:
            continue
        ends = report.intervals.get(name)
        span = f"  ({ends[0]:.3f} to {ends[1]:.3f})" if ends else ""
        rows.append((name, f"{value:.4f}{span}" if math.isfinite(value) else "undefined"))
    for row in report.per_output[:SHOWN_OUTPUTS] if len(report.per_output) > 1 else ():
        errors = f"MAE {row.mean_absolute_error:.4g}, RMSE {row.root_mean_squared_error:.4g}"
        r2 = f"{row.r2_score:.4f}" if math.isfinite(row.r2_score) else "undefined"
        rows.append((row.label, f"{errors}, R2 {r2}"))
    if report.stored is not None:
        rows.append(("calibration", str(report.stored)))
    rows += [("note", note) for note in report.notes]
    return [*rows, ("report", str(report.folder / "report.html"))]


def _set_task(predictor: Predictor, multi_label: bool | None) -> None:
    """Change the model's task where the command line names another."""
    if multi_label is None:
        return
    if predictor.task == "regression":
        flag = "--multi-label" if multi_label else "--single-label"
        raise ConfigError(
            f"{flag} is for classifiers, and this model is a regression: leave it out"
        )
    if multi_label == predictor.multi_label:
        return
    kind = "multi_label_classification" if multi_label else "single_label_classification"
    model = predictor.model
    model.config = replace(model.config, problem_type=kind)  # type: ignore[arg-type]


def _reader(
    predictor: Predictor, on_bad_image: str, class_map: Path | None
) -> Callable[[Path], LabelledPhotos]:
    """Return a function that reads a set for this model."""
    from vitlib.data import read_photos

    def read(path: Path) -> LabelledPhotos:
        return read_photos(
            path,
            multi_label=predictor.multi_label,
            regression=predictor.task == "regression",
            on_bad_image=on_bad_image,  # type: ignore[arg-type]
            labels=predictor.labels,
            class_map=class_map,
        )

    return read
