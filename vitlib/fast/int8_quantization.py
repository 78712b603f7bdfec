"""Quantize a block's linear layers to 8 bits, with scales searched on samples of their inputs.

How data flows: calibration.py gives rows of each layer's input. For each layer the scales are those
with which its outputs on these rows come nearest to float32. Where a norm makes the input, the
scale and zero point of the input are folded into the norm's weight and bias, so that inference only
rounds. The factors that smooth the channels of an input are folded into whatever makes it.

Shapes: R rows, K inputs, N outputs.
Sources: Jacob et al. 1712.05877 (scale and zero point); Xiao et al. 2211.10438 (SmoothQuant:
outlier channels are divided in the inputs and multiplied in the weights); Nagel et al. 1906.04721
(bias correction).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.fast.block import BlockWeights, scale_outputs
from vitlib.fast.linears import LinearWeights
from vitlib.fast.norms import NormWeights

# SmoothQuant's strengths to try: the share of a channel's range that moves into the weights.
SMOOTHING_STRENGTHS = (0.0, 0.4, 0.6, 0.8)
# Clipping ratios to try: the share of a weight row's range that the int8 range covers.
WEIGHT_CLIPS = (1.0, 0.92, 0.85)
# The strengths are compared on every so many of the rows, and of the outputs.
SEARCH_STRIDE = 8
QUANTIZED_PART = 128 * 1024  # numbers of a weight that are quantized at a time
# Other photos exceed the range of the calibration photos. Without a margin, DeiT-tiny calibrated on
# fridges was 0.2 off on cats; with it 0.04, and no worse on fridges.
RANGE_MARGIN = 1.25
# Layers that read the same input, and share its scale and zero point.
SHARED_INPUT = {"qkv": ("qkv",), "out": ("out",), "up": ("up", "gate"), "down": ("down",)}


@dataclass
class ActivationStats:
    """Statistics of a layer's input on the calibration photos.

    Attributes:
        rows: Some of its rows (R, K).
        low: The smallest number of each channel in all rows, (K,).
        high: The largest one, (K,).
    """

    rows: Tensor
    low: Tensor
    high: Tensor


BlockStats = dict[str, ActivationStats]  # of a block, by SHARED_INPUT


@dataclass
class QuantParams:
    """Layers of one input in 8 bits.

    Attributes:
        linears: Their numbers, by name; they share x_scale and x_zero_point.
        smoothing: What each input channel is divided by, (K,).
    """

    linears: dict[str, LinearWeights]
    smoothing: Tensor

    def quantize(self, x: Tensor) -> Tensor:
        """Quantize an input as the 8-bit kernel takes it.

        Args:
            x: (..., K).

        Returns:
            (..., K), whole numbers from 0 to 255 in float32.
        """
        layer = next(iter(self.linears.values()))
        assert layer.x_scale is not None
        return quantize(x / self.smoothing, layer.x_scale, layer.x_zero_point)


def search_block_params(
    block: BlockWeights, stats: BlockStats, *, smooths_hidden: bool = False
) -> dict[str, QuantParams]:
    """Search the 8-bit form of every layer of a block.

    Args:
        block: The block in float32.
        stats: Statistics of the inputs.
        smooths_hidden: As in CalibrationGoal.

    Returns:
        The 8-bit layers, by SHARED_INPUT.
    """
    params = {}
    for name, members in SHARED_INPUT.items():
        linears = {m: block.linears[m] for m in members if m in block.linears}
        # Where the input of "down" comes from an activation, that cannot take over a smoothing.
        smooth = name != "down" or "mlp" in block.sub_norms or smooths_hidden
        params[name] = search_params(linears, stats[name], smooth=smooth)
    return params


def quantize_block(block: BlockWeights, params: Mapping[str, QuantParams]) -> BlockWeights:
    """Quantize the layers of a block.

    Args:
        block: The block in float32.
        params: The layers to quantize, by SHARED_INPUT. In a block with norms after its branches
            they get a scale that is computed for each token.

    Returns:
        The block with those layers in 8 bits, and with norms and values that suit them.
    """
    if block.post:
        # None of its norms can take over the scale of an input.
        names = {name for group in params for name in SHARED_INPUT[group]}
        per_token = {n: quantize_weights(w) if n in names else w for n, w in block.linears.items()}
        return replace(block, linears=per_token)
    linears, norms, sub_norms = dict(block.linears), list(block.norms), dict(block.sub_norms)
    for group in params.values():
        linears |= group.linears
    for index, name in enumerate(("qkv", "up")):
        if name in params:
            norms[index] = fold_quant_into_norm(norms[index], params[name])
    for norm_name, name in (("attn", "out"), ("mlp", "down")):
        # These layers quantize their inputs themselves: only the smoothing is left to the norm.
        if name in params and norm_name in sub_norms:
            sub_norms[norm_name] = sub_norms[norm_name].scale(1 / params[name].smoothing)
    if "out" in params and "attn" not in sub_norms:
        linears["qkv"] = fold_value_scale(linears["qkv"], 1 / params["out"].smoothing)
    return replace(block, norms=(norms[0], norms[1]), linears=linears, sub_norms=sub_norms)


def fold_value_scale(qkv: LinearWeights, scale: Tensor) -> LinearWeights:
    """Multiply the values of a joined qkv layer.

    Attention averages the values with weights that sum to 1, so that this multiplies the input of
    `out` channel by channel.

    Args:
        qkv: The layer of queries, keys and values, in float or in 8 bits.
        scale: The factor of each channel, (D,).

    Returns:
        The layer with its last third scaled.
    """
    factors = torch.ones(len(qkv.weight), dtype=torch.float32)
    factors[-len(scale) :] = scale
    if qkv.scale is None:
        return scale_outputs(qkv, factors)
    bias = None if qkv.bias is None else qkv.bias * factors
    return replace(qkv, scale=qkv.scale * factors, bias=bias)


def fold_quant_into_norm(norm: NormWeights, params: QuantParams) -> NormWeights:
    """Fold smoothing, scale and zero point of an input into the norm that makes it.

    Args:
        norm: The norm in float32.
        params: The layers that read it.

    Returns:
        A norm whose output, truncated to uint8, is the quantized input: 0.5 is added, which makes
        the truncation a rounding.
    """
    layer = next(iter(params.linears.values()))
    assert layer.x_scale is not None
    unit = params.smoothing * layer.x_scale
    bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias / unit
    return norm._replace(weight=norm.weight / unit, bias=bias + layer.x_zero_point + 0.5)


def dequantize_block(block: BlockWeights) -> BlockWeights:
    """Return a quantized block in float32, with every input in its own units again.

    Args:
        block: A block with some layers in 8 bits.

    Returns:
        The block in float32. The rounding of the weights stays.
    """
    linears = {
        name: LinearWeights(w.dequantize(), None if w.bias is None else w.bias.float())
        for name, w in block.linears.items()
    }
    norms = list(block.norms)
    for index, name in enumerate(("qkv", "up")):
        w, n = block.linears[name], norms[index]
        if w.x_scale is not None:
            assert n.bias is not None
            bias = (n.bias - w.x_zero_point - 0.5) * w.x_scale
            norms[index] = n._replace(weight=n.weight * w.x_scale, bias=bias)
    return replace(block, norms=(norms[0], norms[1]), linears=linears)


def quantize_weights(weights: LinearWeights) -> LinearWeights:
    """Quantize the weight of a layer alone; its input gets a scale for each token.

    Args:
        weights: The layer in float32.

    Returns:
        The layer in 8 bits.
    """
    weight, scale = quantize_rows(weights.weight)
    return LinearWeights(weight, weights.bias, scale, None)


def quantize_rows(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize each row of a weight with the scale of least error.

    Args:
        weight: (N, K) float32.
        importance: The weight of an error in each column, (K,): the mean square of its input. None
            counts all columns alike.

    Returns:
        The weight (N, K) int8 in -127..127, and the scale of each row (N,).
    """
    # Parts that stay in the cache: the three clips pass over each part some twenty times.
    parts = torch.split(weight, max(1, QUANTIZED_PART // weight.shape[1]))
    weights, scales = zip(*(_quantize_part(part, importance) for part in parts), strict=True)
    return torch.cat(weights), torch.cat(scales)


def _quantize_part(weight: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize some rows of a weight, see quantize_rows."""
    largest = weight.abs().amax(dim=1).clamp_(min=1e-12)  # a row of zeros has a scale too
    least, best = torch.full_like(largest, torch.inf), largest / 127
    for clip in WEIGHT_CLIPS:
        scale = largest * clip / 127
        error = round_to_int8(weight, scale).mul_(scale[:, None]).sub_(weight).square_()
        total = error.sum(dim=1) if importance is None else error @ importance
        better = total < least
        least, best = torch.where(better, total, least), torch.where(better, scale, best)
    return round_to_int8(weight, best).to(torch.int8), best


def round_to_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """Round a weight to whole multiples of its rows' scales.

    Args:
        weight: (N, K).
        scale: (N,).

    Returns:
        (N, K), whole numbers in -127..127, in the weight's dtype.
    """
    return (weight / scale[:, None]).round_().clamp_(-127, 127)


def search_params(
    linears: dict[str, LinearWeights], stats: ActivationStats, *, smooth: bool
) -> QuantParams:
    """Search the 8-bit form of layers that read one input.

    Args:
        linears: The layers in float32, by name.
        stats: Statistics of their input.
        smooth: Divide the channels of the input. The caller folds that into what makes it.

    Returns:
        The layers in 8 bits.
    """
    smoothing, x_scale, x_zero_point = _search_smoothing(linears, stats, smooth=smooth)
    x_rounded = fake_quantize(stats.rows / smoothing, x_scale, x_zero_point)
    importance = x_rounded.square().mean(dim=0)
    mean, mean_rounded = stats.rows.mean(dim=0), x_rounded.mean(dim=0)
    quantized = {}
    for name, layer in linears.items():
        weight, scale = quantize_rows(layer.weight * smoothing, importance)
        # Bias correction (1906.04721): the mean error of each output goes into the bias.
        shift = layer.weight @ mean - (weight.float() @ mean_rounded).mul_(scale)
        bias = shift if layer.bias is None else layer.bias + shift
        quantized[name] = LinearWeights(weight, bias, scale, x_scale, x_zero_point)
    return QuantParams(quantized, smoothing)


def _search_smoothing(
    linears: dict[str, LinearWeights], stats: ActivationStats, *, smooth: bool
) -> tuple[Tensor, float, int]:
    """Search the smoothing (K,) of least error, with the scale and zero point that go with it."""
    # Some rows and outputs rank the strengths as all of them do.
    rows = stats.rows[::SEARCH_STRIDE]
    weight = torch.cat([w.weight[::SEARCH_STRIDE] for w in linears.values()])
    exact = F.linear(rows, weight)
    best: tuple[float, Tensor, float, int] | None = None
    x_range = torch.maximum(stats.high, -stats.low).clamp_(min=1e-5)
    w_range = torch.stack([w.weight.abs().amax(dim=0) for w in linears.values()]).amax(dim=0)
    w_range.clamp_(min=1e-5)
    for strength in SMOOTHING_STRENGTHS if smooth else SMOOTHING_STRENGTHS[:1]:
        smoothing = x_range.new_ones(())
        if strength:
            smoothing = x_range**strength / w_range ** (1 - strength)
        smoothing = (smoothing / smoothing.mean()).expand_as(x_range)
        x, w = rows / smoothing, weight * smoothing
        scale = w.abs().amax(dim=1).clamp_(min=1e-12) / 127
        w_rounded = round_to_int8(w, scale).mul_(scale[:, None])
        x_scale, x_zero_point = affine_params(stats.low / smoothing, stats.high / smoothing)
        x_rounded = fake_quantize(x, x_scale, x_zero_point)
        error = F.linear(x_rounded, w_rounded).sub_(exact).square_().mean().item()
        if best is None or error < best[0]:
            best = error, smoothing, x_scale, x_zero_point
    assert best is not None
    return best[1:]


def affine_params(low: Tensor, high: Tensor) -> tuple[float, int]:
    """Return scale and zero point of a uint8 input from its range, with RANGE_MARGIN.

    Args:
        low: The smallest number of each channel, (K,).
        high: The largest one, (K,).

    Returns:
        The scale, and the zero point in 0..255.
    """
    lowest = min(low.min().item(), 0.0) * RANGE_MARGIN
    highest = max(high.max().item(), 0.0) * RANGE_MARGIN
    scale = max(highest - lowest, 1e-12) / 255
    return scale, round(-lowest / scale)


def quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Quantize numbers to uint8, in float32.

    Args:
        x: Any shape.
        scale: The scale.
        zero_point: The zero point, 0 to 255.

    Returns:
        The same shape: whole numbers from 0 to 255.
    """
    return (x / scale).add_(zero_point).round_().clamp_(0, 255)


def fake_quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Quantize numbers to uint8 and back, in float32.

    Args:
        x: Any shape.
        scale: The scale.
        zero_point: The zero point, 0 to 255.

    Returns:
        The same shape: whole multiples of the scale.
    """
    return quantize(x, scale, zero_point).sub_(zero_point).mul_(scale)
