"""Predictor: images in, labels, embeddings and attention out; batches, decoding threads, progress.

How data flows: threads turn images into levels or pixels; the caller's thread takes them in order,
stacks those of one size into batches and runs the optimized model (fast/). On a GPU the next batch
is decoded meanwhile; on a CPU it waits, as a model whose cores are taken waits for the slowest.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitlib.checkpoint.adapt import BandMap
from vitlib.checkpoint.save import save
from vitlib.errors import ConfigError
from vitlib.fast import FastViT, optimize
from vitlib.fast.read_folder import holds_one
from vitlib.fast.read_folder import load as load_fast
from vitlib.image.decode import ImageLike
from vitlib.image.depth import Once
from vitlib.image.prefetch import Images, OnError, answers
from vitlib.image.processor import ImageProcessor
from vitlib.predict.engine import CurrentCopy, InferenceEngine, current_config, refuse_unsound
from vitlib.scores import TOP_K, Task, check_choice, labels_of, predict_labels, task_of
from vitlib.source.locate import Source
from vitlib.system.torch_state import own_settings
from vitlib.vit import ViT
from vitlib.weights import load

if TYPE_CHECKING:
    from vitlib.fast.auto_precision import AutoPrecision
    from vitlib.predict.calibration import Calibration

logger = logging.getLogger("vitlib")


class Prediction(NamedTuple):
    """One label of one image; of a regression, one output and its number."""

    label: str
    score: float  # 0..1; of a regression the number itself
    index: int  # type: ignore[assignment]  # of the class; hides tuple.index, which none needs


class AttentionMaps(NamedTuple):
    """Where one image's tokens look."""

    probabilities: npt.NDArray[np.float32]  # (L, H, T, T), or (L, H, P, T) with rows="prefix"
    grid: tuple[int, int]  # of the patches, which are the last h * w of T, by row


