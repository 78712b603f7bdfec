"""Parts of figures: photos, maps placed over them, text that fits.

No pyplot: no figure stays open, and no display is needed. Colours are Okabe and Ito's and viridis,
which colour-blind readers can tell apart. Needs `pip install 'vitlib[plot]'`.

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
from vitlib.system.requirements import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

BLUE, GRAY, ORANGE, INK = "#0072B2", "#B5B5B5", "#D55E00", "#222222"
MAX_TEXT = 200  # characters of a text that are drawn
WIDTH, DPI = 6.0, 100  # inches and dots per inch: 600 pixels, which a web page shows unscaled
Box = tuple[float, float, float, float]  # top, left, bottom, right, in pixels


def require_matplotlib() -> None:
    """Check that matplotlib can be imported, and import it.

    Raises:
        ConfigError: It is absent, too old or broken.
    """
    import_extra("plot", "matplotlib", "pictures need matplotlib")


def new_figure(width: float, height: float) -> Figure:
    """Create a figure that is drawn without a display.

    Args:
        width: Inches.
        height: Inches.

    Returns:
        An empty figure, which a notebook shows as a picture.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    from vitlib.plots.notebook import NotebookFigure

    return NotebookFigure(figsize=(width, height), dpi=DPI, layout="constrained")


def show_image(axes: Axes, image: Any, title: str = "") -> None:
    """Show an image without ticks or frame.

    Args:
        axes: Axes to draw in.
        image: Anything that numpy takes, (H, W, 3).
        title: Text above the image.
    """
    pixels = np.asarray(image)
    axes.imshow(pixels, extent=(0, pixels.shape[1], pixels.shape[0], 0))
    axes.axis("off")
    if title:
        axes.set_title(title, fontsize=10, color=INK)


def decode_upright(photo: ImageLike, processor: ImageProcessor | None = None) -> Image.Image:
    """Decode a photo to RGB, rotated as its EXIF says.

    Args:
        photo: Path, bytes, PIL image or array.
        processor: Preprocessing whose levels state the white of images deeper than 8 bits. Without
            them, such an image is scaled from its least to its greatest value.

    Returns:
        An RGB image of the photo's size.

    Raises:
        ImageError: The photo cannot be decoded, or has channels that cannot be shown.
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
    """Return the part of a photo that the model sees.

    Args:
        image: The photo, upright.
        processor: The model's preprocessing; None means that the model sees all of it.
        patch_size: Pixels (height, width) of a patch, for a map of patches: whole patches may cover
            less than the image. None ignores patches.

    Returns:
        Top, left, bottom and right, in pixels of the photo.
    """
    p, q = patch_size or (1, 1)
    if processor is None:
        return 0.0, 0.0, float(image.height // p * p), float(image.width // q * q)
    return processor.visible_box(image.height, image.width, (p, q))


def clip_outliers(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Clip a map at its 99th percentile: one outlier would make the rest invisible.

    Args:
        values: Map, (h, w).

    Returns:
        The clipped map, (h, w).

    Raises:
        ConfigError: The values are not a map.
    """
    array = check_map(values)
    limit = np.percentile(array, 99)
    # A map of fewer bright patches than a hundredth would become constant.
    return np.minimum(array, limit) if array.size >= 100 and limit > array.min() else array


