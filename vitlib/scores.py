"""Turn logits into scores by the model's task, and choose labels from scores.

Every softmax, sigmoid and top-k over classes of the package is here. The Predictor, the server,
batch jobs, evaluation, training's validation and explanations call this file.

Shapes: N images, C classes or regression outputs, K classes of each image.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from torch import Tensor, nn

from vitlib.config import ViTConfig
from vitlib.errors import ConfigError

if TYPE_CHECKING:
    import numpy.typing as npt

Task = Literal["single_label_classification", "multi_label_classification", "regression"]
TOP_K = 5  # default number of labels of an image
Array = np.ndarray[Any, np.dtype[Any]]
NOT_FINITE = "the model gives numbers that are not finite"  # the reason in errors about one image
_TINY = float(np.finfo(np.float32).tiny)  # the least positive normal float32
_HALF_EPS = 2.0**-25  # half of float32's step below 1
_WIDTH_PRESERVING = (
    nn.Identity,
    nn.Dropout,
    nn.LayerNorm,
    nn.BatchNorm1d,
    nn.ReLU,
    nn.GELU,
    nn.Tanh,
)


class Prediction(NamedTuple):
    """One label of one image, or one output of a regression.

    Attributes:
        label: The name of the class or output.
        score: 0..1; for a regression the output's number.
        index: The class or output, 0..num_classes - 1. Replaces tuple.index.
    """

    label: str
    score: float
    index: int  # type: ignore[assignment]  # the name of transformers' and timm's index of a class


def task_of(config: ViTConfig) -> Task:
    """Return the task of a model's head: its problem_type, or single-label without one.

    A head with one class is multi-label, as in transformers' pipelines: softmax of one logit is 1.

    Args:
        config: The model's config.

    Returns:
        The task, by transformers' names.
    """
    if config.problem_type == "regression":
        return "regression"
    if config.problem_type == "multi_label_classification" or config.num_classes == 1:
        return "multi_label_classification"
    return "single_label_classification"


def labels_of(config: ViTConfig) -> tuple[str, ...]:
    """Return the name of each class or output.

    Args:
        config: The model's config.

    Returns:
        num_classes names; LABEL_0, LABEL_1, ... where the checkpoint has none.
    """
    return config.labels or tuple(f"LABEL_{i}" for i in range(config.num_classes))


def num_outputs(head: nn.Module) -> int | None:
    """Read the number of classes of a head from its modules.

    Args:
        head: An Identity, a linear layer, or a Sequential that ends in one (layers that have no
            width of their own, such as Dropout, may follow it).

    Returns:
        The number of classes, 0 for an Identity; None for modules that do not state it.
    """
    if isinstance(head, nn.Identity):
        return 0
    if isinstance(head, nn.Sequential):
        widths = [num_outputs(layer) for layer in head if not isinstance(layer, _WIDTH_PRESERVING)]
        return widths[-1] if widths else 0
    width = getattr(head, "out_features", None)
    return width if isinstance(width, int) and not isinstance(width, bool) else None


def logits_to_scores(logits: Tensor, task: Task) -> Tensor:
    """Apply softmax or sigmoid to logits, as the task needs.

    Args:
        logits: (N, C).
        task: Single-label takes softmax over classes, multi-label takes sigmoid of each class.

    Returns:
        (N, C) in 0..1; for regression, the logits unchanged.
    """
    if task == "regression":
        return logits
    if task == "multi_label_classification":
        return logits.sigmoid()
    return logits.softmax(dim=-1)


def check_choice(task: Task, **choices: object) -> None:
    """Check options that choose among classes, such as top_k and threshold.

    Args:
        task: The model's task; a regression takes none of these options.
        **choices: Name to value; None means that the caller leaves the option out.

    Raises:
        ConfigError: An option is set for a regression; top_k is not a whole number of at least 1;
            or threshold is not a number in 0..1.
    """
    names = [name for name, value in choices.items() if value is not None]
    if task == "regression" and names:
        verb = "is" if len(names) == 1 else "are"
        raise ConfigError(
            f"{' and '.join(names)} {verb} for classes, and this model gives numbers "
            "(problem_type regression): leave it out"
        )
    top_k, threshold = choices.get("top_k"), choices.get("threshold")
    if top_k is not None:
        check_count("top_k", top_k)
    if threshold is not None:
        is_score = isinstance(threshold, Real) and not isinstance(threshold, bool)
        if not is_score or not 0 <= threshold <= 1:  # type: ignore[operator]
            raise ConfigError(f"threshold={threshold!r}: expected a number from 0 to 1")


def check_count(name: str, value: object) -> None:
    """Check a number of labels or images.

    Args:
        name: The argument's name, for the message.
        value: A whole number of at least 1; numpy's integers are accepted, booleans are not.

    Raises:
        ConfigError: The value is anything else.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r}: expected a whole number, 1 or more")


