"""Two-dimensional maps of features: principal components, and t-SNE of scikit-learn.

Shapes: N photos, D features.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MAX_POINTS = 2000  # of a map; t-SNE's time grows with them
FEWEST = 5
PERPLEXITY = 30.0
Floats = npt.NDArray[np.float32]


def sample_points(count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Choose the photos of a map: all, or 2000 of them.

    Args:
        count: N.
        seed: Seed of the draw.

    Returns:
        Indices, ascending.
    """
    if count <= MAX_POINTS:
        return np.arange(count)
    return np.sort(np.random.RandomState(seed).permutation(count)[:MAX_POINTS])


def principal_components(features: Floats) -> tuple[Floats, tuple[float, float]]:
    """Project features to their first two principal components.

    Args:
        features: (N, D), N at least 2.

    Returns:
        (N, 2), and the share of the variance of each component, 0..1.
    """
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    shares = values**2 / max(float((values**2).sum()), 1e-300)
    points = np.zeros((len(features), 2))
    points[:, : min(2, len(axes))] = centred @ axes[:2].T
    first, second = [*shares[:2].tolist(), 0.0, 0.0][:2]
    return points.astype(np.float32), (first, second)


def tsne(features: Floats, seed: int = 0) -> Floats | None:
    """Project features by t-SNE (van der Maaten and Hinton 2008), started at the components.

    Args:
        features: (N, D).
        seed: Seed of the optimization.

    Returns:
        (N, 2); None for fewer than 5 photos, or features that are all the same.
    """
    if len(features) < FEWEST or not np.ptp(features, axis=0).any():
        return None
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    # The first points are given: scikit-learn's own start by a randomized solver.
    start, _ = principal_components(features)
    start = start / max(float(start[:, 0].std()), 1e-12) * 1e-4
    model = TSNE(perplexity=perplexity, init=start, random_state=seed)
    return np.asarray(model.fit_transform(features), np.float32)
