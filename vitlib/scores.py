"""Logits -> scores, by the model's task, and the labels chosen from scores.

Everything that turns logits into scores or scores into labels calls this file: the Predictor, the
server, batches, reports, training's evaluations and explanations.

Shapes: N images, C classes or outputs.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vitlib.config import ViTConfig
from vitlib.errors import ConfigError

Task = Literal["single_label_classification", "multi_label_classification", "regression"]
TOP_K = 5  # labels of an image, where nobody says how many
Array = npt.NDArray[Any]
NOT_FINITE = "the model gives numbers that are not finite"  # of one image, for an error
_TINY = float(np.finfo(np.float32).tiny)  # a score that float32 rounds to 0 is no smaller
_NEAR = 2.0**-25  # half of float32's step below 1


def task_of(config: ViTConfig) -> Task:
    """The task of a model's head: its problem_type; without one, single-label.

    One class is scored by itself, as transformers' pipelines do: the softmax of one logit is 1.
    """
    if config.problem_type == "regression":
        return "regression"
    if config.problem_type == "multi_label_classification" or config.num_classes == 1:
        return "multi_label_classification"
    return "single_label_classification"


def labels_of(config: ViTConfig) -> tuple[str, ...]:
    """One name a class or output; LABEL_0 and so on where the checkpoint has none."""
    return config.labels or tuple(f"LABEL_{i}" for i in range(config.num_classes))


def scores_of(logits: Tensor, task: Task) -> Tensor:
    """Logits (N, C) -> scores (N, C): softmax of each row, sigmoid of each class, or for a
    regression the logits themselves."""
    if task == "regression":
        return logits
    if task == "multi_label_classification":
        return logits.sigmoid()
    return logits.softmax(dim=-1)


def check_choice(task: Task, **choices: object) -> None:
    """Raise ConfigError for a choice among classes, such as top_k=, that a regression cannot have,
    and for a top_k or threshold that none can.

    choices: name -> value; None: not given.
    """
    given = [name for name, value in choices.items() if value is not None]
    if task == "regression" and given:
        verb = "is" if len(given) == 1 else "are"
        raise ConfigError(
            f"{' and '.join(given)} {verb} for classes, and this model gives numbers "
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
    """Raise ConfigError for a number of labels or images that is no whole number above 0."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r}: expected a whole number, 1 or more")


def chosen(
    scores: Array, top_k: int | None, limits: float | Array | None
) -> list[tuple[int, float]]:
    """One image's scores (C,) -> (class, score) of its labels, best first.

    top_k: at most so many; None: every class. limits: the lowest score of a label, one number or
    (C,); None: none. Of equal scores the first class comes first.
    """
    order = np.argsort(-scores, kind="stable")[:top_k]
    lowest = np.broadcast_to(np.asarray(-np.inf if limits is None else limits), scores.shape)
    return [(int(i), float(scores[i])) for i in order if scores[i] >= lowest[i]]


def answered(
    scores: Array, task: Task, top_k: int | None, limits: float | Array | None
) -> list[tuple[int, float]]:
    """The same of any task: of a regression every output and its number, in the outputs' order."""
    if task == "regression":
        return list(enumerate(scores.tolist()))
    return chosen(scores, top_k, limits)


# --- a temperature --------------------------------------------------------------------------------


def sharpened(scores: Array, by: float, multi_label: bool) -> npt.NDArray[np.float32]:
    """Scores (N, C) at the temperature `by`; at 1 they are what they were.

    A temperature acts on scores: log(softmax(z)) is z less a number a photo, so the softmax of
    log(score) / T is that of z / T; a sigmoid's logit is log(score / (1 - score)).
    """
    if by == 1:
        return np.asarray(scores, np.float32)
    z = logits(scores, multi_label) / by
    return np.asarray((sigmoid if multi_label else softmax)(z), np.float32)


def logits(scores: Array, multi_label: bool) -> npt.NDArray[np.float64]:
    """Scores -> numbers whose softmax or sigmoid they are, as far as float32 tells."""
    p = np.asarray(scores, np.float64)
    if multi_label:
        p = p.clip(_TINY, 1 - _NEAR)
        return np.asarray(np.log(p) - np.log1p(-p))
    return np.asarray(np.log(p.clip(_TINY)))


def softmax(z: Array) -> Array:
    """(N, C) -> (N, C), each row of sum 1."""
    powers = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def sigmoid(z: Array) -> Array:
    """Any shape -> 0..1."""
    return np.asarray(np.exp(-np.logaddexp(0, -z)))
