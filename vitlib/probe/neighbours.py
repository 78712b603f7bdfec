"""Weighted nearest neighbours by DINOv2's protocol, exact, in blocks of bounded memory.

Features are normalised to length 1. The k nearest training photos of a query vote for their
classes; the weight of a vote is the softmax of cosine / temperature over the neighbours (Oquab et
al. 2304.07193, section 7.1, after Wu et al. 1805.01978).

Shapes: N training photos, Q queries, D features, C classes, K neighbours.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitlib.errors import ConfigError, check_int
from vitlib.retrieval import unit
from vitlib.system.torch_state import isolate_torch_settings

COUNTS = (10, 20, 100, 200)  # k of DINOv2's protocol
TEMPERATURE = 0.07
ROWS, QUERIES = 65_536, 512  # a block of cosines takes 128 MiB
GROUP = 32  # neighbouring columns whose greatest cosine is compared first
MAX_QUERIES = 100_000  # whose neighbours are in memory together
VOTERS = 1_000  # queries whose neighbours' labels are in memory together
Array = npt.NDArray[Any]


class Neighbours(NamedTuple):
    """Nearest training photos of each query, best first.

    Attributes:
        indices: (Q, K) int64, rows of the training photos.
        cosines: (Q, K) float32, -1..1.
    """

    indices: npt.NDArray[np.int64]
    cosines: npt.NDArray[np.float32]


@isolate_torch_settings()
def search(
    features: npt.NDArray[np.float32],
    queries: npt.NDArray[np.float32],
    k: int,
    *,
    exclude: npt.NDArray[np.int64] | None = None,
) -> Neighbours:
    """Find the training photos with the greatest cosine to each query, by exact search.

    A memory-mapped array is read once for every 100,000 queries, a block at a time, and pages that
    were read are released.

    Args:
        features: (N, D) of the training photos.
        queries: (Q, D).
        k: Number of neighbours, 1..N; with `exclude` at most N - 1.
        exclude: (Q,) the row that is no neighbour of each query: itself; None excludes none.

    Returns:
        The neighbours; of equal cosines the lower row first.

    Raises:
        ConfigError: Shapes do not match, or k is out of range.
    """
    _check_shapes(features, queries)
    most = len(features) - (exclude is not None)
    if not 1 <= k <= most:
        raise ConfigError(f"k={k}: expected 1 to {most}, the number of training photos")
    parts = []
    for start in range(0, len(queries), MAX_QUERIES):
        rows = slice(start, start + MAX_QUERIES)
        itself = None if exclude is None else torch.from_numpy(exclude[rows])
        parts.append(_search(features, torch.from_numpy(unit(queries[rows])), k, itself))
    if not parts:
        return Neighbours(np.empty((0, k), np.int64), np.empty((0, k), np.float32))
    indices, cosines = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return Neighbours(indices, cosines.clip(-1, 1))


def _check_shapes(features: Array, queries: Array) -> None:
    """Raise ConfigError for arrays that are not (N, D) and (Q, D)."""
    if features.ndim != 2 or queries.ndim != 2 or features.shape[1] != queries.shape[1]:
        raise ConfigError(
            f"features of shapes {features.shape} and {queries.shape}: expected (N, D) and (Q, D)"
        )


def _search(
    features: npt.NDArray[np.float32], queries: Tensor, k: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Find the neighbours of unit queries, (Q, K) indices and cosines."""
    count = len(queries)
    # A row for each query: the best so far, then those of the block.
    cosines = torch.full((count, k), -torch.inf, dtype=torch.float32)
    indices = torch.full((count, k), -1, dtype=torch.int64)
    for start, block in _blocks(features):
        # A block is normalised once for all queries, which are few beside it.
        rows = torch.from_numpy(unit(block)).T
        for first in range(0, count, QUERIES):
            part = slice(first, first + QUERIES)
            products = queries[part] @ rows
            if exclude is not None:
                _mask(products, exclude[part] - start)
            best, columns = _top(products, k)
            both = torch.cat([cosines[part], best], dim=1)
            names = torch.cat([indices[part], columns + start], dim=1)
            # Earlier blocks come first and the sort is stable: the lower row of equal cosines.
            order = both.argsort(dim=1, descending=True, stable=True)[:, :k]
            cosines[part], indices[part] = both.gather(1, order), names.gather(1, order)
    return indices, cosines


