"""Pictures: of the right size, in the right place, the same each time."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitlib import ImageProcessor, Prediction, plots
from vitlib.errors import ConfigError

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'vitlib[plot]'")

PHOTO = Image.fromarray(np.full((120, 200, 3), 128, np.uint8))
CROPPED = ImageProcessor(shortest_edge=64, crop_size=(48, 48))


def drawn(figure: object) -> np.ndarray:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figure.dpi)  # type: ignore[attr-defined]
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def test_an_overlay_is_of_the_photos_own_size_and_place() -> None:
    values = np.zeros((4, 4))
    values[0, 0] = 1  # top left of what the model saw
    found = drawn(plots.overlay(PHOTO, values, processor=CROPPED))
    assert found.shape == (120, 200, 3)
    top, left, bottom, right = CROPPED.visible_box(120, 200)
    assert (top, left, bottom, right) == pytest.approx((15, 54.7, 105, 145.3), abs=0.1)
    outside = np.ones((120, 200), bool)
    outside[int(top) : int(bottom) + 1, int(left) : int(right) + 1] = False
    assert (np.abs(found[outside] - 128) <= 1).all()  # what was not seen is as it was
    bright = np.array(found[..., 1])  # viridis ends in yellow: most green where it is strongest
    bright[outside] = 0
    y, x = np.unravel_index(bright.argmax(), bright.shape)
    assert y < (top + bottom) / 2
    assert x < (left + right) / 2


def test_a_map_of_patches_covers_whole_patches_alone() -> None:
    """48 pixels are two patches of 20 and a rest of 8, that no patch saw."""
    whole = CROPPED.visible_box(120, 200)
    top, left, bottom, right = CROPPED.visible_box(120, 200, (20, 20))
    assert (top, left) == whole[:2]
    assert bottom - top == pytest.approx((whole[2] - whole[0]) * 40 / 48)
    assert right - left == pytest.approx((whole[3] - whole[1]) * 40 / 48)
    foreground = np.ones((2, 2), bool)
    for options, end in (({"processor": CROPPED}, bottom), ({}, 120)):
        found = drawn(plots.mask(PHOTO, foreground, **options, patch_size=(20, 20)))
        assert (found[round(end) + 1 : 120] > 200).all()
        assert (np.abs(found[int(top) + 2 : round(end) - 1, 100] - 128) <= 1).all()


def test_an_overlay_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    file = io.BytesIO()
    PHOTO.save(file, "jpeg", exif=exif)
    assert drawn(plots.overlay(file.getvalue(), np.eye(3))).shape == (200, 120, 3)


def test_a_mask_dims_the_rest() -> None:
    foreground = np.zeros((2, 2), bool)
    foreground[1, 0] = True
    found = drawn(plots.mask(PHOTO, foreground))
    assert (np.abs(found[62:, :98] - 128) <= 1).all()
    assert (found[:58] < 40).all()
    seen = drawn(plots.mask(PHOTO, foreground, processor=CROPPED))
    assert (seen[:, :50] > 200).all()  # not seen is not rejected


def test_labels_that_score_less_than_asked_are_gray() -> None:
    predictions = [Prediction("tabby, tabby cat", 0.8, 1), Prediction("$x$ <b>", 0.2, 2)]
    plain = drawn(plots.labels(PHOTO, predictions))
    lined = drawn(plots.labels(PHOTO, predictions, threshold=0.5))
    assert plain.shape[1] == lined.shape[1] == 600
    blue = np.array([0x00, 0x72, 0xB2])
    count = [(np.abs(x - blue).sum(-1) < 6).sum() for x in (plain, lined)]
    assert count[0] > count[1] > 0
    assert drawn(plots.labels(PHOTO, [])).shape[1] == 600


def test_every_picture_is_drawn_the_same_twice(tmp_path: Path) -> None:
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
            one, two = tmp_path / f"1{kind}", tmp_path / f"2{kind}"
            plots.save(draw(), one)
            plots.save(draw(), two)
            assert one.read_bytes() == two.read_bytes(), name
            assert one.stat().st_size > 1000


def random_maps() -> np.ndarray:
    return np.random.default_rng(1).random((3, 6, 5, 7))


def test_a_name_that_ends_in_no_picture(tmp_path: Path) -> None:
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
def test_what_is_no_map(draw: object) -> None:
    with pytest.raises(ConfigError, match=r"expected|give"):
        draw()  # type: ignore[operator]


def test_heads_are_called_by_their_numbers() -> None:
    figure = plots.heads(random_maps()[:2, :1], layer_numbers=[3, 11], head_numbers=[5])
    (axes,) = figure.axes
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("head", "layer")
    assert [t.get_text() for t in axes.get_xticklabels()] == ["3", "11"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["5"]


def test_the_strongest_patch_of_every_head_is_seen() -> None:
    maps = np.zeros((12, 12, 48, 48))
    random = np.random.default_rng(0)
    for row in range(12):
        for column in range(12):
            maps[row, column, random.integers(48), random.integers(48)] = 1
    figure = plots.heads(maps)
    found = drawn(figure)
    figure.canvas.draw()
    box = figure.axes[0].get_window_extent()
    left, right = round(box.x0), round(box.x1)
    top, bottom = round(found.shape[0] - box.y1), round(found.shape[0] - box.y0)
    shown = found[top:bottom, left:right]
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
def test_a_label_fits_whatever_it_is(label: str) -> None:
    predictions = [Prediction(label, score, 0) for score in (0.99, 0.62, 0.01)]
    figure = plots.labels(PHOTO, predictions)
    drawn(figure)
    bars = figure.axes[1]
    assert bars.get_window_extent().width > 500
    for text in bars.texts:
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= 600
    names = [t for t in bars.texts if not t.get_text().startswith("0.")]
    assert max((t.get_window_extent().x1 for t in names), default=0) < 540  # before the score
    drawn(plots.contact_sheet([PHOTO] * 9, [label] * 9, columns=10))


def test_a_dark_map_with_one_bright_patch_still_shows_the_rest() -> None:
    values = np.random.default_rng(0).random((32, 48))
    values[3, 5] = 1000
    found = drawn(plots.overlay(PHOTO, values, strength=1.0))
    assert found[..., 1].std() > 30
