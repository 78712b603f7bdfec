"""Loss functions: cross-entropy, binary cross-entropy for many labels, squared error.

A loss is a sum over samples. The weight that divides it is counted over the whole batch of a step.
So the result is the same in however many micro-batches and processes the step is computed.

Shapes: B samples, C classes or outputs. Targets are probabilities (B, C) float32, NaN if unknown;
for regression they are the values.
Sources: Szegedy et al. 1512.00567 (label smoothing); Azure ML's rule for rare classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.errors import ConfigError, TrainError
from vitlib.scores import Task
from vitlib.train.config import TrainConfig
from vitlib.train.evaluations import Evaluation
from vitlib.train.settings import Loss

# A final loss of this many times that of one answer for all photos is an error.
EXPLODED = 3
MAX_WEIGHT = 1e6  # larger class weights overflow float32
BALANCED_RATIO = 2  # largest over smallest class, up to which all classes weigh the same


@dataclass(frozen=True)
class Criterion:
    """A loss function and its weights.

    Attributes:
        task: The task, which decides the function.
        smoothing: Label smoothing, 0 to 0.99.
        weights: (C,) of the classes, for many labels of their positives; None for equal weights.
    """

    task: Task
    smoothing: float = 0.0
    weights: Tensor | None = None

    def sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of all samples, not yet divided by weight().

        Args:
            logits: (B, C).
            targets: (B, C).

        Returns:
            The sum, ().
        """
        logits = logits.float()
        if self.task == "regression":
            return F.mse_loss(logits, targets, reduction="sum")
        weights = self.weights
        if self.task == "single_label_classification":
            probabilities = targets * (1 - self.smoothing) + self.smoothing / targets.shape[1]
            if weights is not None:
                probabilities = probabilities * weights
            return -(probabilities * F.log_softmax(logits, dim=1)).sum()
        # An unknown label has a weight of 0, and any finite target, as NaN * 0 is NaN.
        mask = ~targets.isnan()
        probabilities = torch.where(mask, targets, 0) * (1 - self.smoothing)
        return F.binary_cross_entropy_with_logits(
            logits,
            probabilities + self.smoothing / 2,
            weight=mask.float(),
            pos_weight=weights,
            reduction="sum",
        )

    def move_weights(self, move: Callable[[Tensor], Tensor]) -> Criterion:
        """Return a criterion with moved weights, for sum() on a device.

        Args:
            move: Moves a tensor to the device.

        Returns:
            The criterion.
        """
        return self if self.weights is None else replace(self, weights=move(self.weights))

    def weight(self, targets: Tensor) -> float:
        """Compute the number that divides the sum over these samples.

        Args:
            targets: (B, C).

        Returns:
            The samples, by their classes' weights. For many labels the number of known labels; for
            regression the number of values, as in transformers.
        """
        if self.task == "regression":
            return float(targets.numel())
        if self.task == "multi_label_classification":
            return float((~targets.isnan()).sum())
        if self.weights is None:
            return float(len(targets))
        return float((targets.double() * self.weights.double()).sum())


def to_soft_targets(targets: npt.NDArray[np.generic], classes: int) -> Tensor:
    """Convert labels or values to the targets of a criterion.

    Args:
        targets: Class indices (N,); or rows (N, C) of 0, 1 and NaN, or of values.
        classes: C.

    Returns:
        (N, C) float32.
    """
    if targets.ndim == 1:
        return F.one_hot(torch.from_numpy(targets.astype(np.int64)), classes).float()
    return torch.from_numpy(targets.astype(np.float32))


def constant_loss(criterion: Criterion, targets: Tensor) -> float:
    """Compute the least loss of a model that gives all photos the same answer.

    Args:
        criterion: The criterion.
        targets: All targets of a set, (N, C).

    Returns:
        The loss: near the entropy of the classes, or the variance of the values.
    """
    frequency = targets.nanmean(dim=0)
    answer = frequency
    if criterion.task != "regression":
        # Within 0..1, since a class that no photo shows has no finite logit.
        frequency = frequency.clamp(1e-4, 1 - 1e-4)
        is_single = criterion.task == "single_label_classification"
        answer = frequency.log() if is_single else frequency.logit()
    total = criterion.sum(answer.expand_as(targets), targets).item()
    return total / max(criterion.weight(targets), 1e-12)


