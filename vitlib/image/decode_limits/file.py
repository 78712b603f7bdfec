"""File object for Pillow that bounds the number of reads and the time of a decode.

Time is the thread's processor time, so that a busy machine rejects no file that an idle one reads.
"""

from __future__ import annotations

import io
import math
import os
import time
from typing import IO, Any

from vitlib.errors import ImageError

HEAD_CALLS = 10_000  # reads and seeks while a file is opened; photos need tens, long XMP hundreds
HEAD_BYTES = 8 * 2**20  # of metadata, read piece by piece while a file is opened
HEAD_SECONDS = 0.25
LEEWAY = 2.0  # seconds of processor time that a decode may take beyond the estimate for its size
# Nanoseconds a pixel and a byte: about twice what each format takes on a slow core.
NS = {"AVIF": (40, 400), "BMP": (50, 300), "JPEG2000": (150, 600), "TIFF": (60, 200)}
NS_OTHER = (60, 100)


def seconds_for(image_format: str, pixels: int, size: int) -> float:
    """Return the processor time that a decode may take.

    Args:
        image_format: Pillow's name of the format.
        pixels: Number of pixels.
        size: Bytes of the file; for a BMP only as many count as its pixels can need.

    Returns:
        Seconds.
    """
    ns_per_pixel, ns_per_byte = NS.get(image_format, NS_OTHER)
    if image_format == "BMP":
        size = min(size, 4 * pixels)
    return LEEWAY + (pixels * ns_per_pixel + size * ns_per_byte) / 1e9


class LimitedFile:
    """Binary file whose reads raise ImageError beyond a bound.

    The HEAD_ bounds apply while Pillow opens the image, those of decode() while it decodes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        """Wrap a file and start the clock of its header.

        Args:
            file: Seekable binary file.
        """
        self.raw = file
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)
        self._calls, self._bytes = 0, 0
        self._head = True
        self._until = time.thread_time() + HEAD_SECONDS

    def end_header(self) -> None:
        """End the bound on the time of the header, once Pillow has opened the image.

        The clock is this thread's. Other work of the thread until the decode must not count, and
        another thread may decode.
        """
        self._until = math.inf

    def decode(self, image_format: str, pixels: int) -> None:
        """Start the clock of a decode.

        Args:
            image_format: Pillow's name of the format.
            pixels: Number of pixels.
        """
        self._head = False
        self._until = time.thread_time() + seconds_for(image_format, pixels, self.size)

    def read(self, size: int = -1) -> bytes:
        """Read bytes, as io.RawIOBase.read().

        Args:
            size: Most bytes to read; negative for all.

        Returns:
            The bytes.
        """
        if size is not None and size >= 0:
            self._bytes += min(size, self.size)
        self._check()
        return self.raw.read(size)

    def contents(self) -> bytes:
        """Return all bytes of the file; the position does not change."""
        position = self.tell()
        self.seek(0)
        data = self.read()
        self.seek(position)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Change the position, as io.IOBase.seek().

        Args:
            offset: Offset in bytes.
            whence: os.SEEK_SET, os.SEEK_CUR or os.SEEK_END.

        Returns:
            The new position.
        """
        self._check()
        return self.raw.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self.raw.tell()

    def close(self) -> None:
        """Close the file."""
        self.raw.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def _check(self) -> None:
        """Raise ImageError if a bound is exceeded; called at each read and seek."""
        self._calls += 1
        if self._head and (self._calls > HEAD_CALLS or self._bytes > HEAD_BYTES):
            raise ImageError(
                f"its metadata has over {HEAD_CALLS} parts or {HEAD_BYTES} bytes: expected a "
                "photo's; save it anew without them"
            )
        if time.thread_time() > self._until:
            raise ImageError(TOO_LONG)


TOO_LONG = "takes too long to decode for its size: save it anew with an ordinary encoder"
