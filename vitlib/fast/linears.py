"""One linear layer, four ways: torch's own, packed for oneDNN, and in 8 bits.

All take and give activations as the block (block.py) holds them: float32, or bfloat16 where the
route says so. The residual stream is always float32.

Shapes: (..., K) inputs to (..., N) outputs; M rows in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.errors import ConfigError
from vitlib.fast import cpu, onednn_ops
from vitlib.fast.cpu import Route, route
from vitlib.fast.onednn_ops import MIDDLE


@dataclass
class Weights:
    """What a linear is made of; `scale` only in 8 bits."""

    weight: Tensor  # (N, K) float32 or bfloat16, or int8
    bias: Tensor | None = None  # (N,) float32
    scale: Tensor | None = None  # (N,) float32: a weight's level times this is the weight
    # What a level of the input stands for, (level - x_zero) * x_scale; None: found for each token.
    x_scale: float | None = None
    x_zero: int = MIDDLE

    def plain(self) -> Tensor:
        """(N, K) float32, whatever they are held in."""
        weight = self.weight.float()
        return weight if self.scale is None else weight * self.scale[:, None]


def own(tensor: Tensor) -> Tensor:
    """A small tensor, float32, in memory of its own: one left in a mapped file keeps all of it."""
    return tensor.detach().to(torch.float32, copy=True)


class FastLinear(nn.Module):
    """What a block asks of a linear. This one is torch's own, and serves where nothing better is.

    It stands where an nn.Linear stood: `weight`, `bias`, `in_features`, `out_features`.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.out_features, self.in_features = weights.weight.shape
        self.dtype = dtype
        self.held = self.hold(weights)
        self.bias = None if weights.bias is None else weights.bias.to(dtype)

    def hold(self, weights: Weights) -> Tensor:
        """The weights as the kernel takes them."""
        return weights.plain().to(self.dtype, copy=True)  # the model may change

    @property
    def weight(self) -> Tensor:
        """(N, K) float32."""
        return self.weights().plain()

    def weights(self) -> Weights:
        """What it was made of."""
        return Weights(self.held, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N) in this linear's dtype."""
        return F.linear(x.to(self.dtype), self.held, self.bias)

    def activate(self, x: Tensor, activation: str, then: FastLinear | None) -> Tensor:  # noqa: ARG002
        """(..., K) -> (..., N) after the activation, as the linear `then` wants its input."""
        return activated(self(x), activation)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """(..., K), (..., N) -> the linear of x, times other."""
        return self(x) * other  # type: ignore[no-any-return]

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """(..., K), (..., N) float32 -> residual + the linear of x, (..., N) float32."""
        mine: Tensor = self(x)
        return mine.float().add_(residual)  # a sum of two dtypes would take four times as long

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        """The same; the residual may be written over."""
        return self.add(x, residual)


class OpaqueLinear(FastLinear):
    """A linear whose weights are in oneDNN's own order, which nothing can read or write."""

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the weights unpacked, as an array of bytes: a tensor made here
        would be gone before a spawned process opens its memory."""
        weight = self.weights().weight.contiguous()
        array = weight.view(torch.uint8).numpy()
        return {**self.__dict__, "held": (array, weight.dtype)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Pack the weights for this machine."""
        super().__setstate__({**state, "held": None})  # type: ignore[no-untyped-call]
        array, dtype = state["held"]
        self.held = self.hold(Weights(torch.from_numpy(array.copy()).view(dtype)))


