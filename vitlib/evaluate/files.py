"""A report as files: numbers, tables, pictures, and the page that holds them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vitlib import plots
from vitlib.data import LabelledPhotos
from vitlib.evaluate import figures, folder, scatter
from vitlib.evaluate.html_report import page
from vitlib.evaluate.report import Answers, Report, tables_fit
from vitlib.evaluate.table import write_predictions
from vitlib.image.processor import ImageProcessor
from vitlib.metrics import accuracy_table, confusion_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write(
    report: Report,
    photos: LabelledPhotos,
    answers: Answers,
    errors: Mapping[int, str],
    processor: ImageProcessor | None = None,
) -> None:
    """Write everything into report.folder, which becomes the new report once all is there.

    photos: the whole set; errors: index in it -> why a photo is not among the answers; processor:
    how deep photos are shown. Raises SourceError where the folder cannot be written.
    """
    with folder.report_folder(report.folder) as beside:
        write_predictions(beside / folder.PREDICTIONS, photos, answers, errors)
        if report.per_class and tables_fit(len(report.per_class)):
            several, labels = report.multi_label, photos.labels
            args = answers.targets, answers.scores
            folder.write_compact(beside / folder.TABLE, accuracy_table(*args, labels, several))
            matrix = confusion_matrix(*args, several, answers.limits)
            data = {"class_labels": list(labels), "matrix": matrix.tolist()}
            schema = {"schema_type": "confusion_matrix", "schema_version": "1.0.0"}
            folder.write_compact(beside / folder.MATRIX, schema | {"data": data})
        if report.calibration is not None:
            report.calibration.write(beside)
        drawn: dict[str, bytes] = {}
        for name, figure in _figures(report, answers, processor).items():
            plots.save(figure, beside / name)
            drawn[name] = (beside / name).read_bytes()
        text = page(report, drawn)
        (beside / folder.PAGE).write_text(text, encoding="utf-8", errors="backslashreplace")
        folder.write_json(beside / folder.METRICS, report.as_dict())


def _figures(
    report: Report, answers: Answers, processor: ImageProcessor | None
) -> dict[str, Figure]:
    if report.per_output:
        found = {
            "predicted.png": scatter.predicted(answers, report),
            "errors.png": scatter.errors(answers, report),
        }
        sheet = scatter.worst(answers, processor)
        return found if sheet is None else found | {"mistakes.png": sheet}
    by_precision = figures.curves_of(answers, report, "average_precision_score")
    by_area = figures.curves_of(answers, report, "AUC")
    sheet = figures.mistakes(answers, processor)
    found = {
        "confusion.png": figures.confusion(answers, report),
        "precision_recall.png": figures.precision_recall(*by_precision),
        "roc.png": figures.roc(*by_area),
        "reliability.png": figures.reliable(answers, report),
    }
    return found if sheet is None else found | {"mistakes.png": sheet}
