"""Linear heads trained by SGD at many rates at once, by DINOv2's protocol for linear evaluation.

All heads see the same batches of cached features, so that a step is one product. Rates are
scaled by the batch over 256 and fall to 0 along a cosine; momentum is 0.9, and weights do not decay
(Oquab et al. 2304.07193, section 7.1, and the code published with it).

Shapes: N photos, D features, C classes, R rates, B photos of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitlib.errors import ConfigError
from vitlib.probe.logistic_head import LogisticHead
from vitlib.system.torch_state import isolate_torch_settings

Array = npt.NDArray[Any]
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
BATCH, BASE_BATCH = 256, 256
EPOCHS, MIN_STEPS = 10, 300  # few photos are seen in more epochs
MOMENTUM, INIT_STD = 0.9, 0.01


@isolate_torch_settings()
def train_heads(
    features: Array,
    targets: Array,
    num_classes: int,
    rates: Sequence[float] = RATES,
    seed: int = 0,
) -> list[LogisticHead]:
    """Train a linear head at each rate.

    The loss is cross-entropy; with several labels the sum of binary cross-entropies of the classes
    whose label is known.

    Args:
        features: (N, D), not standardised.
        targets: (N,) class numbers, or (N, C) of 1, 0 and NaN.
        num_classes: C.
        rates: Learning rates for a batch of 256, each above 0.
        seed: Seed of the first weights and of the order of the photos.

    Returns:
        A head for each rate; its c is NaN, since no penalty shaped it. A rate that diverges gives
        NaN weights.

    Raises:
        ConfigError: A rate is not above 0, or there is no photo.
    """
    if not len(features) or not all(rate > 0 for rate in rates):
        raise ConfigError(
            f"{len(features)} photos, rates {list(rates)}: expected a photo or more, and rates "
            "above 0"
        )
    x = torch.from_numpy(np.ascontiguousarray(features, np.float32))
    y = _dense_targets(targets, num_classes)
    generator = torch.Generator().manual_seed(seed)
    # Every head starts at the same weights: the rates alone differ.
    first = torch.randn(num_classes, x.shape[1], generator=generator, dtype=torch.float32)
    weight = (first * INIT_STD).repeat(len(rates), 1)  # (RC, D): a step is one product
    bias = torch.zeros(len(weight), dtype=torch.float32)
    velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    batch = min(BATCH, len(x))
    steps = max(EPOCHS * math.ceil(len(x) / batch), MIN_STEPS)
    scaled = torch.tensor(rates, dtype=torch.float32).repeat_interleave(num_classes)
    scaled = scaled[:, None] * (batch / BASE_BATCH)
    for step, rows in enumerate(_batches(len(x), batch, steps, generator)):
        rate = scaled * (0.5 * (1 + math.cos(math.pi * step / steps)))
        error = _errors(weight, bias, x[rows], y[rows], targets.ndim == 2)
        # Momentum as in torch.optim.SGD: the rate scales the velocity, not the gradient.
        velocity[0].mul_(MOMENTUM).addmm_(error.T, x[rows])
        velocity[1].mul_(MOMENTUM).add_(error.sum(dim=0))
        weight.sub_(velocity[0] * rate)
        bias.sub_(velocity[1] * rate[:, 0])
    heads = zip(
        weight.double().reshape(len(rates), num_classes, -1).numpy(),
        bias.double().reshape(len(rates), num_classes).numpy(),
        strict=True,
    )
    return [LogisticHead(w, b, math.nan, targets.ndim == 2) for w, b in heads]


def _dense_targets(targets: Array, num_classes: int) -> Tensor:
    """Convert targets to (N, C) float32 of 1, 0 and NaN."""
    if targets.ndim == 2:
        return torch.from_numpy(np.asarray(targets, np.float32))
    dense = torch.zeros(len(targets), num_classes, dtype=torch.float32)
    return dense.scatter_(1, torch.from_numpy(targets)[:, None], 1.0)


def _batches(count: int, batch: int, steps: int, generator: torch.Generator) -> Any:
    """Yield the photos of each step, every epoch in another order."""
    order, start = torch.randperm(count, generator=generator), 0
    for _ in range(steps):
        if start + batch > count:
            order, start = torch.randperm(count, generator=generator), 0
        yield order[start : start + batch]
        start += batch


def _errors(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, multi_label: bool) -> Tensor:
    """Compute the gradient of the mean loss by the logits, (B, RC)."""
    logits = torch.addmm(bias, x, weight.T).reshape(len(x), -1, y.shape[1])
    scores = logits.sigmoid() if multi_label else logits.softmax(dim=2)
    truth = y[:, None]
    return torch.where(torch.isnan(truth), 0.0, scores - truth.nan_to_num()).flatten(1) / len(x)
