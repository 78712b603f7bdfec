"""Compare an exported file with its model on photos, by the runtime of the file.

A file counts only after this. Float32 outputs must equal the model's within a bound. Lower
precisions must give the model's label on photos where it is not in doubt, or the model's embedding
within a cosine.

Shapes: B photos of a batch, C channels, H W pixels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitlib.checks.compare import (
    COSINES,
    LABELS,
    MARGIN,
    ROUNDING_SHARE,
    error_bound,
    measure_rounding,
    to_json,
)
from vitlib.errors import ConfigError
from vitlib.export.prepare import PreparedModel, list_sizes
from vitlib.image.decode import ImageLike
from vitlib.predict.exported_model import read_levels
from vitlib.predict.runtimes import Runtime
from vitlib.scores import logits_to_scores
from vitlib.testing.distance import relative_distance
from vitlib.vit import ViT

BATCHES = (1, 2, 5)


@dataclass(frozen=True)
class Comparison:
    """One output of a file beside the model's, over all photos of a batch size and an image size.

    Attributes:
        output: Name of the output.
        batch: Photos of a batch.
        image_size: Pixels (height, width).
        error: max |a - b| / max |b|, the largest of all batches.
        cosine: Least cosine of one photo's output with the model's.
        clear: Photos whose label is not in doubt; 0 for outputs but logits.
        agreeing: Those of them that keep their label.
        bound: Largest error that counts: that of the format, or twice the model's own rounding
            where this is larger; None where labels and cosines count.
        equal: The output counts as the model's.
    """

    output: str
    batch: int
    image_size: tuple[int, int]
    error: float
    cosine: float
    clear: int
    agreeing: int
    bound: float | None
    equal: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, as JSON's types."""
        result: dict[str, Any] = to_json(asdict(self))
        return result


def verify_file(
    prepared: PreparedModel, runtime: Runtime, photos: Sequence[ImageLike]
) -> list[Comparison]:
    """Compare a file with its model, at every batch size and image size.

    Args:
        prepared: The model.
        runtime: The open file.
        photos: Photos; at least five, so that a batch of five is a whole one.

    Returns:
        A comparison for each output, batch size and image size.

    Raises:
        ConfigError: There are fewer photos than the largest batch.
        ImageError: A photo cannot be read.
    """
    if len(photos) < max(BATCHES):
        raise ConfigError(
            f"{len(photos)} photos to compare with: expected at least {max(BATCHES)}, for batches "
            f"of {', '.join(map(str, BATCHES))}"
        )
    return [
        comparison
        for size in list_sizes(prepared)
        for batch in BATCHES
        for comparison in _compare_size(prepared, runtime, photos, size, batch)
    ]


def _compare_size(
    prepared: PreparedModel,
    runtime: Runtime,
    photos: Sequence[ImageLike],
    size: tuple[int, int],
    batch: int,
) -> Iterator[Comparison]:
    """Compare every output on batches of one size; small batches on as many photos as the large."""
    processor = prepared.processor
    if size != prepared.image_size:
        processor = processor.with_image_size(size, prepared.model.config.patch_size)
    takes_uint8 = prepared.graph.takes_uint8
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in prepared.outputs}
    worst: dict[str, tuple[float, Tensor, Tensor]] = {}  # error, pixels, the model's output
    # All photos pass once, in the largest batches.
    remaining = iter(photos if batch == BATCHES[-1] else photos[: 2 * BATCHES[-1]])
    while chunk := list(islice(remaining, batch)):
        exact = torch.stack([processor.to_float(photo) for photo in chunk])
        pixels = exact
        if takes_uint8:
            pixels = torch.stack([read_levels(processor, photo) for photo in chunk])
        wanted = prepared.compute_reference(exact)
        results = runtime.run(pixels.numpy())
        for name, pair in pairs.items():
            pair.append((torch.from_numpy(results[name]).float(), wanted[name].float()))
            error = relative_distance(*pair[-1])
            if error > worst.get(name, (-1.0,))[0]:
                worst[name] = error, exact, wanted[name]
    for name, pair in pairs.items():
        comparison = _compare(prepared, runtime.format, name, pair, size, batch)
        if comparison.bound is not None and not comparison.equal:
            rounding = _measure_rounding(prepared, name, *worst[name][1:])
            bound = max(comparison.bound, ROUNDING_SHARE * rounding)
            is_equal = comparison.error <= bound
            comparison = replace(comparison, bound=bound, equal=is_equal)
        yield comparison


def _measure_rounding(prepared: PreparedModel, name: str, images: Tensor, output: Tensor) -> float:
    """Return the distance of the model's own output in float32 from that in float64."""

    def compute(model: ViT, pixels: Tensor) -> Tensor:
        return replace(prepared, model=model).compute_reference(pixels)[name]

    exact = copy.deepcopy(prepared.model).double()
    return measure_rounding(exact, compute, images, output)


def _compare(
    prepared: PreparedModel,
    file_format: str,
    name: str,
    pairs: list[tuple[Tensor, Tensor]],
    size: tuple[int, int],
    batch: int,
) -> Comparison:
    """Compare one output over its batches."""
    error = max(relative_distance(result, wanted) for result, wanted in pairs)
    is_same_shape = all(result.shape == wanted.shape for result, wanted in pairs)
    cosine, clear, agreeing = -1.0, 0, 0
    if is_same_shape:
        rows = [(a.flatten(1), b.flatten(1)) for a, b in pairs]
        cosine = min(float(F.cosine_similarity(a.double(), b.double()).min()) for a, b in rows)
    if is_same_shape and name == "logits" and prepared.model.num_classes > 1:
        clear, agreeing = _count_labels(prepared, pairs)
    precision = prepared.settings.precision
    if precision == "fp32":
        depth = prepared.model.config.depth
        bound = error_bound(file_format, depth, prepared.settings.dynamic_size)
        return Comparison(name, batch, size, error, cosine, clear, agreeing, bound, error <= bound)
    is_equal = (
        math.isfinite(error)
        and clear - agreeing <= _count_allowed(precision, clear)
        and cosine >= COSINES[precision]
        # A single number has a cosine of 1 with any other of its sign.
        and (pairs[0][1][0].numel() > 1 or error <= math.sqrt(2 * (1 - COSINES[precision])))
    )
    return Comparison(name, batch, size, error, cosine, clear, agreeing, None, is_equal)


def _count_allowed(precision: str, clear: int) -> int:
    """Return how many labels may differ, of those that are not in doubt."""
    share = 1 - LABELS[precision]
    return max(1, int(share * clear)) if share else 0


def _count_labels(prepared: PreparedModel, pairs: list[tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """Count the photos whose first label is not in doubt, and those of them that keep it."""
    task = prepared.info.task
    clear = agreeing = 0
    for result, wanted in pairs:
        best = logits_to_scores(wanted, task).topk(2, dim=1)
        is_clear = best.values[:, 0] - best.values[:, 1] >= MARGIN
        clear += int(is_clear.sum())
        agreeing += int((is_clear & (result.argmax(dim=1) == best.indices[:, 0])).sum())
    return clear, agreeing
