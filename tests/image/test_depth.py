"""Range of arrays, tensors and PIL images deeper than 8 bits, and of floats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.deep_images import DEPTH, RULE, WINDOW, expected_pixels, max_difference, picture, png
from vitlib import ImageProcessor
from vitlib.errors import ConfigError, ImageError


@pytest.mark.parametrize(
    "dtype", ["uint16", ">u2", "int16", "int32", "uint32", "float16", "float32", "float64", ">f4"]
)
def test_default_range_is_that_of_dtype(dtype: str) -> None:
    samples = picture(dtype)
    white = 1 if samples.dtype.kind == "f" else np.iinfo(dtype).max
    wanted = expected_pixels(samples, 0, white)
    assert max_difference(RULE.to_float(samples), wanted) < 3e-7
    assert max_difference(RULE.to_float(samples.transpose(2, 0, 1)), wanted) < 3e-7
    if ">" not in dtype:
        assert torch.equal(RULE.to_float(torch.from_numpy(samples)), RULE.to_float(samples))
    gray = samples[:, :, 0]
    if dtype in ("uint16", "int32", "float32"):
        assert torch.equal(RULE.to_float(Image.fromarray(gray)), RULE.to_float(gray))


def test_16_bits_are_not_truncated() -> None:
    rule = ImageProcessor(size=None)
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert len(np.unique(rule.to_float(ramp)[0])) == 65536
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)  # where a level is in both, it is one
    assert torch.equal(rule.to_float(levels.astype(np.uint16) * 257), rule.to_float(levels))


def test_bfloat16_half_and_bool() -> None:
    unit = torch.from_numpy(picture("float32"))
    for tensor in (unit.bfloat16(), unit.half(), unit.requires_grad_()):
        wanted = RULE.to_float(tensor.detach().float().numpy())
        assert torch.equal(RULE.to_float(tensor), wanted)
    mask = picture("float32", (20, 30)) > 0.5
    black_white = np.where(mask, np.uint8(255), np.uint8(0))
    for image in (mask, torch.from_numpy(mask), Image.fromarray(mask)):
        assert torch.equal(RULE.to_float(image), RULE.to_float(black_white))


def test_int64_holds_8_bit_levels() -> None:
    levels = picture("uint8")
    assert (
        max_difference(RULE.to_float(levels.astype(np.int64)), expected_pixels(levels, 0, 255))
        < 3e-7
    )
    levels = levels.astype(np.int64)
    levels[0, 0, 0] = 256
    with pytest.raises(ImageError, match=r"from 0 to 256: expected 0 to 255; give levels= "):
        RULE.to_float(levels)
    assert replace(RULE, levels=256).to_float(levels).shape == (3, 5, 6)


def test_floats_are_in_0_to_1() -> None:
    unit = picture("float32")
    over = unit.copy()
    over[0, 0], over[1, 1] = 1.1, -0.1  # as resampling leaves them
    assert max_difference(RULE.to_float(over), expected_pixels(over, 0, 1)) < 3e-7
    for bad in (1.11, -0.11, 255.0):
        over[0, 0] = bad
        with pytest.raises(ImageError, match=r"expected 0\.\.1, or 0\.\.255 with levels=255"):
            RULE.to_float(over)
    result = replace(RULE, levels=255).to_float(255 * unit)
    assert max_difference(result, expected_pixels(255 * unit.astype(float), 0, 255)) < 3e-7
    dark = unit / 1000  # a dark picture of 0..255 is never taken for one of 0..1
    assert (
        max_difference(replace(RULE, levels=255).to_float(dark), expected_pixels(dark, 0, 255))
        < 3e-7
    )


def test_levels() -> None:
    few = picture("uint16") >> 4
    rule = replace(RULE, levels=4095)
    gray = few[:, :, 0]
    assert max_difference(rule.to_float(few), expected_pixels(few, 0, 4095)) < 3e-7
    assert torch.equal(rule.to_float(few.astype(np.int32)), rule.to_float(few))
    assert torch.equal(rule.to_float(torch.from_numpy(few)), rule.to_float(few))
    for image in (png(gray), Image.fromarray(gray), Image.fromarray(gray.astype(np.int32))):
        assert torch.equal(rule.to_float(image), rule.to_float(gray))
    with pytest.raises(ImageError, match=r"from 0 to 4096: expected 0 to 4095, as levels=4095 say"):
        rule.to_float(np.array([[0, 4096]], np.uint16))
    hounsfield = np.random.default_rng(0).integers(-1024, 3000, (20, 30)).astype(np.int16)
    window = replace(RULE, levels=WINDOW)  # which clips
    assert max_difference(window.to_float(hounsfield), expected_pixels(hounsfield, *WINDOW)) < 3e-7
    assert (
        max_difference(
            window.to_float(hounsfield.astype(float)), expected_pixels(hounsfield, *WINDOW)
        )
        < 3e-7
    )
    with pytest.raises(
        ImageError, match=r"give levels= .* a window .*\(-1023, 2988\), which clips"
    ):
        RULE.to_float(hounsfield)
    assert replace(RULE, levels=(-1023, 2988)).to_float(hounsfield).shape == (3, 5, 6)


@pytest.mark.parametrize("levels", [0, -1, True, "4095", (1, 1), (3, 2), (1, 2, 3), float("nan")])
def test_invalid_levels_are_rejected(levels: object) -> None:
    with pytest.raises(ConfigError, match=r"expected the value of white, such as 4095"):
        ImageProcessor(levels=levels)  # type: ignore[arg-type]


def test_levels_of_numpy() -> None:
    assert ImageProcessor(levels=np.int64(4095)).to_dict()["levels"] == 4095
    assert ImageProcessor(levels=np.array([-160, 240])).levels == WINDOW  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [None, 1 / 10_000, 1.0])
def test_levels_with_other_rescale_factor_is_rejected(factor: float | None) -> None:
    with pytest.raises(ConfigError, match="give one of both"):
        ImageProcessor(levels=4095, rescale_factor=factor)


@pytest.mark.parametrize("levels", [None, 4095, WINDOW, 1, 255, (0, 255)])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "CMYK"])
def test_8_bit_images_ignore_levels(mode: str, levels: object) -> None:
    image = Image.fromarray(picture("uint8")).convert(mode)
    rule = replace(RULE, levels=levels)
    assert rule.to_uint8_or_float(image).dtype == torch.uint8
    assert torch.equal(rule.to_float(image), RULE.to_float(image.convert("RGB")))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4, 3), np.nan), "of float64 holds NaN: expected finite numbers"),
        (np.full((4, 4, 3), np.inf), "of float64 holds infinity: expected finite numbers"),
        (Image.fromarray(np.full((4, 4), -np.inf, np.float32)), "of float32 holds infinity"),
        (torch.full((3, 4, 4), torch.nan, dtype=torch.bfloat16), "holds NaN"),
        (np.full((4, 4, 3), 1j), "of complex128: expected integers or floats"),
        (np.full((4, 4, 3), -5, np.int8), "of int8: expected uint8, or levels="),
        (torch.eye(4).to_sparse(), "expected a dense array"),
        (torch.zeros(3, 4, 4, device="meta"), "expected a dense array"),
        (np.ma.masked_array(np.eye(4), np.eye(4) > 0), "has masked values"),
        (np.full((4, 4), 4095, np.int32), "would be black: give the value of white with levels="),
        (Image.fromarray(np.full((4, 4), 255, np.int32)), "such as 255"),
    ],
)
def test_invalid_values_are_rejected(image: object, message: str) -> None:
    with pytest.raises(ImageError) as error:
        RULE.to_float(image)  # type: ignore[arg-type]
    assert message in str(error.value)


@pytest.mark.parametrize("rule", [RULE, replace(RULE, resample=3), replace(RULE, levels=(-5, 99))])
@pytest.mark.parametrize("step", [1e-7, 1e-3])
@pytest.mark.parametrize("base", [0.0, 0.5, 1.0, "whole levels", "black", "white"])
def test_neighbouring_floats(base: object, step: float, rule: ImageProcessor) -> None:
    """One value changed by one step changes no pixel by more than that step."""
    levels = picture("uint8", (9, 11)) / 255
    levels *= {"black": 0, "white": 0}.get(str(base), 1)
    levels += base == "white"
    first, second = levels.astype(np.float64), levels.astype(np.float64)
    at = 1.0 if isinstance(base, str) else base
    first[4, 4], second[4, 4] = at, at + step
    span = 1 if rule.levels is None else 104
    assert (
        max_difference(rule.to_float(first), rule.to_float(second).numpy())
        <= 2 * step / span + 5e-7
    )


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "int32"])
@pytest.mark.parametrize("at", [0, 127, 254, 255, 256, 4095, 16383, 32766])
def test_neighbouring_integers(at: int, dtype: str) -> None:
    most = np.iinfo(dtype).max
    for top in (at + 1, most):  # alone, and beside white
        first = np.full((9, 11), min(at, 3), dtype)
        first[0, 0], first[4, 4] = top, at
        second = first.copy()
        second[4, 4] += 1
        if most > 65535 and top < most:
            for image in (first, second):
                with pytest.raises(ImageError, match="would be black"):
                    RULE.to_float(image)
        else:
            moved = max_difference(RULE.to_float(first), RULE.to_float(second).numpy())
            assert moved <= 2 / most + 3e-7


@pytest.mark.parametrize("factor", [None, 1 / 10_000, 1 / 255])
def test_many_channels_keep_raw_values(factor: float | None) -> None:
    bands = np.arange(13 * 12 * 12).reshape(12, 12, 13) % 1855
    for dtype in (np.uint16, np.int16, np.int32, np.float32):
        rule = ImageProcessor(in_channels=13, rescale_factor=factor)
        result = rule.to_float(bands.astype(dtype)).permute(1, 2, 0)
        assert len(np.unique(result)) == 1855
        assert max_difference(result, bands * (1 if factor is None else factor)) < 3e-5
        resized = replace(rule, size=(6, 6)).to_float(bands.astype(dtype))
        assert resized.max() > 255 * (1 if factor is None else factor)


@pytest.mark.parametrize("channels", [1, 3])
def test_other_rescale_factor_keeps_raw_values(channels: int) -> None:
    path, samples = DEPTH / "rgb16.tif", np.load(DEPTH / "samples.npz")["rgb16.tif"]
    for factor in (None, 1 / 10_000, 1.0):
        rule = ImageProcessor(in_channels=channels, rescale_factor=factor)
        assert torch.equal(rule.to_float(path), rule.to_float(samples))
        if channels == 3:
            wanted = samples.transpose(2, 0, 1) * (factor or 1.0)
            assert max_difference(rule.to_float(path), wanted) < 4e-3
    unit = picture("float32")
    rule = ImageProcessor(rescale_factor=None)
    assert torch.equal(rule.to_float(unit), torch.from_numpy(unit).permute(2, 0, 1))
    assert rule.to_float(1000 * unit).max() > 900
    with pytest.raises(ImageError, match="holds NaN"):
        rule.to_float(unit * np.float32(np.nan))


@pytest.mark.parametrize("factor", [0.00392156862745098, 0.003921568859368563, 1 / 256, 1 / 127.5])
def test_factors_of_8_bit_levels(factor: float) -> None:
    assert not ImageProcessor(rescale_factor=factor).raw_values
    pixels = ImageProcessor(rescale_factor=factor).to_float(np.full((4, 4), 65535, np.uint16))
    assert pixels.unique().item() == pytest.approx(255 * factor)
