"""Files beside a trained model: its settings, its curves and its model card."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import vitlib
from vitlib.data import LabelledPhotos
from vitlib.data.write_list import TRAINING_LIST, VALIDATION_LIST, write_list
from vitlib.errors import ConfigError, count_noun
from vitlib.metrics import PRIMARY
from vitlib.system.atomic import open_atomic
from vitlib.train.config import TrainConfig

if TYPE_CHECKING:
    from vitlib.train.loop import Trainer

logger = logging.getLogger("vitlib")
SETTINGS, CURVES, CARD = "train_config.yaml", "curves.png", "README.md"
_NO_METRICS = ("event", "step", "epoch", "seconds", "folds")  # keys of an event


def write_settings(out: Path, config: TrainConfig) -> None:
    """Write every setting as a file that `--config` reads.

    Args:
        out: Folder of the run.
        config: Its settings.
    """
    lines = []
    for part, values in config.to_dict().items():
        lines.append(f"{part}:")
        # JSON is YAML, but for 1e-08, which YAML 1.1 takes for text, and config.py for a number.
        lines += [f"  {name}: {json.dumps(value)}" for name, value in values.items()]
    with open_atomic(out / SETTINGS) as file:
        file.write(("\n".join(lines) + "\n").encode())


def write_lists(out: Path, training: LabelledPhotos, held_out: LabelledPhotos | None) -> None:
    """Write the photos of the run as lists, which `vitlib evaluate` takes and recognises.

    Args:
        out: Folder of the run.
        training: The training set.
        held_out: The validation set, or None.
    """
    write_list(training, out, TRAINING_LIST)
    if held_out is not None:
        write_list(held_out, out, VALIDATION_LIST)


def select_readable(trainer: Trainer) -> tuple[LabelledPhotos, LabelledPhotos | None]:
    """Select the photos that took part.

    Args:
        trainer: A finished run.

    Returns:
        The training and the validation set, without photos that could not be read.
    """

    def without(photos: LabelledPhotos, errors: Mapping[int, str]) -> LabelledPhotos:
        return photos.subset(index for index in range(len(photos)) if index not in errors)

    held_out, state = trainer.validation, trainer.state
    training = without(trainer.training, state.train_errors)
    return training, None if held_out is None else without(held_out, state.eval_errors)


def evaluation_metrics(trainer: Trainer) -> dict[str, float]:
    """Return the metrics of the best checkpoint on the validation set.

    Args:
        trainer: A finished run.

    Returns:
        Metrics by name; empty without a validation set.
    """
    return _read_metrics(trainer, "eval", trainer.state.best_or_last)


def fold_metrics(trainer: Trainer) -> dict[str, float]:
    """Return the metrics of linear heads on the folds of the training photos that they did not see.

    Args:
        trainer: A finished run.

    Returns:
        Metrics by name; empty with a validation set, or if no head was fitted.
    """
    return _read_metrics(trainer, "probe", 0)


def _read_metrics(trainer: Trainer, kind: str, step: int) -> dict[str, float]:
    """Return the metrics of an event of the log."""
    events = [e for e in trainer.log.events if e["event"] == kind and e["step"] == step]
    return {k: v for k, v in events[-1].items() if k not in _NO_METRICS} if events else {}


def write_curves(trainer: Trainer) -> None:
    """Draw the loss over the steps, and the metric of the validation set or the learning rate.

    A run without steps has no curves. Without matplotlib a warning is logged, and nothing is
    written.

    Args:
        trainer: A finished run.
    """
    from vitlib import plots
    from vitlib.plots import draw

    if not trainer.state.step:
        return
    try:
        figure = draw.new_figure(draw.WIDTH, 5.2)
    except ConfigError as error:
        logger.warning("no %s: %s", CURVES, error)
        return
    events, state, metric = trainer.log.events, trainer.state, trainer.metric
    train = [e for e in events if e["event"] == "train" and e["loss"] is not None]
    evaluations = [e for e in events if e["event"] == "eval"]
    steps, losses = [e["step"] for e in train], [e["loss"] for e in train]
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(steps, losses, color=draw.GRAY, linewidth=0.8, label="training loss")
    top.plot(steps, smooth(losses), color=draw.BLUE, label="training loss, smoothed")
    if evaluations:
        eval_steps = [e["step"] for e in evaluations]
        top.plot(eval_steps, [e["loss"] for e in evaluations], "o--", markersize=3,
                 color=draw.ORANGE, label="validation loss")  # fmt: skip
        bottom.plot(eval_steps, [e[metric] for e in evaluations], "o-", markersize=3,
                    color=draw.ORANGE)  # fmt: skip
        if state.best_step is not None:
            bottom.axvline(state.best_step, color=draw.INK, linestyle=":", linewidth=1)
            bottom.annotate(
                f"best {state.best_metric:.3f}", (state.best_step, state.best_metric),
                textcoords="offset points", xytext=(4, -12), fontsize=8,
            )  # fmt: skip
        bottom.set_ylabel(f"validation {metric}")
    else:
        bottom.plot(steps, [e["learning_rate"] for e in train], color=draw.BLUE)
        bottom.set_ylabel("learning rate")
    top.set_ylabel("loss")
    top.set_ylim(bottom=0)
    top.legend(frameon=False, fontsize=8)
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    plots.save(figure, trainer.out / CURVES)


def smooth(values: list[float], decay: float = 0.9) -> list[float]:
    """Compute an exponential moving average, corrected for its start.

    Args:
        values: A series.
        decay: Weight of the past, 0 to 1.

    Returns:
        As many averages.
    """
    averages: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        averages.append(total / weight)
    return averages


def write_card(trainer: Trainer, description: dict[str, Any], left_out: int) -> None:
    """Write a model card: the model, its data and settings, and its metrics.

    Args:
        trainer: A finished run.
        description: The content of run.json.
        left_out: Number of photos that could not be used.
    """
    metrics = evaluation_metrics(trainer)
    num_labels = len(description["labels"])
    task = "several labels a photo" if description["multi_label"] else "one label a photo"
    title = f"Image classification, {count_noun(num_labels, 'class')}"
    table = ["| label | training photos |", "|---|---|"]
    training, validation = select_readable(trainer)
    table += [f"| {escape(label)} | {n} |" for label, n in training.counts().items()]
    if trainer.training.regression:
        task, title = "regression", f"Image regression, {count_noun(num_labels, 'output')}"
        table = _output_table(trainer)
    lines = [
        "---", "library_name: vitlib", "pipeline_tag: image-classification", "---", "",
        f"# {title}", "",
        f"{escape(description['model'])}, trained for {task} with vitlib {vitlib.__version__}.", "",
        *table, "",
        f"Training set: {count_noun(len(training), 'photo')}. "
        + ("No validation set." if validation is None
           else f"Validation set: {count_noun(len(validation), 'photo')}."),
    ]  # fmt: skip
    if left_out:
        lines[-1] += f" {left_out} more could not be read or used, and took no part."
    folds = fold_metrics(trainer)
    if folds:
        primary = PRIMARY[trainer.training.task]
        value = f"{primary} {folds[primary]:.4f}"
        lines[-1] += f" Linear heads on frozen features, of folds that they did not see: {value}."
    if metrics:
        best = trainer.state.best_or_last
        lines += [
            "",
            f"Metrics of the validation set, which chose step {best} of "
            f"{trainer.sampler.total_steps} by {trainer.metric}:",
            "", "| metric | value |", "|---|---|",
            *(f"| {k} | {v:.4f} |" for k, v in metrics.items() if v is not None),
        ]  # fmt: skip
    lines += [
        "", "```python", "import vitlib", "",
        'vit = vitlib.Predictor.load("this folder")', 'vit.classify("photo.jpg")', "```", "",
        f"Settings: `{SETTINGS}`; history: `metrics.jsonl`, `metrics.csv`"
        + (f", `{CURVES}`." if trainer.state.step else "."), "",
    ]  # fmt: skip
    with open_atomic(trainer.out / CARD) as file:
        file.write("\n".join(lines).encode("utf-8", "backslashreplace"))


def _output_table(trainer: Trainer) -> list[str]:
    """Return the card's table of a regression: outputs, and the range of their targets."""
    values = trainer.training.targets().astype(np.float64)
    columns = (values.mean(axis=0), values.min(axis=0), values.max(axis=0))
    rows = zip(trainer.training.labels, *columns, strict=True)
    return [
        "| output | mean | min | max |", "|---|---|---|---|",
        *(f"| {escape(name)} | {a:.6g} | {b:.6g} | {c:.6g} |" for name, a, b, c in rows),
    ]  # fmt: skip


def escape(text: str) -> str:
    """Escape text of a data set for Markdown.

    Args:
        text: Any text, such as a label.

    Returns:
        One line without active Markdown or HTML.
    """
    printable = "".join(c if c.isprintable() else "?" for c in text)
    escaped = printable.replace("\\", "\\\\").replace("|", "\\|")
    return escaped.replace("<", "&lt;").replace("`", "\\`")
