"""Image files deeper than 8 bits: all of their bits, and the range that they declare."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.deep_images import (
    DEPTH,
    HALF,
    RULE,
    Tags,
    colour_png,
    expected_pixels,
    max_difference,
    picture,
    png,
    tiff,
)
from vitlib import ImageProcessor
from vitlib.errors import ImageError
from vitlib.image.decode import decode

READ = {  # file -> what is white; black is 0
    "rgb16.tif": 65535, "rgb16-zlib.tif": 65535, "rgb16-big-endian.tif": 65535,
    "rgba16.tif": 65535, "gray16.tif": 65535, "gray16-max-sample-value.tif": 4095,
    "gray12.tif": 4095, "int16.tif": 32767, "int32.tif": 2**31 - 1, "uint32.tif": 2**32 - 1,
    "float32.tif": 1, "rgb16.png": 65535, "rgba16.png": 65535, "gray-alpha16.png": 65535,
    "gray16.png": 65535, "rgb16-interlaced.png": 65535, "gray12.png": 4095,
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_files_keep_all_of_their_bits(name: str) -> None:
    samples = np.load(DEPTH / "samples.npz")[name]
    if samples.ndim == 3:
        samples = samples[:, :, : {2: 1, 4: 3}.get(samples.shape[2])]
    wanted = expected_pixels(samples, 0, READ[name])
    path = DEPTH / name
    opened = Image.open(path)
    for image in (path, str(path), path.read_bytes(), opened):
        # pypng's scaling of 12 bits to 16 is rounded.
        assert max_difference(RULE.to_float(image), wanted) < (
            2e-5 if name == "gray12.png" else 3e-7
        )
    assert torch.equal(RULE.to_float(opened), RULE.to_float(path))  # once more
    opened.load()
    with Image.open(path) as again:
        assert np.array_equal(np.asarray(opened), np.asarray(again))
    if samples.dtype.kind != "u" or READ[name] == np.iinfo(samples.dtype).max:
        assert torch.equal(RULE.to_float(samples), RULE.to_float(path))


def test_white_is_zero() -> None:
    samples = np.load(DEPTH / "samples.npz")["gray16-white-is-zero.tif"]
    path = DEPTH / "gray16-white-is-zero.tif"
    assert max_difference(RULE.to_float(path), expected_pixels(65535 - samples, 0, 65535)) < 3e-7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("planar16.tif", "3 separate planes of 16 bits"),
        ("int8.tif", "signed integers of 8 bits"),
        ("float-rgb.tif", "is a TIFF of 3 samples a pixel, floats of 32 bits"),
        ("float64.tif", "is a TIFF of 1 samples a pixel, floats of 64 bits"),
        ("bands13.tif", "is a TIFF of 13 samples a pixel, unsigned integers of 16 bits"),
    ],
)
def test_undecodable_tiff_is_rejected_with_array_to_pass(name: str, message: str) -> None:
    """The remedy that the message names, the array, works."""
    for image in (DEPTH / name, (DEPTH / name).read_bytes()):
        with pytest.raises(ImageError, match=f"{message}.*with tifffile and give the array"):
            RULE.to_float(image)
    samples = np.load(DEPTH / "samples.npz")[name]
    channels = 13 if "13" in name else 3
    rule = ImageProcessor(in_channels=channels, levels=(-128, 127) if "int8" in name else None)
    assert rule.to_float(samples).shape == (channels, 7, 9)


def test_deep_pixmaps() -> None:
    few = picture("uint16") >> 4
    gray = few[:, :, 0]
    words = " ".join(map(str, few.ravel().tolist())).encode()
    for data, samples in (
        (b"P6 30 20 4095\n" + few.astype(">u2").tobytes(), few),
        (b"P5 30 20 4095\n" + gray.astype(">u2").tobytes(), gray),
        (b"P5 30 20 65535\n" + gray.astype(">u2").tobytes(), gray),
        (b"P3\n# twelve bits\n30 20 4095\n" + words, few),
    ):
        white = 65535 if b"65535" in data[:20] else 4095
        assert max_difference(RULE.to_float(data), expected_pixels(samples, 0, white)) < 3e-7
        with pytest.raises(ImageError, match="truncated"):
            RULE.to_float(data[: len(data) // 2])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_deep_files(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    gray = picture("uint16", (4, 7))
    files = [io.BytesIO(), io.BytesIO()]
    Image.fromarray(gray).save(files[0], "PNG", exif=exif)
    Image.fromarray((gray >> 8).astype(np.uint8)).save(files[1], "PNG", exif=exif)
    deep, shallow = (np.asarray(decode(file.getvalue(), 3)[0]) for file in files)
    assert np.abs(deep - shallow[:, :, 0]).max() <= 1


def test_significant_bits_of_a_png() -> None:
    few = picture("uint16", (20, 30)) >> 4
    for samples, white in ((few, 4095), (few << 4, 65535), (few << 4 | few >> 8, 65535)):
        image = png(samples, b"\x0c")
        assert max_difference(RULE.to_float(image), expected_pixels(samples, 0, white)) < 3e-7
    with pytest.raises(ImageError, match=r"expected 0 to 4095, as the file's sBIT says"):
        RULE.to_float(png(picture("uint16", (20, 30)), b"\x0c"))
    either = np.full((20, 30), 2048, np.uint16)
    with pytest.raises(ImageError, match=r"sBIT says 12 bits.*levels= \(--levels\), 65535 or 4095"):
        RULE.to_float(png(either, b"\x0c"))
    for white in (4095, 65535):  # as the message says
        result = replace(RULE, levels=white).to_float(png(either, b"\x0c"))
        assert max_difference(result, expected_pixels(either, 0, white)) < 3e-7


def test_significant_bits_of_each_channel() -> None:
    bits = (14, 15, 14)
    white = [2**number - 1 for number in bits]
    few = picture("uint16") >> (16 - np.array(bits)).astype(np.uint16)
    few[0, 0], few[0, 1] = white, 0
    unscaled = colour_png(few, bytes(bits))
    wanted = expected_pixels(few / np.array(white), 0, 1)
    assert max_difference(RULE.to_float(unscaled), wanted) < 3e-7
    full = replace(RULE, size=None).to_float(unscaled)
    assert full.max(-1).values.max(-1).values.tolist() == [1, 1, 1]
    scaled = few << (16 - np.array(bits)).astype(np.uint16)
    assert (
        max_difference(
            RULE.to_float(colour_png(scaled, bytes(bits))), expected_pixels(scaled, 0, 65535)
        )
        < 3e-7
    )
    result = replace(RULE, levels=65535).to_float(unscaled)  # what the user says is of all channels
    assert max_difference(result, expected_pixels(few, 0, 65535)) < 3e-7
    few[3, 3, 0] = 16384
    with pytest.raises(ImageError, match=r"bytes, channel 0, of uint16.* expected 0 to 16383, as"):
        RULE.to_float(colour_png(few, bytes(bits)))


def test_ambiguous_significant_bits_of_channels() -> None:
    either = np.full((20, 30, 3), (4096, 8192, 2048), np.uint16)
    image = colour_png(either, b"\x0e\x0f\x0e")
    remedy = (
        r"sBIT says 14, 15, 14 bits.* up to 8192, .*give levels=65535 \(--levels\) if they are, "
        "else the array as floats in 0..1, its channels divided by 16383, 32767, 16383$"
    )
    with pytest.raises(ImageError, match=remedy):
        RULE.to_float(image)
    result = replace(RULE, levels=65535).to_float(image)  # as the message says
    assert max_difference(result, expected_pixels(either, 0, 65535)) < 3e-7
    unit = either / np.array([16383, 32767, 16383])
    assert max_difference(RULE.to_float(unit), expected_pixels(unit, 0, 1)) < 3e-7


@pytest.mark.parametrize("bits", [1, 5, 8, 9, 15])
def test_few_significant_bits(bits: int, caplog: pytest.LogCaptureFixture) -> None:
    white = 2**bits - 1
    few = np.random.default_rng(0).integers(0, white, (20, 30), np.uint16, endpoint=True)
    few[0, :2] = 0, white
    scaled = np.rint(few * (65535 / white)).astype(np.uint16)
    wanted = expected_pixels(few, 0, white)
    for samples in (few, scaled):
        assert max_difference(RULE.to_float(png(samples, bytes([bits]))), wanted) < 2e-5
    assert not caplog.messages
    for wrong in (b"\0", b"\x11", b"\x08\x08\x08"):  # no numbers of bits, or of another colour type
        assert max_difference(RULE.to_float(png(scaled, wrong)), wanted) < 2e-5


@pytest.mark.parametrize(
    ("tags", "low", "high"),
    [
        ({281: (16383, 16383, 16380)}, (0, 0, 0), (16383, 16383, 16380)),
        ({281: (16383, 65535, 16380)}, (0, 0, 0), (16383, 65535, 16380)),
        ({281: 16383}, (0, 0, 0), (16383, 16383, 16383)),
        ({340: 0, 341: (16383, 16383, 16380)}, (0, 0, 0), (16383, 16383, 16380)),
        ({340: (2, 0, 0), 341: (16383,) * 3}, (2, 0, 0), (16383, 16383, 16383)),
    ],
)
def test_tiff_range_of_each_channel(tags: Tags, low: Sequence[int], high: Sequence[int]) -> None:
    few = picture("uint16") >> 2
    few = few.clip(np.array(low, np.uint16), np.minimum(high, 16383).astype(np.uint16))
    wanted = expected_pixels((few - np.array(low)) / (np.array(high) - low), 0, 1)
    assert max_difference(RULE.to_float(tiff(few, tags)), wanted) < 3e-7
    result = replace(RULE, levels=20_000).to_float(tiff(few, tags))
    assert max_difference(result, expected_pixels(few, 0, 20_000)) < 3e-7
    few[2, 2, 2] = 65535
    with pytest.raises(ImageError, match=r"holds values from \d+ to 65535: expected .* Max|SMax"):
        RULE.to_float(tiff(few, tags))


def test_tiff_range_of_wrong_length_is_rejected() -> None:
    few = picture("uint16") >> 2
    image = tiff(few, {281: (16383, 16380)})
    message = (
        r"of 3 samples a pixel, of which MaxSampleValue says 2: give the value of white with lev"
    )
    with pytest.raises(ImageError, match=message):
        RULE.to_float(image)
    assert (
        max_difference(replace(RULE, levels=16383).to_float(image), expected_pixels(few, 0, 16383))
        < 3e-7
    )


@pytest.mark.parametrize(
    ("dtype", "tags", "array", "levels"),
    [
        ("uint16", {258: 12}, "4095 - array, because 0 is white in it (WhiteIsZero),", "4095"),
        ("uint16", {258: 12, 281: 1000}, "1000 - array, because", "1000"),
        ("uint32", {}, "4294967295 - array, because", ""),
        ("int16", {}, "32767 - array, because", ""),
        ("int8", {}, "127 - array, because", "127"),
        ("uint32", {340: 10, 341: 20}, "30 - array, because", "(10, 20)"),
    ],
)
def test_remedy_for_white_is_zero_tiff(dtype: str, tags: Tags, array: str, levels: str) -> None:
    """The array that the message names inverts the stored values of tifffile."""
    low, high = eval(levels) if "(" in levels else (0, int(levels or np.iinfo(dtype).max))
    samples = np.random.default_rng(0).integers(low, high, (20, 30), dtype, endpoint=True)
    with pytest.raises(ImageError, match="read it with tifffile and give") as error:
        RULE.to_float(tiff(samples, {262: 0, **tags}))
    advice = str(error.value).split("and give ")[1]
    assert advice.startswith(array)
    assert advice.endswith(f", with levels={levels}" if levels else "(WhiteIsZero)")
    expression = advice.split(",")[0]
    processor = replace(RULE, levels=eval(levels) if levels else None)
    result = processor.to_float(eval(expression, {"array": samples}))
    assert max_difference(result, -expected_pixels(samples, low, high)) < 3e-7


def test_remedy_for_12_bit_tiff() -> None:
    few = picture("uint16") >> 4
    with pytest.raises(ImageError, match=r"tifffile and give the array with levels=4095$"):
        RULE.to_float(tiff(few, {258: (12,) * 3}))


@pytest.mark.parametrize("scale", [1000, 0.5, 1])
@pytest.mark.parametrize("order", ["<", ">"])
def test_pfm_scale(scale: float, order: str) -> None:
    unit = picture("float32", (20, 30))
    sign = -1 if order == "<" else 1
    stored = (unit / scale).astype(f"{order}f4")[::-1].tobytes()  # from the lowest row up
    image = b"Pf\n30 20\n%g\n" % (sign * scale) + stored
    if scale == 1:
        assert max_difference(RULE.to_float(image), expected_pixels(unit, 0, 1)) < 3e-7
        return
    with pytest.raises(ImageError, match=f"a PFM of scale {scale:g}, .*: give the array") as error:
        RULE.to_float(image)
    expression = str(error.value).split("array, ")[1].split(", and")[0]
    opened = Image.open(io.BytesIO(image))
    processor = eval(expression.replace("Image.open(...)", "opened"), {"np": np, "opened": opened})
    assert max_difference(RULE.to_float(processor), expected_pixels(unit, 0, 1)) < 3e-7


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_orientation_of_unloaded_tiff(orientation: int, dtype: type, tmp_path: Path) -> None:
    """Pillow maps it where it was opened by its path, and drops the tag."""
    top = np.iinfo(dtype).max
    array = (np.arange(40 * 24).reshape(40, 24) * (top // 1000)).astype(dtype)
    path = tmp_path / "turned.tif"
    Image.fromarray(array).save(path, exif={0x112: orientation})
    rule = ImageProcessor(size=(16, 16), **HALF)
    expected = rule([path])
    with Image.open(path) as opened:
        assert torch.equal(rule([opened]), expected)
    assert torch.equal(rule([path.read_bytes()]), expected)
