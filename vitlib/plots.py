"""Pictures of answers and of what a model looks at; each function returns a matplotlib Figure.

How data flows: photos are decoded upright as for the model; maps of patches (explain/) are laid
over what of the photo the model saw (ImageProcessor.shown); save() writes a figure whole or not at
all, the same bytes each time.

No pyplot: nothing is kept open, and no display is asked for. Colours are Okabe and Ito's and
viridis, which the colour-blind can tell apart. Needs `pip install 'vitlib[plot]'`.

Shapes: h w patches, H W the photo's pixels, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitlib.errors import ConfigError, ImageError
from vitlib.files import whole_file
from vitlib.images import ImageLike, decode
from vitlib.predict import Prediction
from vitlib.preprocess import ImageProcessor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, GRAY, ORANGE, INK = "#0072B2", "#B5B5B5", "#D55E00", "#222222"
WIDTH, DPI = 6.0, 100  # inches and dots an inch: the 600 pixels that a page gives a picture
FORMATS = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
Box = tuple[float, float, float, float]  # top, left, bottom, right, in pixels


def labels(
    photo: ImageLike,
    predictions: Sequence[Prediction],
    *,
    threshold: float | None = None,
    title: str = "",
) -> Figure:
    """The photo above, a bar for each label with its score below; with a threshold, a line at it,
    and labels under it in gray."""
    shown = upright(photo)
    height = min(max(WIDTH * shown.height / shown.width, 1.5), 8.0)
    rows = max(len(predictions), 1)
    figure = new_figure(WIDTH, height + 0.34 * rows + 0.5)
    top, bottom = figure.subplots(2, 1, height_ratios=[height, 0.34 * rows + 0.3])
    picture(top, shown, title)
    if not predictions:
        bottom.axis("off")
        bottom.text(0, 0.5, "no label scores enough", color=INK, fontsize=11)
        return figure
    places = range(len(predictions))
    scores = [p.score for p in predictions]
    below = [threshold is not None and score < threshold for score in scores]
    bottom.barh(places, scores, color=[GRAY if b else BLUE for b in below], height=0.72)
    for place, prediction in zip(places, predictions, strict=True):
        inside = prediction.score > 0.62  # room for the name beside a short bar, within a long one
        bottom.text(
            prediction.score - 0.01 if inside else prediction.score + 0.01, place,
            f"{short(prediction.label)}  {prediction.score:.3f}", va="center", fontsize=10,
            ha="right" if inside else "left", color="white" if inside else INK,
        )  # fmt: skip
    if threshold is not None:
        bottom.axvline(threshold, color=ORANGE, linestyle="--", linewidth=1.2)
    bottom.set(xlim=(0, 1), ylim=(rows - 0.5, -0.5), yticks=[], xlabel="score")
    bottom.spines[["top", "right", "left"]].set_visible(False)
    bottom.tick_params(labelsize=8)
    return figure


def overlay(
    photo: ImageLike,
    values: npt.ArrayLike,
    *,
    processor: ImageProcessor | None = None,
    strength: float = 0.6,
) -> Figure:
    """A map (h, w), or any finer one, over the photo, upright and of its own size in pixels.

    processor: whose pixels the map is of: what it cut away stays without colour. The weakest
    place is dark and the strongest bright (viridis); strength: how much of the photo it hides,
    0..1.
    """
    image = upright(photo)
    figure = bare(image)
    axes = figure.axes[0]
    box = seen(image, processor)
    colours = tinted(scaled(clipped(values)), box, image.size)
    alpha = np.where(np.isnan(colours[..., 3]), 0, strength)
    axes.imshow(np.dstack([colours[..., :3], alpha]), extent=(0, image.width, image.height, 0))
    return figure


def mask(
    photo: ImageLike, kept: npt.ArrayLike, *, processor: ImageProcessor | None = None
) -> Figure:
    """The patches of a mask (h, w) as they are, the rest of the photo dimmed."""
    image = upright(photo)
    figure = bare(image)
    grid = placed(np.asarray(kept, np.float64), seen(image, processor), image.size, smooth=False)
    dim = np.zeros((*grid.shape, 4))
    dim[..., 3] = np.where(grid > 0.5, 0, 0.75)
    figure.axes[0].imshow(dim, extent=(0, image.width, image.height, 0))
    return figure


def heads(maps: npt.ArrayLike, photo: ImageLike | None = None, *, title: str = "") -> Figure:
    """Attention maps (L, heads, h, w), each on its own scale: a row a layer, a column a head, or
    the other way round where that is wider."""
    grid = np.asarray(maps, np.float64)
    if grid.ndim != 4:
        raise ConfigError(f"maps of shape {grid.shape}: expected (layers, heads, h, w)")
    names = ("layer", "head")
    if grid.shape[0] > grid.shape[1]:
        grid, names = grid.swapaxes(0, 1), ("head", "layer")
    rows, columns = grid.shape[:2]
    # One picture of all its places: a hundred axes take seconds to draw.
    across, gap = max(WIDTH * 2 * DPI / columns, 24), 2
    side = max(math.ceil(across / max(grid.shape[2:])), 1)
    tall, wide = grid.shape[2] * side, grid.shape[3] * side
    sheet = np.ones((rows * (tall + gap) - gap, columns * (wide + gap) - gap, 3))
    for row in range(rows):
        for column in range(columns):
            large = np.kron(scaled(grid[row, column]), np.ones((side, side)))
            y, x = row * (tall + gap), column * (wide + gap)
            sheet[y : y + tall, x : x + wide] = coloured(large)[..., :3]
    height = WIDTH * sheet.shape[0] / sheet.shape[1]
    if photo is None:
        figure = new_figure(WIDTH, height + 0.6)
        axes = figure.subplots()
    else:
        first = upright(photo)
        above = min(2.5, WIDTH * first.height / first.width)
        figure = new_figure(WIDTH, height + above + 0.8)
        top, axes = figure.subplots(2, 1, height_ratios=[above, height])
        picture(top, first)
    axes.imshow(sheet, interpolation="nearest")
    axes.set(
        xticks=[(wide + gap) * i + wide / 2 for i in range(columns)],
        yticks=[(tall + gap) * i + tall / 2 for i in range(rows)],
        ylabel=names[0], xlabel=names[1], title=title,
    )  # fmt: skip
    axes.set_xticklabels(map(str, range(columns)), fontsize=7)
    axes.set_yticklabels(map(str, range(rows)), fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def patch_pca(
    photo: ImageLike, components: npt.ArrayLike, *, processor: ImageProcessor | None = None
) -> Figure:
    """The photo, and beside it the first three components (h, w, 3), 0..1, as red, green, blue."""
    image, colours = upright(photo), np.asarray(components, np.float64)
    if colours.ndim != 3 or colours.shape[2] != 3:
        raise ConfigError(f"components of shape {colours.shape}: expected (h, w, 3)")
    height = WIDTH / 2 * image.height / image.width
    figure = new_figure(WIDTH, height + 0.4)
    left, right = figure.subplots(1, 2)
    picture(left, image)
    box, size = seen(image, processor), image.size
    planes = [placed(colours[..., i], box, size, smooth=False) for i in range(3)]
    picture(right, np.nan_to_num(np.dstack(planes), nan=1.0), "patch PCA")
    return figure


def similarity(
    photo: ImageLike,
    values: npt.ArrayLike,
    patch: tuple[int, int] | None = None,
    *,
    processor: ImageProcessor | None = None,
) -> Figure:
    """Cosines (h, w) over the photo, -1..1, with a scale; a cross on the patch asked about."""
    image, grid = upright(photo), np.asarray(values, np.float64)
    height = min(max(WIDTH * 0.85 * image.height / image.width, 1.5), 9.0)
    figure = new_figure(WIDTH, height + 0.2)
    axes = figure.subplots()
    picture(axes, image)
    box = seen(image, processor)
    laid = placed(grid, box, image.size, smooth=True)
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
    photos: Sequence[ImageLike], captions: Sequence[str] | None = None, *, columns: int = 4
) -> Figure:
    """Small pictures of many photos, `columns` a row, each with its caption below."""
    if not photos:
        raise ConfigError("a contact sheet of no photos: give one or more")
    if captions is not None and len(captions) != len(photos):
        raise ConfigError(f"{len(captions)} captions for {len(photos)} photos: expected one each")
    columns = max(1, min(columns, len(photos)))
    rows = math.ceil(len(photos) / columns)
    side = WIDTH / columns
    figure = new_figure(WIDTH, rows * (side + 0.35))
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    pixels = round(side * 2 * DPI)
    for axes, photo, caption in zip(grid, photos, captions or [""] * len(photos), strict=False):
        small = upright(photo)
        small.thumbnail((pixels, pixels))
        picture(axes, small)
        axes.text(
            0.5, -0.03, short(caption, 24), transform=axes.transAxes, ha="center", va="top",
            fontsize=8, color=INK,
        )  # fmt: skip
    for axes in grid[len(photos) :]:
        axes.axis("off")
    return figure


def curves(shares: npt.ArrayLike, named: dict[str, npt.ArrayLike], ylabel: str) -> Figure:
    """Lines over shares 0..1, named at their ends: of deletion, of insertion."""
    figure = new_figure(WIDTH, 3.6)
    axes = figure.subplots()
    styles = ("-", "--", ":", "-.")
    for index, (name, values) in enumerate(named.items()):
        colour = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#000000")[index % 6]
        axes.plot(shares, values, styles[index % 4], color=colour, label=name, linewidth=1.8)
    axes.set(xlim=(0, 1), ylim=(0, None), xlabel="share of the patches", ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure, by its name's ending, whole or not at all; the same bytes each time.

    Raises ConfigError for an ending that is none of FORMATS, SourceError where it is not writable.
    """
    target = Path(path)
    kind = target.suffix.lower()
    if kind not in FORMATS:
        raise ConfigError(f"{target.name!r}: expected a name that ends in {', '.join(FORMATS)}")
    # No date and no version: a picture made again is the same picture.
    about = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    from matplotlib import rc_context

    with whole_file(target) as file, rc_context({"svg.hashsalt": "vitlib"}):
        figure.savefig(file, format=kind[1:], dpi=figure.dpi, metadata=about.get(kind))


