"""Measure one set of features by every method: choose inside the training part, measure outside.

Shapes: N photos, M of them held out, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib import metrics
from vitlib.probe.division import Division, Round, draw_few, draws_of
from vitlib.probe.linear import RATES, train_heads
from vitlib.probe.logistic_head import (
    DEFAULT_C,
    FEW,
    PENALTIES,
    Fitter,
    Grade,
    choose_c,
    grade_columns,
    primary_column,
    search_path,
)
from vitlib.probe.neighbours import COUNTS, search, usable_counts, vote
from vitlib.probe.solver import choose_threads

Array = npt.NDArray[Any]
METHODS = ("knn", "logistic", "linear")
MAX_SAMPLE = 5000  # training photos that choose k, each by the others
MAX_COLUMNS = 512  # of the memory of fits: (training set, C) pairs
SHOWN = (
    "accuracy", "balanced_accuracy", "top_5_accuracy", "iou", "f1_score_macro", "f1_score_micro",
    "average_precision_score_macro", "log_loss",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """Labels of the photos, their division, and the settings of every method.

    Attributes:
        targets: (N,) class numbers, or (N, C) of 1, 0 and NaN.
        labels: (C,) names of the classes.
        division: Division of the photos.
        methods: Names of METHODS.
        k: Numbers of neighbours.
        few_shot: Numbers of photos of a class, for probes of few photos.
        seed: Seed of draws and first weights.
    """

    targets: Array
    labels: tuple[str, ...]
    division: Division
    methods: tuple[str, ...] = METHODS
    k: tuple[int, ...] = COUNTS
    few_shot: tuple[int, ...] = ()
    seed: int = 0

    @property
    def multi_label(self) -> bool:
        """True if photos may have several labels."""
        return self.targets.ndim == 2

    @property
    def primary(self) -> str:
        """The metric that chooses: accuracy, or IoU with several labels."""
        if self.multi_label:
            return metrics.PRIMARY["multi_label_classification"]
        return metrics.PRIMARY["single_label_classification"]


class MethodResult(NamedTuple):
    """Result of a method on one set of features, of types that JSON has.

    Attributes:
        method: Name of METHODS.
        column: (M,) what each held-out photo adds to the primary metric, 0..1.
        metrics: Metrics of the held-out photos of all rounds together.
        choices: What each round chose: {"C": ...}, {"k": ...} or {"rate": ...}.
        inner: Primary metric of that choice on photos inside the training part, for each round.
        final_choice: The same, chosen on all training photos.
        final_inner: Primary metric of that choice, on photos that the fit did not see.
        by_choice: Primary metric of the held-out photos by k or rate, had it been given.
    """

    method: str
    column: list[float]
    metrics: dict[str, float]
    choices: list[dict[str, float]]
    inner: list[float]
    final_choice: dict[str, float]
    final_inner: float
    by_choice: dict[str, float]


class FewShotResult(NamedTuple):
    """Result of a method that is fitted to few photos.

    Attributes:
        method: Name of METHODS.
        per_class: Photos of a class.
        tries: Primary metric of each draw.
    """

    method: str
    per_class: int
    tries: list[float]


class _Chosen(NamedTuple):
    """Choice of a round, and the scores of the photos that measure it by every choice."""

    choice: dict[str, float]
    inner: float
    scores: Array
    others: dict[str, Array]


Chooser = Callable[[Round], _Chosen]


def measure_feature(features: npt.NDArray[np.float32], task: Task) -> dict[str, list[Any]]:
    """Measure one set of features.

    Args:
        features: (N, D), every row finite.
        task: Labels, division and settings.

    Returns:
        "methods": a MethodResult for each; "few_shot": FewShotResults.
    """
    choosers: dict[str, Chooser] = {
        "knn": lambda r: _choose_k(features, task, r),
        "logistic": LogisticChooser(features, task).choose,
        "linear": lambda r: _choose_rate(features, task, r),
    }
    with choose_threads(features.size * len(task.labels)):
        results = [_measure(name, choosers[name], task) for name in task.methods]
        few = [
            _measure_few(features, task, name, per_class)
            for per_class in task.few_shot
            for name in task.methods
            if name != "linear"
        ]
    return {"methods": results, "few_shot": few}


def _measure(name: str, choose: Chooser, task: Task) -> MethodResult:
    """Run the rounds of a method."""
    division, held_out = task.division, task.division.held_out
    rounds = [choose(r) for r in division.rounds]
    scores = np.full((len(held_out), len(task.labels)), np.nan)
    columns: dict[str, Array] = {}
    for r, chosen in zip(division.rounds, rounds, strict=True):
        rows = division.parts[held_out] == r.test
        scores[rows] = chosen.scores
        for key, other in chosen.others.items():
            column = columns.setdefault(key, np.full(len(held_out), np.nan))
            column[rows] = _column(task, held_out[rows], other)
    final = rounds[0] if division.final in division.rounds else choose(division.final)
    return MethodResult(
        name,
        _column(task, held_out, scores).tolist(),
        _metrics(task, held_out, scores),
        [chosen.choice for chosen in rounds],
        [chosen.inner for chosen in rounds],
        # With test photos the only round is the final one, too.
        final.choice,
        final.inner,
        # A choice that some round could not make has no value of all held-out photos.
        {key: float(c.mean()) for key, c in columns.items() if not np.isnan(c).any()},
    )


def _column(task: Task, rows: Array, scores: Array) -> npt.NDArray[np.float64]:
    """Compute what each of some photos adds to the primary metric."""
    return primary_column(task.targets[rows], scores, task.multi_label)


def _metrics(task: Task, rows: Array, scores: Array) -> dict[str, float]:
    """Compute the metrics of held-out photos; undefined ones are left out."""
    targets = task.targets[rows]
    if task.multi_label:
        values = metrics.every(targets, scores, task.labels, True).values
    else:
        values = metrics.quick(targets, scores, False)
    return {name: values[name] for name in SHOWN if np.isfinite(values.get(name, np.nan))}


def _test_rows(task: Task, r: Round) -> npt.NDArray[np.int64]:
    """Return the photos that measure a round; none for the final one of folds."""
    none = np.empty(0, np.int64)
    return none if r.test is None else np.flatnonzero(task.division.parts == r.test)


def _choose_k(features: Array, task: Task, r: Round) -> _Chosen:
    """Choose k by the neighbours of each training photo among the others."""
    rows, test = task.division.training(r.excluded), _test_rows(task, r)
    x, y = features[rows], task.targets[rows]
    counts = usable_counts(task.k, max(len(rows) - 1, 1))
    sample = np.arange(len(rows))
    if len(rows) > MAX_SAMPLE:
        sample = np.sort(np.random.RandomState(task.seed).permutation(len(rows))[:MAX_SAMPLE])
    inner = dict.fromkeys(counts, 0.0)
    if len(rows) > 1:
        near = search(x, x[sample], counts[-1], exclude=sample)
        for k in counts:
            scores = vote(near, y, k, num_classes=len(task.labels))
            inner[k] = float(primary_column(y[sample], scores, task.multi_label).mean())
    best = max(counts, key=lambda k: inner[k])
    # One search serves every k: the nearest k are the first of the nearest 200.
    near = search(x, features[test], counts[-1])
    by_k = {f"{k}": vote(near, y, k, num_classes=len(task.labels)) for k in counts}
    return _Chosen({"k": best}, inner[best], by_k[f"{best}"], by_k)


class LogisticChooser:
    """Chooses C on parts that are held out in turn, and fits all of a training set.

    Fits are remembered: folds i and j measure each other by the same head, fitted to the rest.

    Args:
        features: (N, D).
        task: Labels, division and settings.
    """

    def __init__(self, features: Array, task: Task) -> None:
        self.features, self.task = features, task
        self._columns: dict[tuple[frozenset[int], int], Array] = {}
        self._fitters: dict[tuple[frozenset[int], bool], Fitter] = {}

    def choose(self, r: Round) -> _Chosen:
        """Choose C for a round, and score its test photos.

        Args:
            r: The round.

        Returns:
            The choice.
        """
        choice, inner = DEFAULT_C, 0.0
        if r.measured:
            point, grades = search_path(lambda point: self._grade(r, point))
            choice, inner = PENALTIES[point], grades[point].value
        test = _test_rows(self.task, r)
        if not len(test):
            return _Chosen({"C": choice}, inner, np.empty((0, len(self.task.labels))), {})
        head = self._fitter(r.excluded, search=False).fit(choice)
        return _Chosen({"C": choice}, inner, head.scores(self.features[test]), {})

    def _grade(self, r: Round, point: int) -> Grade:
        """Grade a C on the parts of a training set, each by a head of the others."""
        parts = self.task.division.parts
        columns = [
            self._grade_columns(r.excluded | {part}, point)[parts == part] for part in r.measured
        ]
        return Grade(*np.nanmean(np.concatenate(columns), axis=0).tolist())

    def _grade_columns(self, excluded: frozenset[int], point: int) -> Array:
        """Fit without some parts; what each photo of these adds to the grade, (N, 2)."""
        if (excluded, point) in self._columns:
            return self._columns[excluded, point]
        task = self.task
        head = self._fitter(excluded, search=True).fit(PENALTIES[point])
        rows = np.flatnonzero(np.isin(task.division.parts, [*excluded]))
        columns = np.full((len(task.targets), 2), np.nan)
        scores = head.scores(self.features[rows])
        columns[rows] = grade_columns(task.targets[rows], scores, task.multi_label)
        # Bounded, since each is as long as the set.
        if len(self._columns) < MAX_COLUMNS:
            self._columns[excluded, point] = columns
        return columns

    def _fitter(self, excluded: frozenset[int], *, search: bool) -> Fitter:
        """Return the fitter of a training set; of many photos one alone is in memory."""
        task, rows = self.task, self.task.division.training(excluded)
        key = excluded, search
        if key not in self._fitters:
            fitter = Fitter(
                self.features[rows], task.targets[rows], len(task.labels), search=search
            )
            # Each has a copy of its features: of many photos one at a time fits in memory.
            if len(task.targets) > FEW:
                self._fitters.clear()
            self._fitters[key] = fitter
        return self._fitters[key]


def _choose_rate(features: Array, task: Task, r: Round) -> _Chosen:
    """Choose the rate of a linear head on the first part of a training set that is held out."""
    division, test = task.division, _test_rows(task, r)
    rates, inner = list(RATES), 0.0
    if r.measured:
        part = r.measured[0]
        fitted = division.training(r.excluded | {part})
        rows = np.flatnonzero(division.parts == part)
        # The first part alone: SGD on every part would take most of a probe's time.
        heads = _train(features, task, fitted, rates)
        values = [_column(task, rows, _scores(h, features[rows])).mean() for h in heads]
        best = int(np.argmax(values))
        choice, inner = rates[best], float(values[best])
    else:
        choice = 1e-3
    if not len(test):
        return _Chosen({"rate": choice}, inner, np.empty((0, len(task.labels))), {})
    heads = _train(features, task, division.training(r.excluded), rates)
    by_rate = {
        f"{rate:g}": _scores(h, features[test]) for rate, h in zip(rates, heads, strict=True)
    }
    return _Chosen({"rate": choice}, inner, by_rate[f"{choice:g}"], by_rate)


def _train(features: Array, task: Task, rows: Array, rates: Sequence[float]) -> list[Any]:
    """Train linear heads on some photos."""
    count = len(task.labels)
    return train_heads(features[rows], task.targets[rows], count, rates, task.seed)


def _scores(head: Any, features: Array) -> Array:
    """Score photos; the scores of a head that diverged are 0."""
    return np.asarray(np.nan_to_num(head.scores(features)))


def _measure_few(features: Array, task: Task, name: str, per_class: int) -> FewShotResult:
    """Fit a method to a few photos of each class, drawn several times."""
    tries = []
    for r, seed in draws_of(task.division):
        training = task.division.training(r.excluded)
        rows = training[draw_few(task.targets[training], per_class, seed)]
        test = _test_rows(task, r)
        x, y = features[rows], task.targets[rows]
        if name == "knn":
            scores = _vote_of_few(x, y, features[test], task, per_class)
        else:
            c = choose_c(x, y, len(task.labels), seed)
            scores = Fitter(x, y, len(task.labels)).fit(c).scores(features[test])
        tries.append(float(_column(task, test, scores).mean()))
    return FewShotResult(name, per_class, tries)


def _vote_of_few(x: Array, y: Array, queries: Array, task: Task, per_class: int) -> Array:
    """Vote by the best of the k that the protocol allows."""
    counts = usable_counts(_few_counts(task.k, per_class), max(len(x) - 1, 1))
    itself = np.arange(len(x))
    inner = dict.fromkeys(counts, 0.0)
    if len(counts) > 1:
        near = search(x, x, counts[-1], exclude=itself)
        for k in counts:
            scores = vote(near, y, k, num_classes=len(task.labels))
            inner[k] = float(primary_column(y, scores, task.multi_label).mean())
    best = max(counts, key=lambda k: inner[k])
    return vote(search(x, queries, counts[-1]), y, best, num_classes=len(task.labels))


def _few_counts(counts: Iterable[int], per_class: int) -> list[int]:
    """List the k of the protocol for few photos: those up to per_class, and per_class."""
    return [*(k for k in counts if k <= per_class), per_class]
