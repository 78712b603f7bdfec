"""Search one checkpoint for layers that training does not leave as they are.

A finding is a suspicion with its reason, not a proof: a new head that is still to be trained is
reported too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vitlib.checkpoint.layouts.table import summarise
from vitlib.checkpoint.read import Checkpoint
from vitlib.checks.compare import output_name
from vitlib.testing.distance import relative_distance
from vitlib.testing.images import seeded_images
from vitlib.vit import ViT

_FRESH_STD = 0.02  # DeiT, timm, transformers: a normal of 0.02
_MIN_SAMPLE = 4096  # weights; smaller layers pass the test of a distribution by chance
_MAX_WEIGHT = 1e4
_MAX_RATIO = 100.0  # of a layer's RMS to that of the same layer in other blocks
_MIN_DISTANCE = 1e-6  # between the outputs of two different images


class Finding(NamedTuple):
    """An anomaly of a checkpoint.

    Attributes:
        what: The reason, such as "all zero".
        tensors: The tensors, by their names in the file.
    """

    what: str
    tensors: str


def find_anomalies(checkpoint: Checkpoint) -> tuple[Finding, ...]:
    """Search a checkpoint for problems that stop it from loading, and for suspicious layers.

    Args:
        checkpoint: The checkpoint.

    Returns:
        The findings; empty for a healthy checkpoint.
    """
    if checkpoint.problems:
        return tuple(Finding("does not load", problem) for problem in checkpoint.problems)
    cfg, unread = checkpoint.model.config, _unread_prefixes(checkpoint)
    state = {name: t for name, t in checkpoint.state.items() if not name.startswith(unread)}

    def describe(names: Iterable[str]) -> str:
        return summarise(dict.fromkeys(checkpoint.layout.file_name(name, cfg) for name in names))

    findings = [
        Finding(what, describe(names)) for what, test in _TESTS if (names := list(test(state)))
    ]
    return (*findings, *_check_outputs(checkpoint))


def unverified_facts(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the facts that no file states, with the values that are assumed.

    No tensor shows a wrong value: the model runs and gives other numbers. The rule of resizing
    positions is left out, because it changes nothing at the size of the file.

    Args:
        checkpoint: The checkpoint.

    Returns:
        Such as "num_heads=12", with "(can be wrong)" where other values are common.
    """
    return tuple(
        f"{name}={getattr(checkpoint.model.config, name)!r}"
        + (" (can be wrong)" if name in checkpoint.doubtful else "")
        for name in checkpoint.assumed
        if name != "position_resize"
    )


