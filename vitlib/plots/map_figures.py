"""Figures of explanations: maps of patches over photos; each function returns a matplotlib Figure.

How data flows: photos are decoded upright, as for the model. Maps of patches (explain/) are drawn
over the part of the photo that the model sees (ImageProcessor.visible_box).

Shapes: h w patches, H W the photo's pixels, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitlib.errors import ConfigError
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.plots.draw import (
    DPI,
    ORANGE,
    WIDTH,
    check_map,
    clip_outliers,
    colorize,
    decode_upright,
    new_figure,
    photo_figure,
    resample_map,
    scale_map,
    show_image,
    visible_box,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = 512  # rows of a photo in a step: its map as float64 takes many times the photo's memory


def overlay(
    photo: ImageLike,
    values: npt.ArrayLike,
    *,
    processor: ImageProcessor | None = None,
    patch_size: tuple[int, int] | None = None,
    strength: float = 0.6,
) -> Figure:
    """Draw a map over the photo, in viridis: low values are dark, high ones bright.

    Args:
        photo: Path, bytes, PIL image or array.
        values: Map of patches (h, w), or of any finer grid.
        processor: The model's preprocessing. What it crops away gets no colour; None means that the
            model sees the whole photo.
        patch_size: Pixels (height, width) of a patch, for a map of patches. The rest after the last
            whole patch gets no colour, either.
        strength: Opacity of the map, 0..1.

    Returns:
        The figure, of the photo's size in pixels.

    Raises:
        ConfigError: The values are not a map, or matplotlib is not installed.
        ImageError: The photo cannot be decoded.
    """
    image = decode_upright(photo, processor)
    grid, box = scale_map(clip_outliers(values)), visible_box(image, processor, patch_size)
    # 256 colours suffice: the photo's pixels are uint8.
    table = np.round(colorize(np.arange(256) / 255)[:, :3] * 255)
    pixels = np.asarray(image).copy()
    for start in range(0, image.height, ROWS):
        rows = resample_map(grid, box, image.size, smooth=True, rows=range(start, start + ROWS))
        inside = np.isfinite(rows)
        colours = table[np.round(rows[inside] * 255).astype(np.uint8)]
        part = pixels[start : start + ROWS]
        part[inside] = np.round((1 - strength) * part[inside] + strength * colours)
    return photo_figure(Image.fromarray(pixels))


def mask(
    photo: ImageLike,
    foreground: npt.ArrayLike,
    *,
    processor: ImageProcessor | None = None,
    patch_size: tuple[int, int] | None = None,
) -> Figure:
    """Draw the photo with the patches outside a mask darkened.

    What the model does not see fades to white.

    Args:
        photo: Path, bytes, PIL image or array.
        foreground: True for each patch of the mask, (h, w).
        processor: The model's preprocessing. What it crops away fades to white; None means that the
            model sees the whole photo.
        patch_size: Pixels (height, width) of a patch, for a map of patches. The rest after the last
            whole patch fades, too.

    Returns:
        The figure, of the photo's size in pixels.

    Raises:
        ConfigError: The mask is not a map, or matplotlib is not installed.
        ImageError: The photo cannot be decoded.
    """
    image = decode_upright(photo, processor)
    grid, box = check_map(foreground), visible_box(image, processor, patch_size)
    pixels = np.asarray(image).copy()
    for start in range(0, image.height, ROWS):
        rows = resample_map(grid, box, image.size, smooth=False, rows=range(start, start + ROWS))
        part = pixels[start : start + ROWS]
        background, outside = rows <= 0.5, np.isnan(rows)
        part[background] //= 4
        part[outside] = 255 - (255 - part[outside]) // 4
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
    for axis, count, step, numbers in zip(
        (axes.yaxis, axes.xaxis), grid.shape[:2], (tall, wide), ticks, strict=True
    ):
        every = math.ceil(count / 24)
        axis.set_ticks(
            [step * i + step / 2 for i in range(0, count, every)], list(map(str, numbers[::every]))
        )
    axes.set(ylabel=names[0], xlabel=names[1], title=title)
    axes.tick_params(length=0, labelsize=7)
    axes.spines[:].set_visible(False)
    return figure


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


def patch_pca(
    photo: ImageLike,
    components: npt.ArrayLike,
    *,
    processor: ImageProcessor | None = None,
    patch_size: tuple[int, int] | None = None,
) -> Figure:
    """Draw the photo next to the first three components of its patches, as red, green and blue.

    Args:
        photo: Path, bytes, PIL image or array.
        components: Components, (h, w, 3), 0..1.
        processor: The model's preprocessing. What it crops away gets no colour; None means that the
            model sees the whole photo.
        patch_size: Pixels (height, width) of a patch, for a map of patches. The rest after the last
            whole patch gets no colour, either.

    Returns:
        The figure.

    Raises:
        ConfigError: The components have another shape, or matplotlib is not installed.
        ImageError: The photo cannot be decoded.
    """
    image, colours = decode_upright(photo, processor), np.asarray(components, np.float64)
    if colours.ndim != 3 or colours.shape[2] != 3:
        raise ConfigError(f"components of shape {colours.shape}: expected (h, w, 3)")
    height = min(max(WIDTH / 2 * image.height / image.width, 0.8), 9.0)
    figure = new_figure(WIDTH, height + 0.4)
    left, right = figure.subplots(1, 2)
    show_image(left, image)
    box, size = visible_box(image, processor, patch_size), image.size
    planes = [resample_map(colours[..., i], box, size, smooth=False) for i in range(3)]
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
    """Draw cosine similarities over the photo, with a scale.

    Args:
        photo: Path, bytes, PIL image or array.
        values: Cosines, (h, w), -1..1.
        patch: Row and column of the patch that is compared, marked by a cross; None draws none.
        processor: The model's preprocessing. What it crops away gets no colour; None means that the
            model sees the whole photo.
        patch_size: Pixels (height, width) of a patch, for a map of patches. The rest after the last
            whole patch gets no colour, either.

    Returns:
        The figure.

    Raises:
        ConfigError: The values are not a map, the patch is out of range, or matplotlib is not
            installed.
        ImageError: The photo cannot be decoded.
    """
    image, grid = decode_upright(photo, processor), check_map(values)
    if patch is not None and not all(0 <= p < n for p, n in zip(patch, grid.shape, strict=True)):
        raise ConfigError(f"patch={patch}: expected one of {grid.shape[0]}x{grid.shape[1]} patches")
    height = min(max(WIDTH * 0.85 * image.height / image.width, 1.5), 9.0)
    figure = new_figure(WIDTH, height + 0.2)
    axes = figure.subplots()
    show_image(axes, image)
    box = visible_box(image, processor, patch_size)
    placed = resample_map(grid, box, image.size, smooth=True)
    shown = axes.imshow(
        np.ma.masked_invalid(placed), cmap="viridis", alpha=0.65,
        extent=(0, image.width, image.height, 0),
        vmin=min(float(grid.min()), 0.0), vmax=max(float(grid.max()), 1e-6),
    )  # fmt: skip
    figure.colorbar(shown, ax=axes, shrink=0.8, label="cosine")
    if patch is not None:
        (top, left, bottom, right), (h, w) = box, grid.shape
        y = top + (patch[0] + 0.5) * (bottom - top) / h
        x = left + (patch[1] + 0.5) * (right - left) / w
        # A white cross under an orange one: visible on any photo.
        axes.plot([x], [y], marker="x", color="white", markersize=14, markeredgewidth=4)
        axes.plot([x], [y], marker="x", color=ORANGE, markersize=13, markeredgewidth=2)
    return figure
