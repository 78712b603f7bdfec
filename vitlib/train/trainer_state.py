"""Progress of a run: its step, its best evaluation, early stopping, and unreadable photos."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vitlib import metrics
from vitlib.data import LabelledPhotos
from vitlib.errors import ConfigError
from vitlib.train.settings import Runtime


@dataclass
class TrainerState:
    """Progress of a run, which its checkpoints hold.

    Attributes:
        step: Steps taken.
        best_step: Step of the best evaluation; None before the first.
        best_metric: Value of metric_for_best_model there.
        best_loss: Loss there.
        patience_counter: Evaluations since the best.
        stopped_early: Early stopping has ended the run.
        train_errors: Reason by index of each training photo that could not be read.
        eval_errors: The same for the validation set.
    """

    step: int = 0
    best_step: int | None = None
    best_metric: float | None = None
    best_loss: float | None = None
    patience_counter: int = 0
    stopped_early: bool = False
    train_errors: dict[int, str] = field(default_factory=dict)
    eval_errors: dict[int, str] = field(default_factory=dict)

    @property
    def best_or_last(self) -> int:
        """Step of the best evaluation; without a validation set the last step."""
        return self.step if self.best_step is None else self.best_step

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainerState:
        """Build the state of a checkpoint.

        Args:
            values: The attributes, with text for the numbers of photos, as JSON has them.

        Returns:
            The state.
        """
        state = cls(**values)
        state.train_errors = {int(index): why for index, why in state.train_errors.items()}
        state.eval_errors = {int(index): why for index, why in state.eval_errors.items()}
        return state

    def record_evaluation(self, value: float, loss: float, metric: str, run: Runtime) -> None:
        """Update the best evaluation and early stopping.

        Args:
            value: The metric of this evaluation.
            loss: Its loss.
            metric: Name of the metric.
            run: Its settings of early stopping and greater_is_better.
        """
        greater = run.greater_is_better
        if greater is None:
            greater = metric not in metrics.LOWER
        gain = 0.0 if self.best_metric is None else value - self.best_metric
        gain = gain if greater else -gain
        is_better = math.isfinite(value) and (
            self.best_metric is None or gain > run.early_stopping_threshold
        )
        # A small validation set has many equal accuracies: the lower loss is then the better model.
        is_better_tie = (
            value == self.best_metric and self.best_loss is not None and loss < self.best_loss
        )
        if is_better or is_better_tie:
            self.best_step, self.best_metric, self.best_loss = self.step, value, loss
        if is_better:
            self.patience_counter = 0
        else:
            self.patience_counter += 1
            self.stopped_early = 0 < run.early_stopping_patience <= self.patience_counter


def check_metric(
    metric: str, validation: LabelledPhotos | None, num_classes: int, run: Runtime
) -> None:
    """Check before a run that its evaluations compute a metric.

    Args:
        metric: Name of the metric that chooses the best checkpoint.
        validation: The validation set, or None.
        num_classes: Classes or outputs of the model.
        run: Settings of the run.

    Raises:
        ConfigError: No evaluation computes the metric, or there is no validation set for a setting
            that needs one.
    """
    if validation is None:
        if run.early_stopping_patience or run.metric_for_best_model:
            raise ConfigError(
                "early_stopping_patience and metric_for_best_model need a validation set"
            )
        return
    # The metrics of a uniform prediction have the names of every evaluation's.
    targets = validation.targets()
    uniform = np.full((len(targets), num_classes), 1 / num_classes)
    names = ("loss", *metrics.task_metrics(targets, uniform, validation.task))
    if metric not in names:
        raise ConfigError(f"metric_for_best_model={metric!r}: expected one of {', '.join(names)}")
