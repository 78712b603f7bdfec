"""Pictures of other depths than 8 bits: what their numbers mean, and that none are lost.

The oracle is float64 arithmetic, with Pillow's filters on float planes; the files of fixtures/depth
were written by tifffile, imagecodecs and pypng (make_depth.py).
"""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, TiffImagePlugin

import vitlib
from fixtures.hostile_files import chunk
from paths import FIXTURES, ROOT
from vitlib import ImageProcessor, Predictor
from vitlib.batch.manifest import compute_model_digest
from vitlib.errors import ConfigError, ImageError
from vitlib.image.decode import decode
from vitlib.image.depth import WarnOnce

DEPTH = FIXTURES / "depth"
HALF = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
RULE = ImageProcessor(size=(5, 6), **HALF)
WINDOW = (-160, 240)
Array = npt.NDArray[np.generic]


def picture(dtype: str, shape: tuple[int, ...] = (20, 30, 3)) -> Array:
    """The whole range of an integer dtype at random, or 0..1."""
    random = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return random.random(shape).astype(dtype)
    native = np.dtype(dtype).newbyteorder("=")
    return random.integers(0, np.iinfo(dtype).max, shape, native, endpoint=True).astype(dtype)


def expected(
    samples: Array, black: float, white: float, rule: ImageProcessor = RULE
) -> npt.NDArray[np.float64]:
    """(H, W, C) samples -> (C, h, w) pixels, in float64 but for Pillow's planes."""
    share = (samples.astype(np.float64) - black) / (white - black)
    share = np.broadcast_to(np.atleast_3d(share.clip(0, 1)), (*share.shape[:2], 3))
    planes = [Image.fromarray(share[:, :, c].astype(np.float32)) for c in range(3)]
    if rule.size is not None:
        size = rule.size[::-1]
        planes = [plane.resize(size, Image.Resampling(rule.resample)) for plane in planes]
    return (np.stack([np.asarray(plane) for plane in planes]).astype(np.float64) - 0.5) / 0.5


def apart(found: torch.Tensor, wanted: npt.NDArray[np.float64]) -> float:
    return float(np.abs(found.numpy() - wanted).max())


def png(samples: Array, significant: bytes = b"") -> bytes:
    """A gray PNG with an sBIT chunk or without."""
    file = io.BytesIO()
    Image.fromarray(samples).save(file, "PNG")
    data = file.getvalue()
    if not significant:
        return data
    body = b"sBIT" + significant
    chunk = struct.pack(">I", len(significant)) + body + struct.pack(">I", zlib.crc32(body))
    return data[:33] + chunk + data[33:]


# --- files ----------------------------------------------------------------------------------------

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
    wanted = expected(samples, 0, READ[name])
    path = DEPTH / name
    opened = Image.open(path)
    for image in (path, str(path), path.read_bytes(), opened):
        # pypng's scaling of 12 bits to 16 is rounded.
        assert apart(RULE.to_float(image), wanted) < (2e-5 if name == "gray12.png" else 3e-7)
    assert torch.equal(RULE.to_float(opened), RULE.to_float(path))  # once more
    opened.load()
    with Image.open(path) as again:
        assert np.array_equal(np.asarray(opened), np.asarray(again))
    if samples.dtype.kind != "u" or READ[name] == np.iinfo(samples.dtype).max:
        assert torch.equal(RULE.to_float(samples), RULE.to_float(path))


