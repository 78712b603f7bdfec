"""Compare an exported file with a model on photos: their pixels, then each output.

Both compute from the pixels of the file's preprocessing, so that a difference of an output is one
of the computation. Float32 files must equal the model within a bound. Files of lower precision must
give the model's label where it is not in doubt, and vectors within a cosine.

Shapes: B photos of a batch, C channels, H W pixels.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitlib.checks.compare import (
    BOUNDS,
    COSINES,
    LABELS,
    MARGIN,
    ROUNDING_SHARE,
    error_bound,
    list_demo_photos,
    measure_rounding,
)
from vitlib.checks.references import LIBRARIES
from vitlib.checks.verdict import Verdict
from vitlib.errors import ConfigError
from vitlib.fast import FastViT
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.predict.exported_model import ExportedModel
from vitlib.predict.predictor import Predictor
from vitlib.predict.runtimes import open_file
from vitlib.scores import Task, logits_to_scores
from vitlib.testing.distance import relative_distance
from vitlib.vit import ViT

if TYPE_CHECKING:
    from vitlib.predict.backends import Model

_BATCH = 8


def verify_exported(
    source: str | os.PathLike[str],
    against: str | os.PathLike[str] | None,
    photos: Sequence[ImageLike] | None,
    reading: Mapping[str, Any],
) -> Verdict:
    """Compare an exported file with a model.

    Args:
        source: The file.
        against: The model: a hub id, a folder or a file, also an exported one.
        photos: Photos; None takes those of the package.
        reading: Arguments of Predictor.load for the model.

    Returns:
        The verdict. Its errors are named "logits of PHOTO", output by output.

    Raises:
        ConfigError: There is no model to compare with.
        VitlibError: As in Predictor.load, or a photo cannot be read.
    """
    runtime = open_file(source)
    if against is None or os.fspath(against) in LIBRARIES:
        made_of = (runtime.info.source if runtime.info else "") or "the checkpoint it was made from"
        raise ConfigError(
            f"{os.fspath(source)} is an exported file, which is compared with a model: give "
            f"against= (--against), such as {made_of}"
        )
    reference = Predictor.load(against, device="cpu", calibrated=False, **reading)
    # A file of another exporter states nothing; the model's labels and preprocessing are meant.
    facts = (reference.image_processor, reference.labels) if runtime.info is None else (None, None)
    file = ExportedModel(runtime, *facts)
    model, processor = reference.model, file.image_processor
    # Exported files compute in float32 from weights of any precision.
    if isinstance(model, ViT):
        model.float()
    listed = list_demo_photos() if photos is None else list(photos)
    if not listed:
        raise ConfigError("photos=[]: expected one or more")
    wanted, own = _list_calls(model), _list_calls(file)
    names = [name for name in own if name in wanted]
    judge = _Judge(file, model, reference.task)
    judge.compare_pixels(listed, processor, reference.image_processor)
    readers = file.pixel_reader(processor), _choose_reader(model, processor)
    for group in (listed[i : i + _BATCH] for i in range(0, len(listed), _BATCH)):
        pixels = [torch.stack([read(photo) for photo in group]) for read in readers]
        with torch.inference_mode():
            for name in names:
                pair = own[name](pixels[0]).float(), wanted[name](pixels[1]).float()
                judge.compare_rows(name, group, *pair, pixels[1])
    first = judge.first_difference()
    return Verdict(
        os.fspath(source), runtime.format, os.fspath(against), file.config.image_size,
        tuple(judge.list_errors()), tuple(name for name in file.info.outputs if name not in names),
        judge.bound, first, (), photos=len(listed),
    )  # fmt: skip


def _list_calls(model: Model) -> dict[str, Callable[[Tensor], Tensor]]:
    """List the outputs that a model has, with the calls that compute them."""
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "logits": model,
        "embedding": model.embed,
        "tokens": model.forward_features,
    }
    if isinstance(model, ViT | FastViT):
        return calls if model.num_classes else {k: v for k, v in calls.items() if k != "logits"}
    return {name: call for name, call in calls.items() if name in model.info.outputs}


def _choose_reader(model: Model, processor: ImageProcessor) -> Callable[..., Tensor]:
    """Return the preprocessing for a call of the model itself, which takes normalised pixels."""
    if isinstance(model, ViT | FastViT):
        return processor.to_float
    return model.pixel_reader(processor)


class _Judge:
    """Errors of each output on each photo, and which of them count.

    Attributes:
        bound: Largest error that counts as equal; infinity where labels and cosines count.
    """

    def __init__(self, file: ExportedModel, model: Model, task: Task) -> None:
        self.precision, self.task, self.model = file.precision, task, model
        depth = 0 if isinstance(model, ExportedModel) else model.config.depth
        is_dynamic = file.info.image_size is None
        bound = error_bound(file.runtime.format, depth, is_dynamic)
        self.exact: ViT | None = None  # in float64, made where a bound is exceeded
        self.bound = math.inf if self.precision in COSINES else bound
        self.rows: dict[str, list[tuple[str, float, bool]]] = {}

    def compare_pixels(
        self, photos: Sequence[ImageLike], own: ImageProcessor, other: ImageProcessor
    ) -> None:
        """Compare the pixels of two preprocessings."""
        for index, photo in enumerate(photos):
            error = (
                0.0
                if own == other
                else relative_distance(own.to_float(photo), other.to_float(photo))
            )
            self._add("pixels", _name(photo, index), error, error <= BOUNDS["onnx"])

    def compare_rows(
        self,
        name: str,
        photos: Sequence[ImageLike],
        results: Tensor,
        wanted: Tensor,
        images: Tensor,
    ) -> None:
        """Compare one output of a batch, photo by photo."""
        start = len(self.rows.get(name, []))
        for index, photo in enumerate(photos):
            result, row = results[index], wanted[index]
            error = relative_distance(result, row)
            is_equal = error <= self.bound
            if self.precision in COSINES:
                is_equal = math.isfinite(error) and self._is_similar(name, result, row)
            elif not is_equal and isinstance(self.model, ViT):
                one = slice(index, index + 1)
                self.exact = self.exact or copy.deepcopy(self.model).double()
                rounding = measure_rounding(
                    self.exact,
                    lambda model, x: _list_calls(model)[name](x),
                    images[one],
                    wanted[one],
                )
                is_equal = error <= ROUNDING_SHARE * rounding
            self._add(name, _name(photo, start + index), error, is_equal)

    def _is_similar(self, name: str, result: Tensor, row: Tensor) -> bool:
        """Return True if the label is the same or in doubt, or the vectors are near."""
        if name == "logits" and len(row) > 1 and self.task != "regression":
            best = logits_to_scores(row[None], self.task)[0].topk(2)
            is_clear = float(best.values[0] - best.values[1]) >= MARGIN
            return not is_clear or int(result.argmax()) == int(best.indices[0])
        cosine = F.cosine_similarity(result.flatten().double(), row.flatten().double(), dim=0)
        return float(cosine) >= COSINES[self.precision]

    def _add(self, name: str, photo: str, error: float, is_equal: bool) -> None:
        """Record the error of an output on a photo."""
        self.rows.setdefault(name, []).append((f"{name} of {photo}", error, is_equal))

    def list_errors(self) -> Iterator[tuple[str, float]]:
        """Yield the name and the error of each output and photo."""
        for rows in self.rows.values():
            yield from ((name, error) for name, error, _ in rows)

    def first_difference(self) -> str | None:
        """Return the first output and photo that differ; None where all are equal."""
        for output, rows in self.rows.items():
            share = LABELS.get(self.precision, 1.0) if output == "logits" else 1.0
            different = [name for name, _, is_equal in rows if not is_equal]
            if len(different) > (1 - share) * len(rows):
                return different[0]
        return None


def _name(photo: ImageLike, index: int) -> str:
    """Name a photo for the verdict."""
    return os.fspath(photo) if isinstance(photo, str | os.PathLike) else f"photo {index}"
