"""The model under a Predictor: how it is optimized, and optimized again.

A user may change weights or modules of a model after its copy was made. The cache compares a
cheap fingerprint of the model at each use, and optimizes again where it differs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vitlib.checkpoint.reconcile import reconcile
from vitlib.config import ViTConfig
from vitlib.errors import ConfigError
from vitlib.fast import FastViT, optimize
from vitlib.fast.module_swap import unoptimized_modules
from vitlib.image.decode import ImageLike
from vitlib.image.processor import ImageProcessor
from vitlib.vit import ViT

if TYPE_CHECKING:
    from vitlib.fast.auto_precision import AutoPrecision
    from vitlib.predict.backends import Model
    from vitlib.predict.predictor import Predictor

logger = logging.getLogger("vitlib")


def describe_predictor(predictor: Predictor) -> str:
    """Describe a predictor in a few lines: model, labels and preprocessing.

    Args:
        predictor: The predictor.

    Returns:
        The text of its repr.
    """
    model, labels = predictor.model, predictor.labels
    shown = ", ".join(map(repr, labels[:3])) + (", ..." if len(labels) > 3 else "")
    precision = predictor.precision or getattr(model, "precision", None) or "of the weights"
    return (
        f"Predictor({predictor.source!r}\n"
        f"  model: {_describe_model(model)}\n"
        f"  runs: on {model.device}, weights {str(model.dtype).removeprefix('torch.')}, "
        f"precision {precision}\n"
        f"  task: {predictor.task}, {model.num_classes} classes ({shown})\n"
        f"  preprocessing: {predictor.image_processor.describe()}\n"
        f"  calibration: {'none' if predictor.calibration is None else predictor.calibration})"
    )


def _describe_model(model: Model) -> str:
    """Describe family and sizes, or the file."""
    if not isinstance(model, ViT | FastViT):
        return model.describe()
    cfg = model.config
    size, patch = ("x".join(map(str, pair)) for pair in (cfg.image_size, cfg.patch_size))
    return (
        f"{cfg.family}, {cfg.depth} blocks of width {cfg.embed_dim}, patches of {patch}, "
        f"images of {size}"
    )


def current_config(model: Model) -> ViTConfig:
    """Return the config of a model as it is now, replaced modules included.

    Args:
        model: The model; its modules may have been replaced after loading.

    Returns:
        The config that describes the modules.

    Raises:
        ConfigError: The object is not a ViT.
    """
    if isinstance(model, ViT):
        return reconcile(model)
    from vitlib.predict.exported_model import ExportedModel  # few programs run exported files

    if not isinstance(model, FastViT | ExportedModel):
        raise ConfigError(
            f"model: expected a ViT from vitlib.load or vitlib.optimize, got a "
            f"{type(model).__name__}: give what vitlib.load returns"
        )
    return model.config


def check_precision(model: Model, precision: str | None) -> None:
    """Check that a model can run in a precision.

    Args:
        model: The model.
        precision: The precision; None takes that of the weights.

    Raises:
        ConfigError: The model was optimized, or exported, for another one.
    """
    if isinstance(model, ViT) or precision in (None, model.precision):
        return
    own = model.precision
    if isinstance(model, FastViT):
        raise ConfigError(
            f"precision={precision!r}: this model was optimized for {own}; load the checkpoint "
            "it was made from"
        )
    raise ConfigError(
        f"precision={precision!r}: {model.name} computes in {own} precision: leave it out, or "
        "export the checkpoint with --precision"
    )


def prepare(model: Model, compile: bool) -> Model:  # noqa: A002
    """Set a model to eval mode, and compile one that is optimized already.

    Args:
        model: The model.
        compile: True to compile. A ViT is compiled when it is optimized.

    Returns:
        The model of a Predictor.

    Raises:
        ConfigError: The model is to be compiled, and is an exported file or on a GPU.
    """
    if isinstance(model, FastViT) and compile:
        return compile_optimized(model)
    if compile and not isinstance(model, ViT):
        raise ConfigError(
            f"compile=True: {model.name} is an exported file, which its own runtime computes: "
            "leave compile= (--compile) out, or give the checkpoint"
        )
    return model.eval()


def compile_optimized(fast: FastViT, model: ViT | None = None) -> FastViT:
    """Compile a model that is optimized already.

    Args:
        fast: The optimized model.
        model: The model that it was made from, which a GPU needs; None where it is not known.

    Returns:
        The compiled model.

    Raises:
        ConfigError: The device cannot compile, or needs the model.
    """
    from vitlib.fast.compiled import CompiledViT, compile_model  # few programs compile

    if fast.device.type != "cuda":
        return fast if isinstance(fast, CompiledViT) else compile_model(fast)
    if model is None:
        raise ConfigError(
            "compile=True: this model was optimized on a GPU: leave it out, and give compile=True "
            "to vitlib.optimize"
        )
    return optimize(model, fast.precision, compile=True)  # no int8 here, which would need photos


def count_programs(model: object) -> tuple[int, int] | None:
    """Count the compiled programs of a model on a CPU.

    Args:
        model: Any model.

    Returns:
        The programs that are used, as they are faster, and all; None for a model without programs.
    """
    from vitlib.fast.compiled import CompiledViT

    return model.programs.count() if isinstance(model, CompiledViT) else None


def check_head(model: Model) -> None:
    """Check that a model has a head.

    Args:
        model: The model.

    Raises:
        ConfigError: It has none, or an exported file leaves its logits out.
    """
    if model.num_classes:
        return
    if not isinstance(model, ViT | FastViT) and model.info.num_classes:
        model.check_output("logits")
    raise ConfigError(
        "this model has no head to classify with: use embed(), or finetune trains one"
    )


def optimize_model(
    model: ViT,
    precision: AutoPrecision | None,
    image_processor: ImageProcessor,
    calibrate: Sequence[ImageLike] | None,
    compile: bool = False,  # noqa: A002
) -> tuple[ViT | FastViT, str]:
    """Optimize a model for inference on images of a given preprocessing.

    Args:
        model: The model; set to eval mode.
        precision: The precision; None takes that of the weights, "auto" selects by `calibrate`.
        image_processor: The preprocessing whose scale and shift the patch projection absorbs.
        calibrate: Images for "int8" and "auto".
        compile: True compiles the model, as in vitlib.optimize.

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
            return (compile_optimized(fast, model) if compile else fast), note
        note = ""
        if precision is None:
            precision, note = weight_precision(next(model.parameters()))
        return optimize(model, precision, calibrate=calibrate, compile=compile), note
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
