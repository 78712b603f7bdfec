"""Photos unlike the rest, and photos that stand for the rest.

Shapes: N photos, D features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib.audit.search import find_neighbours
from vitlib.metrics import import_sklearn_metrics
from vitlib.retrieval import unit

NEIGHBOURS = 5  # whose distances are averaged
# Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993: modified z-scores above 3.5.
FLAGGED = 3.5
LEAST = 10  # photos of a class with a distribution of its own
TYPICAL_NEIGHBOURS = 20  # as 2202.02794 takes
MAX_CLUSTERED = 50_000  # photos that k-means divides; of more a sample
Floats = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class Rarity(NamedTuple):
    """Distances of photos to their neighbours.

    Attributes:
        distance: (N,) mean cosine distance to the nearest photos of the same class, or of all.
        score: (N,) modified z-score of the distance among those of the class; NaN without
            neighbours.
    """

    distance: Floats
    score: Floats


def measure_rarity(vectors: Vectors, groups: Ints, classes: Ints | None = None) -> Rarity:
    """Measure how far each photo is from its nearest neighbours.

    Args:
        vectors: (N, D).
        groups: (N,) number of each photo's group of duplicates, which are no neighbours.
        classes: (N,) class of each photo, whose photos are its neighbours; None takes all photos.

    Returns:
        The distances. The score compares each with the median of its class, in units of 1.4826
        times the median absolute deviation; a class of fewer than 10 photos is compared with all.
    """
    parts = [np.arange(len(vectors))]
    if classes is not None:
        parts = [np.flatnonzero(classes == value) for value in np.unique(classes)]
    distance = np.full(len(vectors), np.nan)
    for part in parts:
        near = find_neighbours(
            vectors[part], vectors[part], NEIGHBOURS,
            query_groups=groups[part], groups=groups[part],
        )  # fmt: skip
        present = near.photos >= 0
        total = np.where(present, 1 - near.cosine.astype(np.float64), 0).sum(axis=1)
        counts = present.sum(axis=1)
        distance[part] = np.where(counts > 0, total / np.maximum(counts, 1), np.nan)
    score = np.full(len(vectors), np.nan)
    for part in parts:
        own = distance[part]
        reference = own if np.isfinite(own).sum() >= LEAST else distance
        reference = reference[np.isfinite(reference)]
        if len(reference):
            score[part] = _modified_z(own, reference)
    return Rarity(distance, score)


def _modified_z(values: Floats, reference: Floats) -> Floats:
    """Compute (value - median) / (1.4826 MAD); 0 where the reference does not vary."""
    median = np.median(reference)
    spread = 1.4826 * np.median(np.abs(reference - median))
    # Equal distances, as in a set of copies, differ by rounding alone.
    return np.asarray((values - median) / spread if spread > 1e-6 else np.zeros_like(values))


def cover(vectors: Vectors, count: int, first: int | None = None) -> tuple[Ints, Floats]:
    """Choose photos that cover a set: each is the farthest from those before (1708.00489).

    Args:
        vectors: (N, D), distances are Euclidean between unit vectors.
        count: number of photos, at most N.
        first: the first photo; None takes the one nearest to the mean.

    Returns:
        (count,) photos in order, and for each the greatest distance of any photo to those chosen
        so far, itself included.
    """
    rows = unit(vectors)
    if first is None:
        first = int((rows @ rows.mean(axis=0)).argmax())
    chosen, radii = [first], []
    least = np.full(len(rows), np.inf)
    while True:
        cosine = rows @ rows[chosen[-1]]
        least = np.minimum(least, np.sqrt(np.maximum(2 - 2 * cosine.astype(np.float64), 0)))
        least[chosen[-1]] = 0
        radii.append(float(least.max()))
        if len(chosen) >= count:
            return np.array(chosen, np.int64), np.array(radii)
        chosen.append(int(least.argmax()))


def measure_typicality(vectors: Vectors, groups: Ints) -> Floats:
    """Compute the typicality of photos: 1 / mean distance to the 20 nearest (2202.02794, eq. 1).

    Args:
        vectors: (N, D), distances are Euclidean between unit vectors.
        groups: (N,) number of each photo's group of duplicates, which are no neighbours.

    Returns:
        (N,); 0 for a photo without neighbours.
    """
    near = find_neighbours(vectors, vectors, TYPICAL_NEIGHBOURS, query_groups=groups, groups=groups)
    present = near.photos >= 0
    distances = np.sqrt(np.maximum(2 - 2 * np.where(present, near.cosine, 1), 0))
    counts = present.sum(axis=1)
    mean = distances.sum(axis=1) / np.maximum(counts, 1)
    return np.where(counts > 0, 1 / np.maximum(mean, 1e-6), 0.0)


def choose_typical(vectors: Vectors, typicality: Floats, count: int, seed: int) -> Ints:
    """Choose the most typical photo of each of `count` clusters (TypiClust, 2202.02794).

    Args:
        vectors: (N, D).
        typicality: (N,), as measure_typicality() gives it.
        count: number of photos, at most N.
        seed: of k-means.

    Returns:
        (count,) or fewer photos, those of large clusters first.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    import_sklearn_metrics()  # says what to install
    from sklearn.cluster import KMeans

    rows = unit(vectors)
    sample = rows
    if len(rows) > MAX_CLUSTERED:
        sample = rows[np.random.default_rng(seed).choice(len(rows), MAX_CLUSTERED, replace=False)]
    centres = KMeans(count, n_init=3, random_state=seed, max_iter=50).fit(sample).cluster_centers_
    half = 0.5 * (centres.astype(np.float32) ** 2).sum(axis=1)
    clusters = np.concatenate(
        [(part @ centres.T.astype(np.float32) - half).argmax(axis=1) for part in _blocks(rows)]
    )
    sizes = np.bincount(clusters, minlength=count)
    order = [int(k) for k in np.argsort(-sizes, kind="stable") if sizes[k]]
    members = [np.flatnonzero(clusters == k) for k in order]
    return np.array([part[typicality[part].argmax()] for part in members], np.int64)


def _blocks(rows: Vectors) -> list[Vectors]:
    """Divide rows into blocks, as a product with all of them would not fit in memory."""
    return list(np.array_split(rows, max(1, -(-len(rows) // 16_384))))


def rank_next(
    vectors: Vectors, groups: Ints, count: int, method: str, seed: int = 0
) -> tuple[Ints, Floats]:
    """Choose photos to label next, one of each group of duplicates at most.

    Args:
        vectors: (N, D).
        groups: (N,) number of each photo's group of duplicates.
        count: number of photos.
        method: "typicality" or "coverage".
        seed: of k-means.

    Returns:
        The photos in order, and for each its typicality, or the distance of the photo that is
        farthest from those chosen so far.
    """
    _, first = np.unique(groups, return_index=True)
    rows = vectors[first]
    count = min(count, len(first))
    if not count:
        return np.empty(0, np.int64), np.empty(0)
    if method == "coverage":
        chosen, radii = cover(rows, count)
        return first[chosen], radii
    typicality = measure_typicality(rows, np.arange(len(rows)))
    chosen = choose_typical(rows, typicality, count, seed)
    return first[chosen], typicality[chosen]
