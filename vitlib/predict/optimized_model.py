"""The model under a Predictor: how it is loaded, optimized, and optimized again.

A user may change weights or modules of a model after its copy was made. The cache compares a
cheap fingerprint of the model at each use, and optimizes again where it differs.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vitlib.checkpoint.reconcile import reconcile
from vitlib.config import ViTConfig
from vitlib.errors import ConfigError
from vitlib.fast import FastViT, optimize
from vitlib.fast.module_swap import unoptimized_modules
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.source.locate import Source
from vitlib.vit import ViT

if TYPE_CHECKING:
    from vitlib.fast.auto_precision import AutoPrecision
    from vitlib.predict.predictor import Predictor

logger = logging.getLogger("vitlib")


def load_optimized(
    source: str | os.PathLike[str], image_processor: ImageProcessor | None
) -> tuple[ViT | FastViT, ImageProcessor] | None:
    """Load a folder that FastViT.save wrote.

    Args:
        source: Any source of a model.
        image_processor: The preprocessing; None takes that in the folder.

    Returns:
        The optimized model and its preprocessing; None for another source.

    Raises:
        ConfigError: There is no preprocessing.
    """
    from vitlib.fast import deserialize  # few programs open a saved model

    if not deserialize.is_optimized_model(source):
        return None
    model = deserialize.load(source)
    processor = image_processor or model.image_processor
    if processor is None:
        raise ConfigError(f"{os.fspath(source)!r} has no preprocessing: give image_processor=")
    return model, processor


def load_with_processor(
    load_model: Callable[..., ViT],
    open_source: Callable[[], Source],
    image_size: int | tuple[int, int] | Literal["keep"] | None,
) -> tuple[ViT | FastViT, ImageProcessor]:
    """Load a checkpoint and its preprocessing.

    Args:
        load_model: vitlib.load with all arguments but image_size.
        open_source: Opens the checkpoint's files.
        image_size: Pixels, one side or (height, width); "keep" takes each image in its own shape.

    Returns:
        The model and its preprocessing.

    Raises:
        VitlibError: As in vitlib.load, or the preprocessing cannot be read.
    """
    model = load_model(image_size=None if image_size == "keep" else image_size)
    processor = model.image_processor
    if processor is None:  # load() only logs why; reading it again raises the reason
        processor = ImageProcessor.from_source(open_source())
    if image_size == "keep":
        processor = processor.with_image_size("keep", model.config.patch_size)
    return model, processor


def describe_predictor(predictor: Predictor) -> str:
    """Describe a predictor in a few lines: model, labels and preprocessing.

    Args:
        predictor: The predictor.

    Returns:
        The text of its repr.
    """
    model, labels = predictor.model, predictor.labels
    cfg = model.config
    size, patch = ("x".join(map(str, pair)) for pair in (cfg.image_size, cfg.patch_size))
    shown = ", ".join(map(repr, labels[:3])) + (", ..." if len(labels) > 3 else "")
    precision = predictor.precision or getattr(model, "precision", None) or "of the weights"
    return (
        f"Predictor({predictor.source!r}\n"
        f"  model: {cfg.family}, {cfg.depth} blocks of width {cfg.embed_dim}, patches of {patch}, "
        f"images of {size}\n"
        f"  runs: on {model.device}, weights {str(model.dtype).removeprefix('torch.')}, "
        f"precision {precision}\n"
        f"  task: {predictor.task}, {model.num_classes} classes ({shown})\n"
        f"  preprocessing: {predictor.image_processor.describe()}\n"
        f"  calibration: {'none' if predictor.calibration is None else predictor.calibration})"
    )


def current_config(model: ViT | FastViT) -> ViTConfig:
    """Return the config of a model as it is now, replaced modules included.

    Args:
        model: The model; its modules may have been replaced after loading.

    Returns:
        The config that describes the modules.

    Raises:
        ConfigError: The object is not a ViT.
    """
    if isinstance(model, FastViT):
        return model.config
    if not isinstance(model, ViT):
        raise ConfigError(
            f"model: expected a ViT from vitlib.load or vitlib.optimize, got a "
            f"{type(model).__name__}: give what vitlib.load returns"
        )
    return reconcile(model)


def optimize_model(
    model: ViT,
    precision: AutoPrecision | None,
    image_processor: ImageProcessor,
    calibrate: Sequence[ImageLike] | None,
) -> tuple[ViT | FastViT, str]:
    """Optimize a model for inference on images of a given preprocessing.

    Args:
        model: The model; set to eval mode.
        precision: The precision; None takes that of the weights, "auto" selects by `calibrate`.
        image_processor: The preprocessing whose scale and shift the patch projection absorbs.
        calibrate: Images for "int8" and "auto".

    Returns:
        The optimized model, and one line that says which precision was selected and why; "" where
        there is nothing to say.

    Raises:
        ConfigError: The precision is not available, or needs images.
    """
    from vitlib.fast.auto_precision import choose_precision, weight_precision

    model.eval()
    original = model.image_processor
    # optimize() folds the preprocessing of the model itself into the patch projection.
    model.image_processor = image_processor
    try:
        if precision == "auto":
            fast, note = choose_precision(model, calibrate)
            logger.info("%s", note)
            return fast, note
        note = ""
        if precision is None:
            precision, note = weight_precision(next(model.parameters()))
        return optimize(model, precision, calibrate=calibrate), note
    finally:
        model.image_processor = original


class CacheEntry(NamedTuple):
    """An optimized copy, and what it was made from.

    Attributes:
        copy: The optimized model.
        model: The model that was optimized.
        fingerprint: model_fingerprint of the model at that time.
        settings: Precision and preprocessing of the copy.
        needs_images: True if making the copy needs the user's calibration images.
    """

    copy: ViT | FastViT
    model: ViT
    fingerprint: object
    settings: Hashable
    needs_images: bool


class OptimizedModelCache:
    """Cache of one optimized copy, for any number of threads; it can be copied and pickled."""

    def __init__(self) -> None:
        """Make an empty cache."""
        self.entry: CacheEntry | None = None
        # One thread optimizes; the others wait for the same copy instead of making their own.
        self.lock = threading.Lock()

    def get(
        self,
        model: ViT,
        settings: Hashable,
        make: Callable[[], ViT | FastViT],
        needs_images: bool,
    ) -> ViT | FastViT:
        """Return the optimized copy of the model as it is now.

        Args:
            model: The model that is optimized.
            settings: Everything besides the model that the copy depends on.
            make: Makes the copy.
            needs_images: True if `make` needs the user's calibration images.

        Returns:
            The same copy until the model or the settings change.
        """
        with self.lock:
            fingerprint, entry = model_fingerprint(model), self.entry
            if entry is None or (entry.fingerprint, entry.settings) != (fingerprint, settings):
                entry = CacheEntry(make(), model, fingerprint, settings, needs_images)
                self.entry = entry
            return entry.copy

    def __getstate__(self) -> dict[str, Any]:
        """Keep the copy only if it cannot be made again without images.

        Any other copy is made again where the state arrives, for the machine there. The weights
        are then written once, with the model.
        """
        entry = self.entry
        if entry is None or not entry.needs_images:
            return {"sent": None}
        is_current = entry.fingerprint == model_fingerprint(entry.model)
        return {"sent": (entry.copy, entry.model, entry.settings) if is_current else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the copy, with a new fingerprint: ids of tensors differ in each process."""
        self.entry = None
        self.lock = threading.Lock()
        if state["sent"] is not None:
            copy, model, settings = state["sent"]
            self.entry = CacheEntry(copy, model, model_fingerprint(model), settings, True)


def model_fingerprint(model: ViT) -> object:
    """Return a value that differs after a change of weights, modules or config.

    Args:
        model: The model.

    Returns:
        A value to compare within this process. Reading weights is avoided: torch counts in-place
        changes of a tensor in `_version`; inference tensors have none.
    """
    weights = tuple(
        (id(t), None if t.is_inference() else t._version)
        for t in (*model.parameters(), *model.buffers())
    )
    return weights, tuple(map(id, model.modules())), tuple(unoptimized_modules(model)), model.config
