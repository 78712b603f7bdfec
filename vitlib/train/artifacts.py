"""What stands beside a trained model: its settings, its curves, its card."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import vitlib
from vitlib.errors import ConfigError
from vitlib.system.atomic import open_atomic
from vitlib.train.config import TrainConfig

if TYPE_CHECKING:
    from vitlib.train.loop import Trainer

logger = logging.getLogger("vitlib")
SETTINGS, CURVES, CARD = "train_config.yaml", "curves.png", "README.md"


def write_settings(out: Path, config: TrainConfig) -> None:
    """Every setting, resolved, as a file that `--config` reads."""
    lines = []
    for part, values in config.to_dict().items():
        lines.append(f"{part}:")
        # JSON is YAML, but for 1e-08, which YAML 1.1 takes for text, and config.py for a number.
        lines += [f"  {name}: {json.dumps(value)}" for name, value in values.items()]
    with open_atomic(out / SETTINGS) as file:
        file.write(("\n".join(lines) + "\n").encode())


def write_curves(fit: Trainer) -> None:
    """Loss over the steps, and what the validation set said; nothing without matplotlib."""
    from vitlib import plots
    from vitlib.plots import draw

    try:
        figure = draw.new_figure(draw.WIDTH, 5.2)
    except ConfigError as error:
        logger.warning("no %s: %s", CURVES, error)
        return
    trained = [e for e in fit.log.events if e["event"] == "train" and e["loss"] is not None]
    seen = [e for e in fit.log.events if e["event"] == "eval"]
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot([e["step"] for e in trained], [e["loss"] for e in trained],
               color=draw.GRAY, linewidth=0.8, label="training, each step")  # fmt: skip
    smooth = smoothed([e["loss"] for e in trained])
    above.plot([e["step"] for e in trained], smooth, color=draw.BLUE, label="training, smoothed")
    if seen:
        above.plot([e["step"] for e in seen], [e["loss"] for e in seen], "o--", markersize=3,
                   color=draw.ORANGE, label="validation")  # fmt: skip
        below.plot([e["step"] for e in seen], [e[fit.metric] for e in seen], "o-", markersize=3,
                   color=draw.ORANGE)  # fmt: skip
        if fit.now.best_step:
            below.axvline(fit.now.best_step, color=draw.INK, linestyle=":", linewidth=1)
            below.annotate(
                f"best {fit.now.best_value:.3f}", (fit.now.best_step, fit.now.best_value),
                textcoords="offset points", xytext=(4, -12), fontsize=8,
            )  # fmt: skip
        below.set_ylabel(fit.metric)
    else:
        below.plot([e["step"] for e in trained], [e["learning_rate"] for e in trained],
                   color=draw.BLUE)  # fmt: skip
        below.set_ylabel("learning rate")
    above.set_ylabel("loss")
    above.set_ylim(bottom=0)
    above.legend(frameon=False, fontsize=8)
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    plots.save(figure, fit.out / CURVES)


def smoothed(values: list[float], share: float = 0.9) -> list[float]:
    """Each value with those before it, which count less and less."""
    found: list[float] = []
    total = weight = 0.0
    for value in values:
        total, weight = share * total + value, share * weight + 1
        found.append(total / weight)
    return found


def write_card(fit: Trainer, about: dict[str, Any], left_out: int) -> None:
    """A model card: what it is, of what data and settings, how good."""
    now, events = fit.now, fit.log.events
    best = now.best_step or now.step
    seen = [e for e in events if e["event"] == "eval" and e["step"] == best]
    kind = "several labels a photo" if about["multi_label"] else "one label a photo"
    title = f"A photo classifier of {len(about['labels'])} classes"
    table = ["| label | training photos |", "|---|---|"]
    table += [f"| {clean(label)} | {count} |" for label, count in fit.training.counts().items()]
    if fit.training.regression:
        kind, title = "regression", f"What gives {len(about['labels'])} numbers of a photo"
        table = _outputs(fit)
    training, held = about["training"], about["validation"]
    lines = [
        "---", "library_name: vitlib", "pipeline_tag: image-classification", "---", "",
        f"# {title}", "",
        f"{clean(about['model'])}, trained for {kind} with vitlib {vitlib.__version__}.", "",
        *table, "",
        f"Training set: {training['photos']} photos. "
        + (f"Validation set: {held['photos']} photos." if held else "No validation set."),
    ]  # fmt: skip
    if left_out:
        lines[-1] += f" Of both, {left_out} could not be read or used, and took no part."
    if seen:
        lines += ["", f"On the validation set, which chose step {best} of {fit.order.total} by "
                  f"{fit.metric}:", "", "| metric | value |", "|---|---|"]  # fmt: skip
        skip = ("event", "step", "epoch", "seconds")
        lines += [
            f"| {k} | {v:.4f} |" for k, v in seen[-1].items() if k not in skip and v is not None
        ]
    lines += [
        "", "```python", "import vitlib", "",
        'vit = vitlib.Predictor.load("this folder")', 'vit.classify("photo.jpg")', "```", "",
        f"Settings: `{SETTINGS}`; history: `metrics.jsonl`, `metrics.csv`, `{CURVES}`.", "",
    ]  # fmt: skip
    with open_atomic(fit.out / CARD) as file:
        file.write("\n".join(lines).encode("utf-8", "backslashreplace"))


def _outputs(fit: Trainer) -> list[str]:
    """The card's table of a regression: its outputs, and what the training photos have."""
    values = fit.training.targets().astype(np.float64)
    columns = (values.mean(axis=0), values.min(axis=0), values.max(axis=0))
    rows = zip(fit.training.labels, *columns, strict=True)
    return [
        "| output | mean | least | greatest |", "|---|---|---|---|",
        *(f"| {clean(name)} | {a:.6g} | {b:.6g} | {c:.6g} |" for name, a, b, c in rows),
    ]  # fmt: skip


def clean(text: str) -> str:
    """Text of a data set, as Markdown may have it."""
    kept = "".join(c if c.isprintable() else "?" for c in text)
    return kept.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`")
