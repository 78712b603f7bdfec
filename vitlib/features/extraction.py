"""Compute vectors of photos by one pass of a model, and take from a store what it has.

Shapes: N photos, B images of a batch, D values of a vector.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib.errors import ConfigError, ImageError
from vitlib.features.parts import FeatureKey
from vitlib.features.selection import Feature, PooledLayers, feature_width, select_features
from vitlib.features.store import FeatureStore
from vitlib.image.prefetch import map_batches
from vitlib.predict.engine import run_finite
from vitlib.predict.model_digest import hash_model, model_precision
from vitlib.predict.optimized_model import current_config
from vitlib.predict.predictor import Predictor
from vitlib.system.cores import count_cores
from vitlib.system.parallel import ParallelCompute
from vitlib.system.progress import progress_bar

Photo = str | Path | bytes
CHUNK = 2048  # photos between two writes to the store: what a kill may lose
READ_BYTES = 1 << 20
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PhotoFeatures:
    """Vectors of photos.

    Attributes:
        vectors: (N, D) of each feature; a row of NaN for a photo that cannot be read.
        digests: Hash of the bytes of each photo, 32 hexadecimal digits; "" where the file cannot
            be read.
        errors: Why a photo cannot be read, by its index.
        computed: Number of photos that passed through the model; the others came from the store.
        seconds: Time that these took.
    """

    vectors: dict[Feature, Floats]
    digests: tuple[str, ...]
    errors: dict[int, str]
    computed: int
    seconds: float


class HashedFile(NamedTuple):
    """Hash of a photo, and the state of its file when it was hashed.

    Attributes:
        digest: 32 hexadecimal digits; "" where the file cannot be read.
        state: What changes with the file.
    """

    digest: str
    state: object


def extract(
    predictor: Predictor,
    photos: Sequence[Photo],
    features: Sequence[Feature],
    *,
    store: FeatureStore | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> PhotoFeatures:
    """Compute features of photos.

    Args:
        predictor: The model with its preprocessing.
        photos: Paths, or the bytes of files.
        features: From select_features(); of an exported file its embedding alone.
        store: Where vectors are taken from and stored; None computes all.
        batch_size: Photos that are computed together.
        progress: True shows a progress bar.

    Returns:
        The vectors. A photo that cannot be read is named in `errors`.

    Raises:
        ConfigError: No feature is chosen, or the model is an exported file that has not these.
    """
    if not features:
        raise ConfigError("no features: expected one or more of select_features()")
    hashed = hash_photos(photos)
    digests = tuple(entry.digest for entry in hashed)
    config = current_config(predictor.model)
    shapes = {feature: (len(photos), feature_width(config, feature)) for feature in features}
    if store is None:
        keys: dict[Feature, FeatureKey] = {}
        vectors = {f: np.full(shape, np.nan, np.float32) for f, shape in shapes.items()}
    else:
        keys = make_keys(predictor, features)
        vectors = {f: store.read(keys[f], digests, shapes[f][1]) for f in features}
    # One pass computes, for all photos that lack any feature, those that any photo lacks.
    lacking = {f: np.isnan(rows[:, 0]) for f, rows in vectors.items()}
    needed = tuple(f for f in features if lacking[f].any())
    indices = np.flatnonzero(np.logical_or.reduce([*lacking.values()])).tolist()
    errors: dict[int, str] = {}
    start, computed = time.perf_counter(), 0
    unique = _first_of_each(indices, digests)
    with progress_bar(len(unique), progress, "photo") as advance:
        for first in range(0, len(unique), CHUNK):
            chunk = unique[first : first + CHUNK]
            parts = [photos[i] for i in chunk]
            rows, failed = _compute(predictor, parts, needed, batch_size, advance)
            errors |= {chunk[i]: message for i, message in failed.items()}
            computed += len(chunk) - len(failed)
            for feature in needed:
                vectors[feature][chunk] = rows[feature]
            if store is not None:
                # A file that changed meanwhile may not be stored under the hash of the old one.
                same = [_file_state(photos[i]) == hashed[i].state for i in chunk]
                names = [digests[i] if ok else "" for i, ok in zip(chunk, same, strict=True)]
                for feature in needed:
                    store.write(keys[feature], names, rows[feature])
    seconds = time.perf_counter() - start
    _copy_to_repeated(vectors, errors, indices, digests)
    return PhotoFeatures(vectors, digests, errors, computed, seconds)


def embed(
    predictor: Predictor,
    photos: Sequence[Photo],
    store: FeatureStore | None,
    *,
    batch_size: int = 16,
    on_error: Callable[[int, ImageError], object],
    progress: bool = False,
) -> Floats:
    """Compute embeddings, as Predictor.embed does, and take from a store what it has.

    Args:
        predictor: The model with its preprocessing.
        photos: Paths, or the bytes of files.
        store: Where embeddings are taken from and stored; None computes all.
        batch_size: Photos that are computed together.
        on_error: Called with the index of a photo that cannot be read, and the error.
        progress: True shows a progress bar.

    Returns:
        (N, D); a row of NaN for a photo that cannot be read.
    """
    if store is None:
        return predictor.embed(photos, batch_size=batch_size, on_error=on_error, progress=progress)
    features = select_features(current_config(predictor.model))
    result = extract(
        predictor, photos, features, store=store, batch_size=batch_size, progress=progress
    )
    for index, message in sorted(result.errors.items()):
        on_error(index, ImageError(message))
    return result.vectors[features[0]]


def hash_photo(photo: Photo) -> str:
    """Hash the bytes of a photo.

    Args:
        photo: A path, or the bytes of a file.

    Returns:
        32 hexadecimal digits of BLAKE2b; "" for a file that cannot be read.
    """
    hasher = hashlib.blake2b(digest_size=16)
    if isinstance(photo, bytes):
        hasher.update(photo)
        return hasher.hexdigest()
    try:
        if not Path(photo).is_file():  # a pipe or a device would block, or never end
            return ""
        with Path(photo).open("rb") as file:
            while block := file.read(READ_BYTES):
                hasher.update(block)
    except OSError:
        return ""
    return hasher.hexdigest()


def hash_photos(photos: Sequence[Photo]) -> list[HashedFile]:
    """Hash photos by threads.

    Args:
        photos: Paths, or the bytes of files.
    """

    def read(photo: Photo) -> HashedFile:
        state = _file_state(photo)
        return HashedFile(hash_photo(photo), state)

    with ThreadPoolExecutor(min(count_cores(), 8), "vitlib-hash") as pool:
        return list(pool.map(read, photos, chunksize=1))


def _file_state(photo: Photo) -> object:
    """Return what changes with a file: its size and time; of bytes nothing does."""
    if isinstance(photo, bytes):
        return None
    try:
        status = Path(photo).stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def make_keys(predictor: Predictor, features: Sequence[Feature]) -> dict[Feature, FeatureKey]:
    """Make the key of each feature in a store.

    Args:
        predictor: The model with its preprocessing and precision.
        features: The features.
    """
    precision = model_precision(predictor)
    # 8-bit weights depend on the photos that they were calibrated with.
    hashed = predictor.fast() if precision == "int8" else predictor.model
    digest = hash_model(hashed, predictor.image_processor, with_head=False)
    return {feature: FeatureKey(digest, precision, feature) for feature in features}


def _first_of_each(indices: Sequence[int], digests: Sequence[str]) -> list[int]:
    """Leave out photos with the bytes of an earlier one."""
    seen: set[str] = set()
    first = []
    for index in indices:
        if digests[index] not in seen:
            first.append(index)
        if digests[index]:
            seen.add(digests[index])
    return first


def _compute(
    predictor: Predictor,
    photos: Sequence[Photo],
    features: tuple[Feature, ...],
    batch_size: int,
    advance: Callable[[int], object],
) -> tuple[dict[Feature, Floats], dict[int, str]]:
    """Compute features of photos, (N, D) each with NaN for those that cannot be read, and why."""
    engine, config = predictor.engine(calibrated=False), current_config(predictor.model)
    function = PooledLayers(features)
    widths = function.widths(config)
    is_embedding = features == (Feature(config.depth, "embed"),)
    compute = engine.vectors if is_embedding else partial(engine.compute, function)
    errors: dict[int, ImageError] = {}
    nan = np.full(sum(widths), np.nan, np.float32)
    rows = []
    with ParallelCompute(engine.num_parts) as parallel:
        run = partial(run_finite, predictor.model, partial(parallel.run, compute))
        for row in map_batches(
            photos, engine.preprocessor(), run, engine.device, batch_size,
            errors.__setitem__, progress=False,
        ):  # fmt: skip
            rows.append(nan if row is None else row.numpy())
            advance(1)
    parts = np.split(np.stack(rows), np.cumsum(widths)[:-1], axis=1)
    return dict(zip(features, parts, strict=True)), {i: str(e) for i, e in errors.items()}


def _copy_to_repeated(
    vectors: dict[Feature, Floats],
    errors: dict[int, str],
    indices: Sequence[int],
    digests: Sequence[str],
) -> None:
    """Copy vectors and errors of computed photos to those with the same bytes."""
    first: dict[str, int] = {}
    for index in indices:
        digest = digests[index]
        original = first.setdefault(digest, index) if digest else index
        if original == index:
            continue
        for rows in vectors.values():
            rows[index] = rows[original]
        if original in errors:
            errors[index] = errors[original]
