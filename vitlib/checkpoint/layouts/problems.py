"""What stands between a file's tensors and a model: listed, all at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from vitlib.checkpoint.layouts import detect
from vitlib.checkpoint.layouts.layout import Layout
from vitlib.checkpoint.layouts.table import NameMatch, summarise
from vitlib.errors import CheckpointError
from vitlib.vit import ViT


def list_problems(
    model: ViT,
    state: Mapping[str, Tensor],
    name_match: NameMatch,
    layout: Layout,
    head_wanted: bool,
    not_finite: Sequence[str],
) -> list[str]:
    """Return every missing, unknown, mis-shaped, mis-typed and non-finite tensor, by file names.

    Args:
        model: What the tensors are for, on the meta device.
        state: The tensors by our names.
        name_match: Which of the file's names are which of ours.
        layout: The layout the file is in.
        head_wanted: The classifier is read from the file, too.
        not_finite: Our names of the tensors with NaN or infinity.

    Returns:
        One text for each kind of problem; empty where the tensors are the model.
    """
    wanted = model.state_dict()
    missing, shape = [], []
    not_float: dict[str, list[str]] = {}
    unknown = list(name_match.unexpected)
    for name, like in wanted.items():
        if name not in state:
            if head_wanted or not name.startswith("head"):
                missing.append(layout.file_name(name, model.config))
        elif state[name].shape != like.shape:
            there, expected = _by(state[name].shape), _by(like.shape)
            shape.append(f"{name_match.file_name(name)} is {there}, expected {expected}")
    for name, tensor in state.items():
        if name not in wanted:
            unknown.append(name_match.file_name(name))
        if not tensor.is_floating_point():
            not_float.setdefault(str(tensor.dtype), []).append(name_match.file_name(name))
    kinds = {
        "missing": summarise(missing),
        "unexpected": summarise(dict.fromkeys(unknown)),
        "twice there": summarise(name_match.repeated),
        "wrong shape": ", ".join(shape[:12]) + (f" and {len(shape) - 12} more" * (len(shape) > 12)),
        "not floating point": ", ".join(f"{summarise(n)} ({d})" for d, n in not_float.items()),
        "NaN or infinite values in": summarise(name_match.file_name(name) for name in not_finite),
    }
    told = [f"{kind}: {names}" for kind, names in kinds.items() if names]
    mixed = (
        detect.describe_mixed_names(name_match.unexpected, layout)
        if missing and name_match.unexpected
        else ""
    )
    return [*told, mixed] if mixed else told


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights that no reader opens and no answer can come from.

    Args:
        tensors: Names and weights.

    Raises:
        CheckpointError: Tensors hold NaN or infinity; it names each.
    """
    names = [name for name, tensor in tensors if not is_finite(tensor)]
    if names:
        raise CheckpointError(
            f"NaN or infinite values in: {summarise(names)}: a training that diverged leaves such "
            "weights: take a checkpoint from before, and train with a lower learning rate"
        )


def is_finite(tensor: Tensor) -> bool:
    """Return whether every value is finite."""
    # A finite sum proves it in one pass; a sum that is not finite proves nothing.
    if not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:  # no arithmetic on 8-bit floats
        tensor = tensor.float()
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
