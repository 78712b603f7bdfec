"""What pictures are made of: figures, photos, maps laid over them, text that fits.

No pyplot: nothing is kept open, and no display is asked for. Colours are Okabe and Ito's and
viridis, which the colour-blind can tell apart. Needs `pip install 'vitlib[plot]'`.

Shapes: h w patches, H W the photo's pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitlib.errors import ConfigError, ImageError
from vitlib.image.decode import ImageLike, decode
from vitlib.image.depth import DepthOptions, ignore_warning
from vitlib.image.processor import ImageProcessor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

BLUE, GRAY, ORANGE, INK = "#0072B2", "#B5B5B5", "#D55E00", "#222222"
WIDTH, DPI = 6.0, 100  # inches and dots an inch: the 600 pixels that a page gives a picture
Box = tuple[float, float, float, float]  # top, left, bottom, right, in pixels


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches, drawn without a display. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'vitlib[plot]'") from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def photo_figure(image: Image.Image) -> Figure:
    """The photo alone, a dot a pixel."""
    figure = new_figure(image.width / DPI, image.height / DPI)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(np.asarray(image), extent=(0, image.width, image.height, 0))
    axes.axis("off")
    return figure


def show_image(axes: Axes, image: Any, title: str = "") -> None:
    """An image without ticks or frame."""
    pixels = np.asarray(image)
    axes.imshow(pixels, extent=(0, pixels.shape[1], pixels.shape[0], 0))
    axes.axis("off")
    if title:
        axes.set_title(title, fontsize=10, color=INK)


def decode_upright(photo: ImageLike, processor: ImageProcessor | None = None) -> Image.Image:
    """A photo as RGB, turned as its EXIF says, at the levels that the processor's rule has.

    A picture deeper than 8 bits whose white nothing says is shown from its least to its greatest
    value. Raises ImageError for what is no image.
    """
    levels = None if processor is None else processor.levels
    try:
        planes = decode(photo, 3, DepthOptions(levels, warn=ignore_warning))
    except ImageError:
        planes = decode(photo, 3, DepthOptions(raw_values=True, warn=ignore_warning))
        planes = [Image.fromarray(255 * rescale(np.asarray(plane))) for plane in planes]
    if len(planes) == 1:
        return planes[0].copy()
    pixels = np.dstack([np.asarray(plane) for plane in planes])
    if pixels.shape[2] != 3:
        raise ImageError(f"{pixels.shape[2]} channels: a picture needs 3")
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def visible_box(
    image: Image.Image,
    processor: ImageProcessor | None,
    patch_size: tuple[int, int] | None = None,
) -> Box:
    """What of the photo the model saw; all of it where nothing says so.

    patch_size: what its whole patches of this (height, width) in pixels cover, for a map of them.
    """
    p, q = patch_size or (1, 1)
    if processor is None:
        return 0.0, 0.0, float(image.height // p * p), float(image.width // q * q)
    return processor.visible_box(image.height, image.width, (p, q))


def clip_outliers(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """A map without its strongest hundredth, next to which nothing else would be seen."""
    array = check_map(values)
    return np.minimum(array, np.percentile(array, 99)) if array.size >= 100 else array


def scale_map(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """A map -> 0..1: the least to the greatest; zeros where all is one value."""
    return rescale(check_map(values))


def rescale(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same of an array of any shape."""
    low, high = array.min(), array.max()
    return (array - low) / (high - low) if high > low else np.zeros_like(array)


def check_map(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """One number a patch (h, w). Raises ConfigError for what is none."""
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        raise ConfigError(f"a map of shape {array.shape}: expected (h, w), all there and finite")
    return array


def place_map(
    grid: npt.NDArray[np.float64],
    box: Box,
    size: tuple[int, int],
    *,
    smooth: bool,
    rows: range | None = None,
) -> npt.NDArray[np.float64]:
    """A map (h, w) where it lies in a photo of size (W, H) -> (H, W); NaN outside of the box.

    rows: only these of the photo.
    """
    (top, left, bottom, right), (width, height) = box, size
    some = range(height) if rows is None else range(rows.start, min(rows.stop, height))
    y, x = np.arange(some.start, some.stop) + 0.5, np.arange(width) + 0.5
    down = (y - top) / (bottom - top) * grid.shape[0]
    across = (x - left) / (right - left) * grid.shape[1]
    if smooth:
        found = interpolate(interpolate(grid, down - 0.5, 0), across - 0.5, 1)
    else:
        nearest = down.astype(int).clip(0, grid.shape[0] - 1)
        found = grid[nearest][:, across.astype(int).clip(0, grid.shape[1] - 1)]
    outside = ((y < top) | (y >= bottom))[:, None] | ((x < left) | (x >= right))[None]
    return np.where(outside, np.nan, found)


def interpolate(
    grid: npt.NDArray[np.float64], places: npt.NDArray[np.float64], axis: int
) -> npt.NDArray[np.float64]:
    """Values at fractional places of an axis, a line between neighbours; edges repeat."""
    places = places.clip(0, grid.shape[axis] - 1)
    low = np.floor(places).astype(int)
    high = np.minimum(low + 1, grid.shape[axis] - 1)
    share = np.expand_dims(places - low, 1 - axis)
    return grid.take(low, axis) * (1 - share) + grid.take(high, axis) * share  # type: ignore[no-any-return]


def colorize(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """0..1 -> viridis, (..., 4)."""
    from matplotlib import colormaps

    return np.asarray(colormaps["viridis"](values), np.float64)


def ignore_in_layout(text: Text) -> None:
    """Leave it out of the layout: else a long one takes the picture's place."""
    text.set_in_layout(False)


def shorten(text: str, inches: float, points: float) -> str:
    """A text that fits; what is no character, or none of the font's, becomes a question mark."""
    from matplotlib.font_manager import FontProperties, findfont, get_font
    from matplotlib.textpath import text_to_path

    known = get_font(findfont(FontProperties())).get_charmap()
    clean = "".join(c if c.isprintable() and ord(c) in known else "?" for c in text[:200])
    font = FontProperties(size=points)

    def wide(some: str) -> float:
        return float(text_to_path.get_text_width_height_descent(some, font, ismath=False)[0]) / 72

    kept = len(clean)
    if kept * points / 72 > inches:  # else no character is so wide
        while kept and wide(clean[:kept]) > inches:
            kept -= 1
    cut = kept < len(clean) or len(text) > 200
    return (clean[: max(kept - 1, 0)] + "…" if cut else clean).replace("$", r"\$")
