"""A stock block as its fused linears, and the way through them.

How data flows: the residual stream x is float32 and never written in place, so that whoever holds a
block's output keeps it. norm1 -> q, k, v in one product -> attention -> out, which adds x -> norm2
-> up, with its activation -> down, which adds again.

Shapes: as in vitlib/encoder.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.encoder import Block, LayerScale, RotaryAttention, SwiGLU, apply_rope
from vitlib.fast import attention
from vitlib.fast.attention import FirstTokens
from vitlib.fast.cpu import Route
from vitlib.fast.linears import Weights, make, own

# x * sigmoid(1.702 x) is silu(1.702 x) / 1.702 (1606.08415): the factors go into the weights.
QUICK = 1.702
LINEARS = ("qkv", "out", "gate", "up", "down")


@dataclass
class Norm:
    """Gain and offset of a norm, (D,) float32."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass
class BlockWeights:
    """All of a block, LayerScale and the activation's factors in the linears' weights."""

    norms: tuple[Norm, Norm]
    linears: dict[str, Weights]  # by LINEARS; gate only for SwiGLU
    num_heads: int
    activation: str  # gelu, gelu_tanh or silu
    rotary: bool


def gather(block: Block) -> BlockWeights:
    """A block of the model -> its weights, float32; the block is left as it is."""
    attn, mlp = block.attn, block.mlp
    q = scaled(plain(attn.q), attn.head_dim**-0.5)
    linears = {
        "qkv": join(q, plain(attn.k), plain(attn.v)),
        "out": scaled(plain(attn.proj), gamma_of(block.ls1)),
    }
    activation = "silu"
    if isinstance(mlp, SwiGLU):
        both = plain(mlp.fc1)
        biases = (None, None) if both.bias is None else chunks(both.bias, 2)
        for name, weight, bias in zip(("gate", "up"), both.weight.chunk(2), biases, strict=True):
            linears[name] = Weights(weight, bias)
    else:
        linears["up"], activation = plain(mlp.fc1), mlp.activation
    down = plain(mlp.fc2)
    if activation == "quick_gelu":
        activation = "silu"
        linears["up"] = scaled(linears["up"], QUICK)
        down.weight = down.weight / QUICK
    linears["down"] = scaled(down, gamma_of(block.ls2))
    norms = tuple(norm(n) for n in (block.norm1, block.norm2))
    rotary = isinstance(attn, RotaryAttention)
    return BlockWeights(norms, linears, attn.num_heads, activation, rotary)  # type: ignore[arg-type]


def chunks(bias: Tensor, count: int) -> tuple[Tensor, ...]:
    """(N,) -> so many parts, each in memory of its own."""
    return tuple(part.clone() for part in bias.chunk(count))


def norm(module: nn.LayerNorm) -> Norm:
    """A LayerNorm's numbers, float32, its own."""
    return Norm(own(module.weight), own(module.bias), module.eps)


def plain(linear: nn.Linear | nn.Conv2d) -> Weights:
    """The numbers of a linear or a convolution, float32."""
    bias = None if linear.bias is None else own(linear.bias)
    return Weights(linear.weight.detach().float(), bias)


def join(*parts: Weights) -> Weights:
    """Linears of one input -> one, (N + N + ..., K); a missing bias is zeros."""
    weight = torch.cat([p.weight for p in parts])
    if all(p.bias is None for p in parts):
        return Weights(weight)
    biases = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in parts]
    return Weights(weight, torch.cat(biases))


def scaled(of: Weights, gain: Tensor | float | None) -> Weights:
    """The linear whose outputs are `gain` times those of this one; gain: (N,), a number or 1."""
    if gain is None:
        return of
    # A number multiplies as it is: as a tensor it would lie on the CPU, and the weights may not.
    factor: Tensor | float = gain
    rows: Tensor | float = gain
    if isinstance(gain, Tensor):
        factor = gain.detach().float()
        rows = factor.view(-1, 1)
    bias = None if of.bias is None else of.bias * factor
    return Weights(of.weight * rows, bias)