class Predictor:
    """A model with its preprocessing, labels and task; what it runs is an optimized copy.

    The copy is made when it is first needed, and again after the model was changed. `precision` is
    the requested one; `precision_note` says what "auto" selects and why.
    `source` is what it was loaded from, "" where it was made of a model. `calibration` is used by
    every score: None gives the model's own.
    """

    def __init__(
        self,
        model: ViT | FastViT,
        image_processor: ImageProcessor | None = None,
        *,
        precision: AutoPrecision | None = None,
        calibrate: Sequence[ImageLike] | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """image_processor: None takes the model's own. precision, calibrate: as in load(). Raises
        ConfigError where these do not fit."""
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
        if isinstance(model, FastViT) and precision not in (None, model.precision):
            raise ConfigError(
                f"precision={precision!r}: this model was optimized for {model.precision}; load "
                "the checkpoint it was made from"
            )
        self.model = model.eval()
        self.image_processor = processor
        self.precision, self.calibrate = precision, calibrate
        self.calibration = calibration
        self.precision_note = ""
        self.source = ""
        self._copy = CurrentCopy()

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        image_processor: ImageProcessor | None = None,
        layout: str | None = None,
        profile: str | None = None,
        prefix: str | None = None,
        architecture: str | None = None,
        num_heads: int | None = None,
        activation: str | None = None,
        pool: str | None = None,
        revision: str | None = None,
        num_classes: int | None = None,
        image_size: int | tuple[int, int] | Literal["keep"] | None = None,
        in_channels: int | None = None,
        band_map: BandMap | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        precision: AutoPrecision | None = None,
        calibrate: Sequence[ImageLike] | None = None,
        calibrated: bool = True,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Predictor:
        """A checkpoint with its preprocessing: the arguments and errors are those of vitlib.load.

        source: also a folder that FastViT.save wrote, whose precision is its own.
        image_size: also "keep": each photo in its own shape, see ImageProcessor.with_image_size.
        image_processor: instead of the checkpoint's. device: None takes CUDA where there is one.
        precision: "fp32", "bf16", "int8" or "fp8" as in vitlib.optimize; None: the checkpoint's
            own; "auto": the fastest that gives the labels of float32 on the photos to calibrate
            with (without a head: vectors within a cosine of 0.999).
        calibrate: some of your photos (32 or more), for "int8" and "auto".
        calibrated: use the calibration.json beside the weights, if there is one (`vitlib evaluate
            --tune` writes it): a temperature, and thresholds for classify(). False: leave it.
        """
        if holds_one(source):
            fast = load_fast(source)
            rule = image_processor or fast.image_processor
            if rule is None:
                raise ConfigError(f"{os.fspath(source)!r} has no preprocessing: image_processor=")
            return cls(fast, rule, precision=precision)._from(source, calibrated, {})
        where = {"revision": revision, "token": token, "cache_dir": cache_dir}
        model = load(
            source,
            layout=layout,
            profile=profile,
            prefix=prefix,
            architecture=architecture,
            num_heads=num_heads,
            activation=activation,
            pool=pool,
            num_classes=num_classes,
            image_size=None if image_size == "keep" else image_size,
            in_channels=in_channels,
            band_map=band_map,
            image_processor=image_processor,
            dtype=dtype,
            device=device or ("cuda" if torch.cuda.is_available() else None),
            local_files_only=local_files_only,
            **where,  # type: ignore[arg-type]
        )
        processor = model.image_processor
        if not isinstance(processor, ImageProcessor):  # then this says what is wrong with it
            processor = ImageProcessor.load(
                source,
                local_files_only=local_files_only,
                **where,  # type: ignore[arg-type]
            )
        if image_size == "keep":
            processor = processor.with_image_size("keep", model.config.patch_size)
        made = cls(model, processor, precision=precision, calibrate=calibrate)
        where |= {"local_files_only": local_files_only}
        return made._from(source, calibrated, where, replaced=num_classes is not None)

    def _from(
        self,
        source: str | os.PathLike[str],
        calibrated: bool,
        where: dict[str, Any],
        *,
        replaced: bool = False,
    ) -> Predictor:
        """It, with the calibration of its source. replaced: its head may be a new one."""
        self.source = os.fspath(source)
        found = None
        if calibrated and self.model.num_classes:
            from vitlib.predict.calibration import Calibration  # which few models have

            found = Calibration.read(Source(source, **where))
        if found is not None and replaced and found.labels != self.labels:
            logger.warning("%s: calibration.json is not used: the head is a new one", source)
        elif found is not None:
            found.check(self.labels, self.task)
            logger.info("%s: scores are calibrated: %s", source, found.describe())
            self.calibration = found
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """One name a class; LABEL_0 and so on where the checkpoint has none."""
        return labels_of(current_config(self.model))

    @property
    def task(self) -> Task:
        """What the head answers: one of several classes, each class by itself, or numbers."""
        return task_of(current_config(self.model))

    @property
    def multi_label(self) -> bool:
        """Whether each class is scored by itself (sigmoid), rather than against the others."""
        return self.task == "multi_label_classification"

    def classify(
        self,
        images: Images,
        *,
        top_k: int | None = None,
        threshold: float | None = None,
        batch_size: int = 16,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> list[list[Prediction] | None]:
        """The best `top_k` (5) labels of each image, best first; of those, the ones at `threshold`
        or over (None: at their thresholds in the calibration, if it has any).

        Of a regression every output in its order, the number itself as its score: top_k and
        threshold are refused.

        A single image gives a list of one. A bad image raises ImageError, which names it and its
        index; with on_error="none", or a function that is told (index, error), it leaves None in
        its place. Raises ConfigError where the model has no head.
        """
        check_choice(self.task, top_k=top_k, threshold=threshold)
        ready, labels = self._with_head(), self.labels
        limits = ready.thresholds if threshold is None else threshold
        found: list[list[Prediction] | None] = []
        rows = self._answers(images, ready, ready.scores, batch_size, on_error, progress)
        for scores in rows:
            if scores is None:
                found.append(None)
                continue
            pairs = predict_labels(scores.numpy(), ready.task, top_k or TOP_K, limits)
            found.append([Prediction(labels[index], score, index) for index, score in pairs])
        return found

    def probabilities(
        self,
        images: Images,
        *,
        batch_size: int = 16,
        on_error: OnError = "raise",
        progress: bool = False,
        calibrated: bool = True,
    ) -> npt.NDArray[np.float32]:
        """The score of every class, (N, num_classes) float32 in 0..1: softmax, or sigmoid if
        multi_label, at the calibration's temperature. Of a regression the numbers themselves.

        calibrated: False gives what the model says without its calibration. Errors as in classify;
        the row of a bad image that does not raise is NaN.
        """
        ready = self._with_head(calibrated=calibrated)
        rows = self._answers(images, ready, ready.scores, batch_size, on_error, progress)
        return _stack(rows, self.model.num_classes)

    def embed(
        self,
        images: Images,
        *,
        batch_size: int = 16,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> npt.NDArray[np.float32]:
        """The vector that the head reads, not normalised, (N, D) float32.

        D is model.num_features: 2D for cls+mean, the projection for CLIP.
        Errors as in classify; the row of a bad image that does not raise is NaN.
        """
        ready = self.engine(calibrated=False)
        rows = self._answers(images, ready, ready.vectors, batch_size, on_error, progress)
        return _stack(rows, self.model.num_features)

    def attention(
        self,
        images: Images,
        layers: int | Sequence[int] | None = None,
        rows: Literal["all", "prefix"] = "all",
        *,
        batch_size: int = 1,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> list[AttentionMaps | None]:
        """How much each token of each image draws from each: see ViT.attention, whose arguments and
        errors these are; by the model itself, whatever the precision.

        Errors with images as in classify. explain/ makes maps of it, plots.py pictures. Raises
        ConfigError for a model that was loaded optimized.
        """
        model = self.model
        if isinstance(model, FastViT):
            raise ConfigError(
                "an optimized model keeps no attention to look at: load the checkpoint it was made "
                "from"
            )
        if isinstance(layers, Sequence) and not len(layers):
            raise ConfigError("layers=[]: expected one block or more")
        model.eval()
        device = next(model.parameters()).device

        def ask(pixels: Tensor) -> list[AttentionMaps]:
            with torch.inference_mode(), own_settings():
                found = torch.stack(model.attention(pixels.to(device), layers, rows), dim=1)
            return [AttentionMaps(one, model.patch_grid(pixels)) for one in found.cpu().numpy()]

        read = partial(self.image_processor.pixels, warn=Once())
        return list(answers(images, read, ask, device, batch_size, on_error, progress))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write weights, labels, task, preprocessing and calibration: see vitlib.save, or
        FastViT.save."""
        if isinstance(self.model, FastViT):
            self.model.save(folder, image_processor=self.image_processor)
        else:
            save(self.model, folder, image_processor=self.image_processor)
        if self.calibration is not None:
            self.calibration.store(folder)

    def fast(self) -> ViT | FastViT:
        """What runs: the model optimized, made now where it is not there or the model changed."""
        model = self.model
        if isinstance(model, FastViT):
            return model
        current_config(model)
        settings = self.precision, self.image_processor
        by_photos = self.calibrate is not None
        return self._copy.of(model, settings, lambda: self._optimized(model), by_photos)

    def engine(self, *, calibrated: bool = True) -> InferenceEngine:
        """What runs, for one who makes the batches himself: see engine.py.

        Raises ConfigError where the calibration is for another model than this one is now.
        """
        calibration = self.calibration if calibrated else None
        if calibration is not None:
            calibration.check(self.labels, self.task)
        return InferenceEngine(self.fast(), self.image_processor, self.task, calibration)

    def _answers(
        self,
        images: Images,
        ready: InferenceEngine,
        ask: Callable[[Tensor], Tensor],
        batch_size: int,
        on_error: OnError,
        progress: bool,
    ) -> Iterator[Tensor | None]:
        ask = partial(refuse_unsound, self.model, ask)
        return answers(images, ready.preprocess, ask, ready.device, batch_size, on_error, progress)

    def _with_head(self, *, calibrated: bool = True) -> InferenceEngine:
        """The same, of a model that scores. Raises ConfigError where it has no head."""
        if not self.model.num_classes:
            raise ConfigError(
                "this model has no head to classify with: use embed(), or num_classes="
            )
        return self.engine(calibrated=calibrated)

    def _optimized(self, model: ViT) -> ViT | FastViT:
        from vitlib.fast.auto_precision import choose, precision_of

        model.eval()
        kept = model.image_processor
        model.image_processor = self.image_processor  # whose levels it is to take
        try:
            if self.precision == "auto":
                fast, self.precision_note = choose(model, self.calibrate)
                logger.info("%s", self.precision_note)
                return fast
            precision = self.precision
            if precision is None:
                precision, self.precision_note = precision_of(next(model.parameters()))
            return optimize(model, precision, calibrate=self.calibrate)
        finally:
            model.image_processor = kept


def _stack(rows: Iterable[Tensor | None], width: int) -> npt.NDArray[np.float32]:
    """Rows, or NaN for those that are None -> (N, width) float32."""
    nan = np.full(width, np.nan, np.float32)
    arrays = [nan if row is None else row.numpy() for row in rows]
    return np.stack(arrays) if arrays else np.empty((0, width), np.float32)
