"""A model's forward in training: the walk of vit.py and encoder.py through this package's parts.

How data flows: the residual stream is float32. norm1 and q, k, v in one step of autograd ->
attention -> out, which adds the stream -> norm2 and fc1 -> the activation and fc2, which adds
again. Each step keeps its input alone. The last block computes what the head reads. On a GPU the
parts are called as they are, under autocast, but for attention: see cuda_attention.py.

Shapes: B images, C channels, H W pixels, T tokens, Q tokens the head reads, D embed_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitlib.encoder import Block, RotaryAttention, SwiGLU, apply_rope
from vitlib.fast.cpu import kernel_plan
from vitlib.fast.module_swap import has_global_hooks, is_stock
from vitlib.train.fused_step import attention, eligibility
from vitlib.train.fused_step.cuda_attention import pin_attention
from vitlib.train.fused_step.linears import Linears, LinearSpec
from vitlib.train.fused_step.prologue import Before, act
from vitlib.vit import ViT

TrainPrecision = Literal["fp32", "bf16", "fp16"]
_NARROW = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train_forward(model: ViT, pixels: Tensor, *, precision: TrainPrecision) -> Tensor:
    """(B, C, H, W) -> the logits of model(pixels), (B, num_classes) float32, with their graph.

    Gradients are those of the model's own forward: in fp32 to rounding; in bf16 as torch.autocast
    computes, the products in bfloat16, all else in float32. Any part that is not what this package
    knows is called as it is: a module put in a part's place, one with a hook, other dtypes and
    devices. No images (B = 0) give gradients of zero. Raises ImageError where the images cannot be
    cut into patches.
    """
    if not len(pixels):  # Kernels refuse an empty batch, or leave parameters without a gradient.
        blank = pixels.new_zeros(1, *pixels.shape[1:])
        return train_forward(model, blank, precision=precision)[:0]
    dtype = _NARROW[precision]
    with torch.autocast(pixels.device.type, dtype, enabled=False):
        if not _is_known(model, pixels, dtype):
            return call_pinned(dtype, model, pixels).float()  # type: ignore[no-any-return]
        if pixels.is_cuda:
            return walk_on_gpu(dtype, model, pixels)
        if dtype == torch.bfloat16 and not _has_bfloat16():
            dtype = torch.float32
        tokens = _encode(FusedForward(dtype), model, pixels)
        wide = model.config.pool == "map"  # which reads all tokens; the others one row an image
        return call(dtype if wide else torch.float32, model.forward_head, tokens).float()  # type: ignore[no-any-return]


def walk_on_gpu(dtype: torch.dtype, model: ViT, pixels: Tensor) -> Tensor:
    """(B, C, H, W) on a GPU -> logits (B, num_classes) float32, by the model's parts.

    Autocast is entered once for all parts, as each entry costs as much as a small kernel.
    """
    with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
        tokens = _encode(FusedForward(torch.float32), model, pixels)
        return call_pinned(torch.float32, model.forward_head, tokens).float()  # type: ignore[no-any-return]


def plain_forward(model: ViT, pixels: Tensor, *, precision: TrainPrecision) -> Tensor:
    """(B, C, H, W) -> model(pixels), (B, num_classes): for evaluation between steps of a run.

    On a GPU torch.autocast computes it in the run's precision; elsewhere it is the model's forward.
    """
    dtype = _NARROW[precision] if pixels.is_cuda else torch.float32
    return call_pinned(dtype, model, pixels)  # type: ignore[no-any-return]


def _is_known(model: ViT, pixels: Tensor, dtype: torch.dtype) -> bool:
    """Whether the walk below is the model's."""
    if not (pixels.is_cuda or (pixels.is_cpu and dtype != torch.float16)):
        return False
    return (
        is_stock(model, (ViT,), methods=("forward",))
        and not has_global_hooks()
        and all(p.dtype == torch.float32 and p.device == pixels.device for p in model.parameters())
    )


def _has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32; where not, float32 serves."""
    found = kernel_plan("bf16")
    return found is not None and found.arithmetic == "bf16"


def call(dtype: torch.dtype, module: Callable[..., Any], *given: Any) -> Any:
    """A module's own forward, as torch.autocast computes it where dtype is not float32."""
    device = next(x for x in given if isinstance(x, Tensor)).device.type
    if dtype == torch.float32:
        return module(*given)
    with torch.autocast(device, dtype):
        return module(*given)


def call_pinned(dtype: torch.dtype, module: Callable[..., Any], *given: Any) -> Any:
    """Call a module that attends itself, as call() does; on a GPU by pin_attention's kernels."""
    device = next(x for x in given if isinstance(x, Tensor)).device
    with pin_attention(device):
        return call(dtype, module, *given)


def _encode(way: FusedForward, model: ViT, pixels: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, Q, D), as ViT's."""
    x = call(way.dtype, model.patch_embed, pixels)
    x = call(way.dtype, model.norm_pre, x).float()
    num_queries, last = model._num_pooled(), len(model.blocks) - 1
    for index, (block, attn_pos) in enumerate(
        zip(model.blocks, model.attn_positions(pixels), strict=False)
    ):
        given = block, x, num_queries if index == last else None, attn_pos
        if model.gradient_checkpointing and model.training:
            x = checkpoint(way.through, *given, use_reentrant=False)
        else:
            x = way.through(*given)
    return model.norm(x) if model.config.final_norm == "tokens" else x  # type: ignore[no-any-return]