def check_loss(
    criterion: Criterion, targets: Tensor, last: Evaluation, config: TrainConfig
) -> None:
    """Check that training did not end far above the loss of one answer for all photos.

    Such a run has left what it knew, and no metric need show it: a set of one frequent class still
    gets a high accuracy. Augmentation and smoothing reach half of this bound at most.

    Args:
        criterion: The criterion of the run, on the CPU.
        targets: All targets of the training set, (N, C).
        last: The last evaluation.
        config: Settings of the run.

    Raises:
        TrainError: The loss is beyond the bound.
    """
    constant = constant_loss(criterion, targets)
    if criterion.task != "regression":
        constant = max(constant, math.log(2))
    if last.train_loss is not None and 0 < EXPLODED * constant < last.train_loss:
        raise TrainError(
            f"the loss exploded: {last.train_loss:.4g} in the end, where one answer for all photos "
            f"has {constant:.4g}: try a lower learning_rate than {config.optim.learning_rate:g}, a "
            "longer warm-up or max_grad_norm; no model is written, and checkpoints has the last "
            "steps"
        )


def build_criterion(loss: Loss, targets: Tensor, task: Task) -> Criterion:
    """Build the criterion of a training set.

    Args:
        loss: Settings of the loss.
        targets: All targets of the set, (N, C).
        task: The task.

    Returns:
        The criterion.

    Raises:
        ConfigError: The settings do not fit the task or the number of classes.
    """
    classes, multi_label = targets.shape[1], task == "multi_label_classification"
    if task == "regression":
        chosen = [item.name for item in fields(loss) if getattr(loss, item.name) != item.default]
        if chosen:
            raise ConfigError(f"{' and '.join(chosen)}: for classes, and regression has none")
        return Criterion(task)
    for name in ("class_weights", "positive_weights"):
        _check_weights(name, getattr(loss, name), classes)
    if loss.class_weights and multi_label:
        raise ConfigError("class_weights is for one label a photo: give positive_weights")
    if loss.positive_weights and not multi_label:
        raise ConfigError("positive_weights is for many labels a photo: give class_weights")
    values = loss.class_weights or loss.positive_weights
    weights = (
        torch.tensor(values, dtype=torch.float32)
        if values
        else _weigh_by_rarity(loss.weighted_loss, targets, multi_label)
    )
    return Criterion(task, loss.label_smoothing_factor, weights)


def _check_weights(name: str, weights: tuple[float, ...], classes: int) -> None:
    """Raise ConfigError for weights of another number of classes, or out of range."""
    if weights and len(weights) != classes:
        raise ConfigError(f"{name} has {len(weights)}: expected {classes}, one a class")
    if weights and not 0 <= min(weights) <= max(weights) <= MAX_WEIGHT:
        raise ConfigError(
            f"{name} are {min(weights):g} to {max(weights):g}: expected numbers of 0 to "
            f"{MAX_WEIGHT:g}"
        )
    if weights and not any(weights):
        raise ConfigError(f"{name} are all 0: expected a number above 0 for some class")


def _weigh_by_rarity(mode: int, targets: Tensor, multi_label: bool) -> Tensor | None:
    """Compute class weights (C,) by Azure ML's rule; None for equal weights.

    The rule applies if the largest class is more than twice the smallest. Mode 1 takes the root of
    the rarity, mode 2 the rarity itself. A class without photos has a weight of 0.
    """
    if not mode:
        return None
    counts = (targets == 1).sum(dim=0).double()
    if int(counts.max()) // max(1, int(counts.min())) <= BALANCED_RATIO:
        return None
    num_labelled = (~targets.isnan()).sum(dim=0).double()
    rarity = ((num_labelled - counts) if multi_label else 1.0) / counts.clamp(min=1)
    rarity = torch.where(counts > 0, rarity, 0.0)
    return (rarity.sqrt() if mode == 1 else rarity).float()
