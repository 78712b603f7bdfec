"""Tests of the resize of a part: the bits of Pillow's own resize and crop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitlib import ImageProcessor
from vitlib.image import resize
from vitlib.image.resize import Span, resize_part

# Landscape, portrait and square photos; growth; sides in binary and other fractions.
SIDES = [(480, 640), (640, 480), (499, 666), (666, 499), (300, 300), (90, 100), (31, 500)]


def noise(height: int, width: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(height * 1000 + width)
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    if mode == "F":
        return Image.fromarray(rng.random(shape, dtype=np.float32) * 255)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def is_equal(
    plane: Image.Image,
    sides: tuple[int, int],
    part: tuple[int, int, int, int],
    resample: Image.Resampling,
) -> bool:
    """Compare a part with the same crop of the whole."""
    top, left, height, width = part
    whole = np.asarray(plane.resize((sides[1], sides[0]), resample))
    actual = np.asarray(resize_part(plane, sides, part, resample))
    return np.array_equal(actual, whole[top : top + height, left : left + width])


@pytest.mark.parametrize("mode", ["RGB", "L", "F"])
@pytest.mark.parametrize("resample", range(6))
def test_part_equals_resize_and_crop_to_the_bit(mode: str, resample: int) -> None:
    kind = Image.Resampling(resample)
    for height, width in SIDES:
        plane = noise(height, width, mode)
        for short in (256, 96, 101):
            ratio = short / min(height, width)
            sides = int(height * ratio), int(width * ratio)
            crop = short * 7 // 8
            part = ((sides[0] - crop) // 2, (sides[1] - crop) // 2, crop, crop)
            assert is_equal(plane, sides, part, kind), (height, width, short)
        assert is_equal(plane, (64, 64), (3, 0, 50, 64), kind)  # another aspect ratio
        assert is_equal(plane, (height, 64), (3, 5, height - 3, 40), kind)  # one pass
        assert is_equal(plane, (64, width), (3, 5, 40, width - 9), kind)


def test_random_parts_equal_resize_and_crop_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width, *sides = (int(side) for side in rng.integers(1, 90, 4))
        down, across = (int(rng.integers(1, side + 1)) for side in sides)
        top, left = int(rng.integers(sides[0] - down + 1)), int(rng.integers(sides[1] - across + 1))
        kind = Image.Resampling(int(rng.integers(6)))
        part = (top, left, down, across)
        assert is_equal(noise(height, width), (sides[0], sides[1]), part, kind)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (640, 480)])
def test_crop_of_photo_leaves_out_rows_and_columns(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passes of a photo compute fewer pixels than Pillow's whole resize."""
    pixels = 0
    whole = Image.Image.resize

    def count(self: Image.Image, size: tuple[int, int], *args: Any) -> Image.Image:
        nonlocal pixels
        pixels += size[0] * size[1]
        return whole(self, size, *args)

    assert resize._checked_passes()
    monkeypatch.setattr(Image.Image, "resize", count)
    processor = ImageProcessor(shortest_edge=256, crop_size=(224, 224), resample=3)
    processor.to_uint8_or_float(noise(height, width))
    complete = (256 if height > width else 341) * height + 256 * 341
    assert 0 < pixels < 0.85 * complete


def test_box_is_used_only_in_binary_fractions() -> None:
    assert Span(480, 256, 16, 224).exact_box() == (30.0, 450.0)
    assert Span(480, 256, 0, 256).exact_box() == (0.0, 480.0)
    assert Span(640, 341, 58, 224).exact_box() is None
    assert Span(2**25 + 1, 2**25, 3, 8).exact_box() is None  # edges that float32 rounds


def test_other_order_of_passes_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Pillow that resizes the height first gets the whole resize."""
    whole = Image.Image.resize

    def height_first(
        self: Image.Image, size: tuple[int, int], resample: int = 3, box: Any = None
    ) -> Image.Image:
        box = box or (0, 0, *self.size)
        narrow = whole(self, (self.width, size[1]), resample, (0, box[1], self.width, box[3]))
        return whole(narrow, size, resample, (box[0], 0, box[2], size[1]))

    monkeypatch.setattr(Image.Image, "resize", height_first)
    resize._checked_passes.cache_clear()
    try:
        assert not resize._checked_passes()
        assert is_equal(noise(60, 80), (40, 53), (4, 10, 32, 32), Image.Resampling.BICUBIC)
    finally:
        resize._checked_passes.cache_clear()
