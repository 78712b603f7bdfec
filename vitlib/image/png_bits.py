"""Ranges of 16-bit PNG files whose sBIT chunk declares fewer significant bits.

The PNG standard has writers scale samples to 16 bits: shifted left, with zeros or their own high
bits below. Some writers store them unscaled, and a dark image may be either.

Shapes: H W height and width in pixels, C channels.
"""

from __future__ import annotations

import io
from typing import BinaryIO

import numpy as np

from vitlib.errors import ImageError
from vitlib.image.depth import DeclaredRange, Samples

_CHUNKS = 1000  # that are searched for sBIT


def read_significant_bits(file: BinaryIO) -> tuple[int, ...] | None:
    """Read the significant bits of each channel from a PNG's sBIT chunk.

    Args:
        file: The file, at any position, which is restored.

    Returns:
        A number a channel, 1..16, without alpha's; None if there is no chunk or all have 16.
    """
    position = file.tell()
    try:
        file.seek(8)
        for _ in range(_CHUNKS):
            head = file.read(8)
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if len(head) < 8 or kind in (b"IDAT", b"IEND"):
                return None
            if kind == b"sBIT":
                # One number for gray, three for colour; then alpha's.
                bits = tuple(file.read(min(length, 4))[: 3 if length >= 3 else 1])
                usable = all(0 < number <= 16 for number in bits) and set(bits) != {16}
                return bits if usable else None
            file.seek(length + 4, io.SEEK_CUR)
        return None
    finally:
        file.seek(position)


def infer_range(
    samples: Samples, bits: tuple[int, ...]
) -> DeclaredRange | tuple[DeclaredRange, ...]:
    """Infer the range of 16-bit samples whose sBIT chunk declares fewer significant bits.

    Args:
        samples: (H, W, C), uint16.
        bits: Significant bits of each channel, 1..16.

    Returns:
        The range, or one a channel; that of 16 bits if the samples are scaled.

    Raises:
        ImageError: The samples may be scaled or not.
    """
    channels = [samples[:, :, c] for c in range(1 if samples.shape[2] <= 2 else 3)]
    if len(bits) != len(channels) or not any(channel.any() for channel in channels):
        return DeclaredRange()  # a chunk for another colour type
    white = tuple(2**number - 1 for number in bits)
    if not all(map(_is_scaled, channels, bits)):
        ranges = tuple(DeclaredRange(0, value, "sBIT") for value in white)
        return ranges if len(set(white)) > 1 else ranges[0]
    if any(channel.max() > value for channel, value in zip(channels, white, strict=True)):
        return DeclaredRange()
    described = f"sBIT says {_join(bits)} bits, and the samples, up to {samples.max()}, may be"
    if len(set(white)) > 1:
        raise ImageError(
            f"{described} scaled to 16 bits or not: give levels=65535 (--levels) if they are, else "
            f"the array as floats in 0..1, its channels divided by {_join(white)}"
        )
    raise ImageError(
        f"{described} scaled to 16 bits or not: give the value of white with levels= (--levels), "
        f"65535 or {white[0]}"
    )


def _join(values: tuple[int, ...]) -> str:
    """Join numbers for a message; a single number if all are equal."""
    return ", ".join(map(str, values if len(set(values)) > 1 else values[:1]))


def _is_scaled(samples: Samples, bits: int) -> bool:
    """Return True if samples may be values of that many bits, scaled to 16 bits."""
    if not (samples & np.uint16(2 ** (16 - bits) - 1)).any():
        return True
    # Writers round, truncate or repeat the bits below. The results differ by one at most.
    original, white = np.arange(2**bits), 2**bits - 1
    smallest = (original * 65535 // white).astype(np.uint16)
    repeated = (original * 65536 // white).clip(max=65535)
    largest = np.maximum(np.rint(original * (65535 / white)), repeated).astype(np.uint16)
    index = samples >> np.uint16(16 - bits)
    return bool(((smallest[index] <= samples) & (samples <= largest[index])).all())
