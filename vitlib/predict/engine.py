"""Run a model on batches of preprocessed images, and turn its logits into scores.

Predictor computes with this engine. A server or a batch job uses it directly, because it makes its
batches itself. Any thread preprocesses an image, the caller stacks images of one shape, and the
engine returns a row for each.

Shapes: B images, C channels, H W pixels, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vitlib.errors import ConfigError
from vitlib.fast.model import Method
from vitlib.image.decode import ImageLike
from vitlib.image.depth import WarnOnce
from vitlib.image.processor import ImageProcessor
from vitlib.predict.backends import Backend, make_backend
from vitlib.predict.optimized_model import current_config
from vitlib.scores import TOP_K, Prediction, Task, logits_to_scores, predict_labels
from vitlib.system.torch_state import isolate_torch_settings

if TYPE_CHECKING:
    import numpy.typing as npt

    from vitlib.predict.backends import Model
    from vitlib.predict.calibration import Calibration


@dataclass(frozen=True)
class InferenceEngine:
    """A model with its preprocessing and the way from logits to scores.

    Attributes:
        model: The model that runs: optimized where vitlib.optimize can, or an exported file.
        image_processor: The preprocessing of images.
        task: The model's task, which selects softmax or sigmoid.
        calibration: Temperature and thresholds of scores; None leaves scores as they are.
        warn: Warns of the first image whose bit depth is probably misread.
    """

    model: Model
    image_processor: ImageProcessor
    task: Task
    calibration: Calibration | None = None
    warn: WarnOnce = field(default_factory=WarnOnce)

    @property
    def thresholds(self) -> npt.NDArray[np.float64] | None:
        """The calibration's lowest score of a label, for each class (C,); None without one."""
        thresholds = None if self.calibration is None else self.calibration.thresholds
        return None if thresholds is None else np.array(thresholds)

    @property
    def backend(self) -> Backend:
        """The calls that compute, which differ by the kind of the model."""
        return make_backend(self.model)

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.backend.device

    @property
    def num_parts(self) -> int:
        """The threads that compute parts of a batch at once, each on one core; else 1."""
        return torch.get_num_threads() if self.backend.is_divisible else 1

    def preprocess(self, image: ImageLike) -> Tensor:
        """Decode, resize and crop one image; safe in any thread.

        Args:
            image: A path, bytes, PIL image or array.

        Returns:
            (C, H, W) on the CPU: uint8 where the model normalises, else normalised float32.

        Raises:
            ImageError: The image cannot be read.
        """
        return self.preprocessor()(image)

    def preprocessor(self) -> Callable[[ImageLike], Tensor]:
        """Return preprocess() as a function that can be pickled without the model.

        Returns:
            One image -> (C, H, W); see preprocess().
        """
        return partial(self.backend.pixel_reader(self.image_processor), warn=self.warn)

    def scores(self, images: Tensor) -> Tensor:
        """Compute the score of every class.

        Args:
            images: (B, C, H, W) from preprocess().

        Returns:
            (B, num_classes) float32 on the CPU, in 0..1, calibrated where there is a calibration;
            for a regression its numbers.
        """
        return self._to_scores(self._run(self.backend.forward, images))

    def vectors(self, images: Tensor) -> Tensor:
        """Compute the embedding: the vector that the head reads.

        Args:
            images: (B, C, H, W) from preprocess().

        Returns:
            (B, D) float32 on the CPU.
        """
        return self._run(self.backend.embed, images).cpu()

    def compute(self, function: Method, images: Tensor) -> Tensor:
        """Compute a function of the model, such as vectors of several blocks.

        Args:
            function: The function; see fast/model.py.
            images: (B, C, H, W) from preprocess().

        Returns:
            (B, ...) float32 on the CPU.

        Raises:
            ConfigError: The model is an exported file, which has its own outputs alone.
        """
        return self._run(partial(self.backend.compute, function), images).cpu()

    def scores_and_vectors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute scores and embeddings, in one forward pass where the model allows it.

        Args:
            images: (B, C, H, W) from preprocess().

        Returns:
            What scores() and vectors() return.
        """
        with torch.inference_mode(), isolate_torch_settings():
            logits, vectors = self.backend.compute_both(images)
        return self._to_scores(logits.float()), vectors.float().cpu()

    def predict(
        self,
        scores: npt.NDArray[np.float32],
        labels: Sequence[str],
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> list[Prediction]:
        """Choose the labels of one image by its scores.

        Args:
            scores: (num_classes,), a row of scores().
            labels: The name of each class.
            top_k: The largest number of labels; None is 5.
            threshold: The lowest score of a label; None takes the calibration's thresholds.

        Returns:
            The labels, best first; for a regression every output in its order.
        """
        thresholds = self.thresholds if threshold is None else threshold
        pairs = predict_labels(scores, self.task, top_k or TOP_K, thresholds)
        return [Prediction(labels[index], score, index) for index, score in pairs]

    def _to_scores(self, logits: Tensor) -> Tensor:
        """Turn logits into calibrated scores on the CPU."""
        scores = logits_to_scores(logits, self.task).cpu()
        if self.calibration is None:
            return scores
        return torch.from_numpy(self.calibration.apply(scores.numpy()))

    def _run(self, compute: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Run a call of the backend: (B, C, H, W) -> (B, num_classes or D) float32."""
        with torch.inference_mode(), isolate_torch_settings():
            return compute(images).float()


def check_preprocessing(model: Model, image_processor: ImageProcessor | None) -> ImageProcessor:
    """Return the preprocessing of a model, and check that its pixels are the model's.

    Args:
        model: The model.
        image_processor: The preprocessing; None takes the model's own.

    Returns:
        The preprocessing.

    Raises:
        ConfigError: There is no preprocessing, or its channels are not the model's, or its pixels
            not those of an exported file.
    """
    channels = current_config(model).in_channels
    processor = model.image_processor if image_processor is None else image_processor
    if not isinstance(processor, ImageProcessor):
        kind = "none" if processor is None else f"a {type(processor).__name__}"
        raise ConfigError(
            f"image_processor: expected a vitlib.ImageProcessor, got {kind}, and a model that "
            "was not loaded has none: give ImageProcessor(size=..., ...)"
        )
    if processor.in_channels != channels:
        raise ConfigError(
            f"the preprocessing gives {processor.in_channels} channels, the model takes "
            f"{channels}: use Predictor.load(..., in_channels=), or give an ImageProcessor of "
            "as many"
        )
    make_backend(model).pixel_reader(processor)
    return processor


def run_finite(model: Model, run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Run a batch, and refuse weights that are not finite.

    Weights are tested only where a result is not finite: a test each time would cost as much as a
    small batch.

    Args:
        model: The model that `run` computes with, or the one that it was made from.
        run: (B, C, H, W) -> (B, D).
        images: (B, C, H, W).

    Returns:
        (B, D). A row may still not be finite, because of its image alone.

    Raises:
        CheckpointError: Weights are not finite.
    """
    rows = run(images)
    if not bool(rows.isfinite().all()):
        make_backend(model).check_weights()
    return rows


def stack_rows(rows: Iterable[Tensor | None], width: int) -> npt.NDArray[np.float32]:
    """Stack the rows of images, with NaN in place of images that cannot be read.

    Args:
        rows: (width,) each, or None.
        width: The number of values of a row.

    Returns:
        (N, width).
    """
    nan = np.full(width, np.nan, np.float32)
    arrays = [nan if row is None else row.numpy() for row in rows]
    return np.stack(arrays) if arrays else np.empty((0, width), np.float32)
