"""The fast counterparts of a model's stock parts on a GPU.

How data flows: Parts makes them, on the device. A block is products, attention
(cuda_attention.py) and the steps between them, each one kernel (row_ops.py); the products add their
bias, GELU and the residual stream themselves. The stream is in the products' dtype, but float32
beside float16, which holds no number above 65,504. The final norm and the heads are in float32.

The last block computes only the tokens that are read. Its K and V are not absorbed as on a CPU
(attention.py): that saves 1.4 % of ViT-B/16's arithmetic, and at batch 1 adds four kernels to about
100.

Shapes: as in vitlib/encoder.py; P prefix tokens, N patches.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitlib.encoder import AttentionPool, Block
from vitlib.fast.block import BlockWeights, gather, join, plain
from vitlib.fast.cpu import Route
from vitlib.fast.cuda_attention import Card, align, attend
from vitlib.fast.fp8 import Fp8Linear
from vitlib.fast.linears import FastLinear, Weights
from vitlib.fast.row_ops import Affine, activate, add_norm, linear_gelu, norm, rotate
from vitlib.fast.rows import FP8, Rows
from vitlib.fast.swap import Levels, Projection, fold, with_children
from vitlib.patch_embed import PatchEmbed
from vitlib.positions import AttentionPosition

Grid = tuple[int, int]


class Parts(NamedTuple):
    """Makes the fast counterparts of stock parts, on a device."""

    way: Route
    device: torch.device
    fp8: bool
    stream: torch.dtype  # of tokens between parts
    card: Card

    def fast(self, path: str, module: nn.Module) -> nn.Module | None:  # noqa: ARG002
        """A stock part -> its counterpart; None where only its children have one."""
        dtype = self.way.attention_dtype
        if isinstance(module, Block):
            return CudaBlock(self.moved(gather(module)), self)
        if isinstance(module, PatchEmbed):
            return self.embed(module, None)
        if isinstance(module, AttentionPosition):
            return CudaPositions(self.copied(module), dtype)
        if isinstance(module, AttentionPool):
            return CudaPool(module, self)
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
        """A block's numbers on the device."""
        first, second = (
            replace(
                n,
                weight=n.weight.to(self.device, copy=True),
                bias=n.bias.to(self.device, copy=True),
            )
            for n in block.norms
        )
        linears = {name: self.held(weights) for name, weights in block.linears.items()}
        return replace(block, norms=(first, second), linears=linears)

    def linear(self, weights: Weights) -> FastLinear:
        """A block's linear, in 8-bit floats where its sides are what their product asks for."""
        dtype = self.way.attention_dtype
        if self.fp8 and not any(side % 16 for side in weights.weight.shape):
            return Fp8Linear(weights, dtype)
        return FastLinear(weights, dtype)

    def embed(self, module: PatchEmbed, levels: Levels | None) -> PatchEmbed:
        """The counterpart of a PatchEmbed, for pixels, or for the levels they are made of."""
        conv, centre = module.proj, None
        if levels is None:
            weights = plain(conv)
        else:
            # The whole number next to a channel's mean is taken away from levels first: in 16
            # bits, which hold whole numbers up to 256, that is exact, and what is rounded
            # afterwards is then small.
            centre = tuple(
                float(min(max(round(-o / f), 0), 255))
                for f, o in zip(levels.factor, levels.offset, strict=True)
            )
            weights = fold(plain(conv), levels, centre)
        kernel = conv.weight.shape
        weights = Weights(weights.weight.flatten(1), weights.bias)
        linear = FastLinear(self.held(weights), self.way.attention_dtype)
        fast = with_children(module, {"proj": Projection(linear, kernel)})
        tokens = {
            n: None if t is None else t.to(self.device, copy=True)
            for n, t in fast._parameters.items()
        }
        fast.__dict__["_parameters"] = tokens
        fast.__class__ = CudaPatchEmbed
        assert isinstance(fast, CudaPatchEmbed)
        fast.stream, fast.made, fast.centre = self.stream, None, None
        if centre is not None:
            row = torch.tensor(centre, dtype=linear.dtype, device=self.device)
            fast.centre = row[:, None, None]
        return fast


class CudaPatchEmbed(PatchEmbed):
    """A PatchEmbed made by Parts: what does not depend on the pixels is made once a grid."""

    stream: torch.dtype
    centre: Tensor | None
    made: tuple[Grid, Tensor | None, Tensor | None] | None

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) pixels, or levels as bytes -> (B, T, D)."""
        proj = self.proj
        assert isinstance(proj, Projection)
        _, prefix, places = self.rows(self.patch_grid(images))
        if self.centre is not None:
            images = images - self.centre  # bytes less a float are floats, in one kernel
        x = proj.tokens(images).to(self.stream)
        if places is not None:
            x = x + places
        return x if prefix is None else torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)

    def patch_grid(self, images: Tensor) -> Grid:
        """As PatchEmbed's; bytes are levels, where it is made for those."""
        if images.dtype == torch.uint8 and self.centre is not None:
            images = torch.empty(images.shape, dtype=self.centre.dtype, device="meta")
        return super().patch_grid(images)

    def rows(self, grid: Grid) -> tuple[Grid, Tensor | None, Tensor | None]:
        """(h, w) -> the same, the prefix tokens where they stand (1, P, D), positions (1, N, D)."""
        made = self.made  # another thread may put another grid's there at any moment
        if made is None or made[0] != grid:
            first = (self.cls_token, self.dist_token)
            tokens: list[Tensor] = [token for token in first if token is not None]
            places = None
            if self.pos_embed is not None:
                class_places, places = self.resize_pos_embed(grid)
                places = places.to(self.stream)
                if self.num_prefix_positions:
                    tokens = [torch.cat(tokens, dim=1) + class_places]
            if self.reg_token is not None:
                tokens.append(self.reg_token)
            prefix = torch.cat(tokens, dim=1).to(self.stream) if tokens else None
            made = self.made = grid, prefix, places
        return made


