"""Copies among the inputs: those whose encoded bytes are the same as an earlier one's.

Exact but for chance (64 bits of BLAKE2: among 100 million photos one false pair in 4,000 runs), in
bounded memory: keys are divided among files by their first bits, and each is sorted by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vitlib.system.atomic import open_atomic

IN_MEMORY = 4_000_000  # keys: 64 MiB, and as much again while they are sorted
Pairs = npt.NDArray[np.uint64]  # (n, 2): row, key


def write_copies(keys: Iterable[Path], inputs: int, scratch: Path, out: Path) -> int:
    """Find the copies and write a line for each, {"row", "same_as"} -> how many there are.

    keys: files of (row, key), in the order of the rows.
    """
    bits = max(0, (inputs // IN_MEMORY).bit_length())
    count = 0
    with open_atomic(out) as file:
        for pairs in _divided(keys, bits, scratch) if bits else [_together(keys)]:
            lines = [f'{{"row": {row}, "same_as": {first}}}\n' for row, first in copies(pairs)]
            file.write("".join(lines).encode())
            count += len(lines)
    if not count:
        out.unlink()
    return count


def copies(pairs: Pairs) -> list[tuple[int, int]]:
    """(row, key) -> (row, the first row of that key) of each that is not the first, by row."""
    order = np.lexsort((pairs[:, 0], pairs[:, 1]))
    rows, keys = pairs[order, 0], pairs[order, 1]
    begins = np.ones(len(keys), bool)
    begins[1:] = keys[1:] != keys[:-1]
    firsts = rows[np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))]
    return sorted(zip(rows[~begins].tolist(), firsts[~begins].tolist(), strict=True))


def _together(keys: Iterable[Path]) -> Pairs:
    arrays = [np.load(path, allow_pickle=False) for path in keys]
    return np.concatenate(arrays) if arrays else np.empty((0, 2), np.uint64)


def _divided(keys: Iterable[Path], bits: int, scratch: Path) -> Iterator[Pairs]:
    """The pairs by the first bits of their keys."""
    paths = [scratch / f"keys-{i:05d}" for i in range(2**bits)]
    for path in paths:
        path.unlink(missing_ok=True)
    for path in keys:
        pairs = np.load(path, allow_pickle=False)
        which = pairs[:, 1] >> np.uint64(64 - bits)
        for i in np.unique(which).tolist():
            with paths[i].open("ab") as file:
                file.write(pairs[which == i].tobytes())
    for path in paths:
        if path.exists():
            yield np.fromfile(path, np.uint64).reshape(-1, 2)
            path.unlink()
