"""Perceptual hashes of photos, and pairs of them with few different bits.

The hash is the sign pattern of the 63 lowest frequencies of a 32x32 grey copy (Zauner,
Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, section 3.2.1), each
against their median. Scale, compression and brightness leave the low frequencies as they are.

Shapes: N photos. A hash is uint64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

SIDE, LOW = 32, 8  # pixels of a grey copy; frequencies of an axis
BYTES = 8  # of a hash: pairs of at most BYTES - 1 different bits share one of them
BLOCK = 2**22  # pairs compared at once: 32 MiB
# Above so many photos, only hashes that share a byte are compared; below, that takes longer.
ALL_PAIRS = 2_000
Hashes = npt.NDArray[np.uint64]
Pairs = npt.NDArray[np.int64]


def hash_grey(grey: npt.NDArray[Any]) -> tuple[int, int]:
    """Hash a photo and its mirror image.

    Args:
        grey: (32, 32) brightness.

    Returns:
        The hash of the photo, and that of the photo flipped horizontally.
    """
    coefficients = _COSINES @ grey.astype(np.float64) @ _COSINES.T
    # A mirror image has the same cosines, those of odd horizontal frequencies with another sign.
    mirrored = coefficients * np.where(np.arange(LOW) % 2, -1, 1)
    return _to_bits(coefficients), _to_bits(mirrored)


def count_bits(first: Any, second: Any) -> npt.NDArray[np.integer[Any]]:
    """Count the bits in which hashes differ.

    Args:
        first: uint64 hashes.
        second: uint64 hashes of a shape that broadcasts with it.

    Returns:
        The counts, 0..64.
    """
    x = np.bitwise_xor(np.asarray(first, np.uint64), np.asarray(second, np.uint64))
    if hasattr(np, "bitwise_count"):
        return np.asarray(np.bitwise_count(x))
    # The bits of each pair, of each four and of each byte are summed within the number itself:
    # numpy counts bits itself since 2.0.
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    with np.errstate(over="ignore"):  # the product's high byte is the sum of all bytes
        x = x * np.uint64(0x0101010101010101)
    return np.asarray((x >> np.uint64(56)).astype(np.int64))


def near_hashes(hashes: Hashes, queries: Hashes, radius: int) -> Iterator[Pairs]:
    """Yield pairs of photos whose hashes differ in few bits, a block at a time.

    Args:
        hashes: (N,) hashes of the photos.
        queries: (N,) hashes of the same photos, or of their mirror images.
        radius: most bits that differ, 0..7.

    Yields:
        (n, 2) pairs i < j, such that hashes[i] and queries[j], or hashes[j] and queries[i], differ
        in at most `radius` bits; a pair may come twice.
    """
    if len(hashes) <= ALL_PAIRS:
        rows = max(1, BLOCK // max(len(hashes), 1))
        for start in range(0, len(hashes), rows):
            distances = count_bits(queries[start : start + rows, None], hashes[None])
            i, j = np.nonzero(distances <= radius)
            yield _sort_pairs(i + start, j)
        return
    yield from _near_by_byte(hashes, queries, radius)


def _near_by_byte(hashes: Hashes, queries: Hashes, radius: int) -> Iterator[Pairs]:
    """Yield near pairs by multi-index hashing (Norouzi et al. 1307.2982).

    Hashes that differ in fewer bits than they have bytes share a byte, by the pigeonhole principle:
    only photos that share one are compared.
    """
    for byte in range(BYTES):
        shift = np.uint64(8 * byte)
        keys = [((x >> shift) & np.uint64(255)).astype(np.int64) for x in (hashes, queries)]
        orders = [np.argsort(key, kind="stable") for key in keys]
        starts = [
            np.searchsorted(key[order], np.arange(257))
            for key, order in zip(keys, orders, strict=True)
        ]
        for value in range(256):
            members, others = (
                order[start[value] : start[value + 1]]
                for order, start in zip(orders, starts, strict=True)
            )
            rows = max(1, BLOCK // max(len(members), 1))
            for first in range(0, len(others) if len(members) else 0, rows):
                part = others[first : first + rows]
                distances = count_bits(queries[part][:, None], hashes[members][None])
                i, j = np.nonzero(distances <= radius)
                if len(i):
                    yield _sort_pairs(part[i], members[j])


def _sort_pairs(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> Pairs:
    """Stack pairs of two photos as (lower, higher)."""
    different = first != second
    pairs = np.stack([first[different], second[different]], axis=1).astype(np.int64)
    return np.sort(pairs, axis=1)


def _to_bits(coefficients: npt.NDArray[np.float64]) -> int:
    """Pack the signs of coefficients against their median, without that of the mean brightness."""
    values = coefficients.ravel()[1:]
    bits = values > np.median(values)
    return int(np.packbits(np.concatenate([[False], bits])).view(">u8")[0])


def _cosines() -> npt.NDArray[np.float64]:
    """Return the lowest rows of the discrete cosine transform, (LOW, SIDE)."""
    angles = np.pi * np.arange(LOW)[:, None] * (np.arange(SIDE) + 0.5) / SIDE
    return np.asarray(np.cos(angles))


_COSINES = _cosines()
