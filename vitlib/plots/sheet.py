"""Contact sheets: thumbnails with their captions, and a tile for each photo that is unreadable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitlib.errors import ConfigError, VitlibError
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.plots.draw import (
    DPI,
    INK,
    WIDTH,
    decode_upright,
    new_figure,
    shorten,
    show_image,
)
from vitlib.plots.panel import resize_for_display, wrap_text, write
from vitlib.scores import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

SIDE = 2.0  # inches of a tile
POINTS = 8
LINE = 0.155  # inches of a line of a caption
MAX_REASON = 8  # lines of the reason on the tile of an unreadable photo


def contact_sheet(
    photos: Sequence[ImageLike],
    captions: Sequence[str] | None = None,
    *,
    columns: int = 4,
    processor: ImageProcessor | None = None,
    errors: Mapping[int, str] | None = None,
    names: Sequence[str] | None = None,
) -> Figure:
    """Draw thumbnails of many photos, each above its name and its caption.

    Args:
        photos: Photos, each a path, bytes, PIL image or array.
        captions: Text below each, of one or more lines; None draws none.
        columns: Thumbnails in a row, 1 to 8.
        processor: The model's preprocessing, whose levels state the white of deep images.
        errors: Reason of each unreadable photo, by its index: its tile shows the reason. A photo
            that cannot be decoded now gets a tile, too. None expects that each can be decoded.
        names: Name of each photo above its caption, such as the file's; None draws none.

    Returns:
        The figure, 600 pixels wide or more.

    Raises:
        ConfigError: There is no photo, captions or names do not match, or matplotlib is not
            installed.
        ImageError: A photo cannot be decoded, and errors is None.
    """
    if not photos:
        raise ConfigError("a contact sheet of no photos: give one or more")
    for texts, kind in ((captions, "captions"), (names, "names")):
        if texts is not None and len(texts) != len(photos):
            raise ConfigError(f"{len(texts)} {kind} for {len(photos)} photos: expected one each")
    columns = max(1, min(columns, len(photos), 8))
    side = max(SIDE, WIDTH / columns)
    lines = [
        _caption_lines(name, caption, side - 0.12)
        for name, caption in zip(
            names or [""] * len(photos), captions or [""] * len(photos), strict=True
        )
    ]
    rows = [range(i, min(i + columns, len(photos))) for i in range(0, len(photos), columns)]
    # A row is as high as its longest caption.
    heights = [side + LINE * max(len(lines[i]) for i in row) + 0.12 for row in rows]
    figure = new_figure(columns * side, sum(heights) + 0.03)
    figure.set_layout_engine("none")
    top = sum(heights) + 0.03
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            reason = None if errors is None else errors.get(index)
            x = column * side
            _draw_tile(figure, photos[index], (x, top, side), processor, reason, errors is not None)
            for line, (text, colour) in enumerate(lines[index]):
                y = top - side - 0.03 - LINE * line
                write(figure, x + 0.06, y, text, POINTS, colour=colour)
        top -= height
    return figure


def caption_predictions(predictions: Sequence[Prediction], *, numbers: bool = False) -> str:
    """Write labels and scores as a caption, one label a line.

    Args:
        predictions: Labels and scores, in the order to write.
        numbers: The scores are outputs of a regression.

    Returns:
        The caption; the score stands first, where a long label cannot push it out.
    """
    if not predictions:
        return "no label scores enough"
    form = ".4g" if numbers else ".2f"
    return "\n".join(f"{p.score:{form}}  {p.label.split(',')[0]}" for p in predictions)


def file_name(photo: ImageLike) -> str:
    """Return the file's name of a photo.

    Args:
        photo: Path, bytes, PIL image or array.

    Returns:
        The last part of a path; empty for other photos.
    """
    return Path(photo).name if isinstance(photo, str | Path) else ""


def _caption_lines(name: str, caption: str, inches: float) -> list[tuple[str, str]]:
    """Return the lines below a tile that fit, with their colours."""
    lines = [(shorten(name, inches, POINTS, middle=True), INK)] if name else []
    return lines + [(shorten(line, inches, POINTS), "#555555") for line in caption.splitlines()]


def _draw_tile(
    figure: Figure,
    photo: ImageLike,
    corner: tuple[float, float, float],
    processor: ImageProcessor | None,
    reason: str | None,
    may_fail: bool,
) -> None:
    """Draw a photo, or the reason why there is none; corner: left, top and side in inches."""
    x, top, side = corner
    width, height = figure.get_size_inches()
    room = side - 0.06
    axes = figure.add_axes(
        ((x + 0.03) / width, (top - side + 0.03) / height, room / width, room / height)
    )
    small: Image.Image | None = None
    if reason is None:
        try:
            small = decode_upright(photo, processor)
        except VitlibError as error:
            if not may_fail:
                raise
            reason = str(error)
    if small is not None:
        # Twice the pixels of the figure's dots stay sharp on dense screens.
        pixels = round(side * 2 * DPI)
        small.thumbnail((pixels, pixels))
        show_image(axes, resize_for_display(small) if max(small.size) < pixels / 4 else small)
        axes.set_anchor("S")
        return
    # The name stands below the tile.
    reason = (reason or "").removeprefix(f"{str(photo)!r} ")
    axes.set(xticks=[], yticks=[], facecolor="#EEEEEE", xlim=(0, 1), ylim=(0, 1))
    axes.spines[:].set_visible(False)
    write(figure, x + 0.12, top - 0.12, "unreadable", POINTS + 1, colour="#B00020")
    for line, text in enumerate(wrap_text(reason, side - 0.24, POINTS)[:MAX_REASON]):
        write(figure, x + 0.12, top - 0.36 - LINE * line, text, POINTS)
