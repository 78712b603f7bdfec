"""Figures: size, position and reproducibility."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fixtures.pictures import find_frames, photo_pixels, render
from vitlib import ImageProcessor, Prediction, plots
from vitlib.errors import ConfigError

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'vitlib[plot]'")

PHOTO = Image.fromarray(np.full((120, 200, 3), 128, np.uint8))
CROPPED = ImageProcessor(shortest_edge=64, crop_size=(48, 48))


def test_overlay_has_size_and_position_of_photo() -> None:
    values = np.zeros((4, 4))
    values[0, 0] = 1  # top left of what the model saw
    result = photo_pixels(plots.overlay(PHOTO, values, processor=CROPPED))
    assert result.shape == (360, 600, 3)  # three times the photo's
    top, left, bottom, right = CROPPED.visible_box(120, 200)
    assert (top, left, bottom, right) == pytest.approx((15, 54.7, 105, 145.3), abs=0.1)
    top, left, bottom, right = (3 * edge for edge in (top, left, bottom, right))
    outside = np.ones((360, 600), bool)
    # The frame is drawn on the edge.
    outside[int(top) - 4 : int(bottom) + 5, int(left) - 4 : int(right) + 5] = False
    assert (np.abs(result[outside] - 217) <= 1).all()  # faded
    bright = np.array(result[..., 1])  # viridis ends in yellow: most green where it is strongest
    inside = np.zeros((360, 600), bool)
    inside[int(top) + 4 : int(bottom) - 4, int(left) + 4 : int(right) - 4] = True
    bright[~inside] = 0
    y, x = np.unravel_index(bright.argmax(), bright.shape)
    assert y < (top + bottom) / 2
    assert x < (left + right) / 2


def test_large_photo_keeps_its_pixels() -> None:
    random = np.random.default_rng(0)
    photo = random.integers(0, 255, (1100, 1300, 3), dtype=np.uint8)
    result = photo_pixels(plots.mask(Image.fromarray(photo), np.ones((2, 2))))
    assert (result == photo).all()


def test_huge_photo_is_shrunk_with_its_crop() -> None:
    photo = Image.new("RGB", (4800, 600), (128, 128, 128))
    figure = plots.mask(photo, np.ones((2, 2)), processor=CROPPED)
    assert photo_pixels(figure).shape == (300, 2400, 3)
    (frame, *_) = find_frames(figure)
    assert frame == pytest.approx([edge / 2 for edge in CROPPED.visible_box(600, 4800)])


def test_map_covers_whole_patches_only() -> None:
    """48 pixels are two patches of 20 and a rest of 8, that no patch saw."""
    whole = CROPPED.visible_box(120, 200)
    top, left, bottom, right = CROPPED.visible_box(120, 200, (20, 20))
    assert (top, left) == whole[:2]
    assert bottom - top == pytest.approx((whole[2] - whole[0]) * 40 / 48)
    assert right - left == pytest.approx((whole[3] - whole[1]) * 40 / 48)
    foreground = np.ones((2, 2), bool)
    for options, end in (({"processor": CROPPED}, bottom), ({}, 120)):
        result = photo_pixels(plots.mask(PHOTO, foreground, **options, patch_size=(20, 20)))
        end = round(3 * end)
        assert (result[end + 5 : 360] > 200).all()
        assert (np.abs(result[3 * int(top) + 9 : end - 5, 300] - 128) <= 1).all()


def test_overlay_applies_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    file = io.BytesIO()
    PHOTO.save(file, "jpeg", exif=exif)
    assert photo_pixels(plots.overlay(file.getvalue(), np.eye(3))).shape == (600, 360, 3)


def test_mask_darkens_background() -> None:
    foreground = np.zeros((2, 2), bool)
    foreground[1, 0] = True
    result = photo_pixels(plots.mask(PHOTO, foreground))
    assert (np.abs(result[186:, :294] - 128) <= 1).all()
    assert (result[:174] < 40).all()
    cropped = photo_pixels(plots.mask(PHOTO, foreground, processor=CROPPED))
    assert (cropped[:, :150] > 200).all()  # not seen is not rejected


def test_labels_below_threshold_are_gray() -> None:
    predictions = [Prediction("tabby, tabby cat", 0.8, 1), Prediction("$x$ <b>", 0.2, 2)]
    unmodified = render(plots.labels(PHOTO, predictions))
    lined = render(plots.labels(PHOTO, predictions, threshold=0.5))
    assert unmodified.shape[1] == lined.shape[1] == 600
    blue = np.array([0x00, 0x72, 0xB2])
    count = [(np.abs(x - blue).sum(-1) < 6).sum() for x in (unmodified, lined)]
    assert count[0] > count[1] > 0
    assert render(plots.labels(PHOTO, [])).shape[1] == 600


def test_figures_are_reproducible(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    grid = random.random((4, 4))
    figures = {
        "heads": lambda: plots.heads(random_maps(), PHOTO),
        "pca": lambda: plots.patch_pca(PHOTO, np.dstack([grid] * 3), processor=CROPPED),
        "similarity": lambda: plots.similarity(PHOTO, grid * 2 - 1, (1, 2), processor=CROPPED),
        "sheet": lambda: plots.contact_sheet([PHOTO] * 5, list("abcde"), columns=3),
        "curves": lambda: plots.curves([0, 0.5, 1], {"a": [1, 0.5, 0], "b": [1, 1, 0]}, "p"),
    }
    for name, draw in figures.items():
        for kind in (".png", ".svg"):
            item, two = tmp_path / f"1{kind}", tmp_path / f"2{kind}"
            plots.save(draw(), item)
            plots.save(draw(), two)
            assert item.read_bytes() == two.read_bytes(), name
            assert item.stat().st_size > 1000


def random_maps() -> np.ndarray:
    return np.random.default_rng(1).random((3, 6, 5, 7))


def test_save_rejects_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'a\.txt': expected a name that ends in \.png"):
        plots.save(plots.contact_sheet([PHOTO]), tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.overlay(PHOTO, np.full((2, 2), np.nan)),
        lambda: plots.overlay(PHOTO, np.ones(4)),
        lambda: plots.heads(np.ones((2, 2))),
        lambda: plots.patch_pca(PHOTO, np.ones((2, 2))),
        lambda: plots.contact_sheet([]),
        lambda: plots.contact_sheet([PHOTO], ["a", "b"]),
        lambda: plots.overlay(PHOTO, np.zeros((0, 0))),
        lambda: plots.mask(PHOTO, np.ones((1, 2, 2))),
        lambda: plots.similarity(PHOTO, np.ones((2, 2, 2))),
        lambda: plots.similarity(PHOTO, np.ones((2, 2)), (2, 0)),
        lambda: plots.heads(np.ones((0, 3, 2, 2))),
        lambda: plots.heads(np.ones((1, 3, 2, 2)), layer_numbers=[1, 2]),
        lambda: plots.curves([0, 1], {}, "p"),
        lambda: plots.curves([0, 1], {"a": [1, 2, 3]}, "p"),
    ],
)
def test_figures_reject_wrong_maps(draw: object) -> None:
    with pytest.raises(ConfigError, match=r"expected|give"):
        draw()  # type: ignore[operator]


def test_heads_axis_has_layer_and_head_numbers() -> None:
    figure = plots.heads(random_maps()[:2, :1], layer_numbers=[3, 11], head_numbers=[5])
    axes, _ = figure.axes  # and the scale
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("head", "layer")
    assert [t.get_text() for t in axes.get_xticklabels()] == ["3", "11"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["5"]


def test_heads_shows_strongest_patch_of_each() -> None:
    maps = np.zeros((12, 12, 48, 48))
    random = np.random.default_rng(0)
    for row in range(12):
        for column in range(12):
            maps[row, column, random.integers(48), random.integers(48)] = 1
    figure = plots.heads(maps)
    result = render(figure)
    figure.canvas.draw()
    box = figure.axes[0].get_window_extent()
    left, right = round(box.x0), round(box.x1)
    top, bottom = round(result.shape[0] - box.y1), round(result.shape[0] - box.y0)
    shown = result[top:bottom, left:right]
    bright = (shown[..., 1] > 25) & (shown[..., 2] < 200)  # no tile's ground, no white between
    for row in range(12):
        for column in range(12):
            y, x = (round(n * i / 12) for n, i in zip(shown.shape, (row, column), strict=False))
            tile = bright[
                y + 3 : y + shown.shape[0] // 12 - 3, x + 3 : x + shown.shape[1] // 12 - 3
            ]
            if maps[row, column, 4:-4, 4:-4].any():
                assert tile.any(), (row, column)


@pytest.mark.parametrize("label", ["W" * 90, "i" * 300, "\u732b \u72ac", "a $b$ \\c", ""])
def test_any_label_fits(label: str) -> None:
    predictions = [Prediction(label, score, 0) for score in (0.99, 0.62, 0.01)]
    figure = plots.labels(PHOTO, predictions)
    render(figure)
    bars = figure.axes[1]
    assert bars.get_window_extent().width > 500
    for text in bars.texts:
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= 600
    names = [t for t in bars.texts if not t.get_text().startswith("0.")]
    assert max((t.get_window_extent().x1 for t in names), default=0) < 540  # before the score
    render(plots.contact_sheet([PHOTO] * 9, [label] * 9, columns=10))


def test_overlay_clips_one_bright_patch() -> None:
    values = np.random.default_rng(0).random((32, 48))
    values[3, 5] = 1000
    result = photo_pixels(plots.overlay(PHOTO, values, strength=1.0))
    assert result[..., 1].std() > 30


def test_overlay_shows_a_single_bright_patch() -> None:
    values = np.zeros((32, 48))
    values[3, 5] = 1
    result = photo_pixels(plots.overlay(PHOTO, values, strength=1.0))
    assert (result[..., 1] > 200).any()


def test_notebook_shows_figures_without_pyplot() -> None:
    """IPython asks an object for `_repr_png_`; pyplot's backend is not loaded yet."""
    figure = plots.labels(PHOTO, [Prediction("cat", 0.9, 0)])
    shown = Image.open(io.BytesIO(figure._repr_png_()))
    assert shown.format == "PNG"
    assert shown.size == tuple(figure.canvas.get_width_height())
    again = pickle.loads(pickle.dumps(figure))
    assert again._repr_png_().startswith(b"\x89PNG")
