"""Fast counterparts of a model's stock modules on a GPU.

How data flows: CudaModuleFactory makes them, on the device. A block is matrix products, attention
(cuda_attention.py) and the steps between them, each one kernel (row_ops.py); the products add their
bias, GELU and the residual stream themselves. The stream is in the products' dtype, but float32
beside float16, which holds no number above 65,504. The final norm and the heads are in float32.

The last block computes only the tokens that are read. K and V are computed for all tokens, unlike
on a CPU (attention.py): leaving them out saves 1.4 % of ViT-B/16's arithmetic, and at batch 1 adds
four kernels to about 100.

Shapes: as in vitlib/encoder.py; P prefix tokens, N patches.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitlib.encoder import Block
from vitlib.fast.block import BlockWeights, concat_outputs, extract_weights, linear_weights
from vitlib.fast.cpu import KernelPlan
from vitlib.fast.cuda_attention import Gpu, attend
from vitlib.fast.cuda_embeddings import CudaAttentionPosition, CudaPatchEmbed
from vitlib.fast.embeddings import PatchLinear, fold_uint8_affine
from vitlib.fast.fp8 import Fp8Linear
from vitlib.fast.linears import FastLinear, LinearWeights
from vitlib.fast.module_swap import copy_with_children
from vitlib.fast.norms import Float32Norm, Float32RMSNorm, NormWeights
from vitlib.fast.quantized_rows import FP8, Rows
from vitlib.fast.row_ops import activate, add_norm, linear_gelu, norm, rotate
from vitlib.image.pixels import Uint8Affine
from vitlib.patch_embed import PatchEmbed
from vitlib.positions import AttentionPosition
from vitlib.variants import AttentionPool


class CudaModuleFactory(NamedTuple):
    """Make the fast counterparts of stock modules, on a device.

    Attributes:
        plan: The kernels.
        device: The device.
        fp8: Linear layers of blocks are in 8-bit floats.
        stream_dtype: Dtype of the residual stream.
        bias_dtype: Dtype of the biases of attention scores.
        gpu: The GPU's properties, for the choice of attention kernels.
    """

    plan: KernelPlan
    device: torch.device
    fp8: bool
    stream_dtype: torch.dtype
    bias_dtype: torch.dtype
    gpu: Gpu

    def convert(self, path: str, module: nn.Module) -> nn.Module | None:  # noqa: ARG002
        """Make the counterpart of a stock module.

        Args:
            path: Not used.
            module: The module, which is only read.

        Returns:
            The counterpart, or None where only its children have one.
        """
        if isinstance(module, Block):
            return CudaBlock(self.copy_block(extract_weights(module)), self)
        if isinstance(module, PatchEmbed):
            return self.make_patch_embed(module, None)
        if isinstance(module, AttentionPosition):
            return CudaAttentionPosition(self.copy_module(module), self.bias_dtype)
        if isinstance(module, AttentionPool):
            return CudaPool(module, self)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            return self.copy_norm(module)
        if isinstance(module, nn.Linear):  # a head: float32, as it is little and gives the answer
            return FastLinear(self.copy_linear(linear_weights(module)))
        return None if any(module.children()) else self.copy_module(module)

    def copy_module(self, module: nn.Module) -> nn.Module:
        """Copy a module to the device in float32.

        Args:
            module: The module.

        Returns:
            A deep copy without gradients.
        """
        return copy.deepcopy(module).requires_grad_(False).to(self.device, torch.float32)

    def copy_norm(self, module: nn.Module) -> nn.Module:
        """Copy a norm to the device.

        Args:
            module: A LayerNorm or RMSNorm, which is only read.

        Returns:
            A norm that computes and returns float32.
        """
        norm = self.copy_module(module)
        norm.__class__ = Float32Norm if isinstance(module, nn.LayerNorm) else Float32RMSNorm
        return norm

    def copy_linear(self, weights: LinearWeights) -> LinearWeights:
        """Copy the numbers of a linear layer to the device.

        Args:
            weights: The numbers, which may be the model's own.

        Returns:
            Copies, so that training the model does not change them.
        """
        bias = None if weights.bias is None else weights.bias.to(self.device, copy=True)
        return LinearWeights(weights.weight.to(self.device, copy=True), bias)

    def copy_block(self, block: BlockWeights) -> BlockWeights:
        """Copy the numbers of a block to the device.

        Args:
            block: The numbers.

        Returns:
            Copies.
        """
        first, second = (norm.copy_to(self.device) for norm in block.norms)
        sub_norms = {name: norm.copy_to(self.device) for name, norm in block.sub_norms.items()}
        linears = {name: self.copy_linear(layer) for name, layer in block.linears.items()}
        return replace(block, norms=(first, second), linears=linears, sub_norms=sub_norms)

    def make_linear(self, weights: LinearWeights) -> FastLinear:
        """Make a linear layer of a block.

        Args:
            weights: Its numbers, on the device.

        Returns:
            The layer; in 8-bit floats where the plan says so and the product takes its sides.
        """
        dtype = self.plan.attention_dtype
        # torch's fp8 product takes multiples of 16 only.
        if self.fp8 and not any(side % 16 for side in weights.weight.shape):
            return Fp8Linear(weights, dtype)
        return FastLinear(weights, dtype)

    def make_patch_embed(self, embed: PatchEmbed, affine: Uint8Affine | None) -> PatchEmbed:
        """Make the counterpart of a PatchEmbed.

        Args:
            embed: The module, which is only read.
            affine: The normalisation to fold in for uint8 pixels; None for normalised pixels.

        Returns:
            A CudaPatchEmbed.
        """
        conv, centre = embed.proj, None
        if affine is None:
            weights = linear_weights(conv)
        else:
            # The whole number next to a channel's mean is subtracted from uint8 pixels first. In 16
            # bits, which hold whole numbers up to 256, that is exact; what is rounded afterwards is
            # then small.
            centre = tuple(
                float(min(max(round(-o / f), 0), 255))
                for f, o in zip(affine.factor, affine.offset, strict=True)
            )
            weights = fold_uint8_affine(linear_weights(conv), affine, centre)
        kernel = conv.weight.shape
        weights = LinearWeights(weights.weight.flatten(1), weights.bias)
        linear = FastLinear(self.copy_linear(weights), self.plan.attention_dtype)
        children: dict[str, nn.Module | None] = {"proj": PatchLinear(linear, kernel)}
        if embed.norm is not None:
            children["norm"] = self.copy_norm(embed.norm)
        fast = copy_with_children(embed, children)
        parameters = {
            name: None if tensor is None else tensor.to(self.device, copy=True)
            for name, tensor in fast._parameters.items()
        }
        fast.__dict__["_parameters"] = parameters
        fast.__class__ = CudaPatchEmbed
        assert isinstance(fast, CudaPatchEmbed)
        fast.stream_dtype, fast.cached, fast.centre = self.stream_dtype, None, None
        if centre is not None:
            row = torch.tensor(centre, dtype=linear.dtype, device=self.device)
            fast.centre = row[:, None, None]
        return fast


class CudaPool(nn.Module):
    """An AttentionPool whose attention is in 16 bits.

    Its query does not depend on the image and is computed once. Its MLP has one token an image, and
    is in float32.

    Args:
        pool: The pool, which is only read.
        factory: The factory of the device.
    """

    def __init__(self, pool: AttentionPool, factory: CudaModuleFactory) -> None:
        super().__init__()
        assert pool.norm is not None
        assert pool.mlp is not None
        self.dtype, self.gpu = factory.plan.attention_dtype, factory.gpu
        self.num_heads, self.first = pool.num_heads, pool.first
        query = pool.split_heads(pool.q(pool.probe)).float() * pool.head_dim**-0.5
        self.query = query.to(factory.device, self.dtype)
        keys_and_values = concat_outputs(linear_weights(pool.k), linear_weights(pool.v))
        self.kv = FastLinear(factory.copy_linear(keys_and_values), self.dtype)
        self.out = FastLinear(factory.copy_linear(linear_weights(pool.proj)))
        self.norm, self.mlp = factory.copy_module(pool.norm), factory.copy_module(pool.mlp)

    def forward(self, x: Tensor) -> Tensor:
        """Pool tokens.

        Args:
            x: (B, T, D).

        Returns:
            (B, D).
        """
        x = x[:, self.first :]
        b, t, _ = x.shape
        k, v = self.kv(x).view(b, t, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q = self.query.expand(b, -1, -1, -1)
        x = self.out(attend(q, k, v, None, self.gpu))[:, 0]
        y: Tensor = self.mlp(self.norm(x))
        return x + y


class CudaBlock(nn.Module):
    """A transformer block on a GPU, called as Block is.

    Args:
        weights: The numbers of the block, on the device.
        factory: The factory of the device.
    """

    def __init__(self, weights: BlockWeights, factory: CudaModuleFactory) -> None:
        super().__init__()
        self.num_heads, self.activation = weights.num_heads, weights.activation
        self.rotary, self.gpu = weights.rotary, factory.gpu
        self.dtype, self.stream_dtype = factory.plan.attention_dtype, factory.stream_dtype
        self.norm1, self.norm2 = weights.norms
        self.sub_norms, self.post = weights.sub_norms, weights.post
        linears = weights.linears
        self.gated = "gate" in linears
        up = concat_outputs(linears["gate"], linears["up"]) if self.gated else linears["up"]
        self.qkv, self.out = (factory.make_linear(linears[name]) for name in ("qkv", "out"))
        self.up, self.down = factory.make_linear(up), factory.make_linear(linears["down"])
        # cuBLAS adds a product to what is in memory already, if that is in the product's dtype.
        self.adds_in_place = self.stream_dtype == self.dtype and not self.post
        self.adds_in_place &= not isinstance(self.down, Fp8Linear)

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """Apply the block.

        Args:
            x: Tokens (B, T, D).
            num_queries: Q, the number of first tokens to compute; None for all.
            attn_pos: Position table of the attention.

        Returns:
            (B, Q, D).
        """
        x = x.to(self.stream_dtype)
        y: Tensor
        rows = x if self.post else norm(x, self.norm1, input_dtype(self.qkv))
        y = self.attend(self.qkv(rows).view(*x.shape[:2], -1), num_queries, attn_pos)
        shape, rows = y.shape, y
        if "attn" in self.sub_norms:
            rows = norm(y, self.sub_norms["attn"], input_dtype(self.out))
        y = self.out(rows).view(shape)
        if self.post:
            x = x[:, :num_queries] + self.norm_branch(y, self.norm1)
            y = self.down(self.hidden_rows(x.to(self.dtype))).view(shape)
            return x + self.norm_branch(y, self.norm2)
        extra_bias = self.down.bias if self.adds_in_place else None
        x, rows = add_norm(x[:, :num_queries], y, self.norm2, extra_bias, input_dtype(self.up))
        rows = self.hidden_rows(rows)
        if not self.adds_in_place:
            y = self.down(rows)
            return x + y.view(x.shape)
        assert isinstance(rows, Tensor)
        # In place: add_norm returned new memory, and has added the bias of this product there.
        x.view(-1, x.shape[-1]).addmm_(rows.flatten(0, -2), self.down.packed.t())
        return x

    def norm_branch(self, y: Tensor, weights: NormWeights) -> Tensor:
        """Normalize the output of a branch.

        Args:
            y: The output (B, Q, D).
            weights: The norm.

        Returns:
            (B, Q, D) in the dtype of the residual stream.
        """
        rows = norm(y, weights, self.stream_dtype)
        assert isinstance(rows, Tensor)
        return rows

    def attend(self, qkv: Tensor, num_queries: int | None, attn_pos: Tensor | None) -> Tensor:
        """Attend, without the output projection.

        Args:
            qkv: Queries, keys and values (B, T, 3 D).
            num_queries: Q, the number of first tokens that are queries; None for all.
            attn_pos: Position table of the attention.

        Returns:
            (B, Q, D).
        """
        b, t, _ = qkv.shape
        if "q" in self.sub_norms:
            q, k, v = qkv.chunk(3, dim=-1)
            q, k = self.normalize_heads(q, "q"), self.normalize_heads(k, "k")
            qkv = torch.cat((q, k, v), dim=-1)
        q, k, v = qkv.view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = None
        if self.rotary:
            assert attn_pos is not None
            q, k = rotate(qkv, attn_pos, self.num_heads)
        elif attn_pos is not None:
            bias = attn_pos[:, :, :num_queries].to(q.dtype)
        return attend(q[:, :, :num_queries], k, v, bias, self.gpu)

    def normalize_heads(self, x: Tensor, name: str) -> Tensor:
        """Normalize queries or keys (2302.05442).

        Args:
            x: Queries or keys (B, T, D).
            name: Name of the norm, "q" or "k". Its width is that of a head, or of all heads.

        Returns:
            (B, T, D) in the dtype of x.
        """
        weights = self.sub_norms[name]
        rows = norm(x.reshape(*x.shape[:2], -1, len(weights.weight)), weights, x.dtype)
        assert isinstance(rows, Tensor)
        return rows.view(x.shape)

    def hidden_rows(self, x: Rows) -> Rows:
        """Compute the hidden layer of the MLP.

        Args:
            x: Normed tokens (B, Q, D).

        Returns:
            (B, Q, M), in the dtype that the second layer takes.
        """
        if "mlp" not in self.sub_norms:
            return self.activated_rows(x, input_dtype(self.down))
        rows = self.activated_rows(x, self.dtype)
        assert isinstance(rows, Tensor)
        return norm(rows, self.sub_norms["mlp"], input_dtype(self.down))

    def activated_rows(self, x: Rows, dtype: torch.dtype) -> Rows:
        """Apply the first layer of the MLP and its activation.

        Args:
            x: Normed tokens (B, Q, D).
            dtype: Of the result; E4M3 gives quantized rows.

        Returns:
            (B, Q, M); of quantized rows (B * Q, M), or quantized.
        """
        up = self.up
        is_gelu = self.activation in ("gelu", "gelu_tanh") and not self.gated
        is_gelu &= up.bias is not None and not isinstance(up, Fp8Linear)
        if is_gelu and dtype == torch.bfloat16:
            # The two forms of GELU differ by less than a rounding of bfloat16 (performance.md), so
            # that the tanh form, which the product can fuse, serves both.
            assert isinstance(x, Tensor)
            assert up.bias is not None
            return linear_gelu(x, up.packed, up.bias)
        y: Tensor = up(x)
        return activate(y, self.activation, self.gated, dtype)


def input_dtype(linear: FastLinear) -> torch.dtype:
    """Return the dtype of the rows that a linear layer takes.

    Args:
        linear: The layer.

    Returns:
        E4M3 for an 8-bit layer, otherwise its own dtype.
    """
    return FP8 if isinstance(linear, Fp8Linear) else linear.dtype
