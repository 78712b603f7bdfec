"""Panels: photos at whole pixels in a figure, with titles above, and a scale and notes below.

A panel is laid out in pixels, so that each pixel of a photo is one dot of the figure. Photos below
600 pixels are enlarged. Text grows with large photos, and stays legible when they are shrunk.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitlib.image.processor import ImageProcessor
from vitlib.plots.draw import (
    DPI,
    INK,
    Box,
    clean_text,
    colorize,
    new_figure,
    shorten,
    visible_box,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LONG_SIDE = 600  # pixels that the longer side of a photo has at least
MAX_SIDE = 2400  # and at most: no map has more detail, and larger figures take minutes
LARGE_SIDE = 1000  # pixels of a photo above which text grows
MIN_WIDTH = 4.5  # inches, for the text of narrow photos
MARGIN, GAP, LINE, BAR = 0.1, 0.12, 0.17, 0.52  # inches
SMALL = 8  # points
FADED = 0.3  # share that a photo keeps outside the crop; the rest is white
SEEN = "Frame: the part of the photo that the model saw."
SEEN_WHOLE = "The model saw the whole photo."


class PlacedPhoto(NamedTuple):
    """A photo at the size that it is drawn at.

    Attributes:
        image: RGB, 600 to 2400 pixels on its longer side.
        box: Part that the model saw, in pixels of the image.
    """

    image: Image.Image
    box: Box

    def is_cropped(self) -> bool:
        """Return True if the model saw a part of the photo only."""
        top, left, bottom, right = self.box
        short = max(top, left, self.image.height - bottom, self.image.width - right)
        return short > 0.5


class Scale(NamedTuple):
    """Scale of a heat map.

    Attributes:
        low: Value of the darkest colour.
        high: Value of the brightest colour.
        label: Quantity that the colours show.
        clipped: Higher values have the brightest colour, too.
    """

    low: float
    high: float
    label: str
    clipped: bool = False


def place_photo(
    image: Image.Image, processor: ImageProcessor | None, patch_size: tuple[int, int] | None
) -> PlacedPhoto:
    """Resize a photo for display, and find the part that the model sees.

    Args:
        image: The photo, upright, RGB.
        processor: The model's preprocessing; None means that the model sees all of it.
        patch_size: Pixels (height, width) of a patch, as for visible_box().

    Returns:
        The photo and the part. Photos below an eighth of 600 pixels show their pixels as squares.
    """
    box = visible_box(image, processor, patch_size)
    large = resize_for_display(image)
    down, across = large.height / image.height, large.width / image.width
    top, left, bottom, right = box
    return PlacedPhoto(large, (top * down, left * across, bottom * down, right * across))


def resize_for_display(image: Image.Image) -> Image.Image:
    """Resize an image until its longer side has 600 to 2400 pixels.

    Args:
        image: Any image.

    Returns:
        The image itself where it is neither too small nor too large.
    """
    longer = max(image.size)
    factor = min(max(longer, LONG_SIDE), MAX_SIDE) / longer
    if factor == 1:
        return image
    size = (max(round(image.width * factor), 1), max(round(image.height * factor), 1))
    rule = Image.Resampling.NEAREST if factor >= 8 else Image.Resampling.BICUBIC
    return image.resize(size, rule)


def fade(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Fade pixels to white, as those that the model does not see.

    Args:
        pixels: uint8, any shape.

    Returns:
        The same shape, uint8.
    """
    return np.round(255 - FADED * (255.0 - pixels)).astype(np.uint8)


