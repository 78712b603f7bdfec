"""A second forward of the model, for training: the same numbers by fewer autograd nodes.

Why there is a second forward: autograd saves the output of every operation for the backward pass.
In ViT.forward that is the normed tokens, q, k, v, the scores and both sides of the activation, of
every block. Here norm1 with q, k and v is one node, so is norm2 with fc1, and so is the activation
with fc2 and the residual. Each node saves its input alone and computes cheap parts again. So a step
takes less time and memory (figures in docs/finetuning.md). ViT.forward stays readable and
traceable; the modules of fast/, which inference uses, have no gradients.

How data flows: the residual stream is float32. norm1 and q, k, v -> attention -> proj, which adds
the stream -> norm2 and fc1 -> activation and fc2, which adds again. The last block computes only
the tokens that the head reads. Every module is checked first (eligibility.py); a module that is not
stock is called as it is. On a GPU that is every module, under autocast; only the kernel of
attention is chosen here (cuda_attention.py).

Shapes: B images, C channels, H W pixels, T tokens, Q tokens that the head reads, D embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitlib.encoder import Block, RotaryAttention, SwiGLU
from vitlib.fast.cpu import kernel_plan
from vitlib.fast.module_swap import has_global_hooks, is_stock
from vitlib.positions import apply_rope
from vitlib.train.fused_step import attention, eligibility
from vitlib.train.fused_step.cuda_attention import pin_attention
from vitlib.train.fused_step.linears import LinearSpec, apply_linears
from vitlib.train.fused_step.prologue import Prologue, activate
from vitlib.train.settings import Precision
from vitlib.vit import ViT

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train_forward(model: ViT, pixels: Tensor, *, precision: Precision) -> Tensor:
    """Compute the logits of model(pixels) with a graph.

    Gradients are those of the model's own forward: to rounding in fp32. In bf16 they are as with
    torch.autocast, products in bfloat16 and all else in float32. An empty batch gives gradients of
    zero.

    Args:
        model: Any ViT. Custom modules, modules with hooks, and parameters of other dtypes or
            devices are called as they are.
        pixels: (B, C, H, W) on the model's device.
        precision: Of the products.

    Returns:
        (B, num_classes) float32.

    Raises:
        ImageError: The images cannot be cut into patches.
    """
    if not len(pixels):
        # Kernels refuse an empty batch, or leave parameters without a gradient, for which DDP would
        # wait forever. A slice of no rows has gradients of zero.
        blank = pixels.new_zeros(1, *pixels.shape[1:])
        return train_forward(model, blank, precision=precision)[:0]
    dtype = _DTYPES[precision]
    with torch.autocast(pixels.device.type, dtype, enabled=False):
        if not _is_eligible(model, pixels, dtype):
            return call_pinned(dtype, model, pixels).float()
        if pixels.is_cuda:
            return forward_on_gpu(dtype, model, pixels)
        if dtype == torch.bfloat16 and not _has_fast_bfloat16():
            dtype = torch.float32
        tokens = _encode(FusedForward(dtype), model, pixels)
        # An attention pool reads all tokens, other heads one row an image: float32 costs nothing.
        head_dtype = dtype if model.config.pool == "map" else torch.float32
        return call(head_dtype, model.forward_head, tokens).float()


def forward_on_gpu(dtype: torch.dtype, model: ViT, pixels: Tensor) -> Tensor:
    """Compute logits on a GPU by the model's own modules, but for the kernel of attention.

    Args:
        dtype: Of the products.
        model: A stock ViT.
        pixels: (B, C, H, W).

    Returns:
        (B, num_classes) float32.
    """
    # Autocast is entered once for all modules, as each entry costs as much as a small kernel.
    with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
        tokens = _encode(FusedForward(torch.float32), model, pixels)
        return call_pinned(torch.float32, model.forward_head, tokens).float()


def eval_forward(model: ViT, pixels: Tensor, *, precision: Precision) -> Tensor:
    """Compute model(pixels) for an evaluation between steps of a run.

    Args:
        model: Any ViT.
        pixels: (B, C, H, W) on the model's device.
        precision: Of autocast on a GPU; on other devices the model's own dtype is used.

    Returns:
        (B, num_classes).
    """
    dtype = _DTYPES[precision] if pixels.is_cuda else torch.float32
    return call_pinned(dtype, model, pixels)


def _is_eligible(model: ViT, pixels: Tensor, dtype: torch.dtype) -> bool:
    """Return True if the fused forward computes what the model's own forward does."""
    if not (pixels.is_cuda or (pixels.is_cpu and dtype != torch.float16)):
        return False
    return (
        is_stock(model, (ViT,), methods=("forward",))
        and not has_global_hooks()
        and all(p.dtype == torch.float32 and p.device == pixels.device for p in model.parameters())
    )


