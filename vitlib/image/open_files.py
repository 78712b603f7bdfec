"""Opening of image files: few formats, pixels counted before they are decoded.

The readers load with the first file: a model of arrays and tensors needs none of them.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from vitlib.errors import ImageError

# Most pixels of an image: twice the number at which Pillow warns, and the one at which it raises.
MAX_PIXELS = 178_956_970
MAX_SIDE = 1_000_000  # pixels; a resize holds up to 48 bytes for each of a side
# Formats that are opened. Pillow's others are rarely photos, and some of them start programs. The
# first five are loaded by preinit(); for any other, Pillow loads all of its forty readers.
_COMMON = ("JPEG", "PNG", "GIF", "BMP", "PPM")  # JPEG's reader opens phones' MPO too
_OTHER = ("WEBP", "TIFF", "AVIF", "JPEG2000")
FORMATS = (*_COMMON, *_OTHER)

_warnings_lock = threading.Lock()  # warnings.catch_warnings is not safe among threads


def open_image_file(image: str | os.PathLike[str] | bytes | bytearray, name: str) -> Image.Image:
    """Open an image file and check its header; the pixels are not decoded.

    Args:
        image: A path, or encoded bytes.
        name: Name of the image, for messages.

    Returns:
        The image of Pillow.

    Raises:
        ImageError: It is missing, empty, too large or no image.
    """
    if isinstance(image, bytes | bytearray):
        empty = not image
    else:
        path = Path(image)
        try:
            empty = path.stat().st_size == 0 and path.is_file()
        except (OSError, ValueError) as error:
            raise ImageError(f"{name} is not there: expected an image file") from error
        if not path.is_file():
            raise ImageError(f"{name} is a folder or device: expected an image file, or a list")
    if empty:
        raise ImageError(f"{name} is empty: expected {', '.join(FORMATS)}")
    try:
        stream = io.BytesIO(image) if isinstance(image, bytes | bytearray) else path.open("rb")
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}") from error
    try:
        opened = _open_checked(stream, name)
    except BaseException:
        stream.close()
        raise
    # Pillow then closes the file with the image, as for an image that it opened by its path.
    opened._exclusive_fp = True  # type: ignore[attr-defined]
    return opened


def _open_checked(stream: IO[bytes], name: str) -> Image.Image:
    """Open an image within the bounds on its structure and its number of pixels."""
    from vitlib.image.decode_limits import check_head, open_limited

    try:
        check_head(stream)
        with _warnings_lock, warnings.catch_warnings():
            # The bomb is refused below, not warned of.
            warnings.simplefilter("ignore")
            Image.preinit()
            try:
                opened = open_limited(stream, _COMMON)
            except UnidentifiedImageError:
                # Before the time of LimitedFile counts.
                Image.init()
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
    """Raise an ImageError that describes the file, if it is a TIFF that Pillow does not open."""
    from vitlib.image.decode_limits import LimitedFile
    from vitlib.image.deep_files import describe_tiff

    tiff = describe_tiff(LimitedFile(stream))
    if tiff is not None:
        described, array = tiff
        raise ImageError(
            f"{name} is {described}, which Pillow does not decode: read it with tifffile and give "
            f"{array}"
        )
