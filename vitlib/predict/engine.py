"""InferenceEngine: an optimized model as it is now, image by image and batch by batch.

What Predictor computes with, and what a server or a batch job takes in its place, which make their
batches themselves: images are read by any thread, stacked, and answered.

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitlib.checkpoint.layouts.problems import refuse_not_finite
from vitlib.checkpoint.reconcile import reconcile
from vitlib.config import ViTConfig
from vitlib.errors import ConfigError
from vitlib.fast import FastViT
from vitlib.fast.swap import as_they_are, meaning
from vitlib.image.decode import ImageLike
from vitlib.image.depth import Once
from vitlib.image.processor import ImageProcessor
from vitlib.scores import Task, logits_to_scores
from vitlib.system.torch_state import own_settings
from vitlib.vit import ViT

if TYPE_CHECKING:
    from vitlib.predict.calibration import Calibration


@dataclass(frozen=True)
class InferenceEngine:
    """A model that runs, its preprocessing, and how its logits become scores."""

    model: ViT | FastViT
    image_processor: ImageProcessor
    task: Task
    calibration: Calibration | None = None
    warn: Once = field(default_factory=Once)  # of the first picture that is probably misread

    @property
    def thresholds(self) -> npt.NDArray[np.float64] | None:
        """The lowest score that makes a label of each class, (C,); None: nothing says it."""
        tuned = None if self.calibration is None else self.calibration.thresholds
        return None if tuned is None else np.array(tuned)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        fast = self.model
        return fast.device if isinstance(fast, FastViT) else next(fast.parameters()).device

    def preprocess(self, image: ImageLike) -> Tensor:
        """One image -> (C, H, W), what scores() and vectors() take: levels (uint8) where the model
        does the rest, else normalised pixels. On the CPU, by any thread. Raises ImageError."""
        return self.preprocessor()(image)

    def preprocessor(self) -> Callable[[ImageLike], Tensor]:
        """What preprocess() does, without the model: for other processes."""
        fast, rule = self.model, self.image_processor
        takes_levels = (
            isinstance(fast, FastViT)
            and fast.on_levels is not None
            and meaning(rule) == meaning(fast.image_processor)  # what was folded into its weights
        )
        return partial(rule.ready if takes_levels else rule.pixels, warn=self.warn)

    def scores(self, images: Tensor) -> Tensor:
        """(B, C, H, W) of preprocess() -> (B, num_classes) float32, on the CPU: 0..1, calibrated if
        there is a calibration; of a regression the numbers themselves."""
        return self._scores(self._rows("forward", images))

    def vectors(self, images: Tensor) -> Tensor:
        """(B, C, H, W) of preprocess() -> what the head reads, (B, D) float32 on the CPU."""
        return self._rows("embed", images).cpu()

    def scores_and_vectors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What scores() and vectors() give, in one pass where one head reads the vectors."""
        fast = self.model
        trunk = fast.trunk if isinstance(fast, FastViT) else fast
        if trunk.head_dist is not None:  # which reads another token
            return self.scores(images), self.vectors(images)
        vectors = self._rows("embed", images)
        with torch.inference_mode(), own_settings():
            takes = fast.takes if isinstance(fast, FastViT) else next(trunk.parameters()).dtype
            logits = trunk.head(vectors.to(takes)).float()
        return self._scores(logits), vectors.cpu()

    def _scores(self, logits: Tensor) -> Tensor:
        scores = logits_to_scores(logits, self.task).cpu()
        if self.calibration is None:
            return scores
        return torch.from_numpy(self.calibration.apply(scores.numpy()))

    def _rows(self, what: str, images: Tensor) -> Tensor:
        fast = self.model
        with torch.inference_mode(), own_settings():
            if isinstance(fast, FastViT):
                images = fast.upload(images)
            if images.dtype == torch.uint8:
                assert isinstance(fast, FastViT)
                rows = (fast.forward_levels if what == "forward" else fast.embed_levels)(images)
            else:
                if not isinstance(fast, FastViT):  # which takes them from anywhere
                    images = images.to(self.device)
                rows = fast(images) if what == "forward" else fast.embed(images)
            return rows.float()


def current_config(model: ViT | FastViT) -> ViTConfig:
    """What a model is now, parts put in by hand too. Raises ConfigError where it is no ViT."""
    if isinstance(model, FastViT):
        return model.config
    if not isinstance(model, ViT):
        raise ConfigError(f"a {type(model).__name__} is not a ViT: give what vitlib.load gave")
    return reconcile(model)


def refuse_unsound(model: ViT | FastViT, ask: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return what `ask` gives, unless no finite answer can come of the model's weights.

    Args:
        model: What `ask` computes with, or what that was made of.
        ask: (B, C, H, W) -> (B, D).
        images: (B, C, H, W).

    Returns:
        (B, D); a row can still be not finite, because of its image alone.

    Raises:
        CheckpointError: Weights are not finite.
    """
    rows = ask(images)
    if not bool(rows.isfinite().all()):  # testing the weights each time would cost a small batch
        refuse_not_finite(model.state_dict().items())
    return rows


class Made(NamedTuple):
    """An optimized copy, and what it was made of."""

    copy: ViT | FastViT
    model: ViT
    state: object  # of the model: see state_of
    settings: Hashable
    by_photos: bool  # whether photos are needed to make it again


class CurrentCopy:
    """The optimized copy of a model, for any number of threads; it can be copied and pickled."""

    def __init__(self) -> None:
        self.made: Made | None = None
        self.lock = threading.Lock()

    def of(
        self, model: ViT, settings: Hashable, make: Callable[[], ViT | FastViT], by_photos: bool
    ) -> ViT | FastViT:
        """Return the copy of the model as it is now.

        Args:
            model: what is copied.
            settings: what else decides what the copy is.
            make: makes the copy.
            by_photos: whether it needs photos for that.

        Returns:
            The copy: the same one until the model or the settings change.
        """
        with self.lock:
            state, last = state_of(model), self.made
            if last is None or last.state != state or last.settings != settings:
                last = self.made = Made(make(), model, state, settings, by_photos)
            return last.copy

    def __getstate__(self) -> dict[str, Any]:
        """A copy that was made by photos goes along; any other is made again where it arrives, from
        the model, for the machine there: then the weights are written once."""
        if self.made is None or not self.made.by_photos:
            return {"sent": None}
        made = self.made
        is_current = made.state == state_of(made.model)
        return {"sent": (made.copy, made.model, made.settings) if is_current else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The state names tensors of this process: it is taken anew."""
        self.__init__()  # type: ignore[misc]
        if state["sent"] is not None:
            copy, model, settings = state["sent"]
            self.made = Made(copy, model, state_of(model), settings, True)


def state_of(model: ViT) -> object:
    """What an optimized copy is made of: another value after a change of weights or parts."""
    weights = tuple(
        (id(t), None if t.is_inference() else t._version)
        for t in (*model.parameters(), *model.buffers())
    )
    return weights, tuple(map(id, model.modules())), tuple(as_they_are(model)), model.config
