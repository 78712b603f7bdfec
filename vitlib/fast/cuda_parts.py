"""The fast counterparts of a model's stock parts on a GPU.

How data flows: Parts makes them, on the device. Blocks compute in one dtype, the residual stream
too; the final norm and the heads in float32. Attention goes to the kernel that BACKENDS names.

The last block computes only the tokens that are read. Its K and V are not absorbed as on a CPU
(attention.py): that saves 1.4 % of ViT-B/16's arithmetic, and at batch 1 adds four kernels to about
130.

Shapes: as in vitlib/encoder.py; P prefix tokens, N patches.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitlib.encoder import AttentionPool, Block
from vitlib.fast.attention import fused
from vitlib.fast.block import BlockWeights, FastBlock, Norm, gather, plain
from vitlib.fast.fp8 import Fp8Linear
from vitlib.fast.linears import FastLinear, Weights
from vitlib.fast.machine import Route
from vitlib.fast.parts import Levels, Projection, with_children
from vitlib.patch_embed import PatchEmbed
from vitlib.positions import AttentionPositions

Grid = tuple[int, int]

ON = ("cuda",)  # what pins, captures and compiles
CUDNN_TOKENS = 512  # below, cuDNN's plans cost more at start than they save

_FLASH, _EFFICIENT, _CUDNN, _MATH = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
# The first that takes the shape serves it. Flash takes neither float32 nor a bias; cuDNN's masks
# have given NaN (pytorch#196678), and it fails at odd numbers of tokens (#169849, #171627).
BACKENDS = {
    "float32": [_EFFICIENT, _MATH],
    "bias": [_EFFICIENT, _MATH],
    "long": [_CUDNN, _FLASH, _EFFICIENT, _MATH],
    "other": [_FLASH, _EFFICIENT, _MATH],
}


class Parts(NamedTuple):
    """Makes the fast counterparts of stock parts, on a device."""

    way: Route
    device: torch.device
    fp8: bool
    stream: torch.dtype  # of tokens between parts: float32 where some are the user's own

    def fast(self, path: str, module: nn.Module) -> nn.Module | None:  # noqa: ARG002
        """A stock part -> its counterpart; None where only its children have one."""
        if isinstance(module, Block):
            return CudaBlock(self.moved(gather(module)), self.way, self.fp8, self.stream)
        if isinstance(module, PatchEmbed):
            return self.embed(module, None)
        if isinstance(module, AttentionPositions):
            return CudaPositions(self.copied(module), self.stream)
        if isinstance(module, AttentionPool):
            return CudaPool(self.copied(module), self.way.attention_dtype)
        if isinstance(module, nn.LayerNorm):
            norm = self.copied(module)
            norm.__class__ = Float32Norm
            return norm
        if isinstance(module, nn.Linear):  # a head: exact, as it is little and gives the answer
            return FastLinear(self.held(plain(module)))
        return None if any(module.children()) else self.copied(module)

    def copied(self, module: nn.Module) -> nn.Module:
        """A module on the device, float32."""
        return copy.deepcopy(module).requires_grad_(False).to(self.device, torch.float32)

    def held(self, weights: Weights) -> Weights:
        """A linear's numbers on the device; copies, so that training the model goes on alone."""
        bias = None if weights.bias is None else weights.bias.to(self.device, copy=True)
        return Weights(weights.weight.to(self.device, copy=True), bias)

    def moved(self, block: BlockWeights) -> BlockWeights:
        """A block's numbers on the device, its norms in the dtype they are computed in."""
        to = self.device, self.way.attention_dtype
        first, second = (
            Norm(n.weight.to(*to, copy=True), n.bias.to(*to, copy=True), n.eps) for n in block.norms
        )
        linears = {name: self.held(weights) for name, weights in block.linears.items()}
        return BlockWeights(
            (first, second), linears, block.num_heads, block.activation, block.rotary
        )

    def embed(self, module: PatchEmbed, levels: Levels | None) -> PatchEmbed:
        """The counterpart of a PatchEmbed, for pixels, or for the levels they are made of."""
        weights, centre = folded(module.proj, levels)
        kernel = module.proj.weight.shape
        linear = FastLinear(self.held(weights), self.way.attention_dtype)
        fast = with_children(module, {"proj": Projection(linear, kernel)})
        tokens = {
            n: None if t is None else t.to(self.device, copy=True)
            for n, t in fast._parameters.items()
        }
        fast.__dict__["_parameters"] = tokens
        fast.__class__ = CudaPatchEmbed
        assert isinstance(fast, CudaPatchEmbed)
        fast.stream, fast.made = self.stream, None
        fast.centre = None if centre is None else centre.to(self.device, linear.dtype)
        return fast


def folded(conv: nn.Conv2d, levels: Levels | None) -> tuple[Weights, Tensor | None]:
    """A patch projection -> its weights (D, C * p * q), and what to take from levels, (C, 1, 1).

    The whole number next to a channel's mean is taken away first: in bfloat16, which holds whole
    numbers up to 256, that is exact, and what is rounded afterwards is then small.
    """
    weight = conv.weight.detach().double()
    bias = None if conv.bias is None else conv.bias.detach().double()
    centre = None
    if levels is not None:
        to = weight.new_tensor
        factor, offset = to(levels.factor), to(levels.offset)
        whole = (-offset / factor).round().clamp(0, 255)
        shift = (weight.sum(dim=(2, 3)) * (offset + factor * whole)).sum(dim=1)
        bias = shift if bias is None else bias + shift
        weight, centre = weight * factor[:, None, None], whole[:, None, None]
    return Weights(weight.flatten(1).float(), None if bias is None else bias.float()), centre


