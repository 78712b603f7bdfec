"""Decoding of images before any resize: the rules of decode.py, one by one."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitlib.errors import ImageError
from vitlib.image.decode import decode, is_one_image
from vitlib.image.open_files import FORMATS, MAX_PIXELS
from vitlib.image.processor import ImageProcessor


def rgb(height: int = 5, width: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def decode_array(image: object, in_channels: int = 3) -> np.ndarray:
    return np.concatenate(
        [np.atleast_3d(np.asarray(plane)) for plane in decode(image, in_channels)], axis=2
    )


def encode_image(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_paths_bytes_and_arrays_are_the_same_image(tmp_path: Path) -> None:
    array = rgb()
    path = tmp_path / "a.png"
    path.write_bytes(encode_image(Image.fromarray(array)))
    for image in (
        path,
        str(path),
        path.read_bytes(),
        bytearray(path.read_bytes()),
        Image.open(path),
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array),
        np.asfortranarray(array),
        array.astype(np.int64),
        array[:, ::-1][:, ::-1],
    ):
        assert np.array_equal(decode_array(image), array)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_become_what_pillow_makes_of_them(mode: str) -> None:
    image = Image.fromarray(rgb()).convert("LA" if mode == "PA" else "RGB").convert(mode)
    expected = image.convert("RGB")
    assert np.array_equal(decode_array(image), np.asarray(expected))


def test_alpha_is_dropped_and_not_blended() -> None:
    array = np.concatenate([rgb(), np.zeros((5, 7, 1), np.uint8)], axis=2)
    assert np.array_equal(decode_array(array), rgb())
    assert np.array_equal(decode_array(Image.fromarray(array)), rgb())
    for mode in ("RGBa", "La"):
        assert decode_array(Image.new(mode, (4, 3))).shape == (3, 4, 3)


def test_palette_with_transparency_gives_no_warning() -> None:
    image = Image.fromarray(rgb()).convert("P")
    image.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = decode_array(encode_image(image, transparency=bytes(range(256))))
    assert np.array_equal(result, np.asarray(Image.fromarray(rgb()).convert("P").convert("RGB")))


def test_grayscale_is_three_equal_channels() -> None:
    gray = rgb()[:, :, 0]
    for image in (gray, gray[:, :, None], gray[None], Image.fromarray(gray)):
        result = decode_array(image)
        assert np.array_equal(result, np.repeat(gray[:, :, None], 3, axis=2))


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    deep = np.array([[0, 128, 129, 257, 40_000, 65_535]], np.uint16)
    expected = (deep[0] / np.float32(257)).tolist()
    images = (
        deep,
        deep.astype(">u2"),
        Image.fromarray(deep),
        encode_image(Image.fromarray(deep)),
        encode_image(Image.fromarray(deep), "TIFF"),
    )
    for image in images:
        assert decode_array(image)[0, :, 0].tolist() == expected


def test_floats() -> None:
    half = np.full((2, 3, 3), 0.5)
    assert decode_array(half).dtype == np.float32  # 127.5: no 8-bit level, and not rounded to one
    assert decode_array(half)[0, 0, 0] == 127.5
    assert decode_array(Image.fromarray(half[:, :, 0].astype(np.float32)))[0, 0, 0] == 127.5
    assert decode_array(np.ones((2, 3, 3)))[0, 0, 0] == 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    image = Image.fromarray(rgb())
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = Image.open(io.BytesIO(encode_image(image, exif=exif)))
    upright = {
        1: rgb(),
        2: rgb()[:, ::-1],
        3: rgb()[::-1, ::-1],
        4: rgb()[::-1],
        5: rgb().transpose(1, 0, 2),
        6: np.rot90(rgb(), -1),
        7: rgb()[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(rgb()),
    }
    assert np.array_equal(decode_array(turned), upright[orientation])


def test_broken_exif_is_ignored() -> None:
    data = encode_image(Image.fromarray(rgb()), exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert np.array_equal(decode_array(data), rgb())


def test_first_frame() -> None:
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    data = encode_image(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_array(data)[0, 0].tolist() == [255, 0, 0]


def test_one_channel_model_gets_luma() -> None:
    luma = np.asarray(Image.fromarray(rgb()).convert("L"))
    for image in (rgb(), Image.fromarray(rgb()), encode_image(Image.fromarray(rgb()))):
        assert np.array_equal(decode_array(image, 1)[:, :, 0], luma)
    assert np.abs(decode_array(rgb() / 300, 1)[:, :, 0] - luma * (255 / 300)).max() < 1


def test_many_channels_take_arrays() -> None:
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 5), dtype=np.uint8)
    assert np.array_equal(decode_array(array, 5), array)
    assert np.array_equal(decode_array(array.transpose(2, 0, 1), 5), array)
    with pytest.raises(ImageError, match="5 channels, give an array of them"):
        decode_array(Image.fromarray(rgb()), 5)
    with pytest.raises(ImageError, match="with 5 channels"):
        decode_array(rgb(6, 7), 5)


def test_channel_axis_of_arrays() -> None:
    """Two may be: then it is (C, H, W), unless only the last has the model's count."""
    three = np.arange(3 * 8 * 3, dtype=np.uint8).reshape(3, 8, 3)
    assert np.array_equal(decode_array(three), three.transpose(1, 2, 0))
    line = np.arange(8 * 3, dtype=np.uint8).reshape(1, 8, 3)  # one row of RGB pixels
    assert np.array_equal(decode_array(line), line)


