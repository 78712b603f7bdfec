"""Attention in training: what its kernels give, and their gradients.

On a CPU in float32 torch's fused kernel serves, both ways. In bfloat16 it takes three times as long
as the products alone: there the scores of some images at once are held, and computed again for the
gradient. On a GPU cuda_attention.py chooses.

Shapes: B images, T tokens, Q tokens that ask (the first Q of T), D embed_dim, H num_heads,
K = D / H.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitlib.encoder import Attention
from vitlib.fast import attention as fast
from vitlib.fast.cpu import kernel_plan
from vitlib.train.fused_step import cuda_attention

MOST_SCORES = 4 * 1024 * 1024  # held at once


def gather(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """(B, H, Q, K), twice (B, H, T, K), bias (1, H, Q, T) or None -> (B, Q, D). Differentiable."""
    if q.is_cuda:
        return cuda_attention.attend(q, k, v, bias).transpose(1, 2).flatten(2)
    held = q.dtype == torch.bfloat16 and bias is None and _scores(q, k) <= MOST_SCORES
    if held:
        return Gather.apply(q, k, v)  # type: ignore[no-any-return, no-untyped-call]
    bias = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


def _scores(q: Tensor, k: Tensor) -> int:
    """Of one image."""
    return q.shape[1] * q.shape[2] * k.shape[2]


class Gather(torch.autograd.Function):
    """softmax(q k^T / sqrt(K)) v (1706.03762): (B, H, Q, K), twice (B, H, T, K) -> (B, Q, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As the class says."""
        found = kernel_plan("bf16")
        way = (
            fast.graph_attention
            if found is not None and found.attention == "graph"
            else fast.bmm_attention
        )
        ctx.save_for_backward(q, k, v)
        return way(q * q.shape[-1] ** -0.5, k, v, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        """Of q, k and v, each laid out as (B, T, D)."""
        q, k, v = ctx.saved_tensors
        b, h, _, width = q.shape
        g = gradient.unflatten(2, (h, width)).transpose(1, 2)  # type: ignore[no-untyped-call]
        found = tuple(
            x.new_empty(b, x.shape[2], h, width).transpose(1, 2) for x in (q, k, v)
        )  # where each is wanted, so that nothing is copied to get it there
        step = max(MOST_SCORES // _scores(q, k), 1)
        with torch.autocast("cpu", enabled=False):
            for start in range(0, b, step):
                some = slice(start, start + step)
                parts = _back(*(x[some].flatten(0, 1) for x in (q, k, v, g)))
                for whole, part in zip(found, parts, strict=True):
                    whole[some] = part.unflatten(0, (-1, h))  # type: ignore[no-untyped-call]
        return found


def _back(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of some images and all their heads: q (H, Q, K), k and v (H, T, K), g (H, Q, K)."""
    scale = q.shape[-1] ** -0.5
    q = q * scale
    shares = torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1)
    of_v = torch.bmm(shares.transpose(1, 2), gradient)
    of_shares = torch.bmm(gradient, v.transpose(1, 2))
    of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
    return torch.bmm(of_scores, k) * scale, torch.bmm(of_scores.transpose(1, 2), q), of_v


def first_tokens(attn: Attention, x: Tensor, count: int, bias: Tensor | None) -> Tensor:
    """Attend from the first tokens without computing K and V, as inference does.

    It saves two products over all T tokens forward, and four backward. In float32: it is little.

    Args:
        attn: The attention module, whose parameters get their gradients.
        x: Normed tokens (B, T, D).
        count: Q, the number of queries.
        bias: Bias of the scores (1, H, Q, T), or None.

    Returns:
        (B, Q, D).
    """
    (b, _, d), h, width = x.shape, attn.num_heads, attn.head_dim
    q = F.linear(x[:, :count], attn.q.weight, attn.q.bias) * width**-0.5
    q = q.reshape(b * count, h, width).transpose(0, 1)  # (H, BQ, K)
    key_scores = None
    if attn.k.bias is not None:  # the same for all tokens; here so that it has its gradient of 0
        key_scores = torch.bmm(q, attn.k.bias.view(h, width, 1)).view(h, b, count)
        key_scores = key_scores.transpose(0, 1).reshape(b, h * count, 1)
    values = attn.v.weight.view(h, width, d).transpose(1, 2)
    q = q.view(h, b, count, width)
    out = fast.attend_without_kv(q, x, attn.k.weight.view(h, width, d), values, bias, key_scores)
    return out if attn.v.bias is None else out + attn.v.bias
