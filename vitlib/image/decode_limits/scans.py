"""The scans of a JPEG, counted by its markers before any is decoded.

A progressive JPEG sends its coefficients in scans, and a decoder visits every block of a scan's
components in each, however few bytes the scan has. libjpeg sets no bound on them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from vitlib.errors import ImageError

SCANS = 1000
MARKERS = 20_000
# Visits of a block of 8x8 coefficients. Encoders visit each block 4 to 8 times in all; an image
# of 50 million pixels has 0.8 to 2.3 million blocks, a visit takes 20 to 40 nanoseconds.
VISITS_A_BLOCK = 10
VISITS_FREE = 16_000_000
ARITHMETIC_COST = 8  # visits that one of arithmetic coding is worth
_ARITHMETIC = (0xC9, 0xCA)
_SOF = (0xC0, 0xC1, 0xC2, *_ARITHMETIC)
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # the end of a scan's data


class _Frame(NamedTuple):
    blocks: dict[int, int]  # component -> its blocks
    several: bool  # whether it may have several scans
    cost: int  # of a visit


def check_scans(data: bytes) -> int:
    """The visits of blocks in all scans of a JPEG; 0 where it has a single one.

    Raises ImageError where they are far more than any encoder makes.
    """
    frame: _Frame | None = None
    at, visits, scans = 2, 0, 0
    for _ in range(MARKERS):
        match = _MARKER.search(data, at)
        if match is None or len(data) < match.end() + 2:
            return visits
        marker = data[match.start() + 1]
        if marker == 0xD9:
            return visits
        length = int.from_bytes(data[match.end() : match.end() + 2], "big")
        body = data[match.end() + 2 : match.end() + length]
        at = match.end() + max(length, 2)
        if marker in _SOF and frame is None:
            frame = _frame(marker, body)
        elif marker == 0xDA and frame is not None and body:
            components = body[1 : 1 + 2 * body[0] : 2]
            scans += 1
            visits += frame.cost * sum(frame.blocks.get(one, 0) for one in components)
            if not frame.several and len(components) == len(frame.blocks):
                return 0  # decoded as it comes; the rest of the file is never read
            each = VISITS_A_BLOCK * frame.cost
            most = each * sum(frame.blocks.values()) + VISITS_FREE
            if visits > most or scans > SCANS:
                raise ImageError(
                    f"a JPEG with {scans} scans or more, which repeat its blocks more often than "
                    "any encoder does: save it anew"
                )
    raise ImageError(f"a JPEG with over {MARKERS} markers: save it anew")


def _frame(marker: int, body: bytes) -> _Frame | None:
    """The frame header's components. None where it is cut off."""
    if len(body) < 6 or len(body) < 6 + 3 * body[5]:
        return None
    height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    parts = [body[6 + 3 * i : 9 + 3 * i] for i in range(body[5])]
    across = max((part[1] >> 4 for part in parts), default=1) or 1
    down = max((part[1] & 15 for part in parts), default=1) or 1
    blocks = {
        part[0]: -(-width * (part[1] >> 4) // (8 * across))
        * -(-height * (part[1] & 15) // (8 * down))
        for part in parts
    }
    cost = ARITHMETIC_COST if marker in _ARITHMETIC else 1
    return _Frame(blocks, marker in (0xC2, 0xCA), cost)
