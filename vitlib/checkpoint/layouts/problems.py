"""List every difference between the tensors of a file and those of a model at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitlib.checkpoint.layouts import detect
from vitlib.checkpoint.layouts.layout import Layout
from vitlib.checkpoint.layouts.table import NameMatch, summarise
from vitlib.errors import CheckpointError
from vitlib.vit import ViT


@dataclass(frozen=True)
class Problems:
    """Differences between the tensors of a file and those of a model.

    Attributes:
        missing_keys: Parameters that the file lacks, by vitlib's names.
        unexpected_keys: Tensors that the model lacks, by the file's names.
        presence: A line of text for missing, and one for unexpected tensors, where there are any.
        others: A line for each other kind of problem.
    """

    missing_keys: tuple[str, ...]
    unexpected_keys: tuple[str, ...]
    presence: tuple[str, ...]
    others: tuple[str, ...]


def list_problems(
    model: ViT,
    state: Mapping[str, Tensor],
    name_match: NameMatch,
    layout: Layout,
    head_wanted: bool,
    not_finite: Sequence[str],
) -> Problems:
    """List missing, unexpected, mis-shaped, non-float and non-finite tensors, by the file's names.

    Args:
        model: The model that the tensors are for, on the meta device.
        state: The tensors by vitlib's names.
        name_match: The names of the file for each of vitlib's names.
        layout: The layout of the file.
        head_wanted: The classifier is read from the file, too.
        not_finite: vitlib's names of the tensors with NaN or infinity.

    Returns:
        The problems, by vitlib's names and as text; empty if the tensors fit the model.
    """
    expected = model.state_dict()
    missing: dict[str, str] = {}
    shapes = []
    not_float: dict[str, list[str]] = {}
    unexpected = list(name_match.unexpected)
    for name, like in expected.items():
        if name not in state:
            if head_wanted or not name.startswith("head"):
                missing[name] = layout.file_name(name, model.config)
        elif state[name].shape != like.shape:
            sizes = f"{_format_shape(state[name].shape)}, expected {_format_shape(like.shape)}"
            shapes.append(f"{name_match.file_name(name)} is {sizes}")
    for name, tensor in state.items():
        if name not in expected:
            unexpected.append(name_match.file_name(name))
        if not tensor.is_floating_point():
            not_float.setdefault(str(tensor.dtype), []).append(name_match.file_name(name))
    unexpected = list(dict.fromkeys(unexpected))
    presence = {"missing": summarise(missing.values()), "unexpected": summarise(unexpected)}
    kinds = {
        "repeated": summarise(name_match.repeated),
        "wrong shape": ", ".join(shapes[:12])
        + (f" and {len(shapes) - 12} more" * (len(shapes) > 12)),
        "not floating point": ", ".join(f"{summarise(n)} ({d})" for d, n in not_float.items()),
        "NaN or infinite values in": summarise(name_match.file_name(name) for name in not_finite),
    }
    if missing and name_match.unexpected:
        mixed = detect.describe_mixed_names(name_match.unexpected, layout)
    else:
        mixed = ""
    return Problems(
        tuple(missing),
        tuple(unexpected),
        tuple(f"{kind}: {names}" for kind, names in presence.items() if names),
        (*(f"{kind}: {names}" for kind, names in kinds.items() if names), *filter(None, [mixed])),
    )


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Check that weights are finite; others cannot be loaded again and give no useful output.

    Args:
        tensors: Names and weights.

    Raises:
        CheckpointError: Tensors have NaN or infinity; the message names each.
    """
    names = [name for name, tensor in tensors if not is_finite(tensor)]
    if names:
        raise CheckpointError(
            f"NaN or infinite values in: {summarise(names)}: expected finite weights; the training "
            "diverged: take an earlier checkpoint, and train with a lower learning rate"
        )


def is_finite(tensor: Tensor) -> bool:
    """Return True if every value of a tensor is finite.

    Args:
        tensor: A tensor of any shape and dtype; integers are always finite.

    Returns:
        True if the tensor has neither NaN nor infinity.
    """
    # A finite sum proves that all values are finite, in one pass and without a mask in memory.
    # The sum of large finite values may overflow, so only then is each value compared.
    if not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:  # no arithmetic on 8-bit floats
        tensor = tensor.float()
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _format_shape(shape: Sequence[int]) -> str:
    """Return a shape as text, "768x3x16x16" or "a scalar"."""
    return "x".join(map(str, shape)) or "a scalar"
