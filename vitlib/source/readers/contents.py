"""What a reader found in a file, and the one pass over the file's bytes that looks for NaN."""

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
    """A run of numbers of one dtype in a file; `start`, `size` and `place` in bytes."""

    dtype: torch.dtype
    start: int
    size: int
    offset: int = 0  # where in a buffer it belongs


@dataclass(frozen=True)
class Contents:
    """The tensors of one file, each storage its own part of a mapping or buffer."""

    tensors: dict[str, Tensor]
    parts: dict[str, Part] | None = None  # where each lies in the file; None: not known
    finite: bool | None = None  # already known from reading them
    wrapper_keys: tuple[str, ...] = ()  # the keys under which the tensors lay, outermost first
    ignored: tuple[str, ...] = ()  # what lay beside them
    arch: str | None = None  # how the training code that saved them calls the model


def parts_are_finite(path: Path, parts: Collection[Part]) -> bool | None:
    """Whether these parts of a file hold no NaN and no infinity; None: not known.

    They are read through two small buffers, one half by a thread beside, and not through a mapping:
    so the file's pages stay untouched, and belong to no process, until the first forward.
    """
    numbers = {
        part.dtype for part in parts if part.dtype.is_floating_point or part.dtype in _HALVES
    }
    if not all(_infinities(dtype) for dtype in numbers):
        return None  # 8-bit floats have infinities of their own, or none
    try:
        return read_parts(path, _joined(part for part in parts if part.dtype in numbers))
    except (OSError, EOFError):
        return None


def read_parts(path: Path, parts: Sequence[Part], into: memoryview | None = None) -> bool:
    """Read parts of a file, each to its place in `into`, and tell whether all numbers are finite.

    Without `into` nothing is kept, and the reading ends at the first number that is not. Raises
    EOFError where the file ends before a part does.
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
    with ThreadPoolExecutor(1) as beside:
        other_half = beside.submit(_read_pieces, path, pieces[middle:], into)
        finite = _read_pieces(path, pieces[:middle], into)
        return other_half.result() and finite


def all_finite(numbers: memoryview, dtype: torch.dtype) -> bool:
    """Whether bytes hold no NaN and no infinity; for dtypes without a test here: True."""
    bounds = _infinities(dtype)
    if bounds is None or not len(numbers):
        return True
    width, plus, minus = bounds
    signed, unsigned = np.frombuffer(numbers, f"<i{width}"), np.frombuffer(numbers, f"<u{width}")
    return bool(signed.max() < plus and unsigned.max() < minus)


def _read_pieces(path: Path, pieces: Sequence[Part], into: memoryview | None) -> bool:
    # Pages of its own: they are aligned, and some processors copy faster there.
    buffer = memoryview(mmap.mmap(-1, _CHUNK_BYTES)) if into is None else into
    finite = True
    with path.open("rb", buffering=0) as file:
        for dtype, start, size, place in pieces:
            at = 0 if into is None else place
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
    """Width and both infinities as integers: the smallest of its sign that is not finite."""
    dtype = _HALVES.get(dtype, dtype)
    if dtype not in _FLOATS:
        return None
    width = dtype.itemsize
    both = torch.tensor([torch.inf, -torch.inf], dtype=dtype, device="cpu")
    as_bytes = both.view(torch.uint8).numpy()
    return width, as_bytes.view(f"<i{width}")[0], as_bytes.view(f"<u{width}")[1]


def _joined(parts: Iterable[Part]) -> list[Part]:
    """The parts with neighbours and overlaps of one dtype made one: no byte is read twice."""
    joined: list[Part] = []
    for part in sorted(parts, key=lambda part: (str(part.dtype), part.start)):
        last = joined[-1] if joined else None
        if last and last.dtype == part.dtype and part.start <= last.start + last.size:
            end = max(last.start + last.size, part.start + part.size)
            joined[-1] = Part(last.dtype, last.start, end - last.start)
        else:
            joined.append(part)
    return joined