def scale_map(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Scale a map to 0..1.

    Args:
        values: Map, (h, w).

    Returns:
        The scaled map, (h, w); zeros for a constant map.

    Raises:
        ConfigError: The values are not a map.
    """
    return rescale(check_map(values))


def rescale(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Scale an array from its least and greatest value to 0..1.

    Args:
        array: Any shape.

    Returns:
        The same shape; zeros for a constant array.
    """
    low, high = array.min(), array.max()
    return (array - low) / (high - low) if high > low else np.zeros_like(array)


def check_map(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Convert values to a map and check it.

    Args:
        values: One number for each patch, (h, w).

    Returns:
        The map, (h, w) float64.

    Raises:
        ConfigError: There are not two axes, or a number is not finite.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        raise ConfigError(f"a map of shape {array.shape}: expected (h, w), all there and finite")
    return array


def resample_map(
    grid: npt.NDArray[np.float64],
    box: Box,
    size: tuple[int, int],
    *,
    smooth: bool,
    rows: range | None = None,
) -> npt.NDArray[np.float64]:
    """Resample a map to the pixels of a photo.

    Args:
        grid: Map, (h, w).
        box: Top, left, bottom and right of the map, in pixels of the photo.
        size: Width and height of the photo, (W, H).
        smooth: Interpolate between patches; False repeats each.
        rows: Rows of the photo to compute; None means all.

    Returns:
        Values, (H, W); NaN outside the box.
    """
    (top, left, bottom, right), (width, height) = box, size
    chosen = range(height) if rows is None else range(rows.start, min(rows.stop, height))
    y, x = np.arange(chosen.start, chosen.stop) + 0.5, np.arange(width) + 0.5
    down = (y - top) / (bottom - top) * grid.shape[0]
    across = (x - left) / (right - left) * grid.shape[1]
    if smooth:
        values = interpolate(interpolate(grid, down - 0.5, 0), across - 0.5, 1)
    else:
        nearest = down.astype(int).clip(0, grid.shape[0] - 1)
        values = grid[nearest][:, across.astype(int).clip(0, grid.shape[1] - 1)]
    # Half a pixel was added: these are centres of pixels.
    outside = ((y < top) | (y >= bottom))[:, None] | ((x < left) | (x >= right))[None]
    return np.where(outside, np.nan, values)


def interpolate(
    grid: npt.NDArray[np.float64], positions: npt.NDArray[np.float64], axis: int
) -> npt.NDArray[np.float64]:
    """Interpolate linearly at fractional positions of an axis; edges repeat.

    Args:
        grid: Map, (h, w).
        positions: Fractional indices along the axis, (N,).
        axis: 0 or 1.

    Returns:
        The map with N values along the axis.
    """
    positions = positions.clip(0, grid.shape[axis] - 1)
    low = np.floor(positions).astype(int)
    high = np.minimum(low + 1, grid.shape[axis] - 1)
    share = np.expand_dims(positions - low, 1 - axis)
    return np.asarray(grid.take(low, axis) * (1 - share) + grid.take(high, axis) * share)


def colorize(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Map values to the colours of viridis.

    Args:
        values: Values in 0..1, any shape.

    Returns:
        Red, green, blue and opacity, (..., 4), each 0..1.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib import colormaps

    return np.asarray(colormaps["viridis"](values), np.float64)


def ignore_in_layout(text: Text) -> None:
    """Exclude a text from the layout: matplotlib would shrink the axes for a long one.

    Args:
        text: The text.
    """
    text.set_in_layout(False)


def clean_text(text: str) -> str:
    """Replace characters that cannot be printed, or that the font lacks, by "?".

    Args:
        text: Any text; 200 characters are kept.

    Returns:
        The text that can be drawn.
    """
    from matplotlib.font_manager import FontProperties, findfont, get_font

    charmap = get_font(findfont(FontProperties())).get_charmap()
    return "".join(c if c.isprintable() and ord(c) in charmap else "?" for c in text[:MAX_TEXT])


def shorten(text: str, inches: float, points: float, *, middle: bool = False) -> str:
    """Shorten a text until it fits, and escape it for matplotlib.

    Args:
        text: Any text. Characters that cannot be printed, or that the font lacks, become "?".
        inches: Width that the text may take.
        points: Size of the font.
        middle: Cut in the middle, as for names of files, which differ at their ends.

    Returns:
        The text, with an ellipsis where it was cut.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    half = MAX_TEXT // 2
    shown = text[:half] + text[-half:] if middle and len(text) > MAX_TEXT else text
    clean = clean_text(shown)
    font = FontProperties(size=points)

    def cut(length: int) -> str:
        if length >= len(clean) and len(text) <= MAX_TEXT:
            return clean
        end = max(length - 1, 0) // 2 if middle else 0
        start = max(length - 1, 0) - end
        return clean[:start] + "…" + (clean[-end:] if end else "")

    def width(part: str) -> float:
        return float(text_to_path.get_text_width_height_descent(part, font, ismath=False)[0]) / 72

    length = len(clean)
    # Hinting makes drawn text some per cent wider than its measured outline.
    inches *= 0.95
    # No character is wider than the font's size: a text below that need not be measured.
    if length * points / 72 > inches:
        while length and width(cut(length)) > inches:
            length -= 1
    # A dollar sign would start a formula.
    return cut(length).replace("$", r"\$")
