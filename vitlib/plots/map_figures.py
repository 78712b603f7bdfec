"""Figures of explanations: maps of patches over photos; each function returns a matplotlib Figure.

How data flows: photos are decoded upright, as for the model. Maps of patches (explain/) are drawn
over the part of the photo that the model sees (ImageProcessor.visible_box), which has a frame. The
rest is faded. Below a map of numbers the photo is grey, so that colours mean the map alone.

Shapes: h w patches, H W the photo's pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vitlib.errors import ConfigError
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.plots.draw import (
    INK,
    ORANGE,
    check_map,
    clip_outliers,
    colorize,
    decode_upright,
    resample_map,
    scale_map,
)
from vitlib.plots.panel import (
    BAR,
    SEEN,
    SEEN_WHOLE,
    PlacedPhoto,
    Scale,
    draw_frame,
    draw_legend,
    draw_panel,
    draw_scale,
    fade,
    place_photo,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS = 512  # rows of a photo in a step: its map as float64 takes many times the photo's memory


def overlay(
    photo: ImageLike,
    values: npt.ArrayLike,
    *,
    processor: ImageProcessor | None = None,
    patch_size: tuple[int, int] | None = None,
    strength: float = 0.6,
    title: str = "",
    subtitle: str = "",
    scale: str = "map",
) -> Figure:
    """Draw a map over the grey photo, in viridis: low values are dark, high ones bright.

    Args:
        photo: Path, bytes, PIL image or array.
        values: Map of patches (h, w), or of any finer grid.
        processor: The model's preprocessing. What it crops away gets no colour; None means that the
            model sees the whole photo.
        patch_size: Pixels (height, width) of a patch, for a map of patches. The rest after the last
            whole patch gets no colour, either.
        strength: Opacity of the map, 0..1.
        title: Text above the photo, such as a class and its score.
        subtitle: Small text below the title, such as the method.
        scale: Name of the quantity, above the scale.

    Returns:
        The figure. The photo keeps its pixels where its longer side has 600 to 2400 of them.

    Raises:
        ConfigError: The values are not a map, or matplotlib is not installed.
        ImageError: The photo cannot be decoded.
    """
    placed = place_photo(decode_upright(photo, processor), processor, patch_size)
    grid = clip_outliers(values)
    clipped = bool(grid.max() < np.max(values))
    pixels = _blend(placed, scale_map(grid), strength)
    bar = Scale(float(grid.min()), float(grid.max()), scale, clipped)
    return _draw_heat(placed, pixels, bar, title, subtitle)


def _draw_heat(
    placed: PlacedPhoto, pixels: npt.NDArray[Any], bar: Scale, title: str, subtitle: str
) -> Figure:
    """Draw a photo that is blended with a map, its scale and the frame of the crop."""
    note = SEEN if placed.is_cropped() else SEEN_WHOLE
    figure, (axes,), below = draw_panel(
        [pixels], title=title, subtitle=subtitle, notes=[note], footer=BAR
    )
    draw_frame(axes, placed)
    draw_scale(figure, bar, below)
    return figure


def _blend(
    placed: PlacedPhoto, grid: npt.NDArray[np.float64], strength: float
) -> npt.NDArray[np.uint8]:
    """Blend the colours of a map, (h, w) in 0..1, with the grey photo; (H, W, 3)."""
    # 256 colours suffice: the photo's pixels are uint8.
    table = np.round(colorize(np.arange(256) / 255)[:, :3] * 255)
    image = placed.image
    pixels = np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=2)
    for start in range(0, image.height, ROWS):
        rows = resample_map(
            grid, placed.box, image.size, smooth=True, rows=range(start, start + ROWS)
        )
        inside = np.isfinite(rows)
        colours = table[np.round(rows[inside] * 255).astype(np.uint8)]
        part = pixels[start : start + ROWS]
        part[~inside] = fade(part[~inside])
        part[inside] = np.round((1 - strength) * part[inside] + strength * colours)
    return pixels


def mask(
    photo: ImageLike,
    foreground: npt.ArrayLike,
    *,
    processor: ImageProcessor | None = None,
    patch_size: tuple[int, int] | None = None,
    title: str = "",
    subtitle: str = "",
    rule: str = "",
) -> Figure:
    """Draw the photo with the background dark, an orange outline, and a legend.

    The picture calls the true patches of the mask the foreground, and the others the background.
    `explain.foreground` gives True to the side of which a patch has more of the class token's
    attention, on average. What the model does not see fades to white.

    Args:
        photo: Path, bytes, PIL image or array.
        foreground: True for each patch of the mask, (h, w).
        processor: The model's preprocessing. What it crops away fades to white; None means that the
            model sees the whole photo.
        patch_size: Pixels (height, width) of a patch, for a map of patches. The rest after the last
            whole patch fades, too.
        title: Text above the photo.
        subtitle: Small text below the title, such as the method.
        rule: Sentence below the legend: which side is the foreground.

    Returns:
        The figure. The photo keeps its pixels where its longer side has 600 to 2400 of them.

    Raises:
        ConfigError: The mask is not a map, or matplotlib is not installed.
        ImageError: The photo cannot be decoded.
    """
    placed = place_photo(decode_upright(photo, processor), processor, patch_size)
    grid, image = check_map(foreground), placed.image
    pixels = np.asarray(image).copy()
    for start in range(0, image.height, ROWS):
        rows = resample_map(
            grid, placed.box, image.size, smooth=False, rows=range(start, start + ROWS)
        )
        part = pixels[start : start + ROWS]
        background, outside = rows <= 0.5, np.isnan(rows)
        part[background] //= 4
        part[outside] = fade(part[outside])
    share = round(100 * float((grid > 0.5).mean()))
    notes = [*[rule] * bool(rule), SEEN if placed.is_cropped() else SEEN_WHOLE]
    figure, (axes,), below = draw_panel(
        [pixels], title=title, subtitle=subtitle, notes=notes, footer=0.5
    )
    draw_frame(axes, placed)
    _draw_outline(axes, grid > 0.5, placed)
    entries = [
        (f"foreground, as in the photo: {share} % of the patches", ("white", ORANGE)),
        (f"background, dark: {100 - share} % of the patches", (INK, INK)),
    ]
    draw_legend(figure, entries, below)
    return figure


def _draw_outline(axes: Axes, inside: npt.NDArray[np.bool_], placed: PlacedPhoto) -> None:
    """Draw the edges between patches of the foreground and of the background."""
    from matplotlib.collections import LineCollection

    (top, left, bottom, right), (h, w) = placed.box, inside.shape
    down, across = (bottom - top) / h, (right - left) / w
    lines = [
        [(left + across * (x + 1), top + down * (y + i)) for i in (0, 1)]
        for y, x in np.argwhere(inside[:, 1:] != inside[:, :-1])
    ]
    lines += [
        [(left + across * (x + i), top + down * (y + 1)) for i in (0, 1)]
        for y, x in np.argwhere(inside[1:] != inside[:-1])
    ]
    axes.add_collection(
        LineCollection(lines, colors=ORANGE, linewidths=1.2, gid="outline"), autolim=False
    )


def patch_pca(
    photo: ImageLike,
    components: npt.ArrayLike,
    *,
    processor: ImageProcessor | None = None,
    patch_size: tuple[int, int] | None = None,
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """Draw the photo, and the first three components of its patches as red, green and blue.

    Each colour lies over the pixels of its patch. A wide photo stands above its components.

    Args:
        photo: Path, bytes, PIL image or array.
        components: Components, (h, w, 3), 0..1.
        processor: The model's preprocessing. What it crops away gets no colour; None means that the
            model sees the whole photo.
        patch_size: Pixels (height, width) of a patch, for a map of patches. The rest after the last
            whole patch gets no colour, either.
        title: Text above the photos.
        subtitle: Small text below the title, such as the method.

    Returns:
        The figure. The photo keeps its pixels where its longer side has 600 to 2400 of them.

    Raises:
        ConfigError: The components have another shape, or matplotlib is not installed.
        ImageError: The photo cannot be decoded.
    """
    colours = np.asarray(components, np.float64)
    if colours.ndim != 3 or colours.shape[2] != 3:
        raise ConfigError(f"components of shape {colours.shape}: expected (h, w, 3)")
    placed = place_photo(decode_upright(photo, processor), processor, patch_size)
    image = placed.image
    pixels = np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=2)
    for start in range(0, image.height, ROWS):
        part, rows = pixels[start : start + ROWS], range(start, start + ROWS)
        planes = [
            resample_map(colours[..., i], placed.box, image.size, smooth=False, rows=rows)
            for i in range(3)
        ]
        inside = np.isfinite(planes[0])
        part[~inside] = fade(part[~inside])
        part[inside] = np.round(255 * np.dstack(planes)[inside].clip(0, 1))
    notes = [
        "Alike colours are alike features: components 1, 2 and 3 are red, green and blue.",
        SEEN if placed.is_cropped() else SEEN_WHOLE,
    ]
    figure, panels, _ = draw_panel(
        [np.asarray(image), pixels], title=title, subtitle=subtitle,
        names=("photo", "components of the patches"), notes=notes,
    )  # fmt: skip
    for axes in panels:
        draw_frame(axes, placed)
    return figure


def similarity(
    photo: ImageLike,
    values: npt.ArrayLike,
    patch: tuple[int, int] | None = None,
    *,
    processor: ImageProcessor | None = None,
    patch_size: tuple[int, int] | None = None,
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """Draw cosine similarities over the grey photo, with a scale.

    Args:
        photo: Path, bytes, PIL image or array.
        values: Cosines, (h, w), -1..1.
        patch: Row and column of the patch that is compared, marked by a cross; None draws none.
        processor: The model's preprocessing. What it crops away gets no colour; None means that the
            model sees the whole photo.
        patch_size: Pixels (height, width) of a patch, for a map of patches. The rest after the last
            whole patch gets no colour, either.
        title: Text above the photo.
        subtitle: Small text below the title, such as the method.

    Returns:
        The figure. The photo keeps its pixels where its longer side has 600 to 2400 of them.

    Raises:
        ConfigError: The values are not a map, the patch is out of range, or matplotlib is not
            installed.
        ImageError: The photo cannot be decoded.
    """
    grid = check_map(values)
    if patch is not None and not all(0 <= p < n for p, n in zip(patch, grid.shape, strict=True)):
        raise ConfigError(f"patch={patch}: expected one of {grid.shape[0]}x{grid.shape[1]} patches")
    placed = place_photo(decode_upright(photo, processor), processor, patch_size)
    low, high = min(float(grid.min()), 0.0), max(float(grid.max()), 1e-6)
    pixels = _blend(placed, (grid - low) / (high - low), 0.65)
    figure = _draw_heat(placed, pixels, Scale(low, high, "cosine"), title, subtitle)
    if patch is not None:
        (top, left, bottom, right), (h, w) = placed.box, grid.shape
        y = top + (patch[0] + 0.5) * (bottom - top) / h
        x = left + (patch[1] + 0.5) * (right - left) / w
        axes = figure.axes[0]
        # A white cross under an orange one: visible on any photo.
        axes.plot([x], [y], marker="x", color="white", markersize=14, markeredgewidth=4)
        axes.plot([x], [y], marker="x", color=ORANGE, markersize=13, markeredgewidth=2)
    return figure
