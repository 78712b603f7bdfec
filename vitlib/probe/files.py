"""Files of a probe's report: the page, the table, the pictures, and the JSON that completes it.

Shapes: M held-out photos, D features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vitlib.evaluate.figures import draw_versions
from vitlib.evaluate.folder import report_folder, write_json
from vitlib.probe.figures import draw_classes, draw_few_shot, draw_layers
from vitlib.probe.page import render_probe_page
from vitlib.probe.projection import principal_components, sample_points, tsne
from vitlib.probe.results import KIND, PAGE, TABLE, ProbeReport
from vitlib.probe.table import write_csv

Array = npt.NDArray[Any]


def write_report(
    report: ProbeReport, features: npt.NDArray[np.float32], targets: Array, seed: int = 0
) -> None:
    """Write every file of a report into report.folder, which changes once all are written.

    Args:
        report: The report.
        features: (M, D) of the best layer and pool, for the maps of classes.
        targets: (M,) class numbers, or (M, C) of 1, 0 and NaN.
        seed: Seed of t-SNE and of the photos on a map.

    Raises:
        SourceError: The folder cannot be written.
    """
    charts = {"layers.png": draw_versions(lambda palette: draw_layers(report, palette))}
    if report.few_shot:
        charts["few_shot.png"] = draw_versions(lambda palette: draw_few_shot(report, palette))
    if len(features) >= 2:
        rows = sample_points(len(features), seed)
        maps = _maps(features[rows], seed)
        names = _names(targets[rows], report.labels)
        charts["classes.png"] = draw_versions(lambda palette: draw_classes(maps, names, palette))
    with report_folder(report.folder, KIND) as staging:
        for name, versions in charts.items():
            (staging / name).write_bytes(versions["light"])
        page = render_probe_page(report, charts)
        (staging / PAGE).write_text(page, encoding="utf-8", errors="backslashreplace")
        (staging / TABLE).write_text(
            write_csv(report), encoding="utf-8", errors="backslashreplace", newline=""
        )
        write_json(staging / KIND.last, report.as_dict())


def _maps(
    features: npt.NDArray[np.float32], seed: int
) -> list[tuple[str, npt.NDArray[np.float32]]]:
    """Compute the maps that the features allow, each with its title."""
    points, (first, second) = principal_components(features)
    maps = [(f"principal components ({first:.0%} and {second:.0%} of the variance)", points)]
    embedded = tsne(features, seed)
    return maps if embedded is None else [*maps, ("t-SNE", embedded)]


def _names(targets: Array, labels: tuple[str, ...]) -> list[str]:
    """Name the class of each photo; with several labels all of them together."""
    if targets.ndim == 1:
        return [labels[int(number)] for number in targets]
    return [
        " + ".join(label for label, value in zip(labels, row, strict=True) if value == 1) or "none"
        for row in targets
    ]
