"""Predictor: a model with its preprocessing; labels, embeddings and attention of images.

Threads decode images into uint8 or normalised pixels. The caller's thread takes them in order,
stacks those of one size into batches and runs the optimized model (fast/). On a GPU the next batch
is decoded meanwhile. On a CPU decoding and inference do not overlap: they share the cores, each of
which computes its own part of a batch.

Shapes: N images, B images of a batch, C channels, H W pixels, D embedding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from vitlib.checkpoint.adapt import BandMap
from vitlib.checkpoint.families import Profile
from vitlib.checkpoint.layouts.layout import LayoutName
from vitlib.checkpoint.save import save
from vitlib.config import Activation, Pool
from vitlib.fast import FastViT
from vitlib.image.decode import ImageLike
from vitlib.image.prefetch import Images, OnError, map_batches
from vitlib.image.processor import ImageProcessor
from vitlib.predict import optimized_model
from vitlib.predict.engine import InferenceEngine, check_preprocessing, run_finite, stack_rows
from vitlib.scores import Prediction, Task, check_choice, labels_of, task_of
from vitlib.source.locate import Source
from vitlib.system.parallel import ParallelCompute
from vitlib.vit import ViT
from vitlib.weights import load

if TYPE_CHECKING:
    from vitlib.fast.auto_precision import AutoPrecision
    from vitlib.predict.attention import AttentionMaps
    from vitlib.predict.backends import Model
    from vitlib.predict.calibration import Calibration


class Predictor:
    """A model with its preprocessing, labels and task.

    It runs an optimized copy of the model. The copy is made at the first use, and again after a
    change of the model, the precision or the preprocessing.

    Attributes:
        model: The model, in eval mode: a ViT, an optimized one, or an ExportedModel of a file.
        image_processor: The preprocessing.
        precision: The requested precision; None is that of the checkpoint.
        precision_note: The precision that "auto" selected and why, or a faster one to try; "".
        calibrate: Images for precision "int8" and "auto".
        compile: True compiles the optimized copy, as compile= of vitlib.optimize.
        calibration: Temperature and thresholds of every score; None leaves scores unchanged.
        source: The path or hub id that the model was loaded from; "" for a model in memory.
    """

    def __init__(
        self,
        model: Model,
        image_processor: ImageProcessor | None = None,
        *,
        precision: AutoPrecision | None = None,
        calibrate: Sequence[ImageLike] | None = None,
        calibration: Calibration | None = None,
        compile: bool = False,  # noqa: A002
    ) -> None:
        """Make a predictor of a model in memory.

        The arguments are the attributes of these names; image_processor None is the model's own.

        Raises:
            ConfigError: Model, preprocessing and precision do not fit each other.
        """
        self.image_processor = check_preprocessing(model, image_processor)
        optimized_model.check_precision(model, precision)
        self.model: Model = optimized_model.prepare(model, compile)
        self.precision, self.calibrate, self.compile = precision, calibrate, compile
        self.calibration = calibration
        self.precision_note = self.source = ""
        self._optimized_cache = optimized_model.OptimizedModelCache()

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        image_processor: ImageProcessor | None = None,
        labels: Sequence[str] | None = None,
        layout: LayoutName | None = None,
        profile: Profile | None = None,
        prefix: str | None = None,
        architecture: str | None = None,
        num_heads: int | None = None,
        activation: Activation | None = None,
        pool: Pool | None = None,
        revision: str | None = None,
        num_classes: int | None = None,
        image_size: int | tuple[int, int] | Literal["keep"] | None = None,
        in_channels: int | None = None,
        band_map: BandMap | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        precision: AutoPrecision | None = None,
        calibrate: Sequence[ImageLike] | None = None,
        compile: bool = False,  # noqa: A002
        calibrated: bool = True,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Predictor:
        """Load a checkpoint with its preprocessing, labels and calibration; see vitlib.load.

        Args:
            source: A hub id, a folder, one weights file, a folder that FastViT.save wrote, or an
                exported file (.onnx, .pt2, .xml).
            image_processor: The preprocessing; None reads the checkpoint's.
            labels: One name for each class, for an exported file that states none.
            layout: The layout of the file, where its names fit two layouts.
            profile: The library whose numerics and preprocessing to use; None is the file's own.
            prefix: The prefix of the network's tensor names, where the file holds several.
            architecture: The model's name in timm or open_clip, or a published id, as in load().
            num_heads: Attention heads, where no file has the number.
            activation: The MLP's activation, where no file has it.
            pool: The pooling, where no file has it.
            revision: Branch, tag or commit on the hub.
            num_classes: Another number of classes than the checkpoint's: a new, untrained head.
            image_size: Pixels, one side or (height, width); "keep" takes each image in its own
                shape, see ImageProcessor.with_image_size.
            in_channels: Another number of channels than the checkpoint's.
            band_map: For each new channel, the channel whose kernel it takes.
            dtype: The dtype of the weights, also as text; None keeps the file's.
            device: The device; None takes CUDA where there is a GPU.
            precision: "fp32", "bf16", "fp16", "int8" or "fp8" as in vitlib.optimize; None takes
                that of the checkpoint. "auto" takes the fastest that gives float32's labels on
                `calibrate` (without a head: vectors within a cosine of 0.999).
            calibrate: Some of your images (32 or more), for "int8" and "auto".
            compile: True compiles the model, as compile= of vitlib.optimize.
            calibrated: True applies the calibration.json beside the weights, where there is one.
            token: Access token of the hub.
            cache_dir: Cache folder of the hub.
            local_files_only: True reads nothing from the network.

        Returns:
            The predictor.

        Raises:
            VitlibError: As in vitlib.load, or calibration.json is for another model.
        """
        from vitlib.predict import open_model  # a model in memory needs none

        hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        hub["local_files_only"] = local_files_only
        reading: dict[str, Any] = {
            "layout": layout, "profile": profile, "prefix": prefix, "architecture": architecture,
            "num_heads": num_heads, "activation": activation, "pool": pool, "dtype": dtype,
            "num_classes": num_classes, "in_channels": in_channels, "band_map": band_map,
        }  # fmt: skip
        open_source = partial(Source, source, **hub)
        model, processor = (
            open_model.open_exported(source, image_processor, labels, image_size, device, reading)
            or open_model.load_optimized(source, image_processor)
            or open_model.load_with_processor(
                partial(
                    load, source, **reading, **hub, image_processor=image_processor,
                    device=device or ("cuda" if torch.cuda.is_available() else None),
                ), open_source, image_size,
            )
        )  # fmt: skip
        predictor = cls(model, processor, precision=precision, calibrate=calibrate, compile=compile)
        predictor.source = os.fspath(source)
        if calibrated and model.num_classes:
            from vitlib.predict.calibration import Calibration  # most models have none

            predictor.calibration = Calibration.find(
                open_source(), predictor.labels, predictor.task, is_new_head=num_classes is not None
            )
        return predictor

    @property
    def labels(self) -> tuple[str, ...]:
        """One name for each class; LABEL_0, LABEL_1, ... where the checkpoint has none."""
        return labels_of(optimized_model.current_config(self.model))

    @property
    def task(self) -> Task:
        """The head's task, which is single-label or multi-label classification, or regression."""
        return task_of(optimized_model.current_config(self.model))

    @property
    def multi_label(self) -> bool:
        """True if each class is scored alone (sigmoid), not against the others (softmax)."""
        return self.task == "multi_label_classification"

    __repr__ = optimized_model.describe_predictor

    @overload
    def classify(
        self, images: Images, *, top_k: int | None = ..., threshold: float | None = ...,
        batch_size: int = ..., on_error: Literal["raise"] = ..., progress: bool = ...,
    ) -> list[list[Prediction]]: ...  # fmt: skip
    @overload
    def classify(
        self, images: Images, *, top_k: int | None = ..., threshold: float | None = ...,
        batch_size: int = ..., on_error: OnError, progress: bool = ...,
    ) -> list[list[Prediction] | None]: ...  # fmt: skip
    def classify(
        self,
        images: Images,
        *,
        top_k: int | None = None,
        threshold: float | None = None,
        batch_size: int = 16,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> list[list[Prediction]] | list[list[Prediction] | None]:
        """Predict the labels of images, best first; for a regression, all outputs in their order.

        Args:
            images: One image, or an iterable of images: paths, bytes, PIL images or arrays.
            top_k: The largest number of labels of an image; None is 5.
            threshold: The lowest score of a label, 0..1; None takes the calibration's, if any.
            batch_size: The number of images that are computed together.
            on_error: "raise" raises for an image that cannot be read; "none" gives None in its
                place; a function is called with (index, error), and None is in its place.
            progress: True shows a progress bar.

        Returns:
            A list of predictions for each image, also for a single one.

        Raises:
            ImageError: An image cannot be read; the message names its index and path.
            ConfigError: The model has no head, an argument is out of range, or top_k or threshold
                is used with a regression.
        """
        check_choice(self.task, top_k=top_k, threshold=threshold)
        engine, labels = self._engine_with_head(), self.labels
        rows = self._run(images, engine, engine.scores, batch_size, on_error, progress)
        predict = partial(engine.predict, labels=labels, top_k=top_k, threshold=threshold)
        return [None if scores is None else predict(scores.numpy()) for scores in rows]

    def probabilities(
        self,
        images: Images,
        *,
        batch_size: int = 16,
        on_error: OnError = "raise",
        progress: bool = False,
        calibrated: bool = True,
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Compute the score of every class: softmax, or sigmoid if multi_label.

        Args:
            images: As in classify().
            batch_size: As in classify().
            on_error: As in classify(); the row of an image that cannot be read is NaN.
            progress: As in classify().
            calibrated: False leaves the calibration out.

        Returns:
            (N, num_classes) in 0..1; for a regression its numbers.

        Raises:
            VitlibError: As in classify().
        """
        engine = self._engine_with_head(calibrated=calibrated)
        rows = self._run(images, engine, engine.scores, batch_size, on_error, progress)
        return stack_rows(rows, self.model.num_classes)

    def embed(
        self,
        images: Images,
        *,
        batch_size: int = 16,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Compute the embedding: the vector that the head reads, not normalised.

        Args:
            images: As in classify().
            batch_size: As in classify().
            on_error: As in classify(); the row of an image that cannot be read is NaN.
            progress: As in classify().

        Returns:
            Vectors, (N, D) with D = model.num_features. D is twice embed_dim for pool "cls+mean",
            the width of the projection for CLIP.

        Raises:
            VitlibError: As in classify().
        """
        engine = self.engine(calibrated=False)
        rows = self._run(images, engine, engine.vectors, batch_size, on_error, progress)
        return stack_rows(rows, self.model.num_features)

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
        """Compute attention probabilities with the model itself, whatever the precision.

        explain/ makes maps of them, plots/ draws them.

        Args:
            images: As in classify().
            layers: Indices of blocks, as in ViT.attention; None takes all.
            rows: "all" keeps every query token; "prefix" keeps the prefix tokens only.
            batch_size: As in classify().
            on_error: As in classify().
            progress: As in classify().

        Returns:
            The maps of each image.

        Raises:
            ImageError: As in classify().
            ConfigError: The model was loaded optimized, or an argument is out of range.
        """
        from vitlib.predict.attention import attention_maps

        return attention_maps(
            self.model, self.image_processor, images, layers, rows, batch_size, on_error, progress
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write weights, labels, task, preprocessing and calibration.

        Args:
            folder: The folder to write; see vitlib.save and FastViT.save.
        """
        if isinstance(self.model, ViT):
            save(self.model, folder, image_processor=self.image_processor)
        else:
            self.model.save(folder, image_processor=self.image_processor)
        if self.calibration is not None:
            self.calibration.store(folder)

    def fast(self) -> Model:
        """Return the model that runs: the optimized copy, made where there is none yet.

        Returns:
            The same copy until the model, the precision or the preprocessing changes.
        """
        model = self.model
        if not isinstance(model, ViT):
            return model
        optimized_model.current_config(model)
        settings = self.precision, self.image_processor, self.compile
        make = partial(self._optimize, model)
        return self._optimized_cache.get(model, settings, make, self.calibrate is not None)

    def engine(self, *, calibrated: bool = True) -> InferenceEngine:
        """Return the engine under this predictor, for callers that make batches themselves.

        Args:
            calibrated: False leaves the calibration out.

        Returns:
            The engine for the model as it is now.

        Raises:
            ConfigError: The calibration is for other classes or another task than the model has.
        """
        calibration = self.calibration if calibrated else None
        if calibration is not None:
            calibration.check(self.labels, self.task)
        return InferenceEngine(self.fast(), self.image_processor, self.task, calibration)

    def _engine_with_head(self, *, calibrated: bool = True) -> InferenceEngine:
        """Return the engine; raise ConfigError where the model has no head."""
        optimized_model.check_head(self.model)
        return self.engine(calibrated=calibrated)

    def _run(
        self, images: Images, engine: InferenceEngine, run: Callable[[Tensor], Tensor],
        batch_size: int, on_error: OnError, progress: bool,
    ) -> Iterator[Tensor | None]:  # fmt: skip
        """Yield the row of each image, in order; None for one that cannot be read."""
        read, device = engine.preprocessor(), engine.device
        with ParallelCompute(engine.num_parts) as parallel:
            run = partial(run_finite, self.model, partial(parallel.run, run))
            yield from map_batches(images, read, run, device, batch_size, on_error, progress)

    def _optimize(self, model: ViT) -> ViT | FastViT:
        """Optimize the model, and keep the note about its precision."""
        args = self.precision, self.image_processor, self.calibrate, self.compile
        fast, self.precision_note = optimized_model.optimize_model(model, *args)
        return fast
