"""Vectors of all photos, with memory bounded however many layers and pools there are.

Shapes: N photos, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vitlib.features import Feature, FeatureStore, PhotoFeatures, extract
from vitlib.features.extraction import make_keys
from vitlib.predict.predictor import Predictor

CHUNK = 2048  # photos of a pass whose vectors are in memory together
MAX_BYTES = 2**28  # of vectors in memory


@dataclass
class Collector:
    """Computes the vectors of photos by one pass of a model, and reads them feature by feature.

    Attributes:
        name: Name of the model.
        predictor: The model with its preprocessing.
        features: Layers and pools.
        store: Where vectors are stored.
        batch_size: Photos that are computed together.
        progress: True shows a progress bar.
        computed: Photos that passed through the model.
        seconds: Time that they took.
    """

    name: str
    predictor: Predictor
    features: tuple[Feature, ...]
    store: FeatureStore
    batch_size: int = 16
    progress: bool = False
    computed: int = 0
    seconds: float = 0.0

    @property
    def milliseconds(self) -> float | None:
        """Time of a photo through the model; None where the store had all."""
        return 1000 * self.seconds / self.computed if self.computed else None

    @cached_property
    def digest(self) -> str:
        """Hash of the model and its precision, as the store has them."""
        key = make_keys(self.predictor, self.features[:1])[self.features[0]]
        return f"{key.model_digest} {key.precision}"

    def fill(self, photos: Sequence[Path]) -> tuple[list[str], dict[int, str]]:
        """Compute every vector that the store has not.

        Args:
            photos: The photos.

        Returns:
            Hash of each photo, and why a photo cannot be read, by its index.
        """
        digests: list[str] = []
        errors: dict[int, str] = {}
        for start in range(0, len(photos), CHUNK):
            # The vectors are dropped: all layers of all photos would not fit in memory.
            result = self._extract(photos[start : start + CHUNK], self.features)
            errors |= {start + index: error for index, error in result.errors.items()}
            digests += result.digests
            self.computed += result.computed
            self.seconds += result.seconds if result.computed else 0.0
        return digests, errors

    def read(
        self, photos: Sequence[Path], features: Sequence[Feature]
    ) -> Iterator[tuple[Feature, npt.NDArray[np.float32]]]:
        """Yield features with their vectors, as many at once as fit in 256 MiB.

        Args:
            photos: Photos that can be read.
            features: Some of the features.

        Yields:
            The feature, and (N, D).
        """
        row = 8 * self.predictor.model.config.embed_dim  # class token and mean are the widest
        count = max(MAX_BYTES // max(row * len(photos), 1), 1)
        for start in range(0, len(features), count):
            vectors = dict(self._extract(photos, features[start : start + count]).vectors)
            for feature in features[start : start + count]:
                yield feature, vectors.pop(feature)

    def _extract(self, photos: Sequence[Path], features: Sequence[Feature]) -> PhotoFeatures:
        """Compute or read the vectors of some photos."""
        return extract(
            self.predictor, photos, features, store=self.store, batch_size=self.batch_size,
            progress=self.progress,
        )  # fmt: skip
