"""Pictures of answers and of what a model looks at; each function returns a matplotlib Figure.

How data flows: photos are decoded upright as for the model; maps of patches (explain/) are laid
over the part of the photo that the model saw (ImageProcessor.visible_box). save() writes a
figure whole or not at all, the same bytes each time.

No pyplot: nothing is kept open, and no display is asked for. Colours are Okabe and Ito's and
viridis, which the colour-blind can tell apart. Needs `pip install 'vitlib[plot]'`.

Shapes: h w patches, H W the photo's pixels, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitlib.errors import ConfigError
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.plots.draw import (
    BLUE,
    DPI,
    GRAY,
    INK,
    ORANGE,
    WIDTH,
    check_map,
    clip_outliers,
    colorize,
    decode_upright,
    ignore_in_layout,
    new_figure,
    photo_figure,
    place_map,
    scale_map,
    shorten,
    show_image,
    visible_box,
)
from vitlib.scores import Prediction
from vitlib.system.atomic import check_writable, open_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
ROWS = 512  # of a photo at a time: what is laid over it takes many times its memory


def labels(
    photo: ImageLike,
    predictions: Sequence[Prediction],
    *,
    threshold: float | None = None,
    numbers: bool = False,
    title: str = "",
    processor: ImageProcessor | None = None,
) -> Figure:
    """The photo above, below it each label with its score over a bar; with a threshold, a line at
    it, and bars under it in gray.

    numbers: the scores are those of a regression: bars from 0, on an axis as long as they are.
    processor: whose levels say how a deep picture is shown.
    """
    shown = decode_upright(photo, processor)
    height = min(max(WIDTH * shown.height / shown.width, 1.5), 8.0)
    rows = max(len(predictions), 1)
    figure = new_figure(WIDTH, height + 0.42 * rows + 0.5)
    top, bottom = figure.subplots(2, 1, height_ratios=[height, 0.42 * rows + 0.3])
    show_image(top, shown, title)
    if not predictions:
        bottom.axis("off")
        bottom.text(0, 0.5, "no label scores enough", color=INK, fontsize=11)
        return figure
    places = np.arange(rows)
    scores = [p.score for p in predictions]
    low, high = (min(*scores, 0.0), max(*scores, 0.0)) if numbers else (0.0, 1.0)
    high = high if high > low else low + 1.0
    below = [threshold is not None and score < threshold for score in scores]
    bottom.barh(places + 0.22, scores, color=[GRAY if b else BLUE for b in below], height=0.4)
    for place, prediction in zip(places, predictions, strict=True):
        name = shorten(prediction.label, WIDTH - 1.2, 10)
        score = f"{prediction.score:{'.6g' if numbers else '.3f'}}"
        ignore_in_layout(bottom.text(low, place - 0.03, name, va="bottom", fontsize=10, color=INK))
        ignore_in_layout(
            bottom.text(high, place - 0.03, score, va="bottom", ha="right", fontsize=10)
        )
    if threshold is not None:
        bottom.axvline(threshold, color=ORANGE, linestyle="--", linewidth=1.2)
    xlabel = "value" if numbers else "score"
    bottom.set(xlim=(low, high), ylim=(rows - 0.5, -0.5), yticks=[], xlabel=xlabel)
    bottom.spines[["top", "right", "left"]].set_visible(False)
    bottom.tick_params(labelsize=8)
    return figure


def overlay(
    photo: ImageLike,
    values: npt.ArrayLike,
    *,
    processor: ImageProcessor | None = None,
    patch_size: tuple[int, int] | None = None,
    strength: float = 0.6,
) -> Figure:
    """A map (h, w), or any finer one, over the photo, upright and of its own size in pixels.

    processor: whose pixels the map is of: what it cut away stays without colour. patch_size: of a
    map of patches, their (height, width) in pixels: where the image is no multiple of it, the rest
    after the last whole patch stays without colour too. The weakest place is dark and the strongest
    bright (viridis); strength: how much of the photo it hides, 0..1.
    """
    image = decode_upright(photo, processor)
    grid, box = scale_map(clip_outliers(values)), visible_box(image, processor, patch_size)
    table = np.round(colorize(np.arange(256) / 255)[:, :3] * 255)
    pixels = np.asarray(image).copy()
    for start in range(0, image.height, ROWS):
        laid = place_map(grid, box, image.size, smooth=True, rows=range(start, start + ROWS))
        there = np.isfinite(laid)
        colours = table[np.round(laid[there] * 255).astype(np.uint8)]
        some = pixels[start : start + ROWS]
        some[there] = np.round((1 - strength) * some[there] + strength * colours)
    return photo_figure(Image.fromarray(pixels))


def mask(
    photo: ImageLike,
    kept: npt.ArrayLike,
    *,
    processor: ImageProcessor | None = None,
    patch_size: tuple[int, int] | None = None,
) -> Figure:
    """The patches of a mask (h, w) as they are, the others dark; what of the photo the model did
    not see fades to white. processor, patch_size: as overlay's."""
    image = decode_upright(photo, processor)
    grid, box = check_map(kept), visible_box(image, processor, patch_size)
    pixels = np.asarray(image).copy()
    for start in range(0, image.height, ROWS):
        laid = place_map(grid, box, image.size, smooth=False, rows=range(start, start + ROWS))
        some = pixels[start : start + ROWS]
        dim, unseen = laid <= 0.5, np.isnan(laid)
        some[dim] //= 4
        some[unseen] = 255 - (255 - some[unseen]) // 4
    return photo_figure(Image.fromarray(pixels))


