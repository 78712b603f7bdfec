"""Maps over photos: texts, scale, frame, grey photo, legend, alignment and size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fixtures.pictures import find_frames, photo_pixels, read_texts, render
from vitlib import ImageProcessor, plots

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'vitlib[plot]'")

CROPPED = ImageProcessor(shortest_edge=64, crop_size=(48, 48))
RED = Image.new("RGB", (800, 600), (255, 0, 0))
GREY_OF_RED = 76  # of ITU-R 601, which Pillow computes
GRID = np.arange(16.0).reshape(4, 4)

Draw = Callable[[Image.Image], Any]
DRAWN: dict[str, Draw] = {
    "overlay": lambda photo: plots.overlay(photo, GRID, processor=CROPPED),
    "mask": lambda photo: plots.mask(photo, GRID > 7, processor=CROPPED),
    "pca": lambda photo: plots.patch_pca(photo, np.dstack([GRID / 15] * 3), processor=CROPPED),
    "similarity": lambda photo: plots.similarity(photo, GRID / 15, (0, 0), processor=CROPPED),
    "labels": lambda photo: plots.labels(photo, []),
    "heads": lambda photo: plots.heads(GRID[None, None], photo),
    "sheet": lambda photo: plots.contact_sheet([photo]),
}


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_overlay_colours_do_not_depend_on_colours_of_photo(strength: float) -> None:
    result = photo_pixels(plots.overlay(RED, GRID, strength=strength))
    if strength:
        grey = Image.new("RGB", RED.size, (GREY_OF_RED,) * 3)
        assert (result == photo_pixels(plots.overlay(grey, GRID, strength=strength))).all()
        assert result[0, 0].tolist() == [68, 1, 84]  # the least of viridis
    else:
        assert (np.abs(result - GREY_OF_RED) <= 1).all()


def test_overlay_says_class_score_method_and_scale() -> None:
    figure = plots.overlay(
        RED, GRID, title="tabby 0.912", subtitle="relevance: by gradient", scale="relevance"
    )
    texts = read_texts(figure)
    assert {"tabby 0.912", "relevance: by gradient"} <= set(texts)
    assert "relevance: dark is low, bright is high" in texts
    assert {"0", "7.5", "15.0"} <= set(texts)
    bright = np.random.default_rng(0).random((20, 20))
    bright[3, 3] = 9
    assert any(text.startswith("≥ ") for text in read_texts(plots.overlay(RED, bright)))
    assert "3.00 everywhere" in read_texts(plots.overlay(RED, np.full((2, 2), 3.0)))


@pytest.mark.parametrize("name", ["overlay", "mask", "pca", "similarity"])
def test_frame_surrounds_what_the_model_saw(name: str) -> None:
    figure = DRAWN[name](RED)
    frames = find_frames(figure)
    assert frames
    for frame in frames:
        assert frame == pytest.approx(CROPPED.visible_box(600, 800))
    assert "Frame: the part of the photo that the model saw." in read_texts(figure)
    panel = photo_pixels(figure, 1 if name == "pca" else 0)
    assert (panel[:40] > 200).any(axis=-1).all()  # outside of the crop the photo is faded


def test_frame_is_absent_where_the_model_saw_all() -> None:
    figure = plots.overlay(RED, GRID)
    assert not find_frames(figure)
    assert "The model saw the whole photo." in read_texts(figure)


def test_frame_of_padded_crop_stays_on_photo() -> None:
    padded = ImageProcessor(shortest_edge=32, crop_size=(48, 48))
    for top, left, bottom, right in find_frames(plots.overlay(RED, GRID, processor=padded)):
        assert 0 <= top < bottom <= 600
        assert 0 <= left < right <= 800


@pytest.mark.parametrize("size", [(800, 600), (601, 350), (40, 30), (300, 900), (1500, 200)])
def test_pca_colours_lie_over_their_patches(size: tuple[int, int]) -> None:
    """Each pixel of the panel has the colour of the patch that the processor makes of it."""
    components = np.random.default_rng(0).random((4, 4, 3))
    photo = Image.new("RGB", size, (120, 130, 140))
    figure = plots.patch_pca(photo, components, processor=CROPPED, patch_size=(12, 12))
    left, right = (photo_pixels(figure, index) for index in (0, 1))
    assert left.shape == right.shape
    (top, start, bottom, end) = CROPPED.visible_box(size[1], size[0], (12, 12))
    scale = right.shape[1] / size[0]
    for row in range(4):
        for column in range(4):
            y = round((top + (row + 0.5) * (bottom - top) / 4) * scale)
            x = round((start + (column + 0.5) * (end - start) / 4) * scale)
            expected = np.round(255 * components[row, column])
            assert np.abs(right[y, x] - expected).max() <= 1, (row, column)
    # The first pixels beyond the frame, which is drawn on the edge, have no colour.
    beyond = right[:, : max(round(start * scale) - 6, 0)]
    assert (beyond.max(axis=-1) - beyond.min(axis=-1) <= 1).all()


def test_mask_names_both_sides_and_the_rule() -> None:
    foreground = np.zeros((4, 4), bool)
    foreground[0] = True
    texts = read_texts(plots.mask(RED, foreground, rule="Foreground: the upper row."))
    assert "foreground, as in the photo: 25 % of the patches" in texts
    assert "background, dark: 75 % of the patches" in texts
    assert "Foreground: the upper row." in texts


def test_mask_outlines_foreground() -> None:
    from matplotlib.collections import LineCollection

    foreground = np.zeros((4, 4), bool)
    foreground[1, 2] = True
    figure = plots.mask(RED, foreground)
    (outline,) = figure.findobj(LineCollection)
    lines = {tuple(map(tuple, line.tolist())) for line in outline.get_segments()}
    x, y = (400.0, 600.0), (150.0, 300.0)
    assert lines == {
        ((x[0], y[0]), (x[0], y[1])), ((x[1], y[0]), (x[1], y[1])),
        ((x[0], y[0]), (x[1], y[0])), ((x[0], y[1]), (x[1], y[1])),
    }  # fmt: skip


@pytest.mark.parametrize("size", [(28, 28), (3, 7), (640, 10), (10, 640), (1200, 900)])
@pytest.mark.parametrize("name", DRAWN)
def test_every_picture_has_600_pixels(name: str, size: tuple[int, int]) -> None:
    figure = DRAWN[name](Image.new("RGB", size, (9, 99, 199)))
    pixels = render(figure)
    assert max(pixels.shape[:2]) >= 600
    if name in ("overlay", "mask", "pca", "similarity"):
        assert max(photo_pixels(figure).shape[:2]) >= max(600, *size)


def test_tiny_photo_shows_its_pixels() -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    result = photo_pixels(plots.mask(photo, np.ones((1, 1))))
    assert (result == np.asarray(photo).repeat(20, axis=0).repeat(20, axis=1)).all()


@pytest.mark.parametrize("size", [(640, 480), (4000, 300), (300, 4000), (28, 28)])
def test_texts_stay_within_the_figure(size: tuple[int, int]) -> None:
    long = "label $of$ many words and_underscores " * 5
    photo = Image.new("RGB", size)
    figures = [
        plots.overlay(photo, GRID / 1e5, processor=CROPPED, title=long, subtitle=long, scale=long),
        plots.mask(photo, GRID > 3, processor=CROPPED, title=long, rule=long),
        plots.patch_pca(photo, np.dstack([GRID] * 3) / 15, processor=CROPPED, title=long),
    ]
    for figure in figures:
        height, width = render(figure).shape[:2]
        for text in figure.texts:
            box = text.get_window_extent()
            assert box.x0 >= 0, text
            assert box.x1 <= width, text
            assert box.y0 >= 0, text
            assert box.y1 <= height, text
        boxes = [text.get_window_extent() for text in figure.texts]
        for index, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:index]), size


def test_text_of_large_photo_grows() -> None:
    heights = []
    for size in ((800, 600), (2400, 1800)):
        figure = plots.overlay(Image.new("RGB", size), GRID, title="tabby 0.9")
        render(figure)
        (title,) = (text for text in figure.texts if text.get_text() == "tabby 0.9")
        heights.append(title.get_window_extent().height)
    assert heights[1] > 2 * heights[0]


def test_heads_have_title_and_scale() -> None:
    texts = read_texts(plots.heads(np.random.default_rng(0).random((2, 3, 4, 4)), title="heads"))
    assert {"heads", "least attention of a tile", "most"} <= set(texts)
