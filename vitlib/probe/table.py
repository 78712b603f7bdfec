"""Rows of a probe's table, with intervals, and the choice of layer and pool inside training parts.

Shapes: M held-out photos.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from vitlib.evaluate.intervals import resample_intervals, wilson
from vitlib.features import Feature
from vitlib.probe.measure import FewShotResult, MethodResult, Task
from vitlib.probe.results import FewShotRow, ProbeReport, ProbeRow, SelectedRow

RESAMPLES = 1000
CHOSEN_BY = "logistic"  # the method that chooses layer and pool


@dataclass(frozen=True)
class Measured:
    """Results of one layer and pool of a model.

    Attributes:
        model: Name of the model.
        feature: Layer and pool.
        methods: Result of each method.
        few_shot: Results of few photos.
        milliseconds: Time of a photo through the model; None where a store had all vectors.
    """

    model: str
    feature: Feature
    methods: list[MethodResult]
    few_shot: list[FewShotResult]
    milliseconds: float | None

    def method(self, name: str) -> MethodResult:
        """Return the result of a method.

        Args:
            name: Name of the method.
        """
        return next(entry for entry in self.methods if entry.method == name)


def choose_best(measured: Sequence[Measured]) -> Measured | None:
    """Choose model, layer and pool by logistic regression on all training photos.

    Args:
        measured: Results of every feature.

    Returns:
        The best on photos inside the training part, of equal ones the first; None where logistic
        regression is not measured.
    """
    if not any(entry.method == CHOSEN_BY for entry in measured[0].methods):
        return None
    return max(measured, key=lambda entry: entry.method(CHOSEN_BY).final_inner)


def probe_rows(measured: Sequence[Measured], task: Task) -> tuple[ProbeRow, ...]:
    """Make the table.

    Args:
        measured: Results of every feature.
        task: Labels and division.

    Returns:
        A row for each model, layer, pool and method.
    """
    rows = []
    for entry in measured:
        for result in entry.methods:
            column = np.asarray(result.column)
            rows.append(
                ProbeRow(
                    entry.model, entry.feature.layer, entry.feature.pool, result.method,
                    float(column.mean()), _interval(column, task), _spread(column, task),
                    result.metrics, tuple(result.choices), result.final_inner, result.by_choice,
                    entry.milliseconds,
                )
            )  # fmt: skip
    return tuple(rows)


def few_shot_rows(measured: Sequence[Measured]) -> tuple[FewShotRow, ...]:
    """Make the table of few photos.

    Args:
        measured: Results of every feature.

    Returns:
        A row for each model, layer, pool, method and number of photos.
    """
    return tuple(
        FewShotRow(
            entry.model, entry.feature.layer, entry.feature.pool, few.method, few.per_class,
            float(np.mean(few.tries)), float(np.std(few.tries)), tuple(few.tries),
        )
        for entry in measured
        for few in entry.few_shot
    )  # fmt: skip


def selected_rows(measured: Sequence[Measured], task: Task) -> tuple[SelectedRow, ...]:
    """Measure the choice of layer and pool: each round takes the best inside its training part.

    Args:
        measured: Results of every feature.
        task: Labels and division.

    Returns:
        A row for each model and, of several models, one in which the model is chosen, too.
    """
    if choose_best(measured) is None:
        return ()
    groups = {model: [e for e in measured if e.model == model] for model in _models(measured)}
    rows = [_select(model, entries, task) for model, entries in groups.items()]
    return (*rows, *[_select("", list(measured), task)] * (len(groups) > 1))


def _models(measured: Sequence[Measured]) -> list[str]:
    """List the models in their order, each once."""
    return list(dict.fromkeys(entry.model for entry in measured))


def _select(model: str, entries: list[Measured], task: Task) -> SelectedRow:
    """Choose the best of some features in every round, and gather its held-out photos."""
    parts = task.division.parts[task.division.held_out]
    column = np.empty(len(parts))
    choices = []
    for number, r in enumerate(task.division.rounds):

        def inner(entry: Measured, number: int = number) -> float:
            return entry.method(CHOSEN_BY).inner[number]

        # Another round may choose another layer: each is measured on its own photos.
        best, rows = max(entries, key=inner), parts == r.test
        column[rows] = np.asarray(best.method(CHOSEN_BY).column)[rows]
        choices.append((best.model, best.feature.layer, best.feature.pool))
    return SelectedRow(model, float(column.mean()), _interval(column, task), tuple(choices))


def _interval(column: npt.NDArray[np.float64], task: Task) -> tuple[float, float]:
    """Compute the 95 % interval of a mean over photos: of shares by Wilson, else resampled."""
    if not task.multi_label:
        return wilson(float(column.mean()), len(column))

    def mean(counts: npt.NDArray[np.float64]) -> dict[str, float]:
        return {"mean": float(column @ counts / counts.sum())}

    return resample_intervals(len(column), mean, RESAMPLES, task.seed)["mean"]


def _spread(column: npt.NDArray[np.float64], task: Task) -> float | None:
    """Compute the standard deviation over the folds; None with test photos."""
    division = task.division
    if division.kind != "folds":
        return None
    parts = division.parts[division.held_out]
    return float(np.std([column[parts == r.test].mean() for r in division.rounds]))


def write_csv(report: ProbeReport) -> str:
    """Write the table and the results of few photos as CSV.

    Args:
        report: The report.

    Returns:
        The text.
    """
    names = list(dict.fromkeys(chain.from_iterable(row.metrics for row in report.rows)))
    head = [
        "model", "layer", "pool", "method", "photos_per_class", report.primary, "low", "high",
        "spread", "inside_training", "milliseconds", *(n for n in names if n != report.primary),
    ]  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for row in report.rows:
        others = [_cell(row.metrics.get(name)) for name in names if name != report.primary]
        numbers = (row.value, *row.interval, row.spread, row.inner, row.milliseconds)
        first = [row.model, row.layer, row.pool, row.method, "all"]
        writer.writerow([*first, *map(_cell, numbers), *others])
    for few in report.few_shot:
        first = [few.model, few.layer, few.pool, few.method, few.per_class]
        ends = (few.value, min(few.tries), max(few.tries), few.spread)
        writer.writerow([*first, *map(_cell, ends), *[""] * (len(head) - 9)])
    return text.getvalue()


def _cell(value: Any) -> str:
    """Write a number with six digits; "" for None."""
    return "" if value is None else f"{value:.6g}"
