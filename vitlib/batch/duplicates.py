"""Duplicates among the inputs: those with the encoded bytes of an earlier one.

Inputs are compared by 64 bits of BLAKE2, which gives one false pair among 100 million photos in
4,000 runs. Memory is bounded: keys are divided among files by their first bits, and each file is
sorted alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vitlib.system.atomic import open_atomic

MAX_KEYS = 4_000_000  # in memory: 64 MiB, and as much again while they are sorted
Pairs = npt.NDArray[np.uint64]  # (n, 2): row, key


def write_duplicates(keys: Iterable[Path], inputs: int, scratch: Path, out: Path) -> int:
    """Find the duplicates, and write a line {"row", "same_as"} for each.

    Args:
        keys: files of (row, key), in the order of the rows.
        inputs: number of inputs.
        scratch: folder for temporary files.
        out: the file to write; deleted where there are no duplicates.

    Returns:
        Number of duplicates.
    """
    bits = max(0, (inputs // MAX_KEYS).bit_length())
    count = 0
    with open_atomic(out) as file:
        for pairs in _partition(keys, bits, scratch) if bits else [_load_pairs(keys)]:
            lines = [
                f'{{"row": {row}, "same_as": {first}}}\n' for row, first in find_duplicates(pairs)
            ]
            file.write("".join(lines).encode())
            count += len(lines)
    if not count:
        out.unlink()
    return count


def find_duplicates(pairs: Pairs) -> list[tuple[int, int]]:
    """Find the rows whose key an earlier row has.

    Args:
        pairs: (n, 2) rows and keys.

    Returns:
        (row, first row with this key) of each duplicate, by row.
    """
    order = np.lexsort((pairs[:, 0], pairs[:, 1]))
    rows, keys = pairs[order, 0], pairs[order, 1]
    is_first = np.ones(len(keys), bool)
    is_first[1:] = keys[1:] != keys[:-1]
    # Each row of a group takes the index where its group begins.
    firsts = rows[np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))]
    return sorted(zip(rows[~is_first].tolist(), firsts[~is_first].tolist(), strict=True))


def _load_pairs(keys: Iterable[Path]) -> Pairs:
    """Load all pairs."""
    arrays = [np.load(path, allow_pickle=False) for path in keys]
    return np.concatenate(arrays) if arrays else np.empty((0, 2), np.uint64)


def _partition(keys: Iterable[Path], bits: int, scratch: Path) -> Iterator[Pairs]:
    """Yield the pairs in groups by the first bits of their keys."""
    paths = [scratch / f"keys-{i:05d}" for i in range(2**bits)]
    for path in paths:
        path.unlink(missing_ok=True)
    for path in keys:
        pairs = np.load(path, allow_pickle=False)
        group = pairs[:, 1] >> np.uint64(64 - bits)
        for i in np.unique(group).tolist():
            with paths[i].open("ab") as file:
                file.write(pairs[group == i].tobytes())
    for path in paths:
        if path.exists():
            yield np.fromfile(path, np.uint64).reshape(-1, 2)
            path.unlink()
