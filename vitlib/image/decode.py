"""An image in any form -> planes of levels: decoded, upright, of the model's channels.

An image is a path, encoded bytes, an open binary file, a PIL image, or an array or tensor of shape
(H, W), (H, W, C) or (C, H, W). Everything is hostile: formats are a short list, pixels are counted
before they are decoded, and the time of a decode is bounded (decode_limits).

The rules, each held by a test:

- EXIF orientation is applied. Of several frames the first is read.
- Grayscale becomes three equal channels; palette, CMYK, YCbCr and HSV become RGB as Pillow converts
  them; alpha is dropped and not blended, as transformers and timm do on loading a file.
- 8-bit levels stay as they are; what deeper integers and floats mean is depth.py's rule. Image
  files deeper than 8 bits keep all of their bits: see deep_files.py.
- A model of one channel gets Pillow's luma of a colour image. One of another number of channels
  takes arrays of that many.
- An array whose first and last axes could both be channels is (C, H, W), as in transformers, unless
  only the last one has as many channels as the model.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from vitlib.errors import ImageError, first_line
from vitlib.image.decode_limits import LimitedFile, check_head, open_limited
from vitlib.image.deep_files import apply_orientation, decode_samples, undecoded_tiff
from vitlib.image.depth import (
    DEFAULT_OPTIONS,
    DeclaredRange,
    DepthOptions,
    Samples,
    scale_to_255,
    warn_of_8_bits,
)

ImageLike: TypeAlias = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | IO[bytes]
    | Image.Image
    | npt.NDArray[Any]
    | torch.Tensor
)
EXPECTED_IMAGE = "expected a path, bytes, an open binary file, a PIL image, an array or a tensor"

# Pixels that one image may have: twice what Pillow warns of, where it too calls a file a bomb.
MAX_PIXELS = 178_956_970
MAX_FILE_BYTES = 2**31  # of an open file, which is read into memory; any that is decoded has fewer
MAX_SIDE = 1_000_000  # pixels; a resize holds up to 48 bytes for each of a side
# What is opened at all. The other formats of Pillow are rarely photos; some of them start programs.
# The first five come with preinit(); for any other Pillow loads all of its forty readers.
_COMMON = ("JPEG", "PNG", "GIF", "BMP", "PPM")  # JPEG's reader opens phones' MPO too
_OTHER = ("WEBP", "TIFF", "AVIF", "JPEG2000")
FORMATS = (*_COMMON, *_OTHER)

ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_opening = threading.Lock()  # warnings.catch_warnings is not safe among threads


def is_one_image(images: object) -> bool:
    """Whether it is an image, and not several: an array of four axes is several."""
    if isinstance(images, np.ndarray | torch.Tensor):
        return images.ndim < 4
    return is_open_file(images) or isinstance(
        images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image
    )


def is_open_file(image: object) -> bool:
    """Return whether it is an open file, or anything else that Pillow would read like one."""
    return callable(getattr(image, "read", None))


def iter_images(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    """Return images one by one; a single image gives itself.

    Raises:
        ImageError: Neither an image nor several.
    """
    if is_one_image(images):
        return [images]  # type: ignore[list-item]
    # NumPy's scalars have both methods, and raise TypeError.
    if isinstance(images, Mapping | np.generic) or not (
        hasattr(images, "__iter__") or hasattr(images, "__getitem__")
    ):
        raise ImageError(f"images={describe_image(images)}: {EXPECTED_IMAGE}, or a list of them")
    return images  # type: ignore[return-value]


def describe_image(image: object) -> str:
    """How an error names an image."""
    if isinstance(image, str | os.PathLike):
        return repr(os.fspath(image))
    if isinstance(image, bytes | bytearray | memoryview):
        return f"an image of {memoryview(image).nbytes} bytes"
    if isinstance(image, Image.Image):
        return f"a PIL image of mode {image.mode}"
    if isinstance(image, np.ndarray | torch.Tensor):
        return f"an array of shape {tuple(image.shape)}"
    if is_open_file(image) and isinstance(getattr(image, "name", None), str):
        return f"an open file {image.name!r}"  # type: ignore[attr-defined]
    kind = type(image).__name__
    return "None" if image is None else f"{'an' if kind[0] in 'aeio' else 'a'} {kind}"


def has_image_signature(data: bytes) -> bool:
    """Whether encoded bytes start as a file of FORMATS does."""
    starts = (
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF87a",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"MM\0*",
    )
    return (
        data.startswith((*starts, b"II+\0", b"MM\0+", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"))
        or (data[:1] == b"P" and data[1:2] in b"123456Ff" and data[2:3] in b" \t\r\n#")
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
        or (data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis", b"mif1", b"msf1"))
    )


def decode(
    image: ImageLike, in_channels: int, reading: DepthOptions = DEFAULT_OPTIONS
) -> list[Image.Image]:
    """Decode an image into planes.

    Args:
        image: a path, bytes, an open binary file, a PIL image, an array or a tensor.
        in_channels: of the model.
        reading: what the numbers of deeper pictures and floats mean.

    Returns:
        One RGB plane, or one plane (mode L or F) for each channel, all of one size.

    Raises:
        ImageError: what is missing, truncated, no image, too large, of the wrong channels, or of
            numbers that do not fit their range.
    """
    if isinstance(image, torch.Tensor):
        image = _array_of(image)
    if isinstance(image, np.ndarray):
        return _from_array(image, in_channels, describe_image(image), reading)
    if isinstance(image, Image.Image):
        return _from_pil(image, in_channels, describe_image(image), reading)
    if is_open_file(image):
        image = _bytes_of(image)  # type: ignore[arg-type]
    if isinstance(image, memoryview):
        image = image.tobytes()
    if not isinstance(image, str | os.PathLike | bytes | bytearray):
        raise ImageError(f"{describe_image(image)}: {EXPECTED_IMAGE}")
    with open_header(image) as opened:
        return _from_pil(opened, in_channels, describe_image(image), reading)


def _bytes_of(file: IO[bytes]) -> bytes:
    """The contents of an open file from its start, as Pillow reads it; the file stays open."""
    name = describe_image(file)
    try:
        if file.seekable():
            file.seek(0)
        data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError, AttributeError) as error:  # closed, or opened for writing
        raise ImageError(f"{name} cannot be read: {first_line(error)}: open it anew") from error
    if not isinstance(data, bytes | bytearray):
        raise ImageError(f"{name} gives a {type(data).__name__}: expected bytes; open it as 'rb'")
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"{name} has over {MAX_FILE_BYTES} bytes: make the image smaller")
    return bytes(data)


def open_header(image: str | os.PathLike[str] | bytes | bytearray) -> Image.Image:
    """Read the header of an image file and count its pixels; the pixels come later."""
    name = describe_image(image)
    if isinstance(image, bytes | bytearray):
        empty = not image
    else:
        path = Path(image)
        try:
            empty = path.stat().st_size == 0 and path.is_file()
        except (OSError, ValueError) as error:
            raise ImageError(f"{name} is not there: expected an image file") from error
        if not path.is_file():
            raise ImageError(f"{name} is a folder or device: expected an image file")
    if empty:
        raise ImageError(f"{name} is empty: expected {', '.join(FORMATS)}")
    try:
        stream = io.BytesIO(image) if isinstance(image, bytes | bytearray) else path.open("rb")
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}") from error
    try:
        opened = _opened(stream, name)
    except BaseException:
        stream.close()
        raise
    opened._exclusive_fp = True  # type: ignore[attr-defined]  # closed with the image
    return opened


def _opened(stream: IO[bytes], name: str) -> Image.Image:
    """The header of an image, whose structure and pixels are bounded."""
    try:
        check_head(stream)
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the bomb is refused below, not warned of
            Image.preinit()
            try:
                opened = open_limited(stream, _COMMON)
            except UnidentifiedImageError:
                Image.init()  # before the time of LimitedFile counts
                opened = open_limited(stream, _OTHER)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} has over {MAX_PIXELS} pixels: make it smaller") from error
    except Exception as error:  # Pillow's readers raise what they like on hostile bytes
        _refuse_tiff(stream, name)
        raise ImageError(f"{name} is not an image: expected {', '.join(FORMATS)}") from error
    if opened.width * opened.height > MAX_PIXELS or max(opened.size) > MAX_SIDE:
        raise ImageError(
            f"{name} has {opened.width}x{opened.height} pixels: expected at most {MAX_PIXELS}, "
            f"and {MAX_SIDE} a side"
        )
    return opened


def _refuse_tiff(stream: IO[bytes], name: str) -> None:
    """Raise ImageError, saying what it is, for a TIFF that Pillow does not open."""
    tiff = undecoded_tiff(LimitedFile(stream))
    if tiff is not None:
        described, array = tiff
        raise ImageError(
            f"{name} is {described}, which Pillow does not decode: read it with tifffile and give "
            f"{array}"
        )


def _array_of(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A tensor on any device as an array; NumPy has no bfloat16, of which float32 holds all."""
    try:
        tensor = tensor.detach().cpu()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        array: npt.NDArray[Any] = tensor.resolve_conj().resolve_neg().numpy()
    except (TypeError, RuntimeError) as error:  # of meta, sparse and quantized tensors
        raise ImageError(
            f"{describe_image(tensor)} of {tensor.dtype}: expected a dense array"
        ) from error
    return array