class CudaPositions(AttentionPosition):
    """What another module says of where tokens lie, as the kernels take it, once a grid."""

    def __init__(self, of: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(of, AttentionPosition)
        self.of, self.dtype = of, dtype
        self.made: tuple[tuple[Grid, int], list[Tensor]] | None = None

    def per_block(self, grid: Grid, device: torch.device, count: int) -> list[Tensor]:
        """(h, w) -> as the other's, but always a list, and a bias in this dtype."""
        made = self.made  # as in CudaPatchEmbed.rows
        if made is None or made[0] != (grid, count):
            tables = self.of.per_block(grid, device, count)
            aligned = [t if t.dim() == 3 else align(t.to(self.dtype)) for t in tables]
            made = self.made = (grid, count), aligned
        return made[1]


class Float32Norm(nn.LayerNorm):
    """A LayerNorm that computes and gives float32."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return super().forward(x.float())


class CudaPool(nn.Module):
    """An AttentionPool that looks at tokens in 16 bits; what its token asks is known before any
    image is, and its MLP, of one token an image, is in float32."""

    def __init__(self, pool: AttentionPool, parts: Parts) -> None:
        super().__init__()
        self.dtype, self.card = parts.way.attention_dtype, parts.card
        self.num_heads = pool.num_heads
        asked = pool.split_heads(pool.q(pool.probe)).float() * pool.head_dim**-0.5
        self.asked = asked.to(parts.device, self.dtype)
        keys_and_values = join(plain(pool.k), plain(pool.v))
        self.kv = FastLinear(parts.held(keys_and_values), self.dtype)
        self.out = FastLinear(parts.held(plain(pool.proj)))
        self.norm, self.mlp = parts.copied(pool.norm), parts.copied(pool.mlp)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, D)."""
        b, t, _ = x.shape
        k, v = self.kv(x).view(b, t, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q = self.asked.expand(b, -1, -1, -1)
        x = self.out(attend(q, k, v, None, self.card))[:, 0]
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


class CudaBlock(nn.Module):
    """Stands where a Block stood: the same call, the same shapes."""

    def __init__(self, weights: BlockWeights, parts: Parts) -> None:
        super().__init__()
        self.num_heads, self.activation = weights.num_heads, weights.activation
        self.rotary, self.card = weights.rotary, parts.card
        self.dtype, self.stream = parts.way.attention_dtype, parts.stream
        self.norm1, self.norm2 = (Affine(n.weight, n.bias, n.eps) for n in weights.norms)
        linears = weights.linears
        self.gated = "gate" in linears
        up = join(linears["gate"], linears["up"]) if self.gated else linears["up"]
        self.qkv, self.out = parts.linear(linears["qkv"]), parts.linear(linears["out"])
        self.up, self.down = parts.linear(up), parts.linear(linears["down"])
        # A product adds to what is in memory already, if that is in its own dtype.
        self.adds = self.stream == self.dtype and not isinstance(self.down, Fp8Linear)

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, Q, D), as Block's."""
        x = x.to(self.stream)
        qkv = self.qkv(norm(x, self.norm1, rows_of(self.qkv))).view(*x.shape[:2], -1)
        y: Tensor = self.out(self.attend(qkv, num_queries, attn_pos))
        extra = self.down.bias if self.adds else None
        x, rows = add_norm(x[:, :num_queries], y, self.norm2, extra, rows_of(self.up))
        rows = self.hidden(rows)
        if not self.adds:
            y = self.down(rows)
            return x + y.view(x.shape)
        assert isinstance(rows, Tensor)
        # In place: add_norm gave memory of its own, and put the bias there.
        x.view(-1, x.shape[-1]).addmm_(rows.flatten(0, -2), self.down.held.t())
        return x

    def attend(self, qkv: Tensor, num_queries: int | None, attn_pos: Tensor | None) -> Tensor:
        """(B, T, 3 D) -> what the first Q tokens gather, (B, Q, D)."""
        b, t, _ = qkv.shape
        q, k, v = qkv.view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = None
        if self.rotary:
            assert attn_pos is not None
            q, k = rotate(qkv, attn_pos, self.num_heads)
        elif attn_pos is not None:
            bias = attn_pos[:, :, :num_queries].to(q.dtype)
        return attend(q[:, :, :num_queries], k, v, bias, self.card)

    def hidden(self, x: Rows) -> Rows:
        """Normed (B, Q, D) -> what the second layer of the MLP takes, (B, Q, M)."""
        up, dtype = self.up, rows_of(self.down)
        is_gelu = self.activation in ("gelu", "gelu_tanh") and not self.gated
        if is_gelu and dtype == torch.bfloat16 and not isinstance(up, Fp8Linear):
            # bfloat16 rounds by more than the two forms of GELU differ: docs/performance.md.
            assert isinstance(x, Tensor)
            assert up.bias is not None
            return linear_gelu(x, up.held, up.bias)
        y: Tensor = up(x)
        return activate(y, self.activation, self.gated, dtype)


def rows_of(linear: FastLinear) -> torch.dtype:
    """Return the dtype of the rows that a linear takes."""
    return FP8 if isinstance(linear, Fp8Linear) else linear.dtype
