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
    top, left, bottom, right = CROPPED.shown(120, 200)
    assert (top, left, bottom, right) == pytest.approx((15, 54.7, 105, 145.3), abs=0.1)
    outside = np.ones((120, 200), bool)
    outside[int(top) : int(bottom) + 1, int(left) : int(right) + 1] = False
    assert (np.abs(found[outside] - 128) <= 1).all()  # what was not seen is as it was
    bright = np.array(found[..., 1])  # viridis ends in yellow: most green where it is strongest
    bright[outside] = 0
    y, x = np.unravel_index(bright.argmax(), bright.shape)
    assert y < (top + bottom) / 2
    assert x < (left + right) / 2


def test_an_overlay_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    file = io.BytesIO()
    PHOTO.save(file, "jpeg", exif=exif)
    assert drawn(plots.overlay(file.getvalue(), np.eye(3))).shape == (200, 120, 3)


def test_a_mask_dims_the_rest() -> None:
    kept = np.zeros((2, 2), bool)
    kept[1, 0] = True
    found = drawn(plots.mask(PHOTO, kept))
    assert (np.abs(found[62:, :98] - 128) <= 1).all()
    assert (found[:58] < 40).all()


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
    ],
)
def test_what_is_no_map(draw: object) -> None:
    with pytest.raises(ConfigError, match=r"expected|give"):
        draw()  # type: ignore[operator]
