"""precision="auto": the fastest that answers as float32 does, on photos that say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vitlib.errors import ConfigError
from vitlib.fast.calibrate import batches
from vitlib.fast.cpu import Precision, route
from vitlib.fast.cuda_attention import has_bfloat16
from vitlib.fast.fast_vit import FastViT
from vitlib.fast.optimization import optimize
from vitlib.image.decode import ImageLike
from vitlib.scores import Task, task_of
from vitlib.system.torch_state import isolate_torch_settings
from vitlib.vit import ViT

AutoPrecision = Literal["fp32", "bf16", "fp16", "int8", "fp8", "auto"]
# With fewer photos to find the levels of int8 by, and as many to try it on, it is left out.
FEWEST = 8
SPREAD = 0.01  # of a regression: how far a number may be off, as a share of what the photos span
COSINE = 0.999  # of two vectors of a photo, where there are no labels to compare


@isolate_torch_settings()
def choose(model: ViT, photos: Sequence[ImageLike] | None) -> tuple[FastViT, str]:
    """A model and photos -> the model optimized, and one line that says for what, and why.

    Levels of int8 are found on every other photo, and each precision is tried on the rest.
    Raises ConfigError where there are no photos.
    """
    if photos is None or not len(photos):
        raise ConfigError(
            "precision='auto' chooses by photos: give some of yours with calibrate=, 32 or more"
        )
    seen, tried = photos[1::2], photos[::2]
    exact = optimize(model)
    expected = answers(exact, tried)
    task = task_of(model.config) if model.num_classes else None
    against = f"on {len(tried)} photo{'s' * (len(tried) != 1)}"
    for precision in ("int8", "bf16", "fp16"):
        if precision == "int8" and len(seen) < FEWEST:
            continue
        if not served(model, precision):
            continue
        fast = optimize(model, precision, calibrate=seen if precision == "int8" else None)
        if agree(answers(fast, tried), expected, task):
            return fast, f"auto chose {precision}: it answers as fp32 does {against}"
    return exact, f"auto chose fp32: nothing faster answers as it does {against}"


def precision_of(weight: Tensor) -> tuple[Precision, str]:
    """Return the precision of a model's weights where it is computed, and what another gains."""
    if weight.dtype == torch.bfloat16:
        return "bf16", ""
    if not weight.is_cuda:
        return "fp32", ""  # which holds every number of float16
    if weight.dtype == torch.float16:
        return "fp16", ""
    return "fp32", "float32 on a GPU: precision bf16 is several times as fast"


def served(model: ViT, precision: str) -> bool:
    """Whether the model's device has a faster path for a precision."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return precision == ("bf16" if has_bfloat16(device) else "fp16")
    way = route(precision)  # type: ignore[arg-type]
    return way is not None and way.arithmetic == precision


def answers(fast: FastViT, photos: Sequence[ImageLike]) -> Tensor:
    """Logits, or vectors without a head, (N, ...)."""
    pixels, _ = batches(photos, fast.image_processor, fast.config.in_channels)
    with torch.inference_mode():
        return torch.cat([fast(batch).float().cpu() for batch in pixels])


def agree(found: Tensor, expected: Tensor, task: Task | None) -> bool:
    """Whether two sets of answers (N, ...) are as good as each other; task: None without a head.

    The best label is equal, with several labels a photo those above 0.5 too; numbers are as near
    as SPREAD; vectors point the same way.
    """
    if task is None:
        return bool(torch.cosine_similarity(found, expected).min() >= COSINE)
    if task == "regression":
        spread = (expected.amax(dim=0) - expected.amin(dim=0)).clamp(min=1e-12)
        near = torch.maximum(spread, expected.abs().amax(dim=0) * SPREAD)
        return bool(((found - expected).abs() <= SPREAD * near).all())
    if task == "multi_label_classification" and not ((found > 0) == (expected > 0)).all():
        return False
    return bool((found.argmax(dim=-1) == expected.argmax(dim=-1)).all())