# --- what the pictures are made of ----------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches, drawn without a display. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'vitlib[plot]'") from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def bare(image: Image.Image) -> Figure:
    """The photo alone, a dot a pixel."""
    figure = new_figure(image.width / DPI, image.height / DPI)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(np.asarray(image), extent=(0, image.width, image.height, 0))
    axes.axis("off")
    return figure


def picture(axes: Axes, image: Any, title: str = "") -> None:
    """An image without ticks or frame."""
    pixels = np.asarray(image)
    axes.imshow(pixels, extent=(0, pixels.shape[1], pixels.shape[0], 0))
    axes.axis("off")
    if title:
        axes.set_title(title, fontsize=10, color=INK)


def upright(photo: ImageLike) -> Image.Image:
    """A photo as RGB, turned as its EXIF says. Raises ImageError for what is none."""
    planes = decode(photo, 3)
    if len(planes) == 1:
        return planes[0].copy()
    levels = np.dstack([np.asarray(plane) for plane in planes])
    if levels.shape[2] != 3:
        raise ImageError(f"{levels.shape[2]} channels: a picture needs 3")
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def seen(image: Image.Image, processor: ImageProcessor | None) -> Box:
    """What of the photo the model saw; all of it where nothing says so."""
    if processor is None:
        return 0.0, 0.0, float(image.height), float(image.width)
    return processor.shown(image.height, image.width)


