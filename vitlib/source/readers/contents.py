"""Tensors of a file with their byte ranges, and the one pass over the bytes that looks for NaN."""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_CHUNK_BYTES = 2 * 2**20  # stays in a core's cache between reading and testing
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HALVES = {torch.complex64: torch.float32, torch.complex128: torch.float64}


class Part(NamedTuple):
    """A range of a file that holds numbers of one dtype.

    Attributes:
        dtype: Their dtype.
        start: Offset in the file, in bytes.
        size: Bytes.
        offset: Offset of the copy in a buffer, in bytes.
    """

    dtype: torch.dtype
    start: int
    size: int
    offset: int = 0


@dataclass(frozen=True)
class Contents:
    """Tensors of one file, each storage its own part of a mapping or buffer.

    Attributes:
        tensors: Tensors by the file's names.
        parts: Range of each tensor in the file; None if not known.
        finite: True if no number is NaN or infinite, False if one is; None if not tested.
        wrapper_keys: Keys of the dictionaries around the state dict, outermost first.
        ignored: Descriptions of other content of the file.
        arch: Name of the model that the training code stored; None if it stored none.
    """

    tensors: dict[str, Tensor]
    parts: dict[str, Part] | None = None
    finite: bool | None = None
    wrapper_keys: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    arch: str | None = None


def parts_are_finite(path: Path, parts: Collection[Part]) -> bool | None:
    """Test parts of a file for NaN and infinity.

    They are read through two small buffers, half of them in a second thread, and not through the
    mapping: so its pages take no memory of this process until the first forward.

    Args:
        path: The file.
        parts: Ranges of the file.

    Returns:
        True if all numbers are finite; None if the file or a dtype cannot be tested.
    """
    numbers = {
        part.dtype for part in parts if part.dtype.is_floating_point or part.dtype in _HALVES
    }
    if not all(_infinities(dtype) for dtype in numbers):
        # 8-bit floats have infinities of their own, or lack them.
        return None
    try:
        return read_parts(path, _merge_neighbours(part for part in parts if part.dtype in numbers))
    except (OSError, EOFError):
        return None


def read_parts(path: Path, parts: Sequence[Part], into: memoryview | None = None) -> bool:
    """Read parts of a file and test their numbers.

    Args:
        path: The file.
        parts: Ranges of the file.
        into: Buffer that part.offset points into; None keeps nothing and stops at the first number
            that is not finite.

    Returns:
        True if all numbers are finite.

    Raises:
        EOFError: The file ends before a part does.
    """
    pieces = [
        Part(part.dtype, part.start + at, min(_CHUNK_BYTES, part.size - at), part.offset + at)
        for part in parts
        for at in range(0, part.size, _CHUNK_BYTES)
    ]
    if len(pieces) < 2:
        return _read_pieces(path, pieces, into)
    half, middle = sum(piece.size for piece in pieces) // 2, 0
    while half > 0:
        half -= pieces[middle].size
        middle += 1
    # NumPy and readinto release the GIL, so that both threads make progress.
    with ThreadPoolExecutor(1) as executor:
        other_half = executor.submit(_read_pieces, path, pieces[middle:], into)
        finite = _read_pieces(path, pieces[:middle], into)
        return other_half.result() and finite


def all_finite(numbers: memoryview, dtype: torch.dtype) -> bool:
    """Test bytes for NaN and infinity.

    Args:
        numbers: Little-endian numbers, whole ones.
        dtype: Their dtype.

    Returns:
        True if all are finite, and for dtypes without a test, such as integers.
    """
    bounds = _infinities(dtype)
    if bounds is None or not len(numbers):
        return True
    width, plus, minus = bounds
    # Bits of IEEE floats are ordered as integers. Positive ones that are not finite are at least
    # +inf as signed integers, negative ones at least -inf as unsigned integers.
    signed, unsigned = np.frombuffer(numbers, f"<i{width}"), np.frombuffer(numbers, f"<u{width}")
    return bool(signed.max() < plus and unsigned.max() < minus)


def _read_pieces(path: Path, pieces: Sequence[Part], into: memoryview | None) -> bool:
    """Read pieces of a file and return True if all numbers are finite."""
    # An anonymous mapping is aligned to pages, to which some processors copy faster.
    buffer = memoryview(mmap.mmap(-1, _CHUNK_BYTES)) if into is None else into
    finite = True
    with path.open("rb", buffering=0) as file:
        for dtype, start, size, offset in pieces:
            at = 0 if into is None else offset
            chunk = buffer[at : at + size]
            file.seek(start)
            done = 0
            while done < size:
                count = file.readinto(chunk[done:])
                if not count:
                    raise EOFError(f"{size - done} bytes short")
                done += count
            finite = finite and all_finite(chunk, dtype)
            if not finite and into is None:
                break
    return finite


@cache
def _infinities(dtype: torch.dtype) -> tuple[int, np.generic, np.generic] | None:
    """Return a dtype's width and the bits of +inf and -inf as integers; None if untestable."""
    dtype = _HALVES.get(dtype, dtype)
    if dtype not in _FLOATS:
        return None
    width = dtype.itemsize
    both = torch.tensor([torch.inf, -torch.inf], dtype=dtype, device="cpu")
    bits = both.view(torch.uint8).numpy()
    return width, bits.view(f"<i{width}")[0], bits.view(f"<u{width}")[1]


def _merge_neighbours(parts: Iterable[Part]) -> list[Part]:
    """Merge adjacent and overlapping parts of one dtype, so that no byte is read twice."""
    joined: list[Part] = []
    for part in sorted(parts, key=lambda part: (str(part.dtype), part.start)):
        last = joined[-1] if joined else None
        if last and last.dtype == part.dtype and part.start <= last.start + last.size:
            end = max(last.start + last.size, part.start + part.size)
            joined[-1] = Part(last.dtype, last.start, end - last.start)
        else:
            joined.append(part)
    return joined
