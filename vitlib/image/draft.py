"""JPEGs decoded at a fraction of their size, for a preprocessing that says so.

libjpeg computes an image of 1/2, 1/4 or 1/8 of the sides from the low frequencies of each block, in
a fraction of the time. The pixels differ from those of a whole decode, so this is never a default.
"""

from __future__ import annotations

from PIL import Image

from vitlib.errors import ConfigError, is_number

# Below 2 even labels of which a model is sure change: docs/performance.md.
SMALLEST, LARGEST = 2, 8


def check_draft(draft: object) -> None:
    """Check the margin of a draft.

    Args:
        draft: At least how many times as large as the resized image a JPEG is decoded.

    Raises:
        ConfigError: It is no number in 2..8.
    """
    if isinstance(draft, int | float) and is_number(draft) and SMALLEST <= draft <= LARGEST:
        return
    raise ConfigError(f"draft={draft!r}: expected a number in {SMALLEST}..{LARGEST}, or None")


def use_draft(image: Image.Image, least_sides: tuple[int, int]) -> None:
    """Let Pillow decode a JPEG at a fraction of its size; other images stay as they are.

    Args:
        image: Image of a file, not loaded. The bounds of decode_limits stay: its pixels were
            counted at its own size, and its scans are counted before the decode.
        least_sides: Least (height, width) of the decoded image, in the axes of the file.
    """
    if image.format in ("JPEG", "MPO"):
        height, width = least_sides
        image.draft(None, (max(width, 1), max(height, 1)))