def clipped(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """A map of pixels without its strongest hundredth, next to which nothing else would be seen."""
    array = np.asarray(values, np.float64)
    return np.minimum(array, np.percentile(array, 99)) if array.size > 10_000 else array


def scaled(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """A map -> 0..1: the least to the greatest; zeros where all is one value."""
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or not np.isfinite(array).all():
        raise ConfigError(f"a map of shape {array.shape}: expected (h, w), all finite")
    low, high = array.min(), array.max()
    return (array - low) / (high - low) if high > low else np.zeros_like(array)


def placed(
    grid: npt.NDArray[np.float64], box: Box, size: tuple[int, int], *, smooth: bool
) -> npt.NDArray[np.float64]:
    """A map (h, w) where it lies in a photo of size (W, H) -> (H, W); NaN outside of the box."""
    (top, left, bottom, right), (width, height) = box, size
    y, x = (np.arange(n) + 0.5 for n in (height, width))
    rows = (y - top) / (bottom - top) * grid.shape[0]
    columns = (x - left) / (right - left) * grid.shape[1]
    if smooth:
        found = between(between(grid, rows - 0.5, 0), columns - 0.5, 1)
    else:
        down = rows.astype(int).clip(0, grid.shape[0] - 1)
        found = grid[down][:, columns.astype(int).clip(0, grid.shape[1] - 1)]
    outside = ((y < top) | (y >= bottom))[:, None] | ((x < left) | (x >= right))[None]
    return np.where(outside, np.nan, found)


def between(
    grid: npt.NDArray[np.float64], places: npt.NDArray[np.float64], axis: int
) -> npt.NDArray[np.float64]:
    """Values at fractional places of an axis, a line between neighbours; edges repeat."""
    places = places.clip(0, grid.shape[axis] - 1)
    low = np.floor(places).astype(int)
    high = np.minimum(low + 1, grid.shape[axis] - 1)
    share = np.expand_dims(places - low, 1 - axis)
    return grid.take(low, axis) * (1 - share) + grid.take(high, axis) * share  # type: ignore[no-any-return]


def tinted(
    grid: npt.NDArray[np.float64], box: Box, size: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """A map, 0..1 -> colours where it lies, (H, W, 4); alpha is NaN outside of the box."""
    laid = placed(grid, box, size, smooth=True)
    colours = coloured(np.nan_to_num(laid))
    colours[..., 3] = np.where(np.isnan(laid), np.nan, 1.0)
    return colours


def coloured(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """0..1 -> viridis, (..., 4)."""
    from matplotlib import colormaps

    return np.asarray(colormaps["viridis"](values), np.float64)


def short(text: str, most: int = 48) -> str:
    """A label that fits; what is no character becomes a question mark."""
    clean = "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")
    return clean if len(clean) <= most else clean[: most - 1] + "…"
