"""Decoding of an image in any form into planes: upright, with the model's channels.

An image is a path, encoded bytes, an open binary file, a PIL image, or an array or tensor of shape
(H, W), (H, W, C) or (C, H, W). All input is hostile: few formats are read, pixels are counted
before they are decoded, and the time of a decode is bounded (decode_limits).

Rules, each held by a test:

- EXIF orientation is applied. Only the first frame of several is read.
- Grayscale becomes three equal channels. Pillow converts palette, CMYK, YCbCr and HSV to RGB. Alpha
  is dropped and not blended, as transformers and timm do on loading a file.
- uint8 values stay as they are. depth.py scales deeper integers and floats. Image files deeper than
  8 bits keep all of their bits: see deep_files.py.
- One channel is Pillow's luma of a colour image. Other numbers of channels need arrays of as many.
- An array whose first and last axes could both be channels is (C, H, W), as in transformers, unless
  only the last axis has as many channels as the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps

from vitlib.errors import ImageError, first_line
from vitlib.image.depth import (
    DEFAULT_OPTIONS,
    DeclaredRange,
    DepthOptions,
    Samples,
    scale_to_255,
    warn_of_8_bits,
)
from vitlib.image.open_files import MAX_PIXELS, open_image_file

ImageLike: TypeAlias = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | IO[bytes]
    | Image.Image
    | np.ndarray[Any, np.dtype[Any]]
    | torch.Tensor
)
EXPECTED_IMAGE = "expected a path, bytes, an open binary file, a PIL image, an array or a tensor"

MAX_FILE_BYTES = 2**31  # of an open file, which is read into memory
ORIENTATION = 0x0112  # EXIF tag; 1 is upright
SIDEWAYS = (5, 6, 7, 8)  # orientations whose rows are columns
LeastSides: TypeAlias = Callable[[int, int], tuple[int, int]]


def is_one_image(images: object) -> bool:
    """Return True for an image, False for several; an array of four axes is several.

    Args:
        images: Any value.
    """
    if isinstance(images, np.ndarray | torch.Tensor):
        return images.ndim < 4
    return is_open_file(images) or isinstance(
        images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image
    )


def is_open_file(image: object) -> bool:
    """Return True for an open file or another object with a read() method.

    Args:
        image: Any value.
    """
    return callable(getattr(image, "read", None))


def iter_images(images: ImageLike | Iterable[ImageLike]) -> Iterable[ImageLike]:
    """Return an iterable of images.

    Args:
        images: One image or several.

    Returns:
        [images] for one image, else the same object.

    Raises:
        ImageError: The value is no image and cannot be iterated over.
    """
    if is_one_image(images):
        return [images]  # type: ignore[list-item]
    # NumPy's scalars have both methods, which raise TypeError.
    if isinstance(images, Mapping | np.generic) or not (
        hasattr(images, "__iter__") or hasattr(images, "__getitem__")
    ):
        raise ImageError(f"images={describe_image(images)}: {EXPECTED_IMAGE}, or a list of them")
    return images  # type: ignore[return-value]


def describe_image(image: object) -> str:
    """Describe an image for a message.

    Args:
        image: An image, or a value that is none.

    Returns:
        Its path, or its kind and size.
    """
    if isinstance(image, str | os.PathLike):
        return repr(os.fspath(image))
    if isinstance(image, bytes | bytearray | memoryview):
        return f"an image of {memoryview(image).nbytes} bytes"
    if isinstance(image, Image.Image):
        return f"a PIL image of mode {image.mode}"
    if isinstance(image, np.ndarray | torch.Tensor):
        return f"an array of shape {tuple(image.shape)}"
    name = getattr(image, "name", None)
    if is_open_file(image) and isinstance(name, str):
        return f"an open file {name!r}"
    kind = type(image).__name__
    return "None" if image is None else f"{'an' if kind[0] in 'aeio' else 'a'} {kind}"


def has_image_signature(data: bytes) -> bool:
    """Return True if bytes start as an image file of one of FORMATS.

    Args:
        data: The first bytes of a file, at least 12.
    """
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
    image: ImageLike,
    in_channels: int,
    options: DepthOptions = DEFAULT_OPTIONS,
    least_sides: LeastSides | None = None,
) -> list[Image.Image]:
    """Decode an image into planes.

    Args:
        image: A path, bytes, an open binary file, a PIL image, an array or a tensor.
        in_channels: Channels of the model.
        options: Range of deeper images and floats.
        least_sides: Function of the upright (height, width) of an image file that returns the least
            ones to decode a JPEG at; see draft.py. None decodes all at their size.

    Returns:
        One RGB plane, or one plane (mode L or F) for each channel, all of one size.

    Raises:
        ImageError: The image is missing, damaged, too large, of an unknown format or of the wrong
            channels, or its values do not fit their range.
    """
    if isinstance(image, torch.Tensor):
        image = _to_array(image)
    if isinstance(image, np.ndarray):
        return _from_array(image, in_channels, describe_image(image), options)
    if isinstance(image, Image.Image):
        return _from_pil(image, in_channels, describe_image(image), options)
    if is_open_file(image):
        image = _read_bytes(image)  # type: ignore[arg-type]
    if isinstance(image, memoryview):
        image = image.tobytes()
    if not isinstance(image, str | os.PathLike | bytes | bytearray):
        raise ImageError(f"{describe_image(image)}: {EXPECTED_IMAGE}")
    with open_header(image) as opened:
        if least_sides is not None:
            _use_draft(opened, least_sides)
        return _from_pil(opened, in_channels, describe_image(image), options)


def _use_draft(image: Image.Image, least_sides: LeastSides) -> None:
    """Let a JPEG be decoded at a fraction of its size, whatever its orientation."""
    from vitlib.image.draft import use_draft  # few programs ask for it

    if read_orientation(image) in SIDEWAYS:
        use_draft(image, least_sides(image.width, image.height)[::-1])
    else:
        use_draft(image, least_sides(image.height, image.width))


def _read_bytes(file: IO[bytes]) -> bytes:
    """Read an open file from its start, as Pillow does; the file stays open."""
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
    """Open an image file and check its header; the pixels are not decoded.

    Args:
        image: A path, or encoded bytes.

    Returns:
        The image of Pillow.

    Raises:
        ImageError: It is missing, empty, too large or no image.
    """
    return open_image_file(image, describe_image(image))


def _to_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Convert a tensor on any device; bfloat16, which NumPy lacks, becomes float32 exactly."""
    try:
        tensor = tensor.detach().cpu()
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        array: np.ndarray[Any, Any] = tensor.resolve_conj().resolve_neg().numpy()
    except (TypeError, RuntimeError) as error:  # of meta, sparse and quantized tensors
        raise ImageError(
            f"{describe_image(tensor)} of {tensor.dtype}: expected a dense array"
        ) from error
    return array


