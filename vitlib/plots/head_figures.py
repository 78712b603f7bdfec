"""Figures of the attention of many heads, as tiles.

Shapes: h w patches, H W pixels of the figure, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vitlib.errors import ConfigError
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.plots.draw import (
    DPI,
    INK,
    WIDTH,
    colorize,
    decode_upright,
    new_figure,
    scale_map,
    shorten,
    show_image,
    visible_box,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    """Draw the attention maps of heads as tiles, each on its own scale.

    A row is a layer and a column a head, or the reverse where that is wider.

    Args:
        maps: Attention maps, (L, heads, h, w).
        photo: Photo to show above them, cropped to what the model sees; None shows no photo.
        layer_numbers: Numbers on the axis of layers; None counts from 0.
        head_numbers: Numbers on the axis of heads; None counts from 0.
        processor: The model's preprocessing; None means that the model sees the whole photo.
        patch_size: Pixels (height, width) of a patch.
        title: Text above the tiles.

    Returns:
        The figure.

    Raises:
        ConfigError: The maps or numbers do not match, or matplotlib is not installed.
        ImageError: The photo cannot be decoded.
    """
    grid = np.asarray(maps, np.float64)
    if grid.ndim != 4 or 0 in grid.shape:
        raise ConfigError(f"maps of shape {grid.shape}: expected (layers, heads, h, w), all there")
    ticks = [
        list(range(count) if numbers is None else numbers)
        for numbers, count in zip((layer_numbers, head_numbers), grid.shape[:2], strict=True)
    ]
    if [len(names) for names in ticks] != list(grid.shape[:2]):
        raise ConfigError(f"numbers {ticks} for maps of shape {grid.shape}: expected one each")
    names = ["layer", "head"]
    if grid.shape[0] > grid.shape[1]:
        grid, names, ticks = grid.swapaxes(0, 1), names[::-1], ticks[::-1]
    sheet, tall, wide = tiles(grid)
    height = WIDTH * sheet.shape[0] / sheet.shape[1]
    if photo is None:
        figure = new_figure(WIDTH, height + 1.1)
        axes = figure.subplots()
    else:
        image = decode_upright(photo, processor)
        top, left, bottom, right = visible_box(image, processor, patch_size)
        image = image.crop((round(left), round(top), round(right), round(bottom)))
        above = min(2.5, WIDTH * image.height / image.width)
        figure = new_figure(WIDTH, height + above + 1.3)
        first, axes = figure.subplots(2, 1, height_ratios=[above, height])
        show_image(first, image)
    axes.imshow(sheet)
    for axis, count, step, numbers in zip(
        (axes.yaxis, axes.xaxis), grid.shape[:2], (tall, wide), ticks, strict=True
    ):
        every = math.ceil(count / 24)
        axis.set_ticks(
            [step * i + step / 2 for i in range(0, count, every)], list(map(str, numbers[::every]))
        )
    axes.set(ylabel=names[0], xlabel=names[1])
    if title:
        figure.suptitle(shorten(title, WIDTH - 0.2, 10), fontsize=10, color=INK)
    axes.tick_params(length=0, labelsize=7)
    axes.spines[:].set_visible(False)
    _draw_tile_scale(figure, axes)
    return figure


def _draw_tile_scale(figure: Figure, axes: Axes) -> None:
    """Draw the scale that all tiles share, whose ends differ from tile to tile."""
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(
        ScalarMappable(cmap="viridis"), ax=axes, orientation="horizontal", shrink=0.6, aspect=40,
        pad=0.02, ticks=[0, 1],
    )  # fmt: skip
    bar.set_ticklabels(["least attention of a tile", "most"], fontsize=8)
    bar.ax.tick_params(length=0)
    bar.outline.set_linewidth(0.5)


def tiles(grid: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], int, int]:
    """Tile maps into one image, with white gaps: a hundred axes would take seconds to draw.

    Args:
        grid: Maps, (rows, columns, h, w).

    Returns:
        The image (H, W, 3), 0..1, and the pixels from one tile to the next, down and across.
    """
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