class FusedForward(NamedTuple):
    """The way through blocks, with products of a dtype."""

    dtype: torch.dtype

    def through(
        self, block: nn.Module, x: Tensor, num_queries: int | None, attn_pos: Tensor | None
    ) -> Tensor:
        """(B, T, D) float32 -> (B, Q, D) float32, as Block's."""
        if not eligibility.is_block(block):
            return call_pinned(self.dtype, block, x, num_queries, attn_pos).float()  # type: ignore[no-any-return]
        assert isinstance(block, Block)
        x = self.attend(block, x, num_queries, attn_pos)
        return self.mlp(block, x)

    def attend(
        self, block: Block, x: Tensor, num_queries: int | None, attn_pos: Tensor | None
    ) -> Tensor:
        """(B, T, D) -> (B, Q, D), with what attention adds."""
        attn, rest = block.attn, x[:, :num_queries]
        if not eligibility.is_attention(attn):
            found = call_pinned(
                self.dtype, attn, call(self.dtype, block.norm1, x), num_queries, attn_pos
            )
            return self.added(block, rest, found, block.ls1, 1)
        if num_queries is not None and self.is_lone(block, num_queries, x.shape[1]):
            bias = None if attn_pos is None else attn_pos[:, :, :num_queries]
            found = attention.first_tokens(attn, block.norm1(x), num_queries, bias)
        else:
            found = self.gather(block, x, num_queries, attn_pos)
        return self.add(block, rest, attn.proj, "nothing", found, block.ls1, 1)

    def is_lone(self, block: Block, num_queries: int, tokens: int) -> bool:
        """Whether the first tokens are best computed without K and V."""
        attn = block.attn
        return (
            num_queries < tokens
            and 4 * num_queries * attn.num_heads <= attn.proj.in_features
            and not isinstance(attn, RotaryAttention)
            and all(eligibility.is_linear(part) for part in (attn.q, attn.k, attn.v))
        )

    def gather(
        self, block: Block, x: Tensor, num_queries: int | None, attn_pos: Tensor | None
    ) -> Tensor:
        """(B, T, D) -> what the first Q tokens gather, (B, Q, D)."""
        attn = block.attn
        parts = (attn.q, attn.k, attn.v)
        if (
            num_queries is None
            and eligibility.is_norm(block.norm1)
            and all(map(eligibility.is_linear, parts))
        ):
            found = self.normed(block.norm1, x, *parts)
        else:
            x = call(self.dtype, block.norm1, x)
            found = tuple(
                self.linear(part, y)
                for part, y in zip(parts, (x[:, :num_queries], x, x), strict=True)
            )
        q, k, v = (attn.split_heads(y) for y in found)
        if isinstance(attn, RotaryAttention):
            assert attn_pos is not None
            first = x.shape[1] - attn_pos.shape[1]
            q, k, attn_pos = apply_rope(q, first, attn_pos), apply_rope(k, first, attn_pos), None
        return attention.gather(q, k, v, None if attn_pos is None else attn_pos[:, :, :num_queries])

    def mlp(self, block: Block, x: Tensor) -> Tensor:
        """(B, Q, D) -> the same, with what the MLP adds."""
        mlp, norm = block.mlp, block.norm2
        if not eligibility.is_mlp(mlp):
            found = call(self.dtype, mlp, call(self.dtype, norm, x))
            return self.added(block, x, found, block.ls2, 3)
        if eligibility.is_norm(norm) and eligibility.is_linear(mlp.fc1):
            (h,) = self.normed(norm, x, mlp.fc1)
        else:
            h = self.linear(mlp.fc1, call(self.dtype, norm, x))
        kind: Before = "swiglu" if isinstance(mlp, SwiGLU) else mlp.activation
        return self.add(block, x, mlp.fc2, kind, h, block.ls2, 3)

    def normed(self, norm: nn.LayerNorm, x: Tensor, *parts: nn.Linear) -> tuple[Tensor, ...]:
        """(..., D) float32 -> what each linear makes of the normed, (..., N)."""
        layers = [p for part in parts for p in (part.weight, part.bias)]
        plan = LinearSpec("norm", self.dtype, norm.eps)
        found = Linears.apply(plan, None, x, norm.weight, norm.bias, *layers)  # type: ignore[no-untyped-call]
        return found if isinstance(found, tuple) else (found,)

    def linear(self, part: nn.Linear, x: Tensor, kind: Before = "nothing") -> Tensor:
        """(..., K), first through what `kind` says -> (..., N)."""
        if not eligibility.is_linear(part):
            return call(self.dtype, part, x if kind == "nothing" else act(x, kind))  # type: ignore[no-any-return]
        given = LinearSpec(kind, self.dtype), None, x, None, None, part.weight, part.bias
        return Linears.apply(*given)  # type: ignore[no-any-return, no-untyped-call]

    def add(
        self, block: Block, rest: Tensor, part: nn.Linear, kind: Before, x: Tensor,
        layer_scale: nn.Module | None, site: int,
    ) -> Tensor:  # fmt: skip
        """The stream (B, Q, D) -> with the branch that ends in this linear, float32."""
        if eligibility.is_linear(part) and eligibility.is_plain_residual(block, layer_scale):
            given = LinearSpec(kind, self.dtype), rest, x, None, None, part.weight, part.bias
            return Linears.apply(*given)  # type: ignore[no-any-return, no-untyped-call]
        return self.added(block, rest, self.linear(part, x, kind), layer_scale, site)

    def added(
        self, block: Block, rest: Tensor, found: Tensor, layer_scale: nn.Module | None, site: int
    ) -> Tensor:
        """The stream (B, Q, D) -> with what a branch found, as the block adds it, float32."""
        return rest + block.residual(found, layer_scale, site).float()
