"""Vectors of photos from any layer of a model, and a folder that stores them.

How data flows: select_features() names vectors of a model: how many blocks the tokens pass, and how
they are pooled. extract() hashes the photos, takes from a FeatureStore what it has, computes the
others in one pass of the model, and stores them. So no photo passes through one model twice, in
whichever verb.
"""

from vitlib.features.embedding_cache import EmbeddingCache
from vitlib.features.extraction import PhotoFeatures, extract
from vitlib.features.parts import FeatureKey
from vitlib.features.selection import Feature, select_features
from vitlib.features.store import FeatureStore, open_store

__all__ = [
    "EmbeddingCache",
    "Feature",
    "FeatureKey",
    "FeatureStore",
    "PhotoFeatures",
    "extract",
    "open_store",
    "select_features",
]