def _from_pil(
    image: Image.Image, in_channels: int, name: str, reading: DepthOptions
) -> list[Image.Image]:
    if in_channels not in (1, 3):
        raise ImageError(f"{name}: the model takes {in_channels} channels, give an array of them")
    try:
        ranged = reading.levels is None and not reading.raw_values
        loaded, samples, declared = decode_samples(image, ranged=ranged)
        if samples is None:
            warn_of_8_bits(name, reading)
            return [_convert(_upright(loaded), "RGB" if in_channels == 3 else "L")]
        upright = apply_orientation(samples, _orientation(loaded))
        return _planes(upright, in_channels, name, reading, declared)
    except ImageError as error:
        raise error if str(error).startswith(name) else ImageError(f"{name}: {error}") from error
    except Exception as error:  # as above
        reason = first_line(error)
        raise ImageError(f"{name} is damaged or truncated ({reason})") from error


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1 is upright."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata does not make a photo unreadable
        return 1


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """RGB or L of any 8-bit mode; alpha is dropped."""
    if image.mode == mode:
        return image
    if image.mode in ("P", "PA", "RGBa"):
        # By way of RGBA: Pillow would warn of transparency that is about to be dropped anyway.
        image = image.convert("RGBA")
    elif image.mode == "La":
        image = image.convert("LA")
    if mode == "L" and image.mode not in ("1", "LA"):
        image = image.convert("RGB")
    return image.convert(mode)