def _blocks(features: npt.NDArray[np.float32]) -> Iterator[tuple[int, Array]]:
    """Yield (first row, rows) of each block, and release the pages of a file that were read."""
    for start in range(0, len(features), ROWS):
        yield start, np.asarray(features[start : start + ROWS], np.float32)
        pages = getattr(features, "_mmap", None)
        if isinstance(pages, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            # Pages of a file count as the process's memory for as long as they are mapped.
            pages.madvise(mmap.MADV_DONTNEED)


def _mask(products: Tensor, columns: Tensor) -> None:
    """Set the product of each query with itself to -inf, where the block has it."""
    rows = torch.nonzero((columns >= 0) & (columns < products.shape[1])).flatten()
    products[rows, columns[rows]] = -torch.inf


def _top(products: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k greatest numbers of each row, or all; (Q, K) values and columns.

    The k greatest numbers lie in the k groups of columns with the greatest maxima. A maximum is
    cheap, so that few numbers are left to select from.
    """
    count = products.shape[1]
    whole = count // GROUP
    if k >= count or whole <= 2 * k:
        return _sorted(*products.topk(min(k, count), dim=1))
    grouped = products[:, : whole * GROUP].reshape(-1, whole, GROUP)
    groups = grouped.amax(dim=2).topk(k, dim=1).indices.sort(dim=1).values
    values = grouped.gather(1, groups[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    columns = (groups[:, :, None] * GROUP + torch.arange(GROUP, dtype=torch.int64)).flatten(1)
    rest = products[:, whole * GROUP :]
    values = torch.cat([values, rest], dim=1)
    tail = torch.arange(whole * GROUP, count, dtype=torch.int64).expand(len(products), -1)
    # Unsorted until the columns are known: equal values are ordered by them.
    best, order = values.topk(k, dim=1)
    return _sorted(best, torch.cat([columns, tail], dim=1).gather(1, order))


def _sorted(values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Sort by value, greatest first, of equal ones the lower column first."""
    columns, order = columns.sort(dim=1)
    values, inner = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, inner)


def usable_counts(counts: Sequence[int], num_photos: int) -> tuple[int, ...]:
    """Select the numbers of neighbours that a training set can give.

    Args:
        counts: Numbers of neighbours.
        num_photos: Number of training photos.

    Returns:
        The numbers up to num_photos, ascending; num_photos alone where all are larger.
    """
    return tuple(sorted({k for k in counts if k <= num_photos})) or (num_photos,)


def vote(
    neighbours: Neighbours,
    targets: Array,
    k: int,
    *,
    temperature: float = TEMPERATURE,
    num_classes: int | None = None,
) -> npt.NDArray[np.float32]:
    """Let the first k neighbours of each query vote for their classes.

    Args:
        neighbours: From search(), k or more of each query.
        targets: (N,) class numbers of the training photos; with several labels (N, C) of 1, 0 and
            NaN, where an unknown one does not vote.
        k: Number of neighbours that vote.
        temperature: Divides the cosines; above 0.
        num_classes: C; None takes the greatest class number, or the width of targets.

    Returns:
        (Q, C): share of the votes of each class, 0..1. With one label a row sums to 1. With several
        a class on which no neighbour votes is 0.
    """
    if targets.ndim == 1 and num_classes is None:
        num_classes = int(targets.max(initial=0)) + 1
    width = targets.shape[1] if targets.ndim == 2 else num_classes
    shares = np.zeros((len(neighbours.indices), width or 0), np.float32)
    for start in range(0, len(shares), VOTERS):
        rows = slice(start, start + VOTERS)
        # Over the first k alone: the weights of softmax over more differ by a factor of the query,
        # which the share of the votes does not have.
        scaled = neighbours.cosines[rows, :k].astype(np.float64) / temperature
        # Relative to the nearest one, whose power would overflow at low temperatures.
        weights = np.exp(scaled - scaled[:, :1])
        shares[rows] = _share(weights, targets[neighbours.indices[rows, :k]], shares.shape[1])
    return shares


def _share(weights: Array, near: Array, num_classes: int) -> Array:
    """Divide the votes of neighbours, (Q, K), among the classes of `near`, (Q, K) or (Q, K, C)."""
    if near.ndim == 2:
        votes = np.zeros((len(near), num_classes))
        np.add.at(votes, (np.arange(len(near))[:, None], near), weights)
        total = weights.sum(axis=1, keepdims=True)
    else:
        labelled = ~np.isnan(near)
        total = np.einsum("qk,qkc->qc", weights, labelled)
        votes = np.einsum("qk,qkc->qc", weights, np.where(labelled, near, 0))
    # Rounding alone takes a share beyond 1.
    return np.minimum(votes / np.where(total > 0, total, 1), 1)


def knn(
    features: npt.NDArray[np.float32],
    targets: Array,
    queries: npt.NDArray[np.float32],
    *,
    k: Sequence[int] = COUNTS,
    temperature: float = TEMPERATURE,
    num_classes: int | None = None,
) -> dict[int, npt.NDArray[np.float32]]:
    """Classify queries by their weighted nearest neighbours, as DINOv2's evaluation does.

    Args:
        features: (N, D) of the training photos, not normalised; may be memory-mapped.
        targets: (N,) class numbers; with several labels (N, C) of 1, 0 and NaN for unknown.
        queries: (Q, D).
        k: Numbers of neighbours; larger ones than N are left out.
        temperature: Divides the cosines; above 0.
        num_classes: C; None takes the greatest class number, or the width of targets.

    Returns:
        Scores (Q, C), 0..1, by number of neighbours. The predicted class is the greatest score, of
        equal ones the first; with several labels those of 0.5 or more.

    Raises:
        ConfigError: Shapes do not match, there is no training photo, or a number is out of range.
    """
    for number in k:
        check_int("k", number, at_least=1)
    targets = np.asarray(targets)
    if not len(features) or len(targets) != len(features):
        raise ConfigError(
            f"{len(targets)} targets for {len(features)} training photos: expected as many, 1 or "
            "more"
        )
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature!r}: expected a number above 0")
    counts = usable_counts(k, len(features))
    neighbours = search(features, queries, counts[-1])
    options: dict[str, Any] = {"temperature": temperature, "num_classes": num_classes}
    return {number: vote(neighbours, targets, number, **options) for number in counts}
