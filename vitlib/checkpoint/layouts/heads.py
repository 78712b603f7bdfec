"""Classifiers under any of the names that training code gives them, alike in every layout.

A linear layer from the width of the model to classes is the head; any other module of such a name
(a projection of self-supervised training, a layer on several tokens) is left out and listed. So is
a linear layer that is a part of such a module: without the rest its scores would be others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from vitlib.checkpoint.layouts.table import Match, NameMatch, Slice, summarise

_LINEAR = re.compile(
    r"(?:classifier|head|fc|linear|linear_head|linear_classifier|cls_head|heads\.head|head\.fc)"
    r"\.(weight|bias)"
)
# What a head of several layers begins with. Every layer of it is a head's, and none is a trunk's.
_MODULES = (
    "classifier.",
    "head.",
    "heads.",
    "fc.",
    "linear.",
    "linear_head.",
    "linear_classifier.",
    "cls_head.",
    "projector.",
    "predictor.",
)


def find_outer_head(tensors: Mapping[str, Tensor], start: str, width: int) -> dict[str, str]:
    """Return the classifier that stands outside a network: its name alone -> its name in the file.

    Args:
        tensors: All of the file, by its names.
        start: The prefix of the network. A head is named after one of its parts, or after none.
        width: Of the network; a layer of another input is no head of it.
    """
    parts = re.findall(r"[^./]*[./]", start)
    befores = {"".join(parts[:count]) for count in range(len(parts))}
    head: dict[str, str] = {}
    for name in tensors:
        leaf = _LINEAR.search(name)
        if leaf is None or leaf.end() != len(name) or name.startswith(start):
            continue
        if name[: leaf.start()] in befores:
            head.setdefault(name[leaf.start() :], name)
    modules = {name.rpartition(".")[0] for name in head}
    for new, old in head.items():
        module = old.removesuffix(new) + _top(new)
        if any(name.startswith(module) and name not in head.values() for name in tensors):
            return {}  # a part of a larger head
    weight = next((old for new, old in head.items() if new.endswith(".weight")), None)
    fits = weight is not None and tensors[weight].ndim == 2 and tensors[weight].shape[1] == width
    return head if len(modules) == 1 and fits else {}


def is_head(name: str) -> bool:
    """Return True if a name is of a module that training code calls a head.

    Args:
        name: Of a tensor, without the network's prefix.

    Returns:
        Whether it begins so.
    """
    return name.startswith(_MODULES)


def _top(name: str) -> str:
    """Return the module that a head's tensor is part of: "head." of "head.fc.weight"."""
    return name.partition(".")[0] + "."


def attach_head(name_match: NameMatch, tensors: Mapping[str, Tensor]) -> list[str]:
    """Make a linear layer of the right width the head, and list other heads as left out.

    Args:
        name_match: What a layout makes of the names; changed in place.
        tensors: By the names of the file.

    Returns:
        A line that names the heads that are left out; empty where none is.
    """
    heads = {name for name in name_match.unexpected if is_head(name)}
    _leave_parts(name_match, {_top(name) for name in heads})
    heads |= {name for name in name_match.unexpected if is_head(name)}
    patch = name_match.matches.get("patch_embed.proj.weight")
    free = "head.weight" not in name_match.matches and "projection.weight" not in name_match.matches
    if patch and free:
        width = patch_width(tensors[patch[0].file_name])
        linear = [
            name
            for name in (*name_match.unexpected, *name_match.ignored)
            if _LINEAR.fullmatch(name) and name.endswith(".weight")
            if tensors[name].ndim == 2 and tensors[name].shape[1] == width
            if not any(n.startswith(_top(name)) for n in heads - {name, _bias_of(name)})
        ]
        if len(linear) == 1:
            _take(name_match, linear[0], tensors)
    left = [name for name in name_match.unexpected if name in heads]
    skipped = [name for name in name_match.ignored if is_head(name)]
    name_match.ignored += left
    left += skipped
    name_match.unexpected = [name for name in name_match.unexpected if name not in heads]
    return [f"heads that are left out: {summarise(left)[:200]}"] if left else []


def _leave_parts(name_match: NameMatch, modules: set[str]) -> None:
    """Take a layout's own head back where it is one layer of a head of several."""
    for name in ("head.weight", "head.bias"):
        parts = name_match.matches.get(name, [])
        if parts and all(_top(part.file_name) in modules for part in parts):
            name_match.unexpected += [part.file_name for part in parts]
            del name_match.matches[name]


def add_head_bias(state: dict[str, Tensor]) -> None:
    """Give a head without a bias a bias of zeros, which is the same function.

    Args:
        state: Tensors by vitlib's names; changed in place.
    """
    weight = state.get("head.weight")
    if weight is not None and weight.ndim == 2 and "head.bias" not in state:
        state["head.bias"] = torch.zeros(weight.shape[0], dtype=weight.dtype)


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _take(name_match: NameMatch, weight: str, tensors: Mapping[str, Tensor]) -> None:
    for name in (weight, _bias_of(weight)):
        if name not in tensors:
            continue
        for names in (name_match.unexpected, name_match.ignored):
            if name in names:
                names.remove(name)
        name_match.matches[f"head.{name.rpartition('.')[2]}"] = [Match(name, Slice(name))]


def patch_width(patch: Tensor) -> int:
    """Return the width of a model by its patch projection.

    Args:
        patch: The kernel.

    Returns:
        The width; 0 where the projection is not a convolution.
    """
    return int(patch.shape[0]) if patch.ndim == 4 else 0
