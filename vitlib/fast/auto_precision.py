"""Choose precision="auto": the fastest one that keeps float32's predictions on some photos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vitlib.errors import ConfigError, count_noun
from vitlib.fast.calibration import calibration_batches
from vitlib.fast.cpu import Precision, kernel_plan
from vitlib.fast.cuda_attention import has_bfloat16
from vitlib.fast.model import FastViT
from vitlib.fast.optimization import optimize
from vitlib.image.decode import ImageLike
from vitlib.scores import Task, task_of
from vitlib.system.torch_state import isolate_torch_settings
from vitlib.vit import ViT

AutoPrecision = Literal["fp32", "bf16", "fp16", "int8", "fp8", "auto"]
MIN_CALIBRATION_PHOTOS = 8  # with fewer int8 is not tried
# How far the output of a regression may be off, as a share of its range over the photos.
REGRESSION_TOLERANCE = 0.01
MIN_COSINE = 0.999  # between the two embeddings of a photo, for models without a head


@isolate_torch_settings()
def choose_precision(model: ViT, photos: Sequence[ImageLike] | None) -> tuple[FastViT, str]:
    """Optimize a model in the fastest precision that keeps its predictions.

    int8 is calibrated on every other photo, and each precision is tried on the rest.

    Args:
        model: The model, which is only read.
        photos: Photos of the user's, 32 or more.

    Returns:
        The optimized model, and one line that says which precision it has and why.

    Raises:
        ConfigError: There are no photos.
    """
    if photos is None or not len(photos):
        raise ConfigError(
            "precision='auto' chooses by photos: give some of yours with calibrate=, 32 or more"
        )
    calibration, held_out = photos[1::2], photos[::2]
    exact = optimize(model)
    expected = predict_outputs(exact, held_out)
    task = task_of(model.config) if model.num_classes else None
    basis = f"on {count_noun(len(held_out), 'photo')}"
    candidates: tuple[Precision, ...] = ("int8", "bf16", "fp16")
    for precision in candidates:
        if precision == "int8" and len(calibration) < MIN_CALIBRATION_PHOTOS:
            continue
        if not is_faster(model, precision):
            continue
        fast = optimize(model, precision, calibrate=calibration if precision == "int8" else None)
        if outputs_agree(predict_outputs(fast, held_out), expected, task):
            return fast, f"auto chose {precision}: it predicts as fp32 does {basis}"
    return exact, f"auto chose fp32: no faster precision predicts as it does {basis}"


def weight_precision(weight: Tensor) -> tuple[Precision, str]:
    """Return the precision to run a model in by the dtype of its weights.

    Args:
        weight: One of the weights, on the device that computes.

    Returns:
        The precision, and a hint where another one would be faster ("" otherwise).
    """
    if weight.dtype == torch.bfloat16:
        return "bf16", ""
    if not weight.is_cuda:
        return "fp32", ""  # float32 holds every number of float16
    if weight.dtype == torch.float16:
        return "fp16", ""
    return "fp32", "float32 on a GPU: precision bf16 is several times as fast"


def is_faster(model: ViT, precision: Precision) -> bool:
    """Return True if the model's device has a faster path for a precision.

    Args:
        model: The model.
        precision: The precision.

    Returns:
        True if that path is faster than float32.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        return precision == ("bf16" if has_bfloat16(device) else "fp16")
    plan = kernel_plan(precision)
    return plan is not None and plan.arithmetic == precision


def predict_outputs(fast: FastViT, photos: Sequence[ImageLike]) -> Tensor:
    """Run a model on photos.

    Args:
        fast: The optimized model.
        photos: The photos.

    Returns:
        Logits, or embeddings without a head, (N, ...) float32 on the CPU.
    """
    pixels, _ = calibration_batches(photos, fast.image_processor, fast.config.in_channels)
    with torch.inference_mode():
        return torch.cat([fast(batch).float().cpu() for batch in pixels])


def outputs_agree(actual: Tensor, expected: Tensor, task: Task | None) -> bool:
    """Return True if two models give the same predictions.

    The best label must be equal, and for several labels a photo also those above 0.5. Numbers of a
    regression must be within REGRESSION_TOLERANCE, embeddings within MIN_COSINE.

    Args:
        actual: Outputs of one model, (N, ...).
        expected: Outputs of the other, (N, ...).
        task: The task of their head; None without a head.

    Returns:
        True if they agree on every photo.
    """
    if task is None:
        return bool(torch.cosine_similarity(actual, expected).min() >= MIN_COSINE)
    if task == "regression":
        spread = (expected.amax(dim=0) - expected.amin(dim=0)).clamp(min=1e-12)
        # Photos with nearly equal targets span next to nothing: a share of the number itself is
        # the least tolerance.
        unit = torch.maximum(spread, expected.abs().amax(dim=0) * REGRESSION_TOLERANCE)
        return bool(((actual - expected).abs() <= REGRESSION_TOLERANCE * unit).all())
    if task == "multi_label_classification" and not ((actual > 0) == (expected > 0)).all():
        return False
    return bool((actual.argmax(dim=-1) == expected.argmax(dim=-1)).all())