def _from_array(
    array: npt.NDArray[Any], in_channels: int, name: str, reading: DepthOptions
) -> list[Image.Image]:
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise ImageError(f"{name} has masked values: expected all; fill them, array.filled(0)")
    # np.matrix multiplies as matrices do, and with three axes NumPy then writes past its memory.
    array = _channels_last(np.asarray(array), in_channels)
    if 0 in array.shape:
        raise ImageError(f"{name} is empty")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise ImageError(f"{name}: expected at most {MAX_PIXELS} pixels")
    return _planes(array, in_channels, name, reading, None)


def _planes(
    samples: Samples,
    in_channels: int,
    name: str,
    reading: DepthOptions,
    declared: DeclaredRange | tuple[DeclaredRange, ...] | None,
) -> list[Image.Image]:
    """Samples (H, W, C) of any depth -> planes of levels."""
    if in_channels in (1, 3):  # alpha is dropped
        samples = samples[:, :, : {2: 1, 4: 3}.get(samples.shape[2])]
    levels = scale_to_255(samples, name, reading, declared)
    if levels.shape[2] == 1 and in_channels == 3:
        levels = np.repeat(levels, 3, axis=2)
    if levels.shape[2] == 3 and in_channels in (1, 3) and levels.dtype == np.uint8:
        return [_convert(Image.fromarray(levels), "RGB" if in_channels == 3 else "L")]
    if levels.shape[2] == 3 and in_channels == 1:  # ITU-R 601-2 luma, as Pillow's
        levels = (levels @ np.array([0.299, 0.587, 0.114], np.float32))[:, :, None]
    return [Image.fromarray(np.ascontiguousarray(levels[:, :, c])) for c in range(levels.shape[2])]


def _channels_last(array: npt.NDArray[Any], in_channels: int) -> npt.NDArray[Any]:
    """(H, W), (H, W, C) or (C, H, W) -> (H, W, C)."""
    if array.ndim == 2:
        return array[:, :, None]
    allowed = {1, 3, 4} if in_channels in (1, 3) else {in_channels}
    if array.ndim == 3:
        first, last = array.shape[0] in allowed, array.shape[2] in allowed
        if last and (not first or (array.shape[2] == in_channels != array.shape[0])):
            return array
        if first:
            return array.transpose(1, 2, 0)
    raise ImageError(
        f"{describe_image(array)}: expected (height, width), (height, width, channels) or "
        f"(channels, height, width) with {' or '.join(map(str, sorted(allowed)))} channels"
    )
