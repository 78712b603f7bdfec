"""Decoding of an opened image within the bounds of its size, in this thread or a child process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

from PIL import Image

from vitlib.errors import ImageError
from vitlib.image.decode_limits import child
from vitlib.image.decode_limits.file import LimitedFile, seconds_for
from vitlib.image.decode_limits.headers import check_scans
from vitlib.image.decode_limits.png import load_png
from vitlib.image.decode_limits.ppm import CODECS, ppm_pixels

ORIENTATION = 0x0112  # EXIF tag; 1 is upright
EXIF_BYTES = 2**20  # what Pillow reads of it in Python
RUN_BYTES = 2**20  # of a BMP with run lengths, besides two for each pixel and row
SLOW_SECONDS = 0.25  # a decode that is expected to take longer is_slow()
# Time on a slow core: of a pixel of WebP, and of JPEG, PNG and GIF; of a byte of entropy-coded
# data; of a visit of a block by a scan.
_SECONDS_A_PIXEL = {"WEBP": 5e-8}
_OTHER_SECONDS, _SECONDS_A_BYTE, _SECONDS_A_VISIT = 2e-8, 1e-8, 4e-8


def open_limited(stream: IO[bytes], formats: Sequence[str]) -> Image.Image:
    """Open an image file within the bounds of its header; the pixels are not decoded.

    Args:
        stream: The file, at its start.
        formats: Names of Pillow's formats to try.

    Returns:
        The image of Pillow.

    Raises:
        ImageError: The header exceeds a bound.
        Exception: Any that Pillow raises for a damaged file.
    """
    file = LimitedFile(stream)
    image = Image.open(file, formats=list(formats))
    file.end_header()
    return image


def load_pixels(image: Image.Image, raw_mode: str | None = None) -> Image.Image:
    """Decode the pixels of an opened image.

    Args:
        image: Image of Pillow. Only one that reads from a LimitedFile is bounded: others belong to
            the caller.
        raw_mode: Raw mode by which Pillow unpacks the samples; None for its own choice.

    Returns:
        The image, or a copy that a child process has decoded.

    Raises:
        ImageError: The decode takes too long.
        Exception: Any that Pillow raises for a damaged file.
    """
    file = getattr(image, "fp", None)
    if raw_mode is not None:
        child.set_raw_mode(image, raw_mode)
    if not isinstance(file, LimitedFile):
        image.load()
        return image
    file.decode(str(image.format), image.width * image.height)
    if len(image.info.get("exif", b"")) > EXIF_BYTES:
        raise ImageError(f"over {EXIF_BYTES} bytes of EXIF: save it anew without them")
    if image.format in ("JPEG", "MPO"):
        check_scans(file.contents())
    if _codecs(image) & {*CODECS}:
        return ppm_pixels(image, file.contents())
    if not _needs_process(image):
        if image.format == "PNG":
            load_png(image)
        else:
            image.load()
        return image
    if image.format == "BMP" and file.size > RUN_BYTES + 2 * (image.width + 1) * image.height:
        raise ImageError("a BMP with more run lengths than pixels: save it anew")
    data = file.contents()
    seconds = seconds_for(str(image.format), image.width * image.height, file.size)
    response = child.decode(data, str(image.format), seconds, raw_mode)
    if response is None:  # no process can be started here
        image.load()
        return image
    return _copy_with_pixels(image, *response)


def is_slow(image: Image.Image) -> bool:
    """Return True if a decode may take SLOW_SECONDS.

    Args:
        image: Image of Pillow, not loaded.

    Raises:
        ImageError: It is a JPEG with too many scans.
    """
    if _needs_process(image) or _codecs(image) & {*CODECS}:
        return True
    file = getattr(image, "fp", None)
    seconds = image.width * image.height * _SECONDS_A_PIXEL.get(str(image.format), _OTHER_SECONDS)
    if isinstance(file, LimitedFile):
        seconds += file.size * _SECONDS_A_BYTE
        if image.format in ("JPEG", "MPO"):
            seconds += check_scans(file.contents()) * _SECONDS_A_VISIT
    return seconds > SLOW_SECONDS


def _needs_process(image: Image.Image) -> bool:
    """Return True if the decoder runs for long without reads of the file, or in Python."""
    if image.format in ("AVIF", "JPEG2000", "TIFF"):
        return True
    return "bmp_rle" in _codecs(image)


def _codecs(image: Image.Image) -> set[str]:
    return {str(tile[0]) for tile in getattr(image, "tile", ())}


def _copy_with_pixels(image: Image.Image, header: dict[str, Any], pixels: bytes) -> Image.Image:
    """Return a copy of an opened image with the pixels that a child process has decoded."""
    decoded = Image.frombytes(header["mode"], tuple(header["size"]), pixels)
    if header["palette"] is not None:
        mode, colours = header["palette"]
        decoded.putpalette(bytes.fromhex(colours), mode)
    decoded.info = dict(image.info)
    decoded.info.pop("exif", None)
    decoded.getexif()[ORIENTATION] = header["orientation"]
    return decoded
