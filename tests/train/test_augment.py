"""Augmentation of a photo: presets, distributions and known values."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from vitlib.errors import ConfigError, ImageError
from vitlib.train.augment import Augment
from vitlib.train.augment_ops import RAND_AUGMENT, apply_op, draw_crop_box, shift_hue
from vitlib.train.augment_photo import sample_rng

PRESETS = ("none", "light", "strong", "card")
STILL = {"crop_scale": None, "horizontal_flip": 0.0}  # no change but those of a test


def photo(height: int = 40, width: int = 56, channels: int = 3) -> npt.NDArray[np.uint8]:
    """Random pixels: all rows, columns and channels differ."""
    pixels = np.random.default_rng(5).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return np.ascontiguousarray(pixels)


def plane(pixels: npt.NDArray[np.uint8]) -> list[Image.Image]:
    return [Image.fromarray(pixels)]


def test_sample_rng_differs_by_every_argument() -> None:
    def draw(*numbers: int) -> list[float]:
        return sample_rng(*numbers).random(4).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    others = [draw(0, 2, 3), draw(1, 3, 2), draw(1, 2, 4), draw(1, 2, 0), draw(2**63 - 1, 2, 3)]
    others.append(np.random.default_rng([1, 2, 3]).random(4).tolist())  # no spawn key
    assert len({tuple(numbers) for numbers in [draw(1, 2, 3), *others]}) == 7


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_presets(name: str, channels: int) -> None:
    augment, pixels = Augment.from_preset(name), photo(channels=channels)
    before = pixels.copy()
    outcomes = set()
    for sample in range(12):
        np.random.seed(sample)  # what must not matter
        random.seed(sample)
        actual = augment.apply(pixels, (24, 32), sample_rng(0, 0, sample))
        np.random.seed(99)
        again = augment.apply(pixels, (24, 32), sample_rng(0, 0, sample))
        assert actual.shape == (24, 32, channels)
        assert actual.dtype == np.uint8
        assert np.array_equal(actual, again)
        outcomes.add(actual.tobytes())
    assert len(outcomes) == (1 if name == "none" else 12)
    assert np.array_equal(pixels, before)
    assert augment.changes_photo == (name != "none")
    assert augment.mixes == (name == "strong")


def test_from_preset_rejects_unknown_name() -> None:
    with pytest.raises(ConfigError, match="augment='mild': expected one of none, light, strong"):
        Augment.from_preset("mild")


def test_card_preset_values() -> None:
    card = Augment.from_preset("card")
    assert (card.crop_scale, card.crop_ratio, card.horizontal_flip) == (
        (0.08, 1),
        (3 / 4, 4 / 3),
        0.5,
    )
    assert (card.brightness, card.contrast, card.saturation, card.hue) == (0.4,) * 4
    assert card.color_jitter_prob == 0.5


def test_crop_box_distribution() -> None:
    boxes = np.array(
        [draw_crop_box(300, 400, (0.2, 0.6), (0.75, 1.5), sample_rng(0, 0, i)) for i in range(4000)]
    )
    top, left, bottom, right = boxes.T
    assert top.min() >= 0
    assert left.min() >= 0
    assert bottom.max() == 300
    assert right.max() == 400
    down, across = bottom - top, right - left
    shares, shapes = down * across / (300 * 400), across / down
    assert 0.198 < shares.min() < 0.21
    assert 0.58 < shares.max() < 0.602
    assert 0.74 < shapes.min() < 0.76
    assert 1.45 < shapes.max() < 1.51
    # All shares fit but the largest of the widest, so the mean is nearly the middle.
    assert shares.mean() == pytest.approx(0.4, abs=0.01)
    assert np.log(shapes).mean() == pytest.approx(np.log(0.75 * 1.5) / 2, abs=0.03)
    middle = (top + down / 2).mean(), (left + across / 2).mean()
    assert middle == pytest.approx((150, 200), abs=3)


@pytest.mark.parametrize(("height", "width"), [(10, 4000), (4000, 10), (1, 1), (2, 1), (1, 500)])
def test_crop_box_of_extreme_shapes(height: int, width: int) -> None:
    for sample in range(20):
        top, left, bottom, right = draw_crop_box(
            height, width, (0.9, 1.0), (0.75, 4 / 3), sample_rng(0, 0, sample)
        )
        assert 0 <= top < bottom <= height
        assert 0 <= left < right <= width
        if height == 10:  # the largest whose shape is allowed, in the middle
            assert (top, bottom, right - left) == (0, 10, 13)
            assert left == (4000 - 13) // 2


def test_crop_uses_resample_filter() -> None:
    augment, pixels = Augment(horizontal_flip=0.0), photo(90, 120)
    for resample in (0, 1, 2, 3):
        box = draw_crop_box(90, 120, (0.35, 1.0), (3 / 4, 4 / 3), sample_rng(7, 1, 2))
        inside = Image.fromarray(pixels[box[0] : box[2], box[1] : box[3]])
        expected = np.asarray(inside.resize((40, 30), Image.Resampling(resample)))
        actual = augment.apply(pixels, (30, 40), sample_rng(7, 1, 2), resample=resample)
        assert np.array_equal(actual, expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("field", ["horizontal_flip", "vertical_flip"])
def test_flip_probability(channels: int, field: str) -> None:
    pixels = photo(20, 30, channels)
    flipped = pixels[:, ::-1] if field == "horizontal_flip" else pixels[::-1]
    for probability in (0.0, 0.25, 1.0):
        augment = Augment(**{**STILL, field: probability})
        count = 0
        for sample in range(400):
            actual = augment.apply(pixels, (20, 30), sample_rng(0, 0, sample))
            is_flipped = np.array_equal(actual, flipped)
            assert is_flipped or np.array_equal(actual, pixels)
            count += is_flipped
        assert count / 400 == pytest.approx(probability, abs=0.07 if 0 < probability < 1 else 0)


def test_brightness_factor_range() -> None:
    pixels = np.full((4, 4, 3), 100, np.uint8)
    augment = Augment(**STILL, brightness=0.3)
    actual = [augment.apply(pixels, (4, 4), sample_rng(0, 0, i))[0, 0].tolist() for i in range(300)]
    assert all(len(set(pixel)) == 1 for pixel in actual)
    values = [pixel[0] for pixel in actual]
    assert 70 <= min(values) < 73
    assert 127 < max(values) <= 130
    assert np.mean(values) == pytest.approx(100, abs=3)


def test_contrast_keeps_mean() -> None:
    pixels = np.full((4, 4, 1), 50, np.uint8)
    pixels[:2] = 150  # contrast keeps the mean and moves both halves
    augment = Augment(**STILL, contrast=0.5)
    for sample in range(50):
        actual = augment.apply(pixels, (4, 4), sample_rng(0, 0, sample)).astype(int)
        factor = (actual[0, 0, 0] - actual[3, 3, 0]) / 100
        assert 0.48 < factor < 1.52
        assert (actual[0, 0, 0] + actual[3, 3, 0]) / 2 == pytest.approx(100, abs=1)


def test_saturation_and_hue_keep_gray_and_brightness() -> None:
    gray = np.repeat(photo(channels=1), 3, axis=2)
    augment = Augment(**STILL, saturation=1.0, hue=0.5)
    assert np.array_equal(augment.apply(gray, gray.shape[:2], sample_rng(0, 0, 1)), gray)
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    outcomes = set()
    for sample in range(100):
        actual = Augment(**STILL, hue=0.5).apply(red, (4, 4), sample_rng(0, 0, sample))
        assert actual[0, 0].max() == 200
        assert actual[0, 0].min() == 0
        outcomes.add(int(actual[0, 0].argmax()))
    assert outcomes == {0, 1, 2}
    small = Augment(**STILL, hue=0.05)
    hues = [small.apply(red, (4, 4), sample_rng(0, 0, sample))[0, 0] for sample in range(100)]
    assert max(max(hue[1], hue[2]) for hue in hues) <= 200 * 6 * 0.05 + 4
    assert max(hue[1] for hue in hues) > 30
    assert max(hue[2] for hue in hues) > 30


def test_shift_hue_known_values() -> None:
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    for share, expected in ((1 / 3, (0, 255, 0)), (-1 / 3, (0, 0, 255)), (0.5, (0, 255, 255))):
        actual = shift_hue(red, share).getpixel((0, 0))
        assert actual == pytest.approx(expected, abs=6)  # hues are of 256 steps
    assert shift_hue(red, 0.0).getpixel((0, 0)) == (255, 0, 0)


def test_color_jitter_probability() -> None:
    pixels = photo()
    for probability in (0.0, 0.5, 1.0):
        augment = Augment(
            **STILL,
            brightness=0.4,
            contrast=0.4,
            saturation=0.4,
            hue=0.4,
            color_jitter_prob=probability,
        )
        assert augment.changes_photo == (probability > 0)
        changed = sum(
            not np.array_equal(augment.apply(pixels, (40, 56), sample_rng(0, 0, i)), pixels)
            for i in range(300)
        )
        assert changed / 300 == pytest.approx(probability, abs=0.09 if probability == 0.5 else 0)


def test_color_jitter_by_number_of_channels() -> None:
    colours = Augment(**STILL, saturation=0.9, hue=0.5)
    assert np.array_equal(
        colours.apply(photo(channels=1), (40, 56), sample_rng(0, 0, 0)), photo(channels=1)
    )
    all_four = Augment(**STILL, brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5)
    assert not np.array_equal(
        all_four.apply(photo(channels=1), (40, 56), sample_rng(0, 0, 0)), photo(channels=1)
    )
    assert np.array_equal(
        all_four.apply(photo(channels=4), (40, 56), sample_rng(0, 0, 0)), photo(channels=4)
    )


def test_geometric_ops_move_channels_together() -> None:
    pixels = np.repeat(photo(channels=1), 5, axis=2)
    augment = Augment.from_preset("strong")
    moved = 0
    for sample in range(20):
        actual = augment.apply(pixels, (32, 32), sample_rng(0, 0, sample))
        assert all(np.array_equal(actual[..., 0], actual[..., channel]) for channel in range(1, 5))
        moved += bool((actual == 128).sum() > 100)
    assert moved > 5  # turned or shifted, with fill around


def test_grayscale_and_blur() -> None:
    pixels = photo()
    gray = Augment(**STILL, grayscale_prob=1.0).apply(pixels, (40, 56), sample_rng(0, 0, 0))
    assert np.array_equal(gray[..., 0], np.asarray(Image.fromarray(pixels).convert("L")))
    assert np.array_equal(gray[..., 0], gray[..., 2])
    for channels in (1, 3, 4):
        pixels = photo(channels=channels)
        blurred = Augment(**STILL, blur_prob=1.0).apply(pixels, (40, 56), sample_rng(0, 0, 0))
        assert blurred.std() < pixels.std() - 5
        assert blurred.mean() == pytest.approx(pixels.mean(), abs=2)


@pytest.mark.parametrize("name", RAND_AUGMENT)
def test_rand_augment_operation(name: str) -> None:
    smooth = np.add.outer(np.arange(40), 3 * np.arange(56)).astype(np.uint8)
    colours = photo()
    for pixels in (colours, colours[..., 0].copy()):
        for strength in (-1.0, 1.0):
            [actual] = apply_op(name, plane(pixels), strength)
            assert actual.size == (56, 40)
            assert actual.mode == ("RGB" if pixels.ndim == 3 else "L")
            unchanged = np.array_equal(np.asarray(actual), pixels)
            # All pixels are there, so there is no more contrast to be had; gray has no colour.
            nothing = name == "color" and pixels.ndim == 2
            assert unchanged == (name in ("identity", "autocontrast") or nothing)
        if name not in ("autocontrast", "equalize"):  # which know no strength
            [still] = apply_op(name, plane(pixels), 0.0)
            assert np.array_equal(np.asarray(still), pixels)
    dull = (colours // 2 + 40).astype(np.uint8)
    if name == "autocontrast":
        assert np.asarray(apply_op(name, plane(dull), 1.0)[0]).min() == 0
    several = [Image.fromarray(smooth)] * 5
    moved = [np.asarray(plane_image) for plane_image in apply_op(name, several, 1.0)]
    changes = not all(np.array_equal(plane_image, smooth) for plane_image in moved)
    assert changes == (name.split("_")[0] in ("rotate", "shear", "translate"))


def test_apply_op_known_values() -> None:
    pixels = photo(40, 20)
    [posterized] = apply_op("posterize", plane(pixels), -1.0)
    assert np.array_equal(np.asarray(posterized), pixels & 0xF0)
    [solarized] = apply_op("solarize", plane(pixels), 0.5)
    assert np.array_equal(np.asarray(solarized), np.where(pixels < 128, pixels, 255 - pixels))
    [moved] = apply_op("translate_x", plane(pixels), 1.0, (1, 2, 3))  # by 0.45 of 20 pixels
    assert np.array_equal(np.asarray(moved)[:, :11], pixels[:, 9:])
    assert (np.asarray(moved)[:, 11:] == (1, 2, 3)).all()
    [moved] = apply_op("translate_y", plane(pixels), -1.0)  # by 0.45 of 40
    assert np.array_equal(np.asarray(moved)[18:], pixels[:22])
    assert (np.asarray(moved)[:18] == 128).all()
    white = np.full((41, 41), 255, np.uint8)
    white[20, 20] = 0
    for name in ("rotate", "shear_x", "shear_y"):  # about the middle, and the corners come in
        actual = np.asarray(apply_op(name, plane(white), 1.0, (7,))[0])
        assert actual[20, 20] < 60
        assert actual[0, 0] == 7 or actual[0, -1] == 7


def test_rand_augment_draws_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: Counter[tuple[str, float]] = Counter()

    def note(name: str, planes: list[Image.Image], strength: float, _: object) -> list[Image.Image]:
        drawn[name, strength] += 1
        return planes

    monkeypatch.setattr("vitlib.train.augment_ops.apply_op", note)
    augment = Augment(**STILL, rand_augment_ops=2, rand_augment_magnitude=4.0)
    for sample in range(1400):
        augment.apply(photo(4, 4), (4, 4), sample_rng(0, 0, sample))
    assert drawn.total() == 2800
    assert {name for name, _ in drawn} == set(RAND_AUGMENT)
    assert len(RAND_AUGMENT) == 14
    assert {strength for _, strength in drawn} == {-0.4, 0.4}
    assert all(60 < count < 140 for count in drawn.values())  # 100 each


@pytest.mark.parametrize("fill", ["mean", "noise"])
def test_erasing_distribution(fill: str) -> None:
    augment = Augment(random_erasing=0.4, erasing_scale=(0.1, 0.3), erasing_fill=fill)  # type: ignore[arg-type]
    shares, inside, shapes = [], [], []
    for sample in range(500):
        pixels = np.full((3, 60, 80), 9.0, np.float32)
        augment.erase(pixels, sample_rng(0, 0, sample))
        changed = (pixels != 9).all(axis=0)
        assert np.array_equal(changed, (pixels != 9).any(axis=0))
        if not changed.any():
            continue
        rows, columns = changed.any(axis=1), changed.any(axis=0)
        assert np.array_equal(changed, np.outer(rows, columns))  # a rectangle
        shares.append(changed.mean())
        shapes.append(rows.sum() / columns.sum())
        inside.append(pixels[:, changed])
    assert len(shares) / 500 == pytest.approx(0.4, abs=0.07)
    assert 0.095 < min(shares) < 0.12
    assert 0.27 < max(shares) < 0.305
    assert 0.28 < min(shapes) < 0.5
    assert 2 < max(shapes) < 3.4
    values = np.concatenate([part.ravel() for part in inside])
    if fill == "mean":
        assert not values.any()
    else:
        assert (values.mean(), values.std()) == pytest.approx((0, 1), abs=0.01)


def test_erasing_leaves_tiny_photos() -> None:
    pixels = np.ones((3, 8, 8), np.float32)
    Augment().erase(pixels, sample_rng(0, 0, 0))
    assert (pixels == 1).all()
    for sample in range(20):  # no rectangle of a pixel or more is smaller than tiny pixel
        tiny = np.ones((3, 1, 1), np.float32)
        Augment(random_erasing=1.0).erase(tiny, sample_rng(0, 0, sample))
        assert (tiny == 1).all()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("crop_scale", (0.0, 1.0), "two numbers, the smaller first, above 0 and at most 1"),
        ("crop_scale", (0.5, 1.5), "at most 1"),
        ("crop_scale", (0.9, 0.5), "the smaller first"),
        ("crop_scale", 0.5, "two numbers"),
        ("crop_ratio", (1.0,), "two numbers"),
        ("crop_ratio", (float("nan"), 1.0), "two numbers"),
        ("horizontal_flip", 1.1, r"horizontal_flip=1.1: expected a number in 0..1"),
        ("vertical_flip", -0.1, "0..1"),
        ("color_jitter_prob", "often", "0..1"),
        ("brightness", -1, "brightness=-1"),
        ("hue", 0.6, "hue=0.6: expected a number in 0..0.5"),
        ("rand_augment_ops", 1.5, "rand_augment_ops=1.5: expected a whole number"),
        ("rand_augment_ops", True, "whole number"),
        ("rand_augment_magnitude", 11, r"0..10"),
        ("random_erasing", 2, "0..1"),
        ("erasing_scale", (0.1, 2), "at most 1"),
        ("erasing_ratio", (0, 1), "above 0"),
        ("erasing_fill", "black", "erasing_fill='black': expected 'mean' or 'noise'"),
        ("mixup_alpha", -0.2, "mixup_alpha"),
        ("cutmix_alpha", None, "cutmix_alpha"),
        ("mix_prob", 1.01, "0..1"),
        ("mix_switch_prob", float("inf"), "0..1"),
        ("grayscale_prob", -1, "0..1"),
        ("blur_prob", 3, "0..1"),
    ],
)
def test_augment_rejects_bad_values(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augment(**{field: value})  # type: ignore[arg-type]


def test_augment_accepts_lists_of_a_file() -> None:
    augment = Augment(crop_scale=[0.2, 1], erasing_ratio=[1, 2])  # type: ignore[arg-type]
    assert augment.crop_scale == (0.2, 1.0)
    assert augment.erasing_ratio == (1.0, 2.0)
    assert Augment(**dataclasses.asdict(augment)) == augment
    assert Augment(**dataclasses.asdict(Augment.none())) == Augment.none()
    assert all(field.metadata["help"] for field in dataclasses.fields(Augment))


def test_apply_rejects_bad_arrays() -> None:
    rng = sample_rng(0, 0, 0)
    for pixels in (photo()[..., 0], photo().astype(np.float64), photo()[:0]):
        with pytest.raises(ImageError, match=r"expected \(height, width, channels\) of uint8"):
            Augment().apply(pixels, (8, 8), rng)  # type: ignore[arg-type]