def draw_panel(
    photos: Sequence[npt.NDArray[Any]],
    *,
    title: str = "",
    subtitle: str = "",
    names: Sequence[str] = (),
    notes: Sequence[str] = (),
    footer: float = 0.0,
) -> tuple[Figure, list[Axes], float]:
    """Draw photos of one size beside or below each other, with text around them.

    Args:
        photos: Pixels of each, (H, W, 3) uint8.
        title: Large text above the photos.
        subtitle: Small text below the title.
        names: Text above each photo; empty draws none.
        notes: Small texts at the bottom, wrapped.
        footer: Inches between photos and notes that the caller fills.

    Returns:
        The figure, the axes of each photo, in pixels of the photo, and the top of the footer in
        inches from the bottom.
    """
    height, width = photos[0].shape[:2]
    across = len(photos) if height >= width * 0.6 else 1
    down = -(-len(photos) // across)
    dpi = round(DPI * max(1.0, max(height * down, width * across) / LARGE_SIDE))
    names_room = LINE + 0.05 if names else 0.0
    columns = max(across * (width / dpi + GAP) - GAP, MIN_WIDTH)
    lines = [line for note in notes for line in wrap_text(note, columns)]
    head = (0.26 if title else 0) + (LINE + 0.04 if subtitle else 0) + MARGIN
    below = footer + 0.06 + LINE * len(lines) + MARGIN
    room = down * (height / dpi + names_room + GAP) - GAP
    # Whole dots: a photo whose corner lies between two dots would be blurred.
    total = [round(inches * dpi) for inches in (columns + 2 * MARGIN, head + room + below)]
    # The hundredth keeps matplotlib, which rounds down, from losing a dot.
    wide, high = total[0] + 0.01, total[1] + 0.01
    figure = new_figure(wide / dpi, high / dpi)
    figure.set_dpi(dpi)
    figure.set_layout_engine("none")
    start = (columns + 2 * MARGIN - across * (width / dpi + GAP) + GAP) / 2
    all_axes = []
    for index, pixels in enumerate(photos):
        row, column = divmod(index, across)
        x = round((start + column * (width / dpi + GAP)) * dpi)
        top = head + row * (height / dpi + names_room + GAP) + names_room
        y = total[1] - round(top * dpi) - height
        # matplotlib rounds the size of a photo up: a bit less keeps it from gaining a dot.
        size = (width - 0.001) / wide, (height - 0.001) / high
        axes = figure.add_axes((x / wide, y / high, *size))
        axes.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest", aspect="auto")
        axes.axis("off")
        axes.autoscale(enable=False)
        if names:
            text = shorten(names[index], max(width / dpi, MIN_WIDTH / across), 9)
            write(figure, x / dpi, (y + height) / dpi + 0.05, text, 9, va="bottom")
        all_axes.append(axes)
    y = total[1] / dpi - MARGIN
    for text, points, step, colour in ((title, 11, 0.26, INK), (subtitle, SMALL + 1, 0.2, "#555")):
        if text:
            write(figure, MARGIN, y, shorten(text, columns, points), points, colour=colour)
            y -= step
    for index, line in enumerate(lines):
        write(figure, MARGIN, MARGIN + LINE * (len(lines) - index), line, SMALL, colour="#555")
    return figure, all_axes, below


def write(
    figure: Figure, x: float, y: float, text: str, points: float, *, colour: str = INK,
    va: str = "top", ha: str = "left",
) -> None:  # fmt: skip
    """Write a text at a point of a figure.

    Args:
        figure: The figure.
        x: Inches from the left.
        y: Inches from the bottom.
        text: The text, escaped for matplotlib.
        points: Size of the font.
        colour: Colour of the text.
        va: Vertical alignment.
        ha: Horizontal alignment.
    """
    width, height = figure.get_size_inches()
    figure.text(x / width, y / height, text, fontsize=points, color=colour, va=va, ha=ha)


def wrap_text(text: str, inches: float, points: float = SMALL) -> list[str]:
    """Break a text into lines that fit.

    Args:
        text: Any text.
        inches: Width of a line.
        points: Size of the font.

    Returns:
        The lines, escaped for matplotlib.
    """
    # A character of the font is half as wide as high, on average; shorten() cuts the exceptions.
    count = max(int(inches * 72 / points / 0.53), 8)
    return [shorten(line, inches, points) for line in textwrap.wrap(clean_text(text), count)]


def draw_frame(axes: Axes, photo: PlacedPhoto) -> None:
    """Draw the frame of the part that the model saw; none where it saw the whole photo.

    Args:
        axes: Axes of the photo.
        photo: The photo.
    """
    if not photo.is_cropped():
        return
    from matplotlib.patches import Rectangle

    top, left, bottom, right = photo.box
    # Padding lies beyond the edges of the photo, and has no pixels to frame.
    top, left = max(top, 0.0), max(left, 0.0)
    bottom, right = min(bottom, photo.image.height), min(right, photo.image.width)
    # White under ink: visible on any photo.
    for colour, points in (("white", 3.0), (INK, 1.2)):
        axes.add_patch(
            Rectangle(
                (left, top), right - left, bottom - top, fill=False, edgecolor=colour,
                linewidth=points, gid="crop frame", clip_on=False,
            )
        )  # fmt: skip


def draw_scale(figure: Figure, scale: Scale, top: float) -> Axes:
    """Draw a colour bar with numbers below it, and its quantity above it.

    Args:
        figure: The figure.
        scale: Ends and quantity.
        top: Inches from the bottom; the bar takes BAR inches below.

    Returns:
        The axes of the bar.
    """
    width, height = figure.get_size_inches()
    text = f"{scale.label}: dark is low, bright is high"
    write(figure, MARGIN, top - 0.06, shorten(text, width - 2 * MARGIN, SMALL), SMALL)
    left, room = 0.3, width - 0.6
    bar = figure.add_axes((left / width, (top - 0.33) / height, room / width, 0.1 / height))
    colours = colorize(np.linspace(0, 1, 256))[None, :, :3]
    bar.imshow(colours, extent=(0, 1, 0, 1), aspect="auto")
    ends = [scale.low, (scale.low + scale.high) / 2, scale.high]
    words = [format_tick(value, scale.high - scale.low) for value in ends]
    if scale.clipped:
        words[-1] = f"≥ {words[-1]}"
    if scale.high <= scale.low:
        ends, words = ends[:1], [f"{words[0]} everywhere"]
    bar.set_yticks([])
    bar.set_xticks([0, 0.5, 1][: len(ends)], words, fontsize=SMALL)
    bar.tick_params(length=2, pad=1.5)
    # The outer numbers stay within the figure.
    outer = bar.get_xticklabels()
    outer[0].set_horizontalalignment("left")
    if len(outer) > 1:
        outer[-1].set_horizontalalignment("right")
    bar.spines[:].set_linewidth(0.5)
    return bar


def format_tick(value: float, span: float) -> str:
    """Format a number of a scale with as many digits as tell its ends apart.

    Args:
        value: The number.
        span: Difference of the ends.

    Returns:
        The text.
    """
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(span or abs(value)))
    return f"{value:.{digits}f}" if 0 <= digits <= 5 else f"{value:.3g}"


def draw_legend(figure: Figure, entries: Sequence[tuple[str, tuple[str, str]]], top: float) -> None:
    """Draw a legend of coloured squares, one below the other.

    Args:
        figure: The figure.
        entries: Text of each, and the colours of its face and edge.
        top: Inches from the bottom of the legend's top.
    """
    from matplotlib.patches import Rectangle

    width, height = figure.get_size_inches()
    for index, (text, (face, edge)) in enumerate(entries):
        y = top - 0.22 - 0.2 * index
        figure.add_artist(
            Rectangle(
                (MARGIN / width, y / height), 0.2 / width, 0.13 / height, facecolor=face,
                edgecolor=edge, linewidth=1.5, transform=figure.transFigure,
            )
        )  # fmt: skip
        write(figure, MARGIN + 0.3, y + 0.065, shorten(text, width - 0.6, SMALL), SMALL,
              va="center")  # fmt: skip
