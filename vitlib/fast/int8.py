"""A block's linears in 8 bits: which levels stand for what, found on samples of their inputs.

How data flows: calibrate.py gives rows of each linear's input; for each linear the scales are those
with which its outputs on these rows come out nearest to float32. Where a norm makes the input, the
levels' scale and zero move into its gain and offset, so that the forward only rounds; what the
channels of an input are divided by moves into whatever makes it.
Sources: Jacob et al. 1712.05877 (levels, scale, zero); Xiao et al. 2211.10438 (difficult channels
are divided in the inputs and multiplied in the weights); Nagel et al. 1906.04721 (bias correction).

Shapes: R rows, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.fast.block import BlockWeights, Norm, scaled
from vitlib.fast.linears import Weights

# What is tried: how much of a channel's range moves into the weights, and how much of the range of
# a row of weights is kept (what lies outside becomes the last level).
STRENGTHS = (0.0, 0.4, 0.6, 0.8)
KEPT_OF_WEIGHTS = (1.0, 0.92, 0.85)
# Other photos go beyond the range of those seen. Without room, DeiT-tiny calibrated on fridges was
# 0.2 off on cats; with it 0.04, and no worse on fridges.
ROOM = 1.25
# Linears of one input, whose levels they share.
TOGETHER = {"qkv": ("qkv",), "out": ("out",), "up": ("up", "gate"), "down": ("down",)}


@dataclass
class Seen:
    """What a linear was given: some rows (R, K), and the range of each channel in all (K,)."""

    rows: Tensor
    low: Tensor
    high: Tensor


Samples = dict[str, Seen]  # of a block, by TOGETHER


@dataclass
class Choice:
    """Linears of one input in 8 bits."""

    linears: dict[str, Weights]
    divided: Tensor  # (K,): what each input channel was divided by

    def rounded(self, x: Tensor) -> Tensor:
        """An input (..., K) -> what its levels stand for, in the weights' units."""
        held = next(iter(self.linears.values()))
        assert held.x_scale is not None
        return as_levels(x / self.divided, held.x_scale, held.x_zero)


def choices(block: BlockWeights, samples: Samples) -> dict[str, Choice]:
    """Float32 weights and rows of their inputs -> how each would be in 8 bits, by TOGETHER."""
    found = {}
    for name, members in TOGETHER.items():
        linears = {m: block.linears[m] for m in members if m in block.linears}
        # Nothing before an activation's output can take a division by channels.
        found[name] = chosen(linears, samples[name], divide=name != "down")
    return found


def quantised(block: BlockWeights, chosen: Mapping[str, Choice] | None) -> BlockWeights:
    """Float32 weights -> those chosen in 8 bits; None: all, with a scale found for each token."""
    if chosen is None:
        alone = {name: without_samples(weights) for name, weights in block.linears.items()}
        return replace(block, linears=alone)
    linears, norms = dict(block.linears), list(block.norms)
    for choice in chosen.values():
        linears |= choice.linears
    for index, name in enumerate(("qkv", "up")):
        if name in chosen:
            norms[index] = into_norm(norms[index], chosen[name])
    if "out" in chosen:
        linears["qkv"] = of_values(linears["qkv"], 1 / chosen["out"].divided)
    return replace(block, norms=(norms[0], norms[1]), linears=linears)


def of_values(qkv: Weights, gain: Tensor) -> Weights:
    """The joined linear with its last third, the values, multiplied: each adds up to 1 of them."""
    whole = torch.ones(len(qkv.weight), dtype=torch.float32)
    whole[-len(gain) :] = gain
    if qkv.scale is None:
        return scaled(qkv, whole)
    bias = None if qkv.bias is None else qkv.bias * whole
    return replace(qkv, scale=qkv.scale * whole, bias=bias)


def into_norm(norm: Norm, choice: Choice) -> Norm:
    """The norm that gives a linear's input in levels, plus a half: cutting off then rounds."""
    held = next(iter(choice.linears.values()))
    assert held.x_scale is not None
    unit = choice.divided * held.x_scale
    return Norm(norm.weight / unit, norm.bias / unit + held.x_zero + 0.5, norm.eps)