def top_classes(
    scores: Array, top_k: int | None, thresholds: float | Array | None
) -> tuple[npt.NDArray[np.int32], Array]:
    """Return the best classes of each image and their scores, best first.

    Args:
        scores: (N, C).
        top_k: Largest number of classes of an image; None takes every class.
        thresholds: Lowest score of a label, one number or (C,); None sets no limit.

    Returns:
        Classes (N, K) int32 and their scores (N, K). A class below its threshold is -1. Of equal
        scores the lower class comes first.
    """
    # Stable: ties would otherwise depend on numpy's sorting network and on the batch.
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top_k].astype(np.int32)
    best = np.take_along_axis(scores, order, axis=1)
    if thresholds is not None:
        lowest = np.broadcast_to(np.asarray(thresholds), scores.shape[1:])
        order = np.where(best >= lowest[order], order, np.int32(-1))
    return order, best


def predict_labels(
    scores: Array, task: Task, top_k: int | None, thresholds: float | Array | None
) -> list[tuple[int, float]]:
    """Return the labels of one image as pairs of class and score, best first.

    Args:
        scores: (C,).
        task: The model's task; a regression gives every output in order, and ignores the rest.
        top_k: Largest number of labels; None takes every class.
        thresholds: Lowest score of a label, one number or (C,); None sets no limit.

    Returns:
        (class, score) of each label; (output, number) of each output of a regression.
    """
    if task == "regression":
        return list(enumerate(scores.tolist()))
    classes, best = top_classes(scores[None], top_k, thresholds)
    pairs = zip(classes[0].tolist(), best[0].tolist(), strict=True)
    return [(index, score) for index, score in pairs if index >= 0]


# --- temperature ----------------------------------------------------------------------------------


def apply_temperature(
    scores: Array, temperature: float, multi_label: bool
) -> npt.NDArray[np.float32]:
    """Scale scores by a temperature (Guo et al. 1706.04599, section 4.2).

    A temperature can act on scores in place of logits. log(softmax(z)) is z minus a constant of
    the image, so softmax(log(score) / T) equals softmax(z / T). The logit of a sigmoid is
    log(score / (1 - score)).

    Args:
        scores: (N, C) in 0..1.
        temperature: Divides the logits; above 0. At 1 the scores are returned unchanged.
        multi_label: True for sigmoid scores, False for softmax scores.

    Returns:
        (N, C) in 0..1.
    """
    if temperature == 1:
        return np.asarray(scores, np.float32)
    z = scores_to_logits(scores, multi_label) / temperature
    return np.asarray((sigmoid if multi_label else softmax)(z), np.float32)


def scores_to_logits(scores: Array, multi_label: bool) -> npt.NDArray[np.float64]:
    """Invert softmax or sigmoid, to the precision of float32 scores.

    Args:
        scores: (N, C) in 0..1. Scores that float32 rounds to 0 or 1 are moved inside 0..1 first.
        multi_label: True for sigmoid scores, False for softmax scores.

    Returns:
        (N, C) logits; for softmax up to a constant of each row.
    """
    p = np.asarray(scores, np.float64)
    if multi_label:
        p = p.clip(_TINY, 1 - _HALF_EPS)
        return np.asarray(np.log(p) - np.log1p(-p))
    return np.asarray(np.log(p.clip(_TINY)))


def softmax(z: Array) -> Array:
    """Return the softmax of each row.

    Args:
        z: (N, C) logits.

    Returns:
        (N, C) in 0..1, each row of sum 1.
    """
    powers = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def sigmoid(z: Array) -> Array:
    """Return the sigmoid of each number, without overflow.

    Args:
        z: Logits of any shape.

    Returns:
        The same shape, in 0..1.
    """
    return np.asarray(np.exp(-np.logaddexp(0, -z)))