class PackedLinear(OpaqueLinear):
    """oneDNN's kernels on weights in their own order, with what follows fused into them."""

    def hold(self, weights: Weights) -> Tensor:
        """(N, K) -> in oneDNN's own order."""
        return onednn_ops.pack(weights.plain().to(self.dtype))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As OpaqueLinear's; without the packed operations here, torch's own linear."""
        if onednn_ops.has_packed_linear(state["dtype"]):
            super().__setstate__(state)
            return
        array, dtype = state["held"]
        weight = torch.from_numpy(array.copy()).view(dtype)
        self.__class__ = FastLinear  # type: ignore[assignment]
        self.__setstate__({**state, "held": weight})

    def weights(self) -> Weights:
        """What it was made of."""
        return Weights(self.held.to_dense(), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return onednn_ops.linear(x.to(self.dtype), self.held, self.bias)

    def activate(self, x: Tensor, activation: str, then: FastLinear | None) -> Tensor:  # noqa: ARG002
        """(..., K) -> (..., N), after the activation."""
        return onednn_ops.linear(x.to(self.dtype), self.held, self.bias, activation)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """(..., K), (..., N) -> (..., N), multiplied."""
        return onednn_ops.linear_with(x.to(self.dtype), self.held, self.bias, other, "mul")

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """(..., K), (..., N) -> (..., N) float32, added."""
        if self.dtype == torch.float32:
            return onednn_ops.linear_with(x, self.held, self.bias, residual.contiguous(), "add")
        return super().add(x, residual)


class Int8Linear(OpaqueLinear):
    """u8 by s8 on VNNI; the input's levels were fixed by calibration.

    A norm that makes the input has the levels' scale and zero in its own weights, so that all that
    is left is to round. `add` takes bytes, or an input in its own units.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        super().__init__(weights, dtype)
        assert weights.scale is not None
        self.scale = weights.scale
        self.bias = None if weights.bias is None else weights.bias.float()
        self.x_scale = 1.0 if weights.x_scale is None else weights.x_scale
        self.x_zero = weights.x_zero

    def hold(self, weights: Weights) -> Tensor:
        """(N, K) -> in oneDNN's own order."""
        return onednn_ops.pack_int8(weights.weight)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As OpaqueLinear's. Raises ConfigError where this CPU cannot do it."""
        route_of_int8()
        super().__setstate__(state)

    def weights(self) -> Weights:
        """What it was made of."""
        weight = self.held.to_dense().t().contiguous()
        return Weights(weight, self.bias, self.scale, self.x_scale, self.x_zero)

    def levels(self, x: Tensor) -> Tensor:
        """(..., K) levels, as bytes or as floats plus a half, lost here -> (M, K) bytes."""
        if x.dtype != torch.uint8:
            x = onednn_ops.to_bytes(x.clamp_(0, 255))  # which cuts off: hence the half
        return x.reshape(-1, x.shape[-1])

    def run(self, x: Tensor, dtype: torch.dtype, *fused: str | float | int) -> Tensor:
        """(..., K) -> (..., N) of the dtype."""
        y = onednn_ops.linear_int8(
            self.levels(x), self.x_scale, self.x_zero, self.held, self.scale, self.bias, dtype,
            *fused,  # type: ignore[arg-type]
        )  # fmt: skip
        return y.view(*x.shape[:-1], self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return self.run(x, self.dtype)

    def activate(self, x: Tensor, activation: str, then: FastLinear | None) -> Tensor:
        """(..., K) -> (..., N), after the activation."""
        if type(then) is Int8Linear:
            return self.run(x, torch.uint8, activation, then.x_scale, then.x_zero)
        return self.run(x, self.dtype, activation)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """(..., K), (..., N) -> (..., N) float32, added."""
        return self.added(x, residual, "add")

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        """The same, into the residual."""
        return self.added(x, residual, "sum")

    def added(self, x: Tensor, residual: Tensor, how: str) -> Tensor:
        """(..., K), (..., N) -> (..., N) float32."""
        flat = residual.reshape(-1, self.out_features)
        if x.dtype != torch.uint8:
            x = x.float().mul_(1 / self.x_scale).add_(self.x_zero + 0.5)
        y = onednn_ops.linear_int8_add(
            self.levels(x), self.x_scale, self.x_zero, self.held, self.scale, self.bias, flat, how
        )
        return y.view(residual.shape)


class Int8PerToken(Int8Linear):
    """The same where no photos were given to calibrate with: each token has its own scale."""

    def weights(self) -> Weights:
        """What it was made of."""
        weights = super().weights()
        weights.x_scale = None
        return weights

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        x = x.float()
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12)
        levels = (x * (127 / largest)).add_(MIDDLE + 0.5)
        flat = self.levels(levels)
        y = onednn_ops.linear_int8(flat, 1.0, MIDDLE, self.held, self.scale, None, torch.float32)
        y = y.view(*x.shape[:-1], self.out_features).mul_(largest / 127)
        return (y if self.bias is None else y.add_(self.bias)).to(self.dtype)

    def activate(self, x: Tensor, activation: str, then: FastLinear | None) -> Tensor:  # noqa: ARG002
        """(..., K) -> (..., N), after the activation."""
        return activated(self(x), activation)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """(..., K), (..., N) -> (..., N) float32, added."""
        return FastLinear.add(self, x, residual)

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        """The same."""
        return FastLinear.add(self, x, residual)


def activated(x: Tensor, activation: str) -> Tensor:
    """gelu, gelu_tanh or silu of what nobody else reads."""
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def route_of_int8() -> Route:
    """The route of int8 on this CPU. Raises ConfigError where it has none."""
    way = route("int8")
    if way is None:
        raise ConfigError(
            f"int8 needs a CPU with AVX-512 VNNI and this one has {cpu.this_machine().features}"
            ": use fp32 or bf16"
        )
    if not onednn_ops.has_int8_linear():
        raise ConfigError(
            f"int8 needs operations that torch {torch.__version__} does not have here, or that do "
            "not compute what they should: use fp32 or bf16"
        )
    return way


def make(weights: Weights, way: Route) -> FastLinear:
    """The linear of a route."""
    if weights.scale is not None and way.arithmetic == "int8":
        per_token = weights.x_scale is None
        return (Int8PerToken if per_token else Int8Linear)(weights, way.attention_dtype)
    # What int8 leaves out is in what its attention is in.
    dtype = torch.float32 if way.arithmetic == "fp32" else way.attention_dtype
    packed = way.packed and onednn_ops.has_packed_linear(dtype)
    return (PackedLinear if packed else FastLinear)(weights, dtype)