def restored(block: BlockWeights) -> BlockWeights:
    """Weights in 8 bits -> the same in float32, every input in its own units again."""
    held = block.linears
    linears = {
        name: Weights(w.plain(), None if w.bias is None else w.bias.float())
        for name, w in held.items()
    }
    norms = list(block.norms)
    for index, name in enumerate(("qkv", "up")):
        w, n = held[name], norms[index]
        if w.x_scale is not None:
            norms[index] = Norm(n.weight * w.x_scale, (n.bias - w.x_zero - 0.5) * w.x_scale, n.eps)
    return replace(block, norms=(norms[0], norms[1]), linears=linears)


def without_samples(weights: Weights) -> Weights:
    """The weights alone in 8 bits."""
    levels, scale = rounded(weights.weight)
    return Weights(levels, weights.bias, scale, None)


def rounded(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(N, K) -> levels in -127..127 and a scale a row, with the least error.

    importance: (K,), how much an error in a column counts: the mean square of its input.
    """
    largest = weight.abs().amax(dim=1).clamp_(min=1e-12)  # a row of zeros has a scale too
    best, found = torch.full_like(largest, torch.inf), largest / 127
    for kept in KEPT_OF_WEIGHTS:
        scale = largest * kept / 127
        error = weight - levels_of(weight, scale) * scale[:, None]
        error = error.square_() if importance is None else error.square_() * importance
        total = error.sum(dim=1)
        better = total < best
        best, found = torch.where(better, total, best), torch.where(better, scale, found)
    return levels_of(weight, found).to(torch.int8), found


def levels_of(weight: Tensor, scale: Tensor) -> Tensor:
    """(N, K), (N,) -> whole numbers in -127..127."""
    return (weight / scale[:, None]).round_().clamp_(-127, 127)


def chosen(linears: dict[str, Weights], seen: Seen, *, divide: bool) -> Choice:
    """Linears of one input, and what it was -> their levels, with the input's in common."""
    rows = seen.rows
    weight = torch.cat([w.weight for w in linears.values()])
    exact = F.linear(rows, weight)
    best: tuple[float, Tensor, float, int] | None = None
    of_rows = torch.maximum(seen.high, -seen.low).clamp_(min=1e-5)
    of_weight = weight.abs().amax(dim=0).clamp_(min=1e-5)
    for strength in STRENGTHS if divide else STRENGTHS[:1]:
        divided = of_rows.new_ones(())
        if strength:
            divided = of_rows**strength / of_weight ** (1 - strength)
        divided = (divided / divided.mean()).expand_as(of_rows)
        x, w = rows / divided, weight * divided
        scale = w.abs().amax(dim=1).clamp_(min=1e-12) / 127
        held = levels_of(w, scale) * scale[:, None]
        step, zero = input_levels(seen.low / divided, seen.high / divided)
        error = (F.linear(as_levels(x, step, zero), held) - exact).square_().mean().item()
        if best is None or error < best[0]:
            best = error, divided, step, zero
    assert best is not None
    _, divided, step, zero = best
    levels_seen = as_levels(rows / divided, step, zero)
    importance = levels_seen.square().mean(dim=0)
    held_ones = {}
    for name, one in linears.items():
        levels, scale = rounded(one.weight * divided, importance)
        held = levels.float() * scale[:, None]
        off = (F.linear(rows, one.weight) - F.linear(levels_seen, held)).mean(dim=0)
        bias = off if one.bias is None else one.bias + off
        held_ones[name] = Weights(levels, bias, scale, step, zero)
    return Choice(held_ones, divided)


def input_levels(low: Tensor, high: Tensor) -> tuple[float, int]:
    """Ranges of channels (K,) -> what a level of the input is worth, and zero's."""
    lowest, highest = min(low.min().item(), 0.0) * ROOM, max(high.max().item(), 0.0) * ROOM
    step = max(highest - lowest, 1e-12) / 255
    return step, round(-lowest / step)


def as_levels(x: Tensor, step: float, zero: int) -> Tensor:
    """Values -> what their levels stand for."""
    return ((x / step + zero).round_().clamp_(0, 255) - zero) * step
