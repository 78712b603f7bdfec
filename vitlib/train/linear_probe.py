"""A head fitted to frozen features: the start of a run, or all of a run on few photos.

How data flows: the features of every training photo are standardised, a linear head is fitted to
them with an L2 penalty, by L-BFGS, for a regression in closed form, and the standardisation is
folded into its weights. The penalty is that with the least loss on held-out folds. Training that
begins at this head changes the features less than one that begins at a random head, and generalises
better (Kumar et al. 2202.10054, section 3).

Shapes: N photos, D features of a photo, C classes or outputs.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vitlib import metrics
from vitlib.encoder import Linear
from vitlib.errors import DataError
from vitlib.scores import logits_to_scores
from vitlib.source.locate import ALWAYS_SHOW
from vitlib.train.ema import WeightAverage
from vitlib.train.feature_cache import FeatureCache, StoredFeatures
from vitlib.train.losses import Criterion
from vitlib.train.resume import list_checkpoints

if TYPE_CHECKING:
    from vitlib.train.loop import Trainer
    from vitlib.vit import ViT

# Strengths of the penalty in units of sklearn's 1 / C. Stronger ones have a lower loss on folds of
# few photos, since they claim less, and get fewer photos right: of DINOv2's features of 12 photos
# 1000 got 0.39 and 1 got 0.56.
PENALTIES = (0.1, 1.0)
# Of a regression, whose loss is the metric itself. Units of sklearn's Ridge: a feature weighs as
# much as so many photos.
RIDGE_PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
FOLDS, ITERATIONS = 5, 60
logger = logging.getLogger("vitlib")


class FittedHead(NamedTuple):
    """A linear head fitted to features.

    Attributes:
        weight: (C, D) float32.
        bias: (C,) float32.
        held_out: Logits (N, C) of each photo by a head that was fitted without it; or None.
    """

    weight: Tensor
    bias: Tensor
    held_out: Tensor | None


def use_features(trainer: Trainer, model: ViT, folder: str | os.PathLike[str] | None) -> None:
    """Open the store of features, and fit the head of a run that begins with a fitted one.

    Args:
        trainer: The run.
        model: Its model, whole also where the trainer shards it.
        folder: The store; None takes VITLIB_FEATURES of the environment, and without it none.
    """
    config = trainer.config
    stored = StoredFeatures.open(
        folder, model, trainer.processor, config.run.precision, trainer.training
    )
    if trainer.features is not None:
        trainer.features.stored = stored
    if config.tune.linear_probe:
        start_from_probe(trainer, stored)


def start_from_probe(trainer: Trainer, stored: StoredFeatures | None = None) -> None:
    """Fit the head of a run that begins, evaluate it and write it as the checkpoint of step 0.

    Args:
        trainer: A run without a checkpoint; one that continues is left as it is.
        stored: Features of a store; None computes all.
    """
    model, start = trainer.model, time.perf_counter()
    # Of all processes together: the first may write the checkpoint while another still looks.
    begun = any(trainer.world.all_gather(bool(list_checkpoints(trainer.out))))
    if begun or type(model.head) is not Linear:
        return
    loader, head_input = trainer.train_loader, trainer.training_model.head_input
    cache = trainer.features or FeatureCache(model, loader, head_input, trainer.show_progress)
    cache.stored = stored
    try:
        rows = cache.compute_all()
    except BaseException:
        loader.close()  # else it stays open: training reads the same photos, decoded
        raise
    trainer.state.train_errors.update(cache.errors)
    if not rows:
        raise DataError(f"no photo can be read: {min(cache.errors.items())[1]}")
    features = torch.stack(list(rows.values())).flatten(1).cpu()
    targets = trainer.targets[list(rows)]
    # Weights of the classes shift the bias alone: they make rare classes answered, and in the fit
    # they would also spend the weights' freedom on few photos, and rank them worse.
    unweighted = replace(trainer.criterion, weights=None)
    head = fit_head(features, targets, unweighted, trainer.config.run.seed)
    weights = trainer.criterion.weights
    set_head(
        model,
        head.weight,
        head.bias if weights is None else head.bias + weights.clamp(min=1e-6).log(),
    )
    event: dict[str, Any] = {"event": "probe", "step": 0}
    if head.held_out is not None and trainer.validation is None:
        scores = logits_to_scores(head.held_out, trainer.training.task).numpy()
        labels = trainer.training.targets()[list(rows)]
        values = metrics.task_metrics(labels, scores, trainer.training.task)
        primary = metrics.PRIMARY[trainer.training.task]
        event |= {"folds": FOLDS, **values}
        if trainer.world.is_first:
            text = f"{FOLDS} folds, each scored by a head fitted to the others: {primary}"
            logger.warning("%s %.4f", text, values[primary], extra=ALWAYS_SHOW)
    # Averages begin at these weights too.
    trainer.ema = WeightAverage(model, trainer.config.tune.ema_decay)
    trainer.log.start(0)
    trainer.log.write({**event, "seconds": time.perf_counter() - start})
    trainer.evaluate()
    trainer.save()


def fit_head(features: Tensor, targets: Tensor, criterion: Criterion, seed: int) -> FittedHead:
    """Fit a linear head to features.

    Args:
        features: (N, D), N at least 1.
        targets: (N, C), as the criterion takes them.
        criterion: The loss of the run, on the CPU.
        seed: Seed of the division into folds.

    Returns:
        The head.
    """
    x = features.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    # A feature that is the same in all photos says nothing.
    scale = torch.where(std > 1e-6 * x.abs().amax().clamp(min=1e-12), 1 / std, 0.0)
    x = (x - mean) * scale
    penalty, held_out = choose_penalty(x, targets, criterion, seed)
    weight, bias = _minimize(x, targets, criterion, penalty)
    weight = weight * scale
    return FittedHead(weight.float(), (bias - weight @ mean).float(), held_out)


def choose_penalty(
    x: Tensor, targets: Tensor, criterion: Criterion, seed: int
) -> tuple[float, Tensor | None]:
    """Choose the penalty with the least loss on photos that were held out.

    Args:
        x: Standardised features, (N, D).
        targets: (N, C).
        criterion: The loss.
        seed: Seed of the division into folds.

    Returns:
        One of the penalties, and the logits (N, C) that heads of the other folds give each photo;
        the strongest and None where there are too few photos for folds.
    """
    folds = _divide(targets, seed)
    penalties = RIDGE_PENALTIES if criterion.task == "regression" else PENALTIES
    if not folds:
        return penalties[-1], None
    outputs = {penalty: torch.zeros(targets.shape, dtype=torch.float32) for penalty in penalties}
    everything = torch.arange(len(x), device="cpu")
    for fold in folds:
        rest = everything[~torch.isin(everything, fold)]
        start: tuple[Tensor, Tensor] | None = None
        # From the strongest: each solution is a good start for the next weaker one.
        for penalty in reversed(penalties):
            start = _minimize(x[rest], targets[rest], criterion, penalty, start)
            outputs[penalty][fold] = (x[fold] @ start[0].T + start[1]).float()
    losses = {penalty: criterion.sum(out, targets).item() for penalty, out in outputs.items()}
    best = min(penalties, key=lambda penalty: losses[penalty])
    return best, outputs[best]


def set_head(model: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Set the weights of a head; of a distilled model those of both, whose mean is the answer.

    Args:
        model: Changed in place; its head has as many classes.
        weight: (C, D), for two heads (C, 2D).
        bias: (C,).
    """
    heads = [head for head in (model.head, model.head_dist) if isinstance(head, nn.Linear)]
    with torch.no_grad():
        for head, part in zip(heads, weight.chunk(len(heads), dim=1), strict=True):
            head.weight.copy_(part * len(heads))
            head.bias.copy_(bias)


