"""Bounds on the time that an image file can cost before and while it is decoded.

Pillow bounds memory. A file of a few bytes can still cost minutes: a scan repeated 3,000 times, a
million empty chunks, a comment in a loop that is quadratic. So an image file passes four bounds:

- heads.py looks at the structure of a file before Pillow opens it.
- file.py counts what Pillow reads while it opens the file, and the processor time while it decodes.
- scans.py counts the blocks that the scans of a JPEG visit, before they are decoded.
- child.py decodes, in a process that can be ended, the formats that cannot be interrupted: AVIF,
  JPEG 2000, TIFF, and those that Pillow decodes in Python (ASCII or rescaled PPM, BMP with RLE).

png.py, beside these bounds, refuses a PNG of which Pillow would read missing rows as black.

JPEG, PNG, GIF, WebP and the other BMP and PPM files are decoded in the caller's thread. Every
decode may take LEEWAY seconds of processor time beyond a generous estimate for its size.
"""

from vitlib.image.decode_limits.file import LimitedFile, seconds_for
from vitlib.image.decode_limits.headers import check_head
from vitlib.image.decode_limits.pixels import is_slow, load_pixels, open_limited

__all__ = ["LimitedFile", "check_head", "is_slow", "load_pixels", "open_limited", "seconds_for"]