def _from_pil(
    image: Image.Image, in_channels: int, name: str, options: DepthOptions
) -> list[Image.Image]:
    if in_channels not in (1, 3):
        raise ImageError(f"{name}: the model takes {in_channels} channels, give an array of them")
    from vitlib.image.deep_files import apply_orientation, decode_samples  # only files need them

    try:
        ranged = options.levels is None and not options.raw_values
        loaded, samples, declared = decode_samples(image, ranged=ranged)
        if samples is None:
            warn_of_8_bits(name, options)
            return [_convert(_upright(loaded), "RGB" if in_channels == 3 else "L")]
        upright = apply_orientation(samples, read_orientation(loaded))
        return _planes(upright, in_channels, name, options, declared)
    except ImageError as error:
        raise error if str(error).startswith(name) else ImageError(f"{name}: {error}") from error
    except Exception as error:  # as above
        reason = first_line(error)
        raise ImageError(f"{name} is damaged or truncated ({reason})") from error


def read_orientation(image: Image.Image) -> int:
    """Read EXIF's orientation.

    Args:
        image: An image of Pillow.

    Returns:
        1 to 8; 1 is upright, also where the metadata are absent or damaged.
    """
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata does not make a photo unreadable
        return 1


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if read_orientation(image) != 1 else image


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Convert any 8-bit mode to RGB or L; alpha is dropped."""
    if image.mode == mode:
        return image
    if image.mode in ("P", "PA", "RGBa"):
        # Through RGBA: Pillow would warn of transparency, which is dropped anyway.
        image = image.convert("RGBA")
    elif image.mode == "La":
        image = image.convert("LA")
    if mode == "L" and image.mode not in ("1", "LA"):
        image = image.convert("RGB")
    return image.convert(mode)


def _from_array(
    array: np.ndarray[Any, Any], in_channels: int, name: str, options: DepthOptions
) -> list[Image.Image]:
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise ImageError(f"{name} has masked values: expected all; fill them, array.filled(0)")
    # asarray also unwraps np.matrix: with three axes NumPy would write past its memory.
    array = _channels_last(np.asarray(array), in_channels)
    if 0 in array.shape:
        raise ImageError(f"{name} is empty")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise ImageError(f"{name}: expected at most {MAX_PIXELS} pixels")
    return _planes(array, in_channels, name, options, None)


def _planes(
    samples: Samples,
    in_channels: int,
    name: str,
    options: DepthOptions,
    declared: DeclaredRange | tuple[DeclaredRange, ...] | None,
) -> list[Image.Image]:
    """Convert samples (H, W, C) of any depth to planes in 0..255."""
    if in_channels in (1, 3):  # alpha is dropped
        samples = samples[:, :, : {2: 1, 4: 3}.get(samples.shape[2])]
    values = scale_to_255(samples, name, options, declared)
    if values.shape[2] == 1 and in_channels == 3:
        values = np.repeat(values, 3, axis=2)
    if values.shape[2] == 3 and in_channels in (1, 3) and values.dtype == np.uint8:
        return [_convert(Image.fromarray(values), "RGB" if in_channels == 3 else "L")]
    if values.shape[2] == 3 and in_channels == 1:  # ITU-R 601-2 luma, as Pillow's
        values = (values @ np.array([0.299, 0.587, 0.114], np.float32))[:, :, None]
    return [Image.fromarray(np.ascontiguousarray(values[:, :, c])) for c in range(values.shape[2])]


def _channels_last(array: np.ndarray[Any, Any], in_channels: int) -> np.ndarray[Any, Any]:
    """Return an array (H, W), (H, W, C) or (C, H, W) as (H, W, C)."""
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