def test_one_or_several() -> None:
    assert is_one_image("a.jpg")
    assert is_one_image(np.zeros((3, 4, 4)))
    assert not is_one_image(np.zeros((2, 3, 4, 4)))
    assert not is_one_image(["a.jpg"])


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_every_format(kind: str) -> None:
    smooth = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    options = {"save_all": True} if kind == "MPO" else {}
    result = decode_array(encode_image(Image.fromarray(smooth), kind, **options))
    assert result.shape == (40, 60, 3)
    assert np.abs(result.astype(int) - smooth).mean() < 6  # some lose a little


# --- hostile and wrong ----------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of 40,000 x 40,000 pixels in 120 bytes, as its header claims."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "is empty"),
        (b"not an image at all", "is not an image: expected JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "is not an image"),
        (bomb(), f"has over {MAX_PIXELS} pixels"),
        ("no/such/photo.jpg", "'no/such/photo.jpg' is not there"),
        ("a\0b.jpg", "is not there"),
        ("x" * 5000, "is not there"),
        (".", "is a folder or device"),
        (17, "an int: expected a path"),
        (np.float32(1), "a float32: expected a path"),
        (np.zeros((5, 6, 2), np.uint8), "expected (height, width)"),
        (np.zeros((0, 4, 3), np.uint8), "is empty"),
        (np.zeros(5), "expected (height, width)"),
        (np.full((4, 4, 3), np.nan), "holds NaN"),
        (np.full((4, 4, 3), -0.2), "values from -0.2 to -0.2"),
        (np.full((4, 4, 3), 256), "values from 256 to 256"),
        (np.full((4, 4, 3), "a"), "expected integers or floats"),
        (Image.fromarray(np.full((2, 2), 70_000, np.int32)), "values up to 70000"),
    ],
)
def test_decode_rejects_other_objects(image: object, message: str) -> None:
    with pytest.raises(ImageError) as error:
        decode_array(image)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scalar", [3, np.float32(1), np.uint8(3), np.datetime64(0, "s")])
def test_decode_rejects_scalars(scalar: object) -> None:
    kind = type(scalar).__name__
    with pytest.raises(ImageError, match=rf"^images=an? {kind}: expected a path.* or a list of"):
        ImageProcessor(size=(4, 4))(scalar)  # type: ignore[arg-type]


def test_subclasses_of_arrays_are_read_as_arrays() -> None:
    rule = ImageProcessor(size=(4, 4))
    for dtype in ("uint8", "uint16", "float32"):  # uint16 as np.matrix ended the interpreter
        array = (rgb()[:, :, 0] * (1 / 255 if dtype == "float32" else 1)).astype(dtype)
        for same in (array.view(np.matrix), np.ma.masked_array(array), array.view(np.recarray)):
            assert torch.equal(rule(same), rule(array))


def test_memoryview_is_read_as_bytes() -> None:
    data = encode_image(Image.fromarray(rgb()))
    rule = ImageProcessor(size=(4, 4))
    for image in (bytearray(data), memoryview(data), memoryview(data * 2)[: len(data)]):
        assert torch.equal(rule(image), rule(data))
    with pytest.raises(ImageError, match=r"^an image of 32 bytes is not an image"):
        rule(memoryview(np.zeros(4)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF"])
def test_truncation(kind: str) -> None:
    data = encode_image(Image.fromarray(rgb(40, 50)), kind)
    assert decode_array(data).shape == (40, 50, 3)
    with pytest.raises(ImageError, match=r"truncated|not an image"):
        decode_array(data[: len(data) // 2])


def test_damaged_bytes_raise_image_error_only() -> None:
    """Flip bytes of real files at random: an image or an ImageError, and nothing else."""
    random = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM"):
        whole = bytearray(encode_image(Image.fromarray(rgb(20, 30)), kind))
        for _ in range(40):
            data = bytearray(whole)
            for at in random.integers(0, len(data), 4):
                data[at] = random.integers(0, 256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's of damaged metadata
                with contextlib.suppress(ImageError):
                    assert decode_array(bytes(data)).shape[2] == 3
