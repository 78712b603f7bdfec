"""Copy the embeddings of earlier runs into a store of features, without the model.

How data flows: rows of a `vitlib embed` file or of the parts of a `vitlib batch` run are read a few
thousand at a time. Each photo is hashed, and its vector is written under the key of the model that
made the run. Photos that are files no more are counted.

Shapes: D values of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitlib.batch.embedding_file import read_embeddings
from vitlib.batch.results import Floats
from vitlib.batch.search import ROWS, iter_embeddings, read_run_settings
from vitlib.errors import BatchError
from vitlib.features import FeatureStore
from vitlib.features.extraction import hash_photos, make_keys
from vitlib.features.selection import select_features
from vitlib.predict.model_digest import compute_model_digest
from vitlib.predict.optimized_model import current_config
from vitlib.predict.predictor import Predictor


class Copied(NamedTuple):
    """Number of embeddings that were copied.

    Attributes:
        photos: Photos whose vector is in the store now.
        absent: Photos that are no files (any more), such as those within a tar.
    """

    photos: int
    absent: int


def store_embeddings(source: Path, predictor: Predictor, store: FeatureStore) -> Copied:
    """Copy embeddings into a store, as the model's own "embed" vectors.

    Args:
        source: A .npy of `vitlib embed`, or the folder of a complete `vitlib batch --task embed`.
        predictor: The model that made them.
        store: The store.

    Returns:
        How many were copied.

    Raises:
        BatchError: There are no such embeddings, or another model made them.
    """
    (feature,) = select_features(current_config(predictor.model))
    key = make_keys(predictor, (feature,))[feature]
    photos = absent = 0
    for names, vectors in _open(source, predictor, key.precision):
        digests = [entry.digest for entry in hash_photos([Path(name) for name in names])]
        store.write(key, digests, vectors)
        count = sum(bool(digest) for digest in digests)
        photos, absent = photos + count, absent + len(names) - count
    return Copied(photos, absent)


def _open(source: Path, predictor: Predictor, precision: str) -> Iterator[tuple[list[str], Floats]]:
    """Check who made embeddings, and yield names and vectors (n, D)."""
    if source.is_dir():
        settings = read_run_settings(source)
        if settings is not None:
            _check_model(source, settings.model, settings.model_digest, predictor)
            _check_precision(source, settings.precision, precision)
        for rows, vectors in iter_embeddings(source):
            yield [name for _, name in rows], vectors
        return
    file = read_embeddings(source)
    _check_model(source, file.model, file.model_digest, predictor)
    _check_precision(source, file.precision, precision)
    for start in range(0, len(file.images), ROWS):
        yield file.images[start : start + ROWS], np.asarray(file.vectors[start : start + ROWS])


def _check_precision(source: Path, stated: str, precision: str) -> None:
    """Raise BatchError for embeddings of another precision, or of an unknown one."""
    if not stated:
        raise BatchError(f"{source} does not state its precision: write it with vitlib embed again")
    if stated != precision:
        raise BatchError(
            f"{source} was made in {stated}, the model runs in {precision}: give precision={stated}"
        )


def _check_model(source: Path, model: str, digest: str, predictor: Predictor) -> None:
    """Raise BatchError for embeddings of another model."""
    if compute_model_digest(predictor) != digest:
        raise BatchError(
            f"{source} was made by another model ({model}) than {predictor.source or 'this one'}, "
            "or with other --levels or --image-size: give those"
        )