class CudaPatchEmbed(PatchEmbed):
    """A PatchEmbed made by Parts: what does not depend on the pixels is made once a grid."""

    stream: torch.dtype
    centre: Tensor | None
    made: tuple[Grid, Tensor | None, Tensor | None] | None

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) pixels or levels, as floats -> (B, T, D)."""
        _, prefix, places = self.rows(self.patch_grid(images))
        if self.centre is not None:
            images = images - self.centre
        x = self.proj(images).flatten(2).transpose(1, 2).to(self.stream)
        if places is not None:
            x = x + places
        return x if prefix is None else torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)

    def rows(self, grid: Grid) -> tuple[Grid, Tensor | None, Tensor | None]:
        """(h, w) -> the same, the prefix tokens where they stand (1, P, D), positions (1, N, D)."""
        if self.made is None or self.made[0] != grid:
            first = (self.cls_token, self.dist_token)
            tokens: list[Tensor] = [token for token in first if token is not None]
            places = None
            if self.pos_embed is not None:
                class_places, places = self.positions(grid)
                places = places.to(self.stream)
                if self.num_class_rows:
                    tokens = [torch.cat(tokens, dim=1) + class_places]
            if self.reg_token is not None:
                tokens.append(self.reg_token)
            prefix = torch.cat(tokens, dim=1).to(self.stream) if tokens else None
            self.made = grid, prefix, places
        return self.made


class CudaPositions(AttentionPositions):
    """What another module says of where tokens lie, as the kernels take it, once a grid."""

    def __init__(self, of: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(of, AttentionPositions)
        self.of, self.dtype = of, dtype
        self.made: tuple[tuple[Grid, int], list[Tensor]] | None = None

    def for_blocks(self, grid: Grid, device: torch.device, count: int) -> list[Tensor]:
        """(h, w) -> as the other's, but always a list, and a bias in this dtype."""
        if self.made is None or self.made[0] != (grid, count):
            found = self.of.for_blocks(grid, device, count)
            self.made = (
                (grid, count),
                [w if w.dim() == 3 else aligned(w.to(self.dtype)) for w in found],
            )
        return self.made[1]


def aligned(bias: Tensor) -> Tensor:
    """(1, H, T, T) -> the same numbers, each row beginning at a multiple of 8.

    Where they do not, torch's memory-efficient attention copies the bias at every call.
    """
    rows = bias.new_zeros(*bias.shape[:-1], -(-bias.shape[-1] // 8) * 8)
    rows[..., : bias.shape[-1]] = bias
    return rows[..., : bias.shape[-1]]


class Float32Norm(nn.LayerNorm):
    """A LayerNorm that computes and gives float32."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return super().forward(x.float())


class CudaPool(nn.Module):
    """An AttentionPool in a dtype of its own; what its token asks is known before any image is."""

    def __init__(self, pool: nn.Module, dtype: torch.dtype) -> None:
        """pool: a copy that is this one's, float32."""
        super().__init__()
        assert isinstance(pool, AttentionPool)
        self.dtype = dtype
        self.asked = (pool.split(pool.q(pool.probe)) * pool.head_dim**-0.5).to(dtype)
        self.pool = pool.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, D)."""
        pool, x = self.pool, x.to(self.dtype)
        q = self.asked.repeat(len(x), 1, 1, 1)
        x = pool.out(pinned(q, pool.split(pool.k(x)), pool.split(pool.v(x)), None))[:, 0]
        return x + pool.mlp(pool.norm(x))  # type: ignore[no-any-return]


class CudaBlock(FastBlock):
    """Stands where a Block stood, with all of it in one dtype, the residual stream too."""

    def __init__(self, weights: BlockWeights, way: Route, fp8: bool, stream: torch.dtype) -> None:
        super().__init__(weights, way, lone=False)
        self.dtype, self.stream = way.attention_dtype, stream
        self.gather = pinned
        for name, of in weights.linears.items():
            if fp8 and not any(side % 16 for side in of.weight.shape):  # which the product asks for
                setattr(self, name, Fp8Linear(of, self.dtype))

    def forward(self, x: Tensor, keep: int | None = None, where: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, Q, D), as Block's."""
        x = x.to(self.dtype)
        gathered = self.attend(self.qkv(self.normed(x, self.norm1)), keep, where)
        x = x[:, :keep] + self.out(gathered)
        return self.mlp(self.normed(x, self.norm2), x).to(self.stream)


def pinned(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """attention.fused by the kernel of the table: scaled (B, H, Q, K) and so on -> (B, Q, D)."""
    if q.device.type not in ON:
        return fused(q, k, v, bias)
    with sdpa_kernel(
        backends(q.dtype, q.shape[2], k.shape[2], bias is not None), set_priority=True
    ):
        return fused(q, k, v, bias)


def backends(dtype: torch.dtype, queries: int, tokens: int, bias: bool) -> list[SDPBackend]:
    """The row of BACKENDS that serves Q queries of T tokens."""
    if dtype == torch.float32:
        return BACKENDS["float32"]
    if bias:
        return BACKENDS["bias"]
    long = tokens >= CUDNN_TOKENS and tokens % 2 == 0 and queries == tokens
    return BACKENDS["long" if long else "other"]
