"""Comparison of photos where they overlap best."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from vitlib.audit.alignment import Alignments, align
from vitlib.audit.correlation import correlate, prepare_wholes
from vitlib.audit.duplicates import MAX_DIFFERENCE, MIN_CORRELATION


def scene(seed: int, size: tuple[int, int] = (240, 180)) -> Image.Image:
    """A picture of coloured shapes on a smooth background."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(25):
        x, y = rng.uniform(0, 1, 2) * size
        r = rng.uniform(8, 30)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image


def compare(first: Image.Image, second: Image.Image) -> Alignments:
    images = [image.convert("L") for image in (first, second)]
    grey = np.stack([np.asarray(i.resize((64, 64), Image.Resampling.BICUBIC)) for i in images])
    shapes = np.array([image.size for image in images])
    return align(grey, shapes, np.array([[0, 1]]))


def is_near(found: Alignments) -> bool:
    near = found.difference[0] <= MAX_DIFFERENCE and found.correlation[0] >= MIN_CORRELATION
    return bool(near)


def encode(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "jpeg", quality=25)
    return Image.open(file)


@pytest.mark.parametrize(("h", "w"), [(5, 4), (8, 7), (9, 9)])
def test_correlation_equals_numpy(h: int, w: int) -> None:
    """By transforms, and of few places by products; a whole serves several parts."""
    rng = np.random.default_rng(0)
    whole = rng.uniform(0, 255, (2, 9, 9)).astype(np.float32)
    part = rng.uniform(0, 255, (3, h, w)).astype(np.float32)
    rows = [1, 0, 1]
    wholes = prepare_wholes(torch.from_numpy(whole))
    found = correlate(wholes, torch.tensor(rows), torch.from_numpy(part)).numpy()
    assert found.shape == (3, 10 - h, 10 - w)
    expected: npt.NDArray[np.float64] = np.array(
        [
            [
                [
                    np.corrcoef(whole[row, y : y + h, x : x + w].ravel(), part[k].ravel())[0, 1]
                    for x in range(10 - w)
                ]
                for y in range(10 - h)
            ]
            for k, row in enumerate(rows)
        ]
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_brightness_correlates_with_nothing() -> None:
    flat, row = torch.full((1, 8, 8), 200.0), torch.zeros(1, dtype=torch.int64)
    noise = torch.rand(1, 8, 8) * 255
    assert correlate(prepare_wholes(flat), row, noise).item() == 0
    assert correlate(prepare_wholes(noise), row, flat).item() == 0


@pytest.mark.parametrize("seed", range(4))
def test_crop_is_found_where_it_is(seed: int) -> None:
    image = scene(seed)
    part = image.crop((40, 30, 40 + 168, 30 + 126))  # 70 % of each side
    found = compare(image, part)
    assert is_near(found)
    assert found.scale[0] == pytest.approx(0.7, abs=0.03)
    assert not found.swapped[0]
    assert not found.mirrored[0]
    other = compare(part, image)
    assert is_near(other)
    assert other.swapped[0]


def test_crop_of_another_shape() -> None:
    image = scene(5)
    found = compare(image, image.crop((50, 0, 210, 180)).resize((80, 90)))
    assert is_near(found)
    narrow = compare(image, image.crop((30, 20, 150, 180)))
    assert is_near(narrow)


@pytest.mark.parametrize("seed", range(4))
def test_mirrored_brighter_and_encoded_photos_are_near(seed: int) -> None:
    image = scene(seed)
    mirrored = compare(image, ImageOps.mirror(image))
    assert is_near(mirrored)
    assert mirrored.mirrored[0]
    assert is_near(compare(image, ImageEnhance.Brightness(image).enhance(0.6)))
    assert is_near(compare(image, encode(image)))
    assert is_near(compare(image, image.resize((90, 70))))


@pytest.mark.parametrize("seed", range(4))
def test_other_photos_are_not_near(seed: int) -> None:
    image = scene(seed)
    assert not is_near(compare(image, scene(seed + 10)))
    # One thing more on the same background: the mean difference is small, that of a cell is not.
    changed = image.copy()
    ImageDraw.Draw(changed).rectangle((100, 70, 140, 120), fill="white", outline="black")
    assert not is_near(compare(image, changed))


def test_no_pairs() -> None:
    found = align(np.zeros((2, 64, 64), np.uint8), np.ones((2, 2), int), np.empty((0, 2), int))
    assert found.correlation.shape == (0,)


def test_result_of_a_pair_does_not_depend_on_the_others() -> None:
    images = [scene(seed) for seed in range(4)]
    images += [image.crop((20, 20, 200, 155)) for image in images]
    grey = np.stack(
        [np.asarray(i.convert("L").resize((64, 64), Image.Resampling.BICUBIC)) for i in images]
    )
    shapes = np.array([image.size for image in images])
    pairs = np.array([[0, 4], [1, 5], [2, 6], [0, 7]])
    together = align(grey, shapes, pairs)
    for row, pair in enumerate(pairs):
        alone = align(grey, shapes, pair[None])
        assert alone.correlation[0] == pytest.approx(together.correlation[row], abs=1e-5)
        assert alone.scale[0] == together.scale[row]
