"""Files of a report: numbers, tables, figures, and the page that contains them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vitlib import plots
from vitlib.data import LabelledPhotos
from vitlib.evaluate import curves, figures, folder, regression_figures
from vitlib.evaluate.html_report import render_page
from vitlib.evaluate.predictions import write_predictions
from vitlib.evaluate.report import Predictions, Report, has_tables
from vitlib.image.processor import ImageProcessor
from vitlib.metrics import accuracy_table, confusion_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(
    report: Report,
    photos: LabelledPhotos,
    predictions: Predictions,
    errors: Mapping[int, str],
    processor: ImageProcessor | None = None,
) -> None:
    """Write every file of a report into report.folder, which changes once all are written.

    Args:
        report: the report.
        photos: the whole set.
        predictions: of the photos that can be read.
        errors: error of each other photo, by its index in `photos`.
        processor: preprocessing that says how images deeper than 8 bits are shown; None for its
            defaults.

    Raises:
        SourceError: where the folder cannot be written.
    """
    with folder.report_folder(report.folder) as staging:
        write_predictions(staging / folder.PREDICTIONS, photos, predictions, errors)
        if report.per_class and has_tables(len(report.per_class)):
            multi_label, labels = report.multi_label, photos.labels
            pair = predictions.targets, predictions.scores
            table = accuracy_table(*pair, labels, multi_label)
            folder.write_compact(staging / folder.TABLE, table)
            matrix = confusion_matrix(*pair, multi_label, predictions.thresholds)
            data = {"class_labels": list(labels), "matrix": matrix.tolist()}
            schema = {"schema_type": "confusion_matrix", "schema_version": "1.0.0"}
            folder.write_compact(staging / folder.MATRIX, schema | {"data": data})
        if report.calibration is not None:
            report.calibration.write(staging)
        images: dict[str, bytes] = {}
        for name, figure in _figures(report, predictions, processor).items():
            plots.save(figure, staging / name)
            images[name] = (staging / name).read_bytes()
        page = render_page(report, images)
        (staging / folder.PAGE).write_text(page, encoding="utf-8", errors="backslashreplace")
        folder.write_json(staging / folder.METRICS, report.as_dict())


def _figures(
    report: Report, predictions: Predictions, processor: ImageProcessor | None
) -> dict[str, Figure]:
    """Draw the figures of a report, by file name."""
    if report.per_output:
        drawn = {
            "predicted.png": regression_figures.draw_predicted(predictions, report),
            "errors.png": regression_figures.draw_errors(predictions, report),
        }
        sheet = regression_figures.draw_worst(predictions, processor)
        return drawn if sheet is None else drawn | {"mistakes.png": sheet}
    by_precision = curves.select_curves(predictions, report, "average_precision_score")
    by_area = curves.select_curves(predictions, report, "AUC")
    sheet = figures.draw_mistakes(predictions, processor)
    drawn = {
        "confusion.png": figures.draw_confusion(predictions, report),
        "precision_recall.png": curves.draw_precision_recall(*by_precision),
        "roc.png": curves.draw_roc(*by_area),
        "reliability.png": figures.draw_reliability(predictions, report),
    }
    return drawn if sheet is None else drawn | {"mistakes.png": sheet}