def _divide(targets: Tensor, seed: int) -> list[Tensor]:
    """Divide photos into folds, each with its share of every class."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator)
    # Stable: photos of a class stay in their random order, and are dealt to the folds in turn.
    order = order[targets[order].nan_to_num().argmax(dim=1).argsort(stable=True)]
    return [order[i::FOLDS] for i in range(FOLDS)] if len(targets) >= 2 * FOLDS else []


def _minimize(
    x: Tensor,
    targets: Tensor,
    criterion: Criterion,
    penalty: float,
    start: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Minimize the loss and the penalty; (C, D) and (C,), float64."""
    if criterion.task == "regression":
        return _solve_ridge(x, targets.double(), penalty)
    weight = torch.zeros(targets.shape[1], x.shape[1], dtype=torch.float64)
    bias = torch.zeros(targets.shape[1], dtype=torch.float64)
    if start is not None:
        weight, bias = start[0].clone(), start[1].clone()
    weight.requires_grad_()
    bias.requires_grad_()
    optimizer: torch.optim.Optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )
    count = max(criterion.weight(targets), 1e-12)

    def closure() -> float:
        optimizer.zero_grad()
        loss = criterion.sum(x @ weight.T + bias, targets) / count
        loss = loss.double() + penalty * weight.square().sum() / (2 * len(x))
        torch.autograd.backward(loss)
        return loss.item()

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def _solve_ridge(x: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Minimize squared errors and the penalty in closed form; (C, D) and (C,), float64."""
    mean, centred = targets.mean(dim=0), x - x.mean(dim=0)
    # penalty > 0, so that the matrix is positive definite however few the photos are.
    gram = centred.T @ centred + penalty * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.cholesky_solve(centred.T @ (targets - mean), torch.linalg.cholesky(gram)).T
    return weight, mean - weight @ x.mean(dim=0)
