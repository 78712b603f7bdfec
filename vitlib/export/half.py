"""16-bit products in an exported graph: float16 weights and inputs, everything else in float32.

How data flows: norms, softmax, activations and the residual stream are float32. Each linear layer
and both products of the attention cast their inputs to float16, and their results back. The largest
float16 is 65504, and activations of large models pass it. So the float32 model runs on photos
first: a layer whose inputs or outputs come near the limit gets powers of two, which divide its
input and weight and multiply its result in float32. They round nothing.

Shapes: as in vitlib/encoder.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.encoder import Attention, RotaryAttention
from vitlib.fast.module_swap import Convert, copy_with_children, swap_stock_modules
from vitlib.variants import AttentionPool
from vitlib.vit import ViT

# Other photos may exceed the largest number of those that the scales were chosen on.
HEADROOM = 8.0
_LARGEST = torch.finfo(torch.float16).max


class HalfScales(NamedTuple):
    """Powers of two that keep a layer within float16.

    Attributes:
        x: What the input is divided by.
        y: What the result is multiplied by.
    """

    x: float = 1.0
    y: float = 1.0


class ObservedLinear(nn.Linear):
    """A linear layer that records the largest number of its input and output."""

    largest_input = 0.0
    largest_output = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, (..., K) -> (..., N).

        Args:
            x: (..., K).
        """
        y = super().forward(x)
        self.largest_input = max(self.largest_input, float(x.abs().max()))
        self.largest_output = max(self.largest_output, float(y.abs().max()))
        return y

    def choose_scales(self) -> HalfScales:
        """Return the smallest scales that leave HEADROOM."""
        x = _choose_scale(self.largest_input * HEADROOM)
        # The weight is divided by the same power as the result.
        largest_weight = float(self.weight.abs().max()) * x
        return HalfScales(x, _choose_scale(max(self.largest_output * HEADROOM, largest_weight)))


class HalfLinear(nn.Linear):
    """A linear layer whose product is in float16; the bias is added in float32."""

    scales = HalfScales()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, (..., K) float32 -> (..., N) float32.

        Args:
            x: (..., K).
        """
        y = F.linear(_divide(x, self.scales.x).half(), self.weight)
        y = _multiply(y.float(), self.scales.y)
        return y if self.bias is None else y + self.bias


class HalfAttention(Attention):
    """Attention whose products are in float16, with a float32 softmax between them."""

    value_scale = 1.0  # what the values are divided by in float16

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """Attend from the queries to every token, (B, T, D) -> (B, Q, D).

        Args:
            x: Normalised tokens, (B, T, D) float32.
            num_queries: As in `Attention.forward`.
            attn_pos: As in `Attention.forward`.

        Returns:
            The attended tokens, (B, Q, D) float32.
        """
        q, k, bias = self.project_qk(x, num_queries, attn_pos)
        v = _divide(self.split_heads(self.v(x)), self.value_scale).half()
        # Queries are scaled first: the scores themselves may pass the largest float16.
        scores = ((q * self.head_dim**-0.5).half() @ k.half().transpose(-1, -2)).float()
        probs = (scores if bias is None else scores + bias).softmax(dim=-1)
        x = _multiply((probs.half() @ v).float(), self.value_scale).transpose(1, 2).flatten(2)
        return self.proj(x if self.sub_norm is None else self.sub_norm(x))


class HalfRotaryAttention(RotaryAttention, HalfAttention):
    """Attention of rotated queries and keys whose products are in float16."""


class HalfAttentionPool(AttentionPool, HalfAttention):
    """Attention pool whose products are in float16."""


_HALF_TYPES: dict[type[nn.Module], type[HalfAttention]] = {
    Attention: HalfAttention,
    RotaryAttention: HalfRotaryAttention,
    AttentionPool: HalfAttentionPool,
}


def halve_products(model: ViT, scales: Mapping[str, HalfScales]) -> ViT:
    """Replace the products of a model by those in float16.

    The patch projection stays in float32: it reads levels of 0 to 255, whose mean it subtracts.

    Args:
        model: A copy for export, of stock modules but for its positions; it is only read.
        scales: Powers of two of linear layers, by path; a missing layer has none.

    Returns:
        A copy whose linear layers hold float16.
    """

    def convert(path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.Linear):
            return _halve_linear(module, scales.get(path, HalfScales()))
        if type(module) not in _HALF_TYPES:
            return None
        children = {
            name: child and swap_stock_modules(child, convert, f"{path}.{name}")
            for name, child in module._modules.items()
        }
        attention = copy_with_children(module, children)
        attention.__class__ = _HALF_TYPES[type(module)]
        assert isinstance(attention, HalfAttention)
        attention.value_scale = scales.get(f"{path}.v", HalfScales()).y
        return attention

    return _swap(model, convert)


@torch.no_grad()
def choose_half_scales(model: ViT, pixels: Iterable[Tensor]) -> dict[str, HalfScales]:
    """Run a model on photos, and choose powers of two that keep its layers within float16.

    Args:
        model: The model in float32, which is only read.
        pixels: Batches of normalised pixels, (B, C, H, W).

    Returns:
        Scales of the layers that need some, by path.
    """
    observed: dict[str, ObservedLinear] = {}

    def convert(path: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.Linear):
            return None
        linear = copy.copy(module)
        linear.__class__ = ObservedLinear
        assert isinstance(linear, ObservedLinear)
        observed[path] = linear
        return linear

    copied = _swap(model, convert)
    for batch in pixels:
        copied.forward_head(copied.forward_features(batch))
    scales = {path: linear.choose_scales() for path, linear in observed.items()}
    return {path: pair for path, pair in scales.items() if pair != HalfScales()}


def _swap(model: ViT, convert: Convert) -> ViT:
    """Swap modules of a model."""
    copied = swap_stock_modules(model, convert)
    assert isinstance(copied, ViT)
    return copied


def _halve_linear(linear: nn.Linear, scales: HalfScales) -> nn.Linear:
    """Return a linear layer in float16."""
    half = copy_with_children(linear, {})
    half.__class__ = HalfLinear
    assert isinstance(half, HalfLinear)
    weight = half.weight.detach() * (scales.x / scales.y)
    half.weight = nn.Parameter(weight.half(), requires_grad=False)
    half.scales = scales
    return half


def _choose_scale(largest: float) -> float:
    """Return the least power of two that brings a number within float16, at least 1."""
    return 2.0 ** max(0, math.ceil(math.log2(max(largest, 1.0) / _LARGEST)))


def _divide(x: Tensor, scale: float) -> Tensor:
    """Divide by a power of two."""
    return x if scale == 1.0 else x * (1 / scale)


def _multiply(x: Tensor, scale: float) -> Tensor:
    """Multiply by a power of two."""
    return x if scale == 1.0 else x * scale