def heads(
    maps: npt.ArrayLike,
    photo: ImageLike | None = None,
    *,
    layer_numbers: Sequence[int] | None = None,
    head_numbers: Sequence[int] | None = None,
    processor: ImageProcessor | None = None,
    patch_size: tuple[int, int] | None = None,
    title: str = "",
) -> Figure:
    """Attention maps (L, heads, h, w), each on its own scale: a row a layer, a column a head, or
    the other way round where that is wider; above them what of the photo the model saw.

    layer_numbers, head_numbers: what to call them; None: from 0. processor, patch_size: as
    overlay's.
    """
    grid = np.asarray(maps, np.float64)
    if grid.ndim != 4 or 0 in grid.shape:
        raise ConfigError(f"maps of shape {grid.shape}: expected (layers, heads, h, w), all there")
    ticks = [
        list(range(count) if given is None else given)
        for given, count in zip((layer_numbers, head_numbers), grid.shape[:2], strict=True)
    ]
    if [len(names) for names in ticks] != list(grid.shape[:2]):
        raise ConfigError(f"numbers {ticks} for maps of shape {grid.shape}: expected one each")
    names = ["layer", "head"]
    if grid.shape[0] > grid.shape[1]:
        grid, names, ticks = grid.swapaxes(0, 1), names[::-1], ticks[::-1]
    sheet, tall, wide = tiles(grid)
    height = WIDTH * sheet.shape[0] / sheet.shape[1]
    if photo is None:
        figure = new_figure(WIDTH, height + 0.6)
        axes = figure.subplots()
    else:
        image = decode_upright(photo, processor)
        top, left, bottom, right = visible_box(image, processor, patch_size)
        image = image.crop((round(left), round(top), round(right), round(bottom)))
        above = min(2.5, WIDTH * image.height / image.width)
        figure = new_figure(WIDTH, height + above + 0.8)
        first, axes = figure.subplots(2, 1, height_ratios=[above, height])
        show_image(first, image)
    axes.imshow(sheet)
    for axis, count, step, told in zip(
        (axes.yaxis, axes.xaxis), grid.shape[:2], (tall, wide), ticks, strict=True
    ):
        every = math.ceil(count / 24)
        axis.set_ticks(
            [step * i + step / 2 for i in range(0, count, every)], list(map(str, told[::every]))
        )
    axes.set(ylabel=names[0], xlabel=names[1], title=title)
    axes.tick_params(length=0, labelsize=7)
    axes.spines[:].set_visible(False)
    return figure


def tiles(grid: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], int, int]:
    """(rows, columns, h, w) -> one picture of them all, white between, and the pixels of a step
    down and across. A hundred axes would take seconds to draw."""
    rows, columns, h, w = grid.shape
    side = max(math.ceil(WIDTH * 2 * DPI / columns / max(h, w)), 1)
    gap = max(round(columns * w * side / 300), 2)  # two pixels of the picture
    tall, wide = h * side + gap, w * side + gap
    sheet = np.ones((rows * tall - gap, columns * wide - gap, 3))
    for row in range(rows):
        for column in range(columns):
            large = np.kron(scale_map(grid[row, column]), np.ones((side, side)))
            y, x = row * tall, column * wide
            sheet[y : y + h * side, x : x + w * side] = colorize(large)[..., :3]
    return sheet, tall, wide


def patch_pca(
    photo: ImageLike,
    components: npt.ArrayLike,
    *,
    processor: ImageProcessor | None = None,
    patch_size: tuple[int, int] | None = None,
) -> Figure:
    """The photo, and beside it the first three components (h, w, 3), 0..1, as red, green, blue.

    processor, patch_size: as overlay's.
    """
    image, colours = decode_upright(photo, processor), np.asarray(components, np.float64)
    if colours.ndim != 3 or colours.shape[2] != 3:
        raise ConfigError(f"components of shape {colours.shape}: expected (h, w, 3)")
    height = min(max(WIDTH / 2 * image.height / image.width, 0.8), 9.0)
    figure = new_figure(WIDTH, height + 0.4)
    left, right = figure.subplots(1, 2)
    show_image(left, image)
    box, size = visible_box(image, processor, patch_size), image.size
    planes = [place_map(colours[..., i], box, size, smooth=False) for i in range(3)]
    show_image(right, np.nan_to_num(np.dstack(planes), nan=1.0), "patch PCA")
    return figure


