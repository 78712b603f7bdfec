"""Evaluations of a run as a person reads them: a line each while it runs, a table at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run, or the end of an epoch without a validation set.

    Attributes:
        step: Steps taken.
        epoch: Epochs taken, 1.0 after the first.
        epochs: Epochs of the whole run.
        train_loss: Mean loss of the steps since the evaluation before; None if it is unknown.
        loss: Loss of the validation set; None without one.
        metric: Name of the metric that chooses the best checkpoint.
        value: Its value; None without a validation set.
        learning_rate: Rate of the last step.
        is_best: It is the best so far; in a table, the best of all.
        seconds_left: Estimated time to the end of the run; None in a table.
    """

    step: int
    epoch: float
    epochs: float
    train_loss: float | None
    loss: float | None
    metric: str
    value: float | None
    learning_rate: float | None
    is_best: bool
    seconds_left: float | None = None

    def line(self) -> str:
        """Describe it in one line."""
        parts = [f"epoch {_short(self.epoch)} of {_short(self.epochs)}"]
        parts.append(f"training loss {_number(self.train_loss)}")
        if self.value is not None or self.loss is not None:
            best = " (best)" if self.is_best else ""
            parts.append(f"validation loss {_number(self.loss)}")
            if self.metric != "loss":
                parts.append(f"{self.metric} {_number(self.value)}{best}")
        if self.learning_rate is not None:
            parts.append(f"rate {self.learning_rate:.2g}")
        if self.seconds_left is not None:
            parts.append(f"{format_seconds(self.seconds_left)} left")
        return ", ".join(parts)


def list_evaluations(
    events: Sequence[Mapping[str, Any]],
    due: Sequence[int],
    steps_per_epoch: float,
    epochs: float,
    metric: str,
    best_step: int | None,
) -> list[Evaluation]:
    """List the evaluations of a run.

    Args:
        events: Events of metrics.jsonl.
        due: Steps after which an evaluation was due, ascending.
        steps_per_epoch: Steps of an epoch.
        epochs: Epochs of the whole run.
        metric: Name of the metric that chooses the best checkpoint.
        best_step: Step of the best evaluation; None without a validation set.

    Returns:
        One entry for each due step.
    """
    trained = {event["step"]: event for event in events if event["event"] == "train"}
    evaluated = {event["step"]: event for event in events if event["event"] == "eval"}
    rows, previous = [], 0
    for step in due:
        since = (trained[s] for s in range(previous + 1, step + 1) if s in trained)
        losses = [event["loss"] for event in since if event["loss"] is not None]
        evaluation = evaluated.get(step, {})
        rows.append(
            Evaluation(
                step=step,
                epoch=step / steps_per_epoch,
                epochs=epochs,
                train_loss=sum(losses) / len(losses) if losses else None,
                loss=evaluation.get("loss"),
                metric=metric,
                value=evaluation.get(metric),
                learning_rate=trained.get(step, {}).get("learning_rate"),
                is_best=step == best_step,
            )
        )
        previous = step
    return rows


def due_steps(last: int, total: int, interval: int) -> list[int]:
    """List the steps after which an evaluation is due.

    Args:
        last: Last step that was taken.
        total: Steps of the whole run; one is due after the last of them.
        interval: Steps from one evaluation to the next.

    Returns:
        Steps, ascending, at most `last`.
    """
    steps = list(range(interval, last + 1, interval))
    return steps if last in (0, *steps[-1:]) or last != total else [*steps, last]


def make_table(evaluations: Sequence[Evaluation], most: int = 20) -> list[list[str]]:
    """Make the table of a run's evaluations; of many, some at equal distances and the best.

    Args:
        evaluations: As list_evaluations() gives them.
        most: Number of rows, the best and the last not counted.

    Returns:
        Rows of cells, the first with the names of the columns; empty without evaluations.
    """
    # The start of a run that fits its head alone has neither loss.
    evaluations = [e for e in evaluations if e.train_loss is not None or e.loss is not None]
    if not evaluations:
        return []
    # A terminal shows some thirty lines; a run may have hundreds of epochs.
    stride = -(-len(evaluations) // most)
    shown = [
        evaluation
        for index, evaluation in enumerate(evaluations, 1)
        if index % stride == 0 or evaluation.is_best or index == len(evaluations)
    ]
    validated = any(evaluation.loss is not None for evaluation in evaluations)
    metric = evaluations[0].metric
    head = ["epoch", "training loss"]
    if validated:
        head += ["validation loss", *([metric] if metric != "loss" else []), ""]
    rows = [head]
    for evaluation in shown:
        cells = [_short(evaluation.epoch), _number(evaluation.train_loss)]
        if validated:
            cells.append(_number(evaluation.loss))
            cells += [_number(evaluation.value)] if metric != "loss" else []
            cells.append("best" if evaluation.is_best else "")
        rows.append(cells)
    return rows


def format_seconds(seconds: float) -> str:
    """Format a duration in its two largest units.

    Args:
        seconds: The duration.

    Returns:
        Text such as "8 s", "1 min 20 s" or "2 h 5 min".
    """
    whole = max(round(seconds), 0)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _short(epoch: float) -> str:
    """Format a number of epochs, without a decimal where it is whole."""
    return f"{epoch:.0f}" if abs(epoch - round(epoch)) < 1e-6 else f"{epoch:.2f}"


def _number(value: float | None) -> str:
    """Format a loss or a metric."""
    if value is None:
        return "undefined"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"
