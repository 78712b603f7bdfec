"""What one checkpoint alone says of its health: layers that no training leaves so.

A finding is a suspicion with its reason, not a proof: a head somebody meant to train next is found
too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vitlib.checkpoint.layouts.table import summarise
from vitlib.checks.compare import distance, output_name, probe
from vitlib.vit import ViT
from vitlib.weights import Checkpoint

_FRESH_STD = 0.02  # DeiT, timm, transformers: a normal of 0.02
_FEW = 4096  # numbers; of fewer, without a bias of zeros, chance looks like anything
_LARGE = 1e4
_RATIO = 100.0  # of a block's layer to the same layer of the others
_SAME = 1e-6


class Finding(NamedTuple):
    """What is suspicious, and the tensors that it is of, by their names in the file."""

    what: str
    tensors: str


def find_anomalies(found: Checkpoint) -> tuple[Finding, ...]:
    """Everything suspicious in a checkpoint: what stops it from loading, and what would not."""
    if found.problems:
        return tuple(Finding("does not load", problem) for problem in found.problems)
    cfg, unread = found.model.config, _unread(found)
    state = {name: t for name, t in found.state.items() if not name.startswith(unread)}

    def told(names: Iterable[str]) -> str:
        return summarise(dict.fromkeys(found.layout.name_of(name, cfg) for name in names))

    findings = [Finding(what, told(names)) for what, test in _TESTS if (names := list(test(state)))]
    return (*findings, *_outputs(found))


def unverified_facts(found: Checkpoint) -> tuple[str, ...]:
    """Return the facts that no file says, with the values that they are taken to have.

    No tensor shows a wrong one: the model runs and gives other numbers. How positions are resized
    is left out, for it changes nothing at the size of the file.
    """
    return tuple(
        f"{name}={getattr(found.model.config, name)!r}"
        + (" (can be wrong)" if name in found.doubtful else "")
        for name in found.assumed
        if name != "position_resize"
    )


def _unread(found: Checkpoint) -> tuple[str, ...]:
    """What no forward reads: it is as its pre-training left it."""
    cfg = found.model.config
    names = ["patch_embed.mask_token"]
    names += ["pooler."] if cfg.pool != "pooler" else []
    names += ["attn_pool."] if cfg.pool != "map" else []
    names += ["norm."] if cfg.final_norm == "none" else []
    return tuple(names)


def _zero(state: Mapping[str, Tensor]) -> Iterable[str]:
    """A bias of zeros is common: keys without one get it in layouts that want it."""
    return (n for n, t in state.items() if not n.endswith(".bias") and not bool(t.any()))


def _fresh_norms(state: Mapping[str, Tensor]) -> Iterable[str]:
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and tensor.ndim == 1 and bool((tensor == 1).all()):
            bias = state.get(f"{module}.bias")
            if bias is None or not bool(bias.any()):
                yield name


def _constant_scales(state: Mapping[str, Tensor]) -> Iterable[str]:
    return (
        name
        for name, tensor in state.items()
        if name.endswith(("scale1", "scale2")) and bool((tensor == tensor[0]).all())
    )


def _fresh_layers(state: Mapping[str, Tensor]) -> Iterable[str]:
    for name, tensor in state.items():
        if tensor.ndim not in (2, 4) or not name.endswith(".weight"):
            continue
        bias = state.get(name.removesuffix("weight") + "bias")
        if (bias is not None and not bool(bias.any())) or tensor.numel() >= _FEW:
            zero = bias is None or not bool(bias.any())
            if (zero and _is_normal(tensor.float())) or _is_uniform(tensor.float(), bias):
                yield name


def _is_normal(x: Tensor) -> bool:
    """Whether these look like draws from a normal of 0.02: by their mean, spread and tails."""
    n = x.numel()
    std, mean = float(x.std()), float(x.mean())
    if abs(std / _FRESH_STD - 1) > 4 / math.sqrt(2 * n) + 1e-3:
        return False
    tails = float((((x - mean) / std) ** 4).mean())
    return abs(mean) < 5 * std / math.sqrt(n) and abs(tails - 3) < 6 * math.sqrt(24 / n) + 0.01


def _is_uniform(x: Tensor, bias: Tensor | None) -> bool:
    """Whether these look like torch's own: uniform within 1 / sqrt(inputs), the bias too."""
    n, bound = x.numel(), 1 / math.sqrt(x[0].numel())
    most = max(float(x.abs().max()), float(bias.float().abs().max()) if bias is not None else 0.0)
    if n < _FEW or most > bound * 1.005:
        return False
    std = float(x.std())
    tails = float((((x - x.mean()) / std) ** 4).mean()) if std else 0.0
    spread = abs(std * math.sqrt(3) / bound - 1) < 4 / math.sqrt(2 * n) + 1e-3
    return spread and abs(tails - 1.8) < 6 * math.sqrt(24 / n) + 0.01


def _twins(state: Mapping[str, Tensor]) -> Iterable[str]:
    """The second of two blocks that are the same in every number."""
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, number, leaf = name.split(".", 2)
            blocks.setdefault(number, {})[leaf] = tensor
    seen: dict[float, list[dict[str, Tensor]]] = {}
    for number, block in blocks.items():
        alike = seen.setdefault(float(block["mlp.fc2.weight"].float().sum()), [])
        if any(_equal(block, other) for other in alike):
            yield from (f"blocks.{number}.{leaf}" for leaf in block)
        alike.append(block)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def _absurd(state: Mapping[str, Tensor]) -> Iterable[str]:
    return (n for n, t in state.items() if t.numel() and float(t.abs().max()) > _LARGE)


def _unlike_others(state: Mapping[str, Tensor]) -> Iterable[str]:
    """Layers far larger or smaller than the same layer of the other blocks."""
    sizes: dict[str, dict[str, float]] = {}
    for name, tensor in state.items():
        if name.startswith("blocks.") and tensor.ndim == 2:
            size = float(tensor.float().square().mean().sqrt())
            sizes.setdefault(name.split(".", 2)[2], {})[name] = size
    for alike in sizes.values():
        usual = sorted(alike.values())[len(alike) // 2]
        for name, size in alike.items():
            if size and usual and not 1 / _RATIO < size / usual < _RATIO:
                yield name


_TESTS: tuple[tuple[str, Callable[[Mapping[str, Tensor]], Iterable[str]]], ...] = (
    ("all zero", _zero),
    ("untrained: a norm of ones and zeros", _fresh_norms),
    ("untrained: a LayerScale of one value", _constant_scales),
    ("untrained: looks as it was drawn at the start", _fresh_layers),
    ("the same numbers as an earlier block", _twins),
    (f"absurd: numbers beyond {_LARGE:g}", _absurd),
    (f"absurd: {_RATIO:g} times off the same layer of other blocks", _unlike_others),
)


@torch.inference_mode()
def _outputs(found: Checkpoint) -> list[Finding]:
    """Whether the model tells two images apart at all."""
    cfg = found.model.config
    with torch.device("meta"):
        model = ViT(cfg)
    model.load_state_dict(found.state, assign=True)
    one, other = model.float().eval()(probe(cfg))
    if not bool(torch.isfinite(one).all() and torch.isfinite(other).all()):
        return [Finding("dead: gives NaN or infinity", output_name(cfg))]
    if distance(one, other) < _SAME and one.numel() > 1:
        return [Finding("dead: two different images give the same", output_name(cfg))]
    return []
