"""A block's linears in 8 bits: which levels stand for what, found on samples of their inputs.

How data flows: calibrate.py gives rows of each linear's input; for each linear the scales are those
with which its outputs on these rows come out nearest to float32; then the inputs' scale and zero are
moved into whatever makes the inputs (the norm's gain and offset, the values' weights), so that the
forward only rounds.
Sources: Jacob et al. 1712.05877 (levels, scale, zero); Xiao et al. 2211.10438 (difficult channels
are divided in the inputs and multiplied in the weights).

Shapes: R rows, K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.fast.block import BlockWeights, Norm, scaled
from vitlib.fast.linears import Weights


# What is tried: how much of a channel's range moves into the weights, and how much of the range of
# the inputs is kept (what lies outside becomes the last level).
STRENGTHS = (0.0, 0.35, 0.5, 0.65, 0.8)
KEPT = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
KEPT_OF_WEIGHTS = (1.0, 0.95, 0.9, 0.85, 0.8)

Samples = dict[str, Tensor]  # of a block: (R, K) rows of the inputs of qkv, out, up, down


@dataclass
class Choice:
    """Of one linear: its weights in 8 bits, and what each input channel was divided by."""

    weights: Weights
    divided: Tensor  # (K,)
    error: float  # mean square, of the outputs on the samples


def quantised(block: BlockWeights, samples: Samples | None) -> BlockWeights:
    """Float32 weights -> in 8 bits; the inputs' scales fixed on samples, or none for each token."""
    old = block.linears
    if samples is None:
        linears = {name: without_samples(weights) for name, weights in old.items()}
        return replace(block, linears=linears)
    qkv = chosen([old["qkv"]], samples["qkv"], divide=True)[0]
    out = chosen([old["out"]], samples["out"], divide=True)[0]
    both = [old[name] for name in ("up", "gate") if name in old]
    up, *gate = chosen(both, samples["up"], divide=True)
    down = chosen([old["down"]], samples["down"], divide=False)[0]
    linears = {"qkv": qkv, "out": out, "up": up, "down": down}
    norms = (into_norm(block.norms[0], qkv), into_norm(block.norms[1], up))
    held = {name: choice.weights for name, choice in linears.items()}
    if gate:  # down's input is a product: its scale goes into one factor, its zero stays
        held["gate"] = gate[0].weights
        held["up"] = gained(held["up"], 1 / scale_of(down))
    width = held["out"].weight.shape[1]
    gain = torch.ones(3 * width)
    gain[2 * width :] = 1 / (out.divided * scale_of(out))  # a row of attention sums to 1
    held["qkv"] = gained(held["qkv"], gain)
    return replace(block, norms=norms, linears=held)


def scale_of(choice: Choice) -> float:
    """What a level of a linear's input is worth."""
    assert choice.weights.x_scale is not None
    return choice.weights.x_scale


def gained(weights: Weights, gain: Tensor | float) -> Weights:
    """The linear whose outputs are gain times those of this one."""
    assert weights.scale is not None
    bias = None if weights.bias is None else weights.bias * gain
    return replace(weights, scale=weights.scale * gain, bias=bias)


def into_norm(norm: Norm, choice: Choice) -> Norm:
    """The norm that gives a linear's input in levels, plus a half: cutting off then rounds."""
    unit = choice.divided * scale_of(choice)
    return Norm(norm.weight / unit, norm.bias / unit + choice.weights.x_zero + 0.5, norm.eps)


def restored(block: BlockWeights) -> BlockWeights:
    """Weights in 8 bits -> the same in float32, every input in its own units again."""
    held = block.linears
    plain = {name: Weights(w.plain(), w.bias) for name, w in held.items()}
    if held["qkv"].x_scale is None:
        return replace(block, linears=plain)
    norms = tuple(
        Norm(n.weight * w.x_scale, (n.bias - w.x_zero - 0.5) * w.x_scale, n.eps)
        for n, w in zip(block.norms, (held["qkv"], held["up"]), strict=True)
    )
    out, down = held["out"], held["down"]
    assert out.x_scale is not None and down.x_scale is not None
    width = plain["out"].weight.shape[1]
    gain = torch.ones(3 * width)
    gain[2 * width :] = out.x_scale
    plain["qkv"] = scaled(plain["qkv"], gain)
    if "gate" in held:
        plain["up"] = scaled(plain["up"], down.x_scale)
    return replace(block, norms=(norms[0], norms[1]), linears=plain)


def without_samples(weights: Weights) -> Weights:
    """The weights alone in 8 bits."""
    levels, scale = rounded(weights.weight)
    return Weights(levels, weights.bias, scale, None)


def rounded(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(N, K) -> levels in -127..127 and a scale a row, with the least error.

    importance: (K,), how much an error in a column counts: the mean square of its input.
    """
    largest = weight.abs().amax(dim=1).clamp_(min=1e-12)
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


def chosen(linears: list[Weights], rows: Tensor, *, divide: bool) -> list[Choice]:
    """Linears of one input, and rows of it (R, K) -> their levels, with the input's in common."""
    weight = torch.cat([w.weight for w in linears])
    exact = F.linear(rows, weight)
    best: tuple[float, Tensor, float, int] | None = None
    of_rows = rows.abs().amax(dim=0).clamp_(min=1e-5)
    of_weight = weight.abs().amax(dim=0).clamp_(min=1e-5)
    for strength in STRENGTHS if divide else STRENGTHS[:1]:
        divided = of_rows**strength / of_weight ** (1 - strength) if strength else torch.ones(())
        divided = (divided / divided.mean()).expand_as(of_rows)
        x, w = rows / divided, weight * divided
        levels, scale = rounded(w)
        held = levels.float() * scale[:, None]
        for kept in KEPT:
            step, zero = input_levels(x, kept)
            error = (F.linear(as_levels(x, step, zero), held) - exact).square_().mean().item()
            if best is None or error < best[0]:
                best = error, divided, step, zero
    assert best is not None
    error, divided, step, zero = best
    importance = as_levels(rows / divided, step, zero).square_().mean(dim=0)
    choices = []
    for weights in linears:
        levels, scale = rounded(weights.weight * divided, importance)
        held = Weights(levels, weights.bias, scale, step, zero)
        choices.append(Choice(held, divided, error))
    return choices


def input_levels(x: Tensor, kept: float) -> tuple[float, int]:
    """Rows (R, K), the share of their range that is kept -> what a level is worth, and zero's."""
    low, high = min(x.min().item() * kept, 0.0), max(x.max().item() * kept, 0.0)
    step = max(high - low, 1e-12) / 255
    return step, round(-low / step)


def as_levels(x: Tensor, step: float, zero: int) -> Tensor:
    """Values -> what their levels stand for."""
    return ((x / step + zero).round_().clamp_(0, 255) - zero) * step


