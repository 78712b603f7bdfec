"""Worker: a model that computes batches of inputs, in each process or actor of a run.

How data flows: any thread decodes an input to uint8 or float pixels. `compute` stacks pixels of one
size, runs the model, and puts rows and errors in the order of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from vitlib.batch.inputs.items import Item, digest
from vitlib.batch.results import Results
from vitlib.errors import ImageError
from vitlib.features.embedding_cache import CachedEmbedding, EmbeddingCache
from vitlib.image.decode import ImageLike
from vitlib.image.prefetch import stack
from vitlib.predict.engine import InferenceEngine
from vitlib.scores import NOT_FINITE, top_classes

Task = Literal["classify", "embed", "both"]


class DecodedImage(NamedTuple):
    """Pixels of an input, or the error of decoding it.

    Attributes:
        pixels: as the model takes them; None with an error.
        error: the error, or None.
        key: hash of the encoded bytes, 64 bits; 0 without bytes.
        cached: hash by which a store knows the photo, and the embedding that it has; None without
            a store.
    """

    pixels: Tensor | None
    error: str | None
    key: int
    cached: CachedEmbedding | None = None


class Worker:
    """Model that computes batches of inputs.

    Args:
        engine: the optimized model and its preprocessing.
        task: scores, embeddings or both.
        top_k: labels per image; None for the scores of every class in its order, and for the
            numbers of a regression.
        cache: embeddings of a store, for the task "embed"; None computes all.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        task: Task,
        top_k: int | None,
        cache: EmbeddingCache | None = None,
    ) -> None:
        self.engine, self.task, self.top_k, self.cache = engine, task, top_k, cache

    def decode(self, item: Item) -> DecodedImage:
        """Decode an input to the pixels of the model.

        Args:
            item: the input.

        Returns:
            The pixels, or the error of a bad image.
        """
        return decode_item(item, self.engine.preprocess, self.cache)

    def compute_items(self, items: Sequence[Item], images: Sequence[DecodedImage]) -> Results:
        """Compute consecutive inputs.

        Args:
            items: the inputs.
            images: their pixels.

        Returns:
            Their results.
        """
        files, numbers = [item.file for item in items], [item.number for item in items]
        return self.compute(items[0].row, files, numbers, images)

    def compute(
        self, first: int, files: list[str], numbers: list[int], images: Sequence[DecodedImage]
    ) -> Results:
        """Compute decoded images.

        Args:
            first: row of the first input.
            files: name of each input.
            numbers: position of each input in its file.
            images: their pixels.

        Returns:
            Their results.
        """
        scores: dict[int, Any] = {}
        vectors: dict[int, Any] = {}
        errors = [image.error for image in images]
        good = [i for i, image in enumerate(images) if image.pixels is not None]
        for i, image in enumerate(images):
            if image.cached is not None and image.cached.vector is not None:
                vectors[i] = image.cached.vector
        for _, group in groupby(good, key=lambda i: _stack_key(images[i].pixels)):
            members = list(group)
            batch = stack([images[i].pixels for i in members], self.engine.device)  # type: ignore[misc]
            outputs = self._run_model(batch)
            for by_index, rows in zip((scores, vectors), outputs, strict=True):
                if rows is not None:
                    by_index.update(zip(members, rows.numpy(), strict=True))
        for i in good:
            if not all(np.isfinite(x[i]).all() for x in (scores, vectors) if x):
                errors[i] = NOT_FINITE
            cached = images[i].cached
            if self.cache is not None and cached is not None and errors[i] is None:
                self.cache.add(cached.digest, vectors[i])
        model = self.engine.model
        classes = score_rows = vector_rows = None
        if self.task != "embed":
            score_rows = _fill_rows(scores, errors, model.num_classes)
        if self.task != "classify":
            vector_rows = _fill_rows(vectors, errors, model.num_features)
        if score_rows is not None and self.top_k is not None:
            classes, score_rows = top_classes(score_rows, self.top_k, self.engine.thresholds)
        keys = np.array([image.key for image in images], np.uint64)
        return Results(first, files, numbers, errors, keys, classes, score_rows, vector_rows)

    def _run_model(self, batch: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the scores and the embeddings of a batch, None where the task lacks them."""
        if self.task == "both":
            return self.engine.scores_and_vectors(batch)
        if self.task == "embed":
            return None, self.engine.vectors(batch)
        return self.engine.scores(batch), None


def decode_item(
    item: Item,
    preprocess: Callable[[ImageLike], Tensor],
    cache: EmbeddingCache | None = None,
) -> DecodedImage:
    """Decode an input, unless its embedding is stored.

    Args:
        item: the input.
        preprocess: function of encoded bytes that returns pixels.
        cache: stored embeddings; None decodes all.

    Returns:
        The pixels, or the error of a bad image.
    """
    key = 0
    try:
        data = item.ref.read()
        key = int(digest(data), 16)
        cached = None if cache is None else cache.find(data)
        if cached is not None and cached.vector is not None:
            return DecodedImage(None, None, key, cached)
        return DecodedImage(preprocess(data), None, key, cached)
    except ImageError as error:
        return DecodedImage(None, " ".join(str(error).split()), key)


def _stack_key(pixels: Tensor | None) -> object:
    """Return dtype and shape, which images of one stack share."""
    return None if pixels is None else (pixels.dtype, pixels.shape)


def _fill_rows(by_index: dict[int, Any], errors: list[str | None], width: int) -> Any:
    """Make an array (n, width), float32, with zeros for failed inputs."""
    rows = np.zeros((len(errors), width), np.float32)
    for i, row in by_index.items():
        if errors[i] is None:
            rows[i] = row
    return rows
