"""What is made small: cross-entropy of one label, binary cross-entropy of many, the squared error
of a regression.

Sums over samples come with the weight they are to be divided by, which is counted over the whole
batch of a step, in however many passes and processes it is computed.

Shapes: B samples, C classes or outputs. Targets are shares (B, C) float32, NaN: nothing is known;
of a regression its values.
Sources: Szegedy et al. 1512.00567 (label smoothing); the model card's rule for rare classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.errors import ConfigError
from vitlib.scores import Task
from vitlib.train.config import Loss

MOST = 1e6  # of a weight that is given: what is far above overflows float32
RARE = 2  # the largest class over the smallest, up to which all weigh the same


@dataclass(frozen=True)
class Criterion:
    """A loss and its weights."""

    task: Task
    smoothing: float = 0.0
    weights: Tensor | None = None  # (C,) of the classes; multi-label: of their positives

    def sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B, C) twice -> the loss of all samples, not yet divided by weight()."""
        logits = logits.float()
        if self.task == "regression":
            return F.mse_loss(logits, targets, reduction="sum")
        weights = self.weights
        if self.task == "single_label_classification":
            shares = targets * (1 - self.smoothing) + self.smoothing / targets.shape[1]
            if weights is not None:
                shares = shares * weights
            return -(shares * F.log_softmax(logits, dim=1)).sum()
        known = ~targets.isnan()
        shares = torch.where(known, targets, 0) * (1 - self.smoothing) + self.smoothing / 2
        found = F.binary_cross_entropy_with_logits(
            logits, shares, weight=known.float(), pos_weight=weights, reduction="sum"
        )
        return found

    def move_weights(self, move: Callable[[Tensor], Tensor]) -> Criterion:
        """Return the criterion with its weights where `move` puts them, for sum() on a device."""
        return self if self.weights is None else replace(self, weights=move(self.weights))

    def weight(self, targets: Tensor) -> float:
        """(B, C) -> what their sum is divided by: samples, by their classes' weights; of many
        labels the known ones; of a regression every number, as transformers' mean does."""
        if self.task == "regression":
            return float(targets.numel())
        if self.task == "multi_label_classification":
            return float((~targets.isnan()).sum())
        if self.weights is None:
            return float(len(targets))
        return float((targets.double() * self.weights.double()).sum())


def soft_targets(targets: npt.NDArray[np.generic], classes: int) -> Tensor:
    """Class numbers (N,), or a row of 0, 1 and NaN or of a regression's values each -> (N, C)
    float32."""
    if targets.ndim == 1:
        return F.one_hot(torch.from_numpy(targets.astype(np.int64)), classes).float()
    return torch.from_numpy(targets.astype(np.float32))


def build_criterion(loss: Loss, targets: Tensor, task: Task) -> Criterion:
    """The loss of a training set (N, C). Raises ConfigError for weights that do not fit it."""
    classes, multi_label = targets.shape[1], task == "multi_label_classification"
    if task == "regression":
        chosen = [one.name for one in fields(loss) if getattr(loss, one.name) != one.default]
        if chosen:
            raise ConfigError(f"{' and '.join(chosen)}: of classes, and regression has none")
        return Criterion(task)
    for name, given in (
        ("class_weights", loss.class_weights), ("positive_weights", loss.positive_weights)
    ):  # fmt: skip
        if given and len(given) != classes:
            raise ConfigError(f"{name} has {len(given)}: expected {classes}, one a class")
        if given and not 0 <= min(given) <= max(given) <= MOST:
            raise ConfigError(
                f"{name} are {min(given):g} to {max(given):g}: expected numbers of 0 to {MOST:g}"
            )
        if given and not any(given):
            raise ConfigError(f"{name} are all 0: expected a number above 0 for some class")
    if loss.class_weights and multi_label:
        raise ConfigError("class_weights is for one label a photo: give positive_weights")
    if loss.positive_weights and not multi_label:
        raise ConfigError("positive_weights is for many labels a photo: give class_weights")
    given = loss.class_weights or loss.positive_weights
    weights = (
        torch.tensor(given, dtype=torch.float32)
        if given
        else _by_rarity(loss.weighted_loss, targets, multi_label)
    )
    return Criterion(task, loss.label_smoothing_factor, weights)


def _by_rarity(mode: int, targets: Tensor, multi_label: bool) -> Tensor | None:
    """The card's rule: only where the largest class is over twice the smallest; mode 1 by the
    root, mode 2 as it is; a class of no photo weighs nothing."""
    if not mode:
        return None
    counts = (targets == 1).sum(dim=0).double()
    if int(counts.max()) // max(1, int(counts.min())) <= RARE:
        return None
    known = (~targets.isnan()).sum(dim=0).double()
    rarity = ((known - counts) if multi_label else 1.0) / counts.clamp(min=1)
    rarity = torch.where(counts > 0, rarity, 0.0)
    return (rarity.sqrt() if mode == 1 else rarity).float()
