"""Bounds on the time that an image file can cost before and while it is decoded.

Pillow bounds memory. A file of a few bytes can still cost minutes: a scan repeated 3,000 times, a
million empty chunks, a comment in a loop of quadratic time. So an image file passes four bounds:

- headers.py checks the structure of a file before Pillow opens it, and counts the blocks that the
  scans of a JPEG visit before they are decoded.
- file.py counts the reads while Pillow opens the file, and the processor time of the decode.
- pixels.py decodes in the caller's thread, or in a child process.
- child.py is that process, which can be killed. It decodes formats that cannot be interrupted:
  AVIF, JPEG 2000, TIFF, and those that Pillow decodes in Python (ASCII or rescaled PPM, BMP with
  RLE).

Besides these, png.py rejects a PNG whose missing rows Pillow would read as black.

JPEG, PNG, GIF, WebP and the other BMP and PPM files are decoded in the caller's thread. A decode
may take LEEWAY seconds of processor time beyond a generous estimate for its size.
"""

from vitlib.image.decode_limits.file import LimitedFile, seconds_for
from vitlib.image.decode_limits.headers import check_head
from vitlib.image.decode_limits.pixels import is_slow, load_pixels, open_limited

__all__ = ["LimitedFile", "check_head", "is_slow", "load_pixels", "open_limited", "seconds_for"]