def _unread_prefixes(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return prefixes of tensors that forward does not read; pre-training left them as they are."""
    cfg = checkpoint.model.config
    prefixes = ["patch_embed.mask_token"]
    prefixes += ["pooler."] if cfg.pool != "pooler" else []
    prefixes += ["attn_pool."] if cfg.pool != "map" else []
    prefixes += ["norm."] if cfg.final_norm == "none" else []
    return tuple(prefixes)


def _zero(state: Mapping[str, Tensor]) -> Iterable[str]:
    """Yield tensors of zeros. Biases are left out: layouts that need one for keys write zeros."""
    return (n for n, t in state.items() if not n.endswith(".bias") and not bool(t.any()))


def _fresh_norms(state: Mapping[str, Tensor]) -> Iterable[str]:
    """Yield norms whose scale is 1 and whose shift is 0 everywhere."""
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and tensor.ndim == 1 and bool((tensor == 1).all()):
            bias = state.get(f"{module}.bias")
            if bias is None or not bool(bias.any()):
                yield name


def _constant_scales(state: Mapping[str, Tensor]) -> Iterable[str]:
    """Yield LayerScale vectors of one value."""
    return (
        name
        for name, tensor in state.items()
        if name.endswith(("ls1.gamma", "ls2.gamma")) and bool((tensor == tensor[0]).all())
    )


def _fresh_layers(state: Mapping[str, Tensor]) -> Iterable[str]:
    """Yield layers that look as the usual initialisations draw them."""
    for name, tensor in state.items():
        if tensor.ndim not in (2, 4) or not name.endswith(".weight"):
            continue
        bias = state.get(name.removesuffix("weight") + "bias")
        is_zero_bias = bias is not None and not bool(bias.any())
        if is_zero_bias or tensor.numel() >= _MIN_SAMPLE:
            no_bias = bias is None or is_zero_bias
            if (no_bias and _is_normal(tensor.float())) or _is_uniform(tensor.float(), bias):
                yield name


def _is_normal(x: Tensor) -> bool:
    """Return True if mean, spread and kurtosis are those of draws from a normal of 0.02.

    The bounds are several standard errors of n draws: 1 / sqrt(2 n) for the standard deviation,
    sqrt(24 / n) for the kurtosis, which is 3.
    """
    n = x.numel()
    std, mean = float(x.std()), float(x.mean())
    if abs(std / _FRESH_STD - 1) > 4 / math.sqrt(2 * n) + 1e-3:
        return False
    kurtosis = float((((x - mean) / std) ** 4).mean())
    return abs(mean) < 5 * std / math.sqrt(n) and abs(kurtosis - 3) < 6 * math.sqrt(24 / n) + 0.01


def _is_uniform(x: Tensor, bias: Tensor | None) -> bool:
    """Return True if weights and bias look as torch draws them: uniform in +-1 / sqrt(inputs).

    A uniform distribution in +-b has the standard deviation b / sqrt(3) and the kurtosis 1.8.
    """
    n, bound = x.numel(), 1 / math.sqrt(x[0].numel())
    most = max(float(x.abs().max()), float(bias.float().abs().max()) if bias is not None else 0.0)
    if n < _MIN_SAMPLE or most > bound * 1.005:
        return False
    std = float(x.std())
    kurtosis = float((((x - x.mean()) / std) ** 4).mean()) if std else 0.0
    spread = abs(std * math.sqrt(3) / bound - 1) < 4 / math.sqrt(2 * n) + 1e-3
    return spread and abs(kurtosis - 1.8) < 6 * math.sqrt(24 / n) + 0.01


def _twins(state: Mapping[str, Tensor]) -> Iterable[str]:
    """Yield the tensors of a block that equals an earlier block in every number."""
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name.startswith("blocks."):
            _, number, leaf = name.split(".", 2)
            blocks.setdefault(number, {})[leaf] = tensor
    # Blocks of one sum are candidates: comparing each pair in full would read all weights often.
    by_sum: dict[float, list[dict[str, Tensor]]] = {}
    for number, block in blocks.items():
        alike = by_sum.setdefault(float(block["mlp.fc2.weight"].float().sum()), [])
        if any(_equal(block, other) for other in alike):
            yield from (f"blocks.{number}.{leaf}" for leaf in block)
        alike.append(block)


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Return True if two blocks have the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _too_large(state: Mapping[str, Tensor]) -> Iterable[str]:
    """Yield tensors with a weight beyond any that training leaves."""
    return (n for n, t in state.items() if t.numel() and float(t.abs().max()) > _MAX_WEIGHT)


def _unlike_others(state: Mapping[str, Tensor]) -> Iterable[str]:
    """Yield layers far larger or smaller than the same layer of the other blocks."""
    sizes: dict[str, dict[str, float]] = {}
    for name, tensor in state.items():
        if name.startswith("blocks.") and tensor.ndim == 2:
            size = float(tensor.float().square().mean().sqrt())
            sizes.setdefault(name.split(".", 2)[2], {})[name] = size
    for alike in sizes.values():
        usual = sorted(alike.values())[len(alike) // 2]
        for name, size in alike.items():
            if size and usual and not 1 / _MAX_RATIO < size / usual < _MAX_RATIO:
                yield name


_TESTS: tuple[tuple[str, Callable[[Mapping[str, Tensor]], Iterable[str]]], ...] = (
    ("all zero", _zero),
    ("untrained: a norm of ones and zeros", _fresh_norms),
    ("untrained: a LayerScale of one value", _constant_scales),
    ("untrained: looks like a random initialisation", _fresh_layers),
    ("equal to an earlier block", _twins),
    (f"implausible: weights beyond {_MAX_WEIGHT:g}", _too_large),
    (f"implausible: {_MAX_RATIO:g} times off the same layer of other blocks", _unlike_others),
)


@torch.inference_mode()
def _check_outputs(checkpoint: Checkpoint) -> list[Finding]:
    """Run the model on two images; report outputs that are not finite, or equal."""
    cfg = checkpoint.model.config
    with torch.device("meta"):
        model = ViT(cfg)
    model.load_state_dict(checkpoint.state, assign=True)
    first, second = model.float().eval()(seeded_images(cfg))
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        return [Finding("not finite: the output has NaN or infinity", output_name(cfg))]
    if relative_distance(first, second) < _MIN_DISTANCE and first.numel() > 1:
        return [Finding("constant: two different images give the same output", output_name(cfg))]
    return []
