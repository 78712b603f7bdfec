"""LimitedFile: the file that Pillow reads from, which counts and ends what takes too long.

Time is the thread's processor time, so that a busy machine refuses nothing that an idle one reads.
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


def seconds_for(form: str, pixels: int, size: int) -> float:
    """The processor time that a decode may take: Pillow's format, the image's pixels, the file's
    bytes; of a BMP no more bytes count than its pixels can need."""
    a_pixel, a_byte = NS.get(form, NS_OTHER)
    if form == "BMP":
        size = min(size, 4 * pixels)
    return LEEWAY + (pixels * a_pixel + size * a_byte) / 1e9


class LimitedFile:
    """A binary file whose reads raise ImageError once a bound is passed.

    A new one is open for the head of an image, with the HEAD_ bounds; decode() sets those of its
    pixels.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.raw = file
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)
        self._calls, self._bytes = 0, 0
        self._head = True
        self._until = time.thread_time() + HEAD_SECONDS

    def end_header(self) -> None:
        """End the bound on the time of the head, once Pillow has opened the image.

        The clock is this thread's: what the thread computes until the pixels are decoded, or
        another thread that decodes them, must not count.
        """
        self._until = math.inf

    def decode(self, form: str, pixels: int) -> None:
        """Begin to decode an image of a format and so many pixels."""
        self._head = False
        self._until = time.thread_time() + seconds_for(form, pixels, self.size)

    def read(self, size: int = -1) -> bytes:
        """As a file's."""
        if size is not None and size >= 0:
            self._bytes += min(size, self.size)
        self._check()
        return self.raw.read(size)

    def contents(self) -> bytes:
        """Return all of its bytes; the position stays."""
        position = self.tell()
        self.seek(0)
        data = self.read()
        self.seek(position)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As a file's."""
        self._check()
        return self.raw.seek(offset, whence)

    def tell(self) -> int:
        """As a file's."""
        return self.raw.tell()

    def close(self) -> None:
        """As a file's."""
        self.raw.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def _check(self) -> None:
        self._calls += 1
        if self._head and (self._calls > HEAD_CALLS or self._bytes > HEAD_BYTES):
            raise ImageError(
                f"its metadata has over {HEAD_CALLS} parts or {HEAD_BYTES} bytes: expected a "
                "photo's; save it anew without them"
            )
        if time.thread_time() > self._until:
            raise ImageError(TOO_LONG)


TOO_LONG = "takes too long to decode for its size: save it anew with an ordinary encoder"