def gamma_of(layer_scale: LayerScale | None) -> Tensor | None:
    """Return the gamma of a LayerScale, (D,); None where the block has none."""
    return None if layer_scale is None else layer_scale.gamma


class FastBlock(nn.Module):
    """Stands where a Block stood: the same call, the same shapes."""

    def __init__(self, weights: BlockWeights, route: Route, lone: bool) -> None:
        """lone: whether it computes its first tokens without K and V, where only they are asked."""
        super().__init__()
        self.num_heads, self.activation = weights.num_heads, weights.activation
        self.rotary, self.route = weights.rotary, route
        self.norm1, self.norm2 = weights.norms
        linears = {name: make(held, route) for name, held in weights.linears.items()}
        self.qkv, self.out = linears["qkv"], linears["out"]
        self.up, self.down = linears["up"], linears["down"]
        self.gate = linears.get("gate")
        self.gather = attention.WAYS[route.attention]
        self.first = first_tokens(weights) if lone else None

    def weights(self) -> BlockWeights:
        """What it was made of, for save()."""
        both = ((name, getattr(self, name)) for name in LINEARS)
        linears = {name: linear.weights() for name, linear in both if linear is not None}
        norms = (self.norm1, self.norm2)
        return BlockWeights(norms, linears, self.num_heads, self.activation, self.rotary)

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, Q, D), as Block's."""
        x = x.float()
        y = self.normed(x, self.norm1)
        if num_queries is not None and self.first is not None and num_queries < x.shape[1]:
            gathered = self.first(
                y, num_queries, None if attn_pos is None else attn_pos[:, :, :num_queries]
            )
        else:
            gathered = self.attend(self.qkv(y), num_queries, attn_pos)
        x = self.out.add(gathered, x[:, :num_queries])
        return self.mlp(self.normed(x, self.norm2), x)

    def normed(self, x: Tensor, by: Norm) -> Tensor:
        """(B, T, D) -> the same, normed (1607.06450), float32."""
        return F.layer_norm(x, by.weight.shape, by.weight, by.bias, by.eps)

    def attend(self, qkv: Tensor, num_queries: int | None, attn_pos: Tensor | None) -> Tensor:
        """(B, T, 3D) -> what the first Q tokens gather, (B, Q, D)."""
        b, t, _ = qkv.shape
        q, k, v = qkv.view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = None
        if self.rotary:
            assert attn_pos is not None
            first = t - attn_pos.shape[1]
            q, k = apply_rope(q, first, attn_pos), apply_rope(k, first, attn_pos)
        elif attn_pos is not None:
            bias = attn_pos[:, :, :num_queries]
        return self.gather(q[:, :, :num_queries], k, v, bias)

    def mlp(self, y: Tensor, x: Tensor) -> Tensor:
        """Normed (B, Q, D), residual (B, Q, D), written over -> (B, Q, D)."""
        if self.gate is None:
            return self.down.add_(self.up.activate(y, self.activation, self.down), x)
        h = self.up.times(y, self.gate.activate(y, self.activation, None))
        return self.down.add_(h, x)


class LastBlock(nn.Module):
    """The last block of a model whose head reads class tokens: for them alone in float32."""

    def __init__(self, few: FastBlock, every: FastBlock) -> None:
        super().__init__()
        self.few, self.every = few, every

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, Q, D), as Block's."""
        return (self.every if num_queries is None else self.few)(x, num_queries, attn_pos)  # type: ignore[no-any-return]


def first_tokens(weights: BlockWeights) -> FirstTokens:
    """The block's q, k and v for its first tokens alone."""
    qkv = weights.linears["qkv"]
    # Copies: MKL's sums depend on where in memory the weights begin, and a spawned process takes no
    # two tensors of one storage.
    q, k, v = (part.clone() for part in qkv.plain().chunk(3))
    q_bias, _, v_bias = (None,) * 3 if qkv.bias is None else chunks(qkv.bias, 3)
    return FirstTokens(q, k, v, (q_bias, v_bias), weights.num_heads)
