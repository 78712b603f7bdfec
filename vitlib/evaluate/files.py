"""Files of a report: numbers, tables, figures, and the page that contains them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vitlib import plots
from vitlib.data import LabelledPhotos
from vitlib.evaluate import curves, figures, folder, regression_figures
from vitlib.evaluate.figures import MAX_CLASSES, MAX_NARROW, encode_figure
from vitlib.evaluate.html_report import render_page
from vitlib.evaluate.mistakes import draw_mistakes, encode_thumbnail, list_mistakes
from vitlib.evaluate.palette import DARK, LIGHT, Palette
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
        charts = _draw_charts(report, predictions)
        for name, versions in charts.items():
            (staging / name).write_bytes(versions["light"])
        mistakes = list_mistakes(predictions)
        sheet = draw_mistakes(mistakes, processor)
        if sheet is not None:
            plots.save(sheet, staging / "mistakes.png")
        photos_of_mistakes = [encode_thumbnail(mistake.path, processor) for mistake in mistakes]
        page = render_page(report, charts, list(zip(mistakes, photos_of_mistakes, strict=True)))
        (staging / folder.PAGE).write_text(page, encoding="utf-8", errors="backslashreplace")
        folder.write_json(staging / folder.METRICS, report.as_dict())


def _draw_charts(report: Report, predictions: Predictions) -> dict[str, dict[str, bytes]]:
    """Draw the charts of a report as PNG, by file name, then by version of html_report."""
    from matplotlib import rc_context

    charts: dict[str, dict[str, bytes]] = {}
    for version, palette in (("light", LIGHT), ("dark", DARK)):
        # Ticks take their colours when they are drawn: the settings last until then.
        with rc_context(palette.settings()):
            for name, figure in _figures(report, predictions, palette).items():
                charts.setdefault(name, {})[version] = encode_figure(figure)
            if not report.multi_label and MAX_NARROW < len(report.per_class) <= MAX_CLASSES:
                narrow = figures.draw_confusion(predictions, report, palette, narrow=True)
                charts["confusion.png"][f"narrow {version}"] = encode_figure(narrow)
    return charts


def _figures(report: Report, predictions: Predictions, palette: Palette) -> dict[str, Figure]:
    """Draw the charts of a report in a palette, by file name."""
    if report.per_output:
        return {
            "predicted.png": regression_figures.draw_predicted(predictions, report, palette),
            "errors.png": regression_figures.draw_errors(predictions, report, palette),
        }
    by_precision = curves.select_curves(predictions, report, "average_precision_score")
    by_area = curves.select_curves(predictions, report, "AUC")
    return {
        "confusion.png": figures.draw_confusion(predictions, report, palette),
        "precision_recall.png": curves.draw_precision_recall(*by_precision, palette),
        "roc.png": curves.draw_roc(*by_area, palette),
        "reliability.png": figures.draw_reliability(predictions, report, palette),
    }