def similarity(
    photo: ImageLike,
    values: npt.ArrayLike,
    patch: tuple[int, int] | None = None,
    *,
    processor: ImageProcessor | None = None,
    patch_size: tuple[int, int] | None = None,
) -> Figure:
    """Cosines (h, w) over the photo, -1..1, with a scale; a cross on the patch asked about.

    processor, patch_size: as overlay's.
    """
    image, grid = decode_upright(photo, processor), check_map(values)
    if patch is not None and not all(0 <= p < n for p, n in zip(patch, grid.shape, strict=True)):
        raise ConfigError(f"patch={patch}: expected one of {grid.shape[0]}x{grid.shape[1]} patches")
    height = min(max(WIDTH * 0.85 * image.height / image.width, 1.5), 9.0)
    figure = new_figure(WIDTH, height + 0.2)
    axes = figure.subplots()
    show_image(axes, image)
    box = visible_box(image, processor, patch_size)
    laid = place_map(grid, box, image.size, smooth=True)
    shown = axes.imshow(
        np.ma.masked_invalid(laid), cmap="viridis", alpha=0.65,
        extent=(0, image.width, image.height, 0),
        vmin=min(float(grid.min()), 0.0), vmax=max(float(grid.max()), 1e-6),
    )  # fmt: skip
    figure.colorbar(shown, ax=axes, shrink=0.8, label="cosine")
    if patch is not None:
        (top, left, bottom, right), (h, w) = box, grid.shape
        y = top + (patch[0] + 0.5) * (bottom - top) / h
        x = left + (patch[1] + 0.5) * (right - left) / w
        axes.plot([x], [y], marker="x", color="white", markersize=14, markeredgewidth=4)
        axes.plot([x], [y], marker="x", color=ORANGE, markersize=13, markeredgewidth=2)
    return figure


def contact_sheet(
    photos: Sequence[ImageLike],
    captions: Sequence[str] | None = None,
    *,
    columns: int = 4,
    processor: ImageProcessor | None = None,
) -> Figure:
    """Small pictures of many photos, `columns` a row, each with its caption below.

    columns: 1 to 8. processor: as labels'.
    """
    if not photos:
        raise ConfigError("a contact sheet of no photos: give one or more")
    if captions is not None and len(captions) != len(photos):
        raise ConfigError(f"{len(captions)} captions for {len(photos)} photos: expected one each")
    columns = max(1, min(columns, len(photos), 8))
    rows, side, line = math.ceil(len(photos) / columns), WIDTH / columns, 0.25
    height = rows * (side + line)
    figure = new_figure(WIDTH, height)
    figure.set_layout_engine("none")
    pixels = round(side * 2 * DPI)
    for index, (photo, caption) in enumerate(
        zip(photos, captions or [""] * len(photos), strict=True)
    ):
        small = decode_upright(photo, processor)
        small.thumbnail((pixels, pixels))
        row, column = divmod(index, columns)
        bottom = height - row * (side + line) - side
        x, y, room = column * side + 0.03, bottom + 0.03, side - 0.06
        where = (x / WIDTH, y / height, room / WIDTH, room / height)
        show_image(figure.add_axes(where), small)
        figure.text(
            (column + 0.5) * side / WIDTH, (bottom - 0.02) / height,
            shorten(caption, side - 0.1, 8), ha="center", va="top", fontsize=8, color=INK,
        )  # fmt: skip
    return figure


def curves(shares: npt.ArrayLike, named: dict[str, npt.ArrayLike], ylabel: str) -> Figure:
    """Lines over shares 0..1, named at their ends: of deletion, of insertion."""
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
    """Write a figure, by its name's ending, whole or not at all; the same bytes each time.

    Raises ConfigError for an ending that is none of FORMATS, SourceError where it is not writable.
    """
    target = check_figure_path(path)
    kind = target.suffix.lower()
    # No date and no version: a picture made again is the same picture.
    about = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    from matplotlib import rc_context

    with open_atomic(target) as file, rc_context({"svg.hashsalt": "vitlib"}):
        figure.savefig(file, format=kind[1:], dpi=figure.dpi, metadata=about.get(kind))


def check_figure_path(path: str | Path) -> Path:
    """A path that save() could write to. Errors as there: to ask before the work is done."""
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise ConfigError(f"{target.name!r}: expected a name that ends in {', '.join(FORMATS)}")
    return check_writable(target)