def test_white_is_zero() -> None:
    samples = np.load(DEPTH / "samples.npz")["gray16-white-is-zero.tif"]
    path = DEPTH / "gray16-white-is-zero.tif"
    assert apart(RULE.to_float(path), expected(65535 - samples, 0, 65535)) < 3e-7


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("planar16.tif", "3 separate planes of 16 bits"),
        ("int8.tif", "signed integers of 8 bits"),
        ("float-rgb.tif", "is a TIFF of 3 samples a pixel, floats of 32 bits"),
        ("float64.tif", "is a TIFF of 1 samples a pixel, floats of 64 bits"),
        ("bands13.tif", "is a TIFF of 13 samples a pixel, unsigned integers of 16 bits"),
    ],
)
def test_what_pillow_does_not_decode_is_refused_by_name(name: str, told: str) -> None:
    """The remedy that the message names, the array, works."""
    for image in (DEPTH / name, (DEPTH / name).read_bytes()):
        with pytest.raises(ImageError, match=f"{told}.*read it with tifffile and give the array"):
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
        assert apart(RULE.to_float(data), expected(samples, 0, white)) < 3e-7
        with pytest.raises(ImageError, match="truncated"):
            RULE.to_float(data[: len(data) // 2])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_photos_are_turned_as_8_bit_ones(orientation: int) -> None:
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
        assert apart(RULE.to_float(image), expected(samples, 0, white)) < 3e-7
    with pytest.raises(ImageError, match=r"expected 0 to 4095, as the file's sBIT says"):
        RULE.to_float(png(picture("uint16", (20, 30)), b"\x0c"))
    either = np.full((20, 30), 2048, np.uint16)
    with pytest.raises(ImageError, match=r"sBIT says 12 bits.*levels= \(--levels\), 65535 or 4095"):
        RULE.to_float(png(either, b"\x0c"))
    for white in (4095, 65535):  # as the message says
        found = replace(RULE, levels=white).to_float(png(either, b"\x0c"))
        assert apart(found, expected(either, 0, white)) < 3e-7


def colour_png(samples: Array, significant: bytes = b"") -> bytes:
    """An RGB PNG of 16 bits with an sBIT chunk or without; Pillow writes none."""
    height, width, _ = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    chunks[1:1] = [chunk(b"sBIT", significant)] * bool(significant)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_significant_bits_of_each_channel() -> None:
    bits = (14, 15, 14)
    white = [2**number - 1 for number in bits]
    few = picture("uint16") >> (16 - np.array(bits)).astype(np.uint16)
    few[0, 0], few[0, 1] = white, 0
    unscaled = colour_png(few, bytes(bits))
    wanted = expected(few / np.array(white), 0, 1)
    assert apart(RULE.to_float(unscaled), wanted) < 3e-7
    full = replace(RULE, size=None).to_float(unscaled)
    assert full.max(-1).values.max(-1).values.tolist() == [1, 1, 1]
    scaled = few << (16 - np.array(bits)).astype(np.uint16)
    assert apart(RULE.to_float(colour_png(scaled, bytes(bits))), expected(scaled, 0, 65535)) < 3e-7
    found = replace(RULE, levels=65535).to_float(unscaled)  # what the user says is of all channels
    assert apart(found, expected(few, 0, 65535)) < 3e-7
    few[3, 3, 0] = 16384
    with pytest.raises(ImageError, match=r"bytes, channel 0, of uint16.* expected 0 to 16383, as"):
        RULE.to_float(colour_png(few, bytes(bits)))


def test_significant_bits_of_channels_that_may_be_scaled_or_not() -> None:
    either = np.full((20, 30, 3), (4096, 8192, 2048), np.uint16)
    image = colour_png(either, b"\x0e\x0f\x0e")
    remedy = (
        r"sBIT says 14, 15, 14 bits.* up to 8192, .*give levels=65535 \(--levels\) if they are, "
        "else the array as floats in 0..1, its channels divided by 16383, 32767, 16383$"
    )
    with pytest.raises(ImageError, match=remedy):
        RULE.to_float(image)
    found = replace(RULE, levels=65535).to_float(image)  # as the message says
    assert apart(found, expected(either, 0, 65535)) < 3e-7
    unit = either / np.array([16383, 32767, 16383])
    assert apart(RULE.to_float(unit), expected(unit, 0, 1)) < 3e-7


@pytest.mark.parametrize("bits", [1, 5, 8, 9, 15])
def test_few_significant_bits(bits: int, caplog: pytest.LogCaptureFixture) -> None:
    white = 2**bits - 1
    few = np.random.default_rng(0).integers(0, white, (20, 30), np.uint16, endpoint=True)
    few[0, :2] = 0, white
    scaled = np.rint(few * (65535 / white)).astype(np.uint16)
    wanted = expected(few, 0, white)
    for samples in (few, scaled):
        assert apart(RULE.to_float(png(samples, bytes([bits]))), wanted) < 2e-5
    assert not caplog.messages
    for wrong in (b"\0", b"\x11", b"\x08\x08\x08"):  # no numbers of bits, or of another colour type
        assert apart(RULE.to_float(png(scaled, wrong)), wanted) < 2e-5


Tags = dict[int, object]


def tiff(samples: Array, tags: Tags) -> bytes:
    """A TIFF of one strip, little-endian; its tags beside those of the shape and dtype."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    channels = 1 if samples.ndim == 2 else samples.shape[2]
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    fields: Tags = {
        256: samples.shape[1], 257: samples.shape[0], 258: (8 * samples.itemsize,) * channels,
        259: 1, 262: 1 if channels == 1 else 2, 273: 0, 277: channels, 278: samples.shape[0],
        279: samples.nbytes, 339: (kind,) * channels, **tags,
    }  # fmt: skip
    for tag, value in fields.items():
        directory[tag] = value  # of 273, the offset, Pillow counts from the directory's end
    return b"II*\0\x08\0\0\0" + directory.tobytes(8) + samples.tobytes()


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
def test_ranges_of_a_tiffs_channels(tags: Tags, low: Sequence[int], high: Sequence[int]) -> None:
    few = picture("uint16") >> 2
    few = few.clip(np.array(low, np.uint16), np.minimum(high, 16383).astype(np.uint16))
    wanted = expected((few - np.array(low)) / (np.array(high) - low), 0, 1)
    assert apart(RULE.to_float(tiff(few, tags)), wanted) < 3e-7
    found = replace(RULE, levels=20_000).to_float(tiff(few, tags))
    assert apart(found, expected(few, 0, 20_000)) < 3e-7
    few[2, 2, 2] = 65535
    with pytest.raises(ImageError, match=r"holds values from \d+ to 65535: expected .* Max|SMax"):
        RULE.to_float(tiff(few, tags))


def test_a_tiffs_range_of_another_number_of_channels_is_refused() -> None:
    few = picture("uint16") >> 2
    image = tiff(few, {281: (16383, 16380)})
    told = r"of 3 samples a pixel, of which MaxSampleValue says 2: give the value of white with lev"
    with pytest.raises(ImageError, match=told):
        RULE.to_float(image)
    assert apart(replace(RULE, levels=16383).to_float(image), expected(few, 0, 16383)) < 3e-7


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
def test_the_remedy_for_a_tiff_of_which_white_is_zero(
    dtype: str, tags: Tags, array: str, levels: str
) -> None:
    """tifffile gives the stored numbers: the array of the message is inverted, and reads right."""
    low, high = eval(levels) if "(" in levels else (0, int(levels or np.iinfo(dtype).max))
    samples = np.random.default_rng(0).integers(low, high, (20, 30), dtype, endpoint=True)
    with pytest.raises(ImageError, match="read it with tifffile and give") as error:
        RULE.to_float(tiff(samples, {262: 0, **tags}))
    advice = str(error.value).split("and give ")[1]
    assert advice.startswith(array)
    assert advice.endswith(f", with levels={levels}" if levels else "(WhiteIsZero)")
    expression = advice.split(",")[0]
    given = replace(RULE, levels=eval(levels) if levels else None)
    found = given.to_float(eval(expression, {"array": samples}))
    assert apart(found, -expected(samples, low, high)) < 3e-7


def test_the_remedy_for_a_tiff_of_12_bits_says_its_white() -> None:
    few = picture("uint16") >> 4
    with pytest.raises(ImageError, match=r"tifffile and give the array with levels=4095$"):
        RULE.to_float(tiff(few, {258: (12,) * 3}))


@pytest.mark.parametrize("scale", [1000, 0.5, 1])
@pytest.mark.parametrize("order", ["<", ">"])
def test_the_scale_of_a_pfm(scale: float, order: str) -> None:
    unit = picture("float32", (20, 30))
    sign = -1 if order == "<" else 1
    stored = (unit / scale).astype(f"{order}f4")[::-1].tobytes()  # from the lowest row up
    image = b"Pf\n30 20\n%g\n" % (sign * scale) + stored
    if scale == 1:
        assert apart(RULE.to_float(image), expected(unit, 0, 1)) < 3e-7
        return
    with pytest.raises(ImageError, match=f"a PFM of scale {scale:g}, .*: give the array") as error:
        RULE.to_float(image)
    expression = str(error.value).split("array, ")[1].split(", and")[0]
    opened = Image.open(io.BytesIO(image))
    given = eval(expression.replace("Image.open(...)", "opened"), {"np": np, "opened": opened})
    assert apart(RULE.to_float(given), expected(unit, 0, 1)) < 3e-7


# --- arrays, tensors, PIL images ------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["uint16", ">u2", "int16", "int32", "uint32", "float16", "float32", "float64", ">f4"]
)
def test_the_range_is_the_dtypes(dtype: str) -> None:
    samples = picture(dtype)
    white = 1 if samples.dtype.kind == "f" else np.iinfo(dtype).max
    wanted = expected(samples, 0, white)
    assert apart(RULE.to_float(samples), wanted) < 3e-7
    assert apart(RULE.to_float(samples.transpose(2, 0, 1)), wanted) < 3e-7
    if ">" not in dtype:
        assert torch.equal(RULE.to_float(torch.from_numpy(samples)), RULE.to_float(samples))
    gray = samples[:, :, 0]
    if dtype in ("uint16", "int32", "float32"):
        assert torch.equal(RULE.to_float(Image.fromarray(gray)), RULE.to_float(gray))


def test_16_bits_are_not_cut_to_8() -> None:
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
    assert apart(RULE.to_float(levels.astype(np.int64)), expected(levels, 0, 255)) < 3e-7
    levels = levels.astype(np.int64)
    levels[0, 0, 0] = 256
    with pytest.raises(ImageError, match=r"from 0 to 256: expected 0 to 255; give levels= "):
        RULE.to_float(levels)
    assert replace(RULE, levels=256).to_float(levels).shape == (3, 5, 6)


def test_floats_are_in_0_to_1() -> None:
    unit = picture("float32")
    over = unit.copy()
    over[0, 0], over[1, 1] = 1.1, -0.1  # as resampling leaves them
    assert apart(RULE.to_float(over), expected(over, 0, 1)) < 3e-7
    for bad in (1.11, -0.11, 255.0):
        over[0, 0] = bad
        with pytest.raises(ImageError, match=r"expected 0\.\.1, or 0\.\.255 with levels=255"):
            RULE.to_float(over)
    found = replace(RULE, levels=255).to_float(255 * unit)
    assert apart(found, expected(255 * unit.astype(float), 0, 255)) < 3e-7
    dark = unit / 1000  # a dark picture of 0..255 is never taken for one of 0..1
    assert apart(replace(RULE, levels=255).to_float(dark), expected(dark, 0, 255)) < 3e-7


def test_levels() -> None:
    few = picture("uint16") >> 4
    rule = replace(RULE, levels=4095)
    gray = few[:, :, 0]
    assert apart(rule.to_float(few), expected(few, 0, 4095)) < 3e-7
    assert torch.equal(rule.to_float(few.astype(np.int32)), rule.to_float(few))
    assert torch.equal(rule.to_float(torch.from_numpy(few)), rule.to_float(few))
    for image in (png(gray), Image.fromarray(gray), Image.fromarray(gray.astype(np.int32))):
        assert torch.equal(rule.to_float(image), rule.to_float(gray))
    with pytest.raises(ImageError, match=r"from 0 to 4096: expected 0 to 4095, as levels=4095 say"):
        rule.to_float(np.array([[0, 4096]], np.uint16))
    hounsfield = np.random.default_rng(0).integers(-1024, 3000, (20, 30)).astype(np.int16)
    window = replace(RULE, levels=WINDOW)  # which clips
    assert apart(window.to_float(hounsfield), expected(hounsfield, *WINDOW)) < 3e-7
    assert apart(window.to_float(hounsfield.astype(float)), expected(hounsfield, *WINDOW)) < 3e-7
    with pytest.raises(
        ImageError, match=r"give levels= .* a window .*\(-1023, 2988\), which clips"
    ):
        RULE.to_float(hounsfield)
    assert replace(RULE, levels=(-1023, 2988)).to_float(hounsfield).shape == (3, 5, 6)


@pytest.mark.parametrize("levels", [0, -1, True, "4095", (1, 1), (3, 2), (1, 2, 3), float("nan")])
def test_levels_that_cannot_be(levels: object) -> None:
    with pytest.raises(ConfigError, match=r"expected the value of white, such as 4095"):
        ImageProcessor(levels=levels)  # type: ignore[arg-type]


def test_levels_of_numpy() -> None:
    assert ImageProcessor(levels=np.int64(4095)).to_dict()["levels"] == 4095
    assert ImageProcessor(levels=np.array([-160, 240])).levels == WINDOW  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [None, 1 / 10_000, 1.0])
def test_levels_and_a_factor_of_its_own_contradict(factor: float | None) -> None:
    with pytest.raises(ConfigError, match="give one of both"):
        ImageProcessor(levels=4095, rescale_factor=factor)


@pytest.mark.parametrize("levels", [None, 4095, WINDOW, 1, 255, (0, 255)])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "CMYK"])
def test_8_bits_stay(mode: str, levels: object) -> None:
    image = Image.fromarray(picture("uint8")).convert(mode)
    rule = replace(RULE, levels=levels)
    assert rule.to_uint8_or_float(image).dtype == torch.uint8
    assert torch.equal(rule.to_float(image), RULE.to_float(image.convert("RGB")))


@pytest.mark.parametrize(
    ("image", "told"),
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
def test_numbers_that_mean_nothing(image: object, told: str) -> None:
    with pytest.raises(ImageError) as error:
        RULE.to_float(image)  # type: ignore[arg-type]
    assert told in str(error.value)


# --- neighbours -----------------------------------------------------------------------------------


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
    assert apart(rule.to_float(first), rule.to_float(second).numpy()) <= 2 * step / span + 5e-7


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
            moved = apart(RULE.to_float(first), RULE.to_float(second).numpy())
            assert moved <= 2 / most + 3e-7


# --- the file's own numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("factor", [None, 1 / 10_000, 1 / 255])
def test_reflectance_keeps_its_numbers(factor: float | None) -> None:
    bands = np.arange(13 * 12 * 12).reshape(12, 12, 13) % 1855
    for dtype in (np.uint16, np.int16, np.int32, np.float32):
        rule = ImageProcessor(in_channels=13, rescale_factor=factor)
        found = rule.to_float(bands.astype(dtype)).permute(1, 2, 0)
        assert len(np.unique(found)) == 1855
        assert apart(found, bands * (1 if factor is None else factor)) < 3e-5
        resized = replace(rule, size=(6, 6)).to_float(bands.astype(dtype))
        assert resized.max() > 255 * (1 if factor is None else factor)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_factor_of_the_rule_is_for_the_files_own_numbers(channels: int) -> None:
    path, samples = DEPTH / "rgb16.tif", np.load(DEPTH / "samples.npz")["rgb16.tif"]
    for factor in (None, 1 / 10_000, 1.0):
        rule = ImageProcessor(in_channels=channels, rescale_factor=factor)
        assert torch.equal(rule.to_float(path), rule.to_float(samples))
        if channels == 3:
            wanted = samples.transpose(2, 0, 1) * (factor or 1.0)
            assert apart(rule.to_float(path), wanted) < 4e-3
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


# --- warnings -------------------------------------------------------------------------------------


def test_a_dark_picture_is_told_once_a_call(caplog: pytest.LogCaptureFixture) -> None:
    dark = picture("uint16", (20, 30)) >> 4
    files = [png(dark), png(dark), Image.fromarray(dark)]
    RULE(files)
    [line] = caplog.messages
    assert f"an image of {len(files[0])} bytes of uint16 holds values up to 408" in line
    assert "far below 65535" in line
    assert "levels= (--levels), such as 4095" in line
    caplog.clear()
    for quiet in (replace(RULE, levels=4095), replace(RULE, levels=65535)):
        quiet(files)
    RULE([png(picture("uint16", (20, 30))), np.zeros((4, 4), np.uint16)])
    assert not caplog.messages
    bands = picture("float32", (20, 30, 5))
    ImageProcessor(in_channels=5)(bands)
    assert "5 channels (float32" in caplog.text
    assert "rescale_factor=0.00392157" in caplog.text
    caplog.clear()
    replace(RULE, levels=(50, 200))(Image.fromarray(picture("uint8")))
    assert "has 8 bits and is read in 0..255" in caplog.text


def test_predictor_tells_once_and_asks_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    predictor = Predictor.load("demo")
    caplog.clear()
    dark = picture("uint16", (40, 40)) >> 4
    predictor.probabilities([dark] * 5, batch_size=2)
    assert len(caplog.messages) == 1
    predictor.attention([dark] * 2)
    assert len(caplog.messages) == 2
    assert pickle.loads(pickle.dumps(copy.deepcopy(WarnOnce()))) is not None


# --- levels stay with the model -------------------------------------------------------------------


def test_levels_are_saved(tmp_path: Path) -> None:
    number = replace(RULE, levels=4095)
    assert ImageProcessor.from_dict(json.loads(json.dumps(number.to_dict()))) == number
    levels, predictor = WINDOW, Predictor.load("demo")
    plain = predictor.probabilities(np.zeros((40, 40), np.uint8))
    predictor.image_processor = replace(predictor.image_processor, levels=levels)
    dark = picture("uint16", (40, 40)) >> 4
    scores = predictor.probabilities(dark)
    with_levels = compute_model_digest(predictor)  # by which a batch run knows its model
    assert with_levels != compute_model_digest(Predictor.load("demo"))
    predictor.save(tmp_path / "hf")
    rule = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert rule["levels"] == list(levels)
    predictor.fast().save(tmp_path / "fast")
    for folder in ("hf", "fast"):
        again = Predictor.load(tmp_path / folder)
        assert again.image_processor.levels == levels
        assert np.array_equal(again.probabilities(dark), scores)
        assert np.array_equal(again.probabilities(np.zeros((40, 40), np.uint8)), plain)
    again.image_processor = replace(again.image_processor, levels=255)
    again.save(tmp_path / "other")
    assert Predictor.load(tmp_path / "other").image_processor.levels == 255
    assert "deeper than 8 bits" in predictor.image_processor.describe()
    assert any("levels" in line for line in predictor.image_processor.unsupported_fields("timm"))


def test_levels_on_the_command_line(
    run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    dark = picture("uint16", (40, 40)) >> 4
    (tmp_path / "dark.png").write_bytes(png(dark))
    asked = ("classify", tmp_path / "dark.png", "--model", "demo", "--json")
    predictor = Predictor.load("demo")
    predictor.image_processor = replace(predictor.image_processor, levels=(0, 4095))
    for levels in ("4095", "0,4095"):
        status, out, err = run_cli(*asked, "--levels", levels)
        assert (status, err) == (0, "")
        [best] = json.loads(out)[0]["predictions"][:1]
        assert best["score"] == pytest.approx(predictor.classify(dark)[0][0].score, abs=1e-6)
    status, _, err = run_cli(*asked, "--levels", "2000")
    assert status == 1
    assert "expected 0 to 2000, as levels=2000 says; give levels= (--levels)" in err
    for wrong in ("abc", "0", "3,2", "1,2,3", "nan"):
        status, _, err = run_cli(*asked, "--levels", wrong)
        assert status == 2
        assert "expected the value of white, such as 4095, or a window BLACK,WHITE" in err


def test_another_rule_than_the_fast_models_own_is_followed(tmp_path: Path) -> None:
    """An optimized model has mean and std in its weights; another rule must not meet those."""
    vitlib.optimize(vitlib.load("demo")).save(tmp_path)
    rule = ImageProcessor(size=(64, 64), image_mean=(0.1,) * 3, image_std=(0.9,) * 3)
    rule = rule.with_image_size(vitlib.load("demo").config.image_size)
    photo = picture("uint8", (64, 64, 3))
    found = Predictor.load(tmp_path, image_processor=rule).probabilities(photo)
    wanted = Predictor(vitlib.load("demo"), rule).probabilities(photo)
    assert np.abs(found - wanted).max() < 1e-5


def test_the_log_of_a_picture_passes_where_loading_is_silent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from vitlib.cli.predictors import logs_muted

    with logs_muted():
        RULE(picture("uint16", (20, 30)) >> 4)
        logging.getLogger("vitlib").warning("of loading")
    assert len(caplog.messages) == 1


def test_the_code_of_the_page_runs() -> None:
    text = (ROOT / "docs" / "pictures.md").read_text(encoding="utf-8")
    names: dict[str, object] = {"vitlib": vitlib}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert isinstance(names["vit"], Predictor)
    assert names["vit"].image_processor.levels == 4095


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_an_unloaded_tiff_is_turned_as_its_file_is(
    orientation: int, dtype: type, tmp_path: Path
) -> None:
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
