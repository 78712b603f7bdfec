"""Worker: a model that answers batches of inputs; what each process of a run, or actor, holds.

How data flows: read() turns an input into levels, by any thread; answer() stacks those of one size,
asks the model, and puts rows and errors back in the order of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from vitlib.batch.inputs.items import Item, digest
from vitlib.batch.results import Answer
from vitlib.errors import ImageError
from vitlib.image.decode import ImageLike
from vitlib.image.prefetch import stack
from vitlib.predict.engine import InferenceEngine
from vitlib.scores import NOT_FINITE, top_classes

Task = Literal["classify", "embed", "both"]


class Read(NamedTuple):
    """An input that was read, or why it was not."""

    pixels: Tensor | None
    error: str | None
    key: int  # 64 bits of its encoded bytes; 0 where there are none


class Worker:
    """Answers batches: top_k labels an image (None: all, in the classes' order; so of a regression,
    whose numbers they are), or vectors."""

    def __init__(self, engine: InferenceEngine, task: Task, top_k: int | None) -> None:
        self.engine, self.task, self.top_k = engine, task, top_k

    def read(self, item: Item) -> Read:
        """An input's pixels, as the model takes them; never raises for a bad image."""
        return read(item, self.engine.preprocess)

    def answer(self, items: Sequence[Item], reads: Sequence[Read]) -> Answer:
        """The rows of inputs that follow each other."""
        files, numbers = [item.file for item in items], [item.number for item in items]
        return self.answered(items[0].row, files, numbers, reads)

    def answered(
        self, first: int, files: list[str], numbers: list[int], reads: Sequence[Read]
    ) -> Answer:
        """The same, of inputs that were read elsewhere."""
        scores: dict[int, Any] = {}
        vectors: dict[int, Any] = {}
        errors = [read.error for read in reads]
        good = [i for i, read in enumerate(reads) if read.error is None]
        for _, group in groupby(good, key=lambda i: _kind(reads[i].pixels)):
            members = list(group)
            batch = stack([reads[i].pixels for i in members], self.engine.device)  # type: ignore[misc]
            found = self._ask(batch)
            for kept, rows in zip((scores, vectors), found, strict=True):
                if rows is not None:
                    kept.update(zip(members, rows.numpy(), strict=True))
        for i in good:
            if not all(np.isfinite(kept[i]).all() for kept in (scores, vectors) if kept):
                errors[i] = NOT_FINITE
        model = self.engine.model
        of_scores = _rows(scores, errors, model.num_classes) if self.task != "embed" else None
        of_vectors = _rows(vectors, errors, model.num_features) if self.task != "classify" else None
        classes = None
        if of_scores is not None and self.top_k is not None:
            classes, of_scores = top_classes(of_scores, self.top_k, self.engine.thresholds)
        keys = np.array([read.key for read in reads], np.uint64)
        return Answer(first, files, numbers, errors, keys, classes, of_scores, of_vectors)

    def _ask(self, batch: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.task == "both":
            return self.engine.scores_and_vectors(batch)
        if self.task == "embed":
            return None, self.engine.vectors(batch)
        return self.engine.scores(batch), None


def read(item: Item, pixels_of: Callable[[ImageLike], Tensor]) -> Read:
    """An input's pixels; never raises for a bad image."""
    key = 0
    try:
        data = item.place.read()
        key = int(digest(data), 16)
        return Read(pixels_of(data), None, key)
    except ImageError as error:
        return Read(None, " ".join(str(error).split()), key)


def _kind(pixels: Tensor | None) -> object:
    """What images of one stack have in common."""
    return None if pixels is None else (pixels.dtype, pixels.shape)


def _rows(found: dict[int, Any], errors: list[str | None], width: int) -> Any:
    """(n, width) float32; zeros where an input failed."""
    rows = np.zeros((len(errors), width), np.float32)
    for i, row in found.items():
        if errors[i] is None:
            rows[i] = row
    return rows
