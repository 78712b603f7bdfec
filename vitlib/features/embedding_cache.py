"""Embeddings of a store for a caller that makes its batches itself; safe in threads.

How data flows: find() looks up the bytes of a photo before they are decoded. The embeddings that
the model computes of the others are added, and written to the store in parts and at the end.

Shapes: D values of an embedding.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np

from vitlib.features.extraction import hash_photo, make_keys
from vitlib.features.parts import Floats
from vitlib.features.selection import select_features
from vitlib.features.store import FeatureStore
from vitlib.predict.optimized_model import current_config
from vitlib.predict.predictor import Predictor

ROWS = 1024  # photos between two writes: what a kill may lose


class CachedEmbedding(NamedTuple):
    """A photo in the cache or to be added.

    Attributes:
        digest: Hash of its bytes.
        vector: Its embedding (D,); None where the store has none.
    """

    digest: str
    vector: Floats | None


class EmbeddingCache:
    """Embeddings of one model in a store."""

    def __init__(self, store: FeatureStore, predictor: Predictor) -> None:
        """Open the embeddings of a model, as the store has them now.

        Args:
            store: The store.
            predictor: The model with its preprocessing.
        """
        config = current_config(predictor.model)
        (feature,) = select_features(config)
        self.store, self.key = store, make_keys(predictor, (feature,))[feature]
        self.stored = store.open_group(self.key, config.num_features)
        self.lock = threading.Lock()
        self.digests: list[str] = []
        self.vectors: list[Floats] = []

    def find(self, data: bytes) -> CachedEmbedding:
        """Look up a photo.

        Args:
            data: The bytes of its file.

        Returns:
            Its digest, and its vector if the store has it.
        """
        digest = hash_photo(data)
        vector = self.stored.find([digest])[0]
        return CachedEmbedding(digest, None if np.isnan(vector[0]) else vector)

    def add(self, digest: str, vector: Floats) -> None:
        """Add an embedding that the store has not.

        Args:
            digest: Hash of the photo, of find().
            vector: (D,); one that is not finite is left out.
        """
        with self.lock:
            self.digests.append(digest)
            self.vectors.append(vector)
            if len(self.digests) >= ROWS:
                self._write()

    def flush(self) -> None:
        """Write what was added."""
        with self.lock:
            if self.digests:
                self._write()

    def _write(self) -> None:
        """Write what was added, under the lock."""
        digests, vectors = self.digests, np.stack(self.vectors)
        self.digests, self.vectors = [], []
        self.store.write(self.key, digests, vectors)
