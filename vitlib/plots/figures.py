"""Figures of predictions, photos and curves, and how a figure is saved.

Each function that draws returns a matplotlib Figure. save() writes it atomically, and the same
bytes each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vitlib.errors import ConfigError
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.plots.draw import (
    BLUE,
    GRAY,
    INK,
    ORANGE,
    WIDTH,
    decode_upright,
    ignore_in_layout,
    new_figure,
    shorten,
    show_image,
)
from vitlib.plots.panel import resize_for_display
from vitlib.scores import Prediction
from vitlib.system.atomic import check_writable, open_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The suffixes of files that a figure can be written to.
FORMATS = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")


def labels(
    photo: ImageLike,
    predictions: Sequence[Prediction],
    *,
    threshold: float | None = None,
    numbers: bool = False,
    title: str = "",
    processor: ImageProcessor | None = None,
) -> Figure:
    """Draw the photo, and below it a bar of each label's score.

    Args:
        photo: Path, bytes, PIL image or array.
        predictions: Labels and scores, in the order to draw.
        threshold: Draw a line at this score, and lower bars in gray.
        numbers: The scores are outputs of a regression: the axis spans them and 0.
        title: Text above the photo.
        processor: The model's preprocessing, whose levels state the white of deep images.

    Returns:
        The figure.

    Raises:
        ConfigError: matplotlib is not installed.
        ImageError: The photo cannot be decoded.
    """
    shown = decode_upright(photo, processor)
    height = min(max(WIDTH * shown.height / shown.width, 1.5), 8.0)
    rows = max(len(predictions), 1)
    figure = new_figure(WIDTH, height + 0.42 * rows + 0.5)
    top, bottom = figure.subplots(2, 1, height_ratios=[height, 0.42 * rows + 0.3])
    show_image(top, resize_for_display(shown), shorten(title, WIDTH - 0.2, 10, middle=True))
    if not predictions:
        bottom.axis("off")
        bottom.text(0, 0.5, "no label scores enough", color=INK, fontsize=11)
        return figure
    positions = np.arange(rows)
    scores = [p.score for p in predictions]
    low, high = (min(*scores, 0.0), max(*scores, 0.0)) if numbers else (0.0, 1.0)
    high = high if high > low else low + 1.0
    below = [threshold is not None and score < threshold for score in scores]
    bottom.barh(positions + 0.22, scores, color=[GRAY if b else BLUE for b in below], height=0.4)
    for y, prediction in zip(positions, predictions, strict=True):
        name = shorten(prediction.label, WIDTH - 1.2, 10)
        score = f"{prediction.score:{'.6g' if numbers else '.3f'}}"
        # Labels lie over the bars, not beside them: long names need no margin.
        ignore_in_layout(bottom.text(low, y - 0.03, name, va="bottom", fontsize=10, color=INK))
        ignore_in_layout(bottom.text(high, y - 0.03, score, va="bottom", ha="right", fontsize=10))
    if threshold is not None:
        bottom.axvline(threshold, color=ORANGE, linestyle="--", linewidth=1.2)
    xlabel = "value" if numbers else "score"
    bottom.set(xlim=(low, high), ylim=(rows - 0.5, -0.5), yticks=[], xlabel=xlabel)
    bottom.spines[["top", "right", "left"]].set_visible(False)
    bottom.tick_params(labelsize=8)
    return figure


def curves(shares: npt.ArrayLike, named: dict[str, npt.ArrayLike], ylabel: str) -> Figure:
    """Draw curves over shares of the patches, such as deletion and insertion.

    Args:
        shares: Shares of the patches, (S,), 0..1.
        named: Name of each curve to its values, (S,).
        ylabel: Label of the vertical axis.

    Returns:
        The figure.

    Raises:
        ConfigError: There is no curve, lengths differ, or matplotlib is not installed.
    """
    lengths = {len(np.atleast_1d(np.asarray(line))) for line in (shares, *named.values())}
    if not named or len(lengths) != 1:
        raise ConfigError(f"lines of lengths {sorted(lengths)}: expected one or more, all alike")
    figure = new_figure(WIDTH, 3.6)
    axes = figure.subplots()
    styles = ("-", "--", ":", "-.")
    for index, (name, values) in enumerate(named.items()):
        colour = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#000000")[index % 6]
        axes.plot(
            shares,
            values,
            styles[index % 4],
            color=colour,
            label=shorten(name, 2.2, 9),
            linewidth=1.8,
        )
    axes.set(xlim=(0, 1), ylim=(0, None), xlabel="share of the patches", ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure atomically; the same figure gives the same bytes.

    Args:
        figure: The figure.
        path: File to write; its suffix chooses the format.

    Raises:
        ConfigError: The suffix is not in FORMATS.
        SourceError: The file cannot be written.
    """
    target = check_figure_path(path)
    kind = target.suffix.lower()
    # Without date and version, the bytes depend on the figure alone.
    metadata = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    from matplotlib import rc_context

    with open_atomic(target) as file, rc_context({"svg.hashsalt": "vitlib"}):
        figure.savefig(file, format=kind[1:], dpi=figure.dpi, metadata=metadata.get(kind))


def check_figure_path(path: str | Path) -> Path:
    """Check that save() can write to a path, before the work is done.

    Args:
        path: File to write; its suffix chooses the format.

    Returns:
        The path.

    Raises:
        ConfigError: The suffix is not in FORMATS.
        SourceError: The file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise ConfigError(f"{target.name!r}: expected a name that ends in {', '.join(FORMATS)}")
    return check_writable(target)