def _has_fast_bfloat16() -> bool:
    """Return True if this CPU multiplies bfloat16 faster than float32."""
    plan = kernel_plan("bf16")
    return plan is not None and plan.arithmetic == "bf16"


def call(dtype: torch.dtype, module: Callable[..., Any], *arguments: Any) -> Tensor:
    """Call a module as it is, under autocast unless the dtype is float32.

    Args:
        dtype: Of the products.
        module: A module or method.
        *arguments: Its arguments, of which at least one is a tensor.

    Returns:
        Its result.
    """
    device = next(x for x in arguments if isinstance(x, Tensor)).device.type
    if dtype == torch.float32:
        output: Tensor = module(*arguments)
        return output
    with torch.autocast(device, dtype):
        output = module(*arguments)
    return output


def call_pinned(dtype: torch.dtype, module: Callable[..., Any], *arguments: Any) -> Tensor:
    """Call a module that contains attention: as call() does, on a GPU by pin_attention's kernels.

    Args:
        dtype: Of the products.
        module: A module or method.
        *arguments: Its arguments, of which at least one is a tensor.

    Returns:
        Its result.
    """
    device = next(x for x in arguments if isinstance(x, Tensor)).device
    with pin_attention(device):
        return call(dtype, module, *arguments)


def _encode(fused: FusedForward, model: ViT, pixels: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, Q, D), the tokens that the head reads."""
    x = call(fused.dtype, model.patch_embed, pixels)
    x = call(fused.dtype, model.norm_pre, x).float()
    num_queries, last = model.count_queries(), len(model.blocks) - 1
    for index, (block, attn_pos) in enumerate(
        zip(model.blocks, model.attn_positions(pixels), strict=False)
    ):
        arguments = block, x, num_queries if index == last else None, attn_pos
        if model.gradient_checkpointing and model.training:
            x = checkpoint(fused.run_block, *arguments, use_reentrant=False)
        else:
            x = fused.run_block(*arguments)
    return model.norm(x) if model.config.final_norm == "tokens" else x


class FusedForward(NamedTuple):
    """The forward of blocks by fused nodes.

    Attributes:
        dtype: Of the products, float32 or bfloat16.
    """

    dtype: torch.dtype

    def run_block(
        self, block: nn.Module, x: Tensor, num_queries: int | None, attn_pos: Tensor | None
    ) -> Tensor:
        """Compute Block.forward.

        Args:
            block: A block; one that is not stock is called as it is.
            x: Tokens (B, T, D) float32.
            num_queries: Q, the first tokens that are computed; None for all.
            attn_pos: The block's item of ViT.attn_positions.

        Returns:
            (B, Q, D) float32.
        """
        if not eligibility.is_block(block):
            return call_pinned(self.dtype, block, x, num_queries, attn_pos).float()
        assert isinstance(block, Block)
        x = self._add_attention(block, x, num_queries, attn_pos)
        return self._add_mlp(block, x)

    def _add_attention(
        self, block: Block, x: Tensor, num_queries: int | None, attn_pos: Tensor | None
    ) -> Tensor:
        """(B, T, D) -> (B, Q, D), the stream with the branch of attention."""
        attn, stream = block.attn, x[:, :num_queries]
        if not eligibility.is_attention(attn):
            normed = call(self.dtype, block.norm1, x)
            branch = call_pinned(self.dtype, attn, normed, num_queries, attn_pos)
            return self._add_branch(block, stream, branch, block.ls1, 1)
        if num_queries is not None and self._can_skip_kv(block, num_queries, x.shape[1]):
            bias = None if attn_pos is None else attn_pos[:, :, :num_queries]
            mixed = attention.attend_first_tokens(attn, block.norm1(x), num_queries, bias)
        else:
            mixed = self._attend(block, x, num_queries, attn_pos)
        return self._add_projection(block, stream, attn.proj, "none", mixed, block.ls1, 1)

    def _can_skip_kv(self, block: Block, num_queries: int, tokens: int) -> bool:
        """Return True if so few queries are faster without K and V."""
        attn = block.attn
        return (
            num_queries < tokens
            and 4 * num_queries * attn.num_heads <= attn.proj.in_features
            and not isinstance(attn, RotaryAttention)
            and all(eligibility.is_linear(layer) for layer in (attn.q, attn.k, attn.v))
        )

    def _attend(
        self, block: Block, x: Tensor, num_queries: int | None, attn_pos: Tensor | None
    ) -> Tensor:
        """(B, T, D) -> (B, Q, D), before the projection."""
        attn = block.attn
        layers = (attn.q, attn.k, attn.v)
        if (
            num_queries is None
            and eligibility.is_norm(block.norm1)
            and all(map(eligibility.is_linear, layers))
        ):
            outputs = self._norm_linears(block.norm1, x, *layers)
        else:
            x = call(self.dtype, block.norm1, x)
            inputs = (x[:, :num_queries], x, x)
            outputs = tuple(self._linear(*pair) for pair in zip(layers, inputs, strict=True))
        q, k, v = (attn.split_heads(y) for y in outputs)
        if isinstance(attn, RotaryAttention):
            assert attn_pos is not None
            first = x.shape[1] - attn_pos.shape[-2]
            q, k, attn_pos = apply_rope(q, first, attn_pos), apply_rope(k, first, attn_pos), None
        return attention.attend(q, k, v, None if attn_pos is None else attn_pos[:, :, :num_queries])

    def _add_mlp(self, block: Block, x: Tensor) -> Tensor:
        """(B, Q, D) -> (B, Q, D), the stream with the branch of the MLP."""
        mlp, norm = block.mlp, block.norm2
        if not eligibility.is_mlp(mlp):
            branch = call(self.dtype, mlp, call(self.dtype, norm, x))
            return self._add_branch(block, x, branch, block.ls2, 3)
        if eligibility.is_norm(norm) and eligibility.is_linear(mlp.fc1):
            (h,) = self._norm_linears(norm, x, mlp.fc1)
        else:
            h = self._linear(mlp.fc1, call(self.dtype, norm, x))
        activation: Prologue = "swiglu" if isinstance(mlp, SwiGLU) else mlp.activation
        return self._add_projection(block, x, mlp.fc2, activation, h, block.ls2, 3)

    def _norm_linears(
        self, norm: nn.LayerNorm, x: Tensor, *layers: nn.Linear
    ) -> tuple[Tensor, ...]:
        """(..., D) float32 -> (..., N) of each layer, after the norm, in one node."""
        parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
        spec = LinearSpec("norm", self.dtype, norm.eps)
        return apply_linears(spec, None, x, norm.weight, norm.bias, *parameters)

    def _linear(self, layer: nn.Linear, x: Tensor, prologue: Prologue = "none") -> Tensor:
        """(..., K) -> (..., N), after a prologue without a norm."""
        if not eligibility.is_linear(layer):
            x = x if prologue == "none" else activate(x, prologue)
            if eligibility.is_lora(layer):  # its base is frozen, and saves no input
                return self._linear(layer.base, x) + call(self.dtype, layer.update, x)
            return call(self.dtype, layer, x)
        spec = LinearSpec(prologue, self.dtype)
        return apply_linears(spec, None, x, None, None, layer.weight, layer.bias)[0]

    def _add_projection(
        self, block: Block, stream: Tensor, layer: nn.Linear, prologue: Prologue, x: Tensor,
        layer_scale: nn.Module | None, site: int,
    ) -> Tensor:  # fmt: skip
        """Return the stream (B, Q, D) with the branch that ends in a linear layer, float32."""
        if eligibility.is_linear(layer) and eligibility.is_plain_residual(block, layer_scale):
            spec = LinearSpec(prologue, self.dtype)
            return apply_linears(spec, stream, x, None, None, layer.weight, layer.bias)[0]
        branch = self._linear(layer, x, prologue)
        return self._add_branch(block, stream, branch, layer_scale, site)

    def _add_branch(
        self, block: Block, stream: Tensor, branch: Tensor, layer_scale: nn.Module | None, site: int
    ) -> Tensor:
        """Return the stream (B, Q, D) with a branch, as the block adds it, float32."""
        return stream + block.residual(branch, layer_scale, site).float()
