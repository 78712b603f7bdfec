"""Attention in training on a CPU, with its gradient; on a GPU cuda_attention.py chooses a kernel.

In float32 torch's fused kernel is fastest, forward and backward. In bfloat16 it takes three times
as long as the products alone. There the scores of a few images at a time are computed as matrices,
and computed again for the gradient.

Shapes: B images, T tokens, Q queries (the first Q of T tokens), D embed_dim, H num_heads,
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

MAX_SCORES = 4 * 1024 * 1024  # scores that backward holds at a time


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attend by the fastest kernel, with a graph.

    Args:
        q: Queries (B, H, Q, K).
        k: Keys (B, H, T, K).
        v: Values (B, H, T, K).
        bias: Of the scores, (1, H, Q, T); or None.

    Returns:
        (B, Q, D).
    """
    if q.is_cuda:
        return cuda_attention.attend(q, k, v, bias).transpose(1, 2).flatten(2)
    if q.dtype == torch.bfloat16 and bias is None and _scores_per_image(q, k) <= MAX_SCORES:
        output: Tensor = _apply_matrix_attention(q, k, v)
        return output
    bias = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


def _scores_per_image(q: Tensor, k: Tensor) -> int:
    """Return H * Q * T."""
    return q.shape[1] * q.shape[2] * k.shape[2]


class MatrixAttention(torch.autograd.Function):
    """Attention by matrices, softmax(q k^T / sqrt(K)) v (1706.03762), in bfloat16."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; save the inputs alone, not the scores."""
        plan = kernel_plan("bf16")
        uses_graph = plan is not None and plan.attention == "graph"
        kernel = fast.graph_attention if uses_graph else fast.bmm_attention
        ctx.save_for_backward(q, k, v)
        return kernel(q * q.shape[-1] ** -0.5, k, v, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        """Compute the gradients of q, k and v, in the memory order (B, T, H, K)."""
        q, k, v = ctx.saved_tensors
        b, h, _, width = q.shape
        output_grad = gradient.view(*gradient.shape[:2], h, width).transpose(1, 2)
        # q, k and v are views of linear layers' outputs (B, T, D). Gradients in that memory order
        # reach the layers without a copy.
        results = tuple(x.new_empty(b, x.shape[2], h, width).transpose(1, 2) for x in (q, k, v))
        step = max(MAX_SCORES // _scores_per_image(q, k), 1)
        with torch.autocast("cpu", enabled=False):
            for start in range(0, b, step):
                images = slice(start, start + step)
                parts = _attention_backward(
                    *(x[images].flatten(0, 1) for x in (q, k, v, output_grad))
                )
                for result, part in zip(results, parts, strict=True):
                    result[images] = part.view(-1, h, *part.shape[1:])
        return results


_apply_matrix_attention: Any = MatrixAttention.apply  # torch does not type it


def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of q, k and v for some images' heads, (BH, Q, K) and twice (BH, T, K)."""
    scale = q.shape[-1] ** -0.5
    q = q * scale
    probs = torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1)
    v_grad = torch.bmm(probs.transpose(1, 2), gradient)
    probs_grad = torch.bmm(gradient, v.transpose(1, 2))
    scores_grad = torch.ops.aten._softmax_backward_data(probs_grad, probs, -1, probs.dtype)
    return torch.bmm(scores_grad, k) * scale, torch.bmm(scores_grad.transpose(1, 2), q), v_grad


def attend_first_tokens(attn: Attention, x: Tensor, count: int, bias: Tensor | None) -> Tensor:
    """Attend from the first tokens without computing K and V, as inference does.

    It saves two products over all T tokens forward, and four backward. It runs in float32, as so
    few queries take little time.

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
    # A bias of the keys adds the same number to all scores of a query, so softmax removes it. It
    # takes part so that it has its gradient of 0, which DDP waits for.
    if attn.k.bias is not None:
        key_scores = torch.bmm(q, attn.k.bias.view(h, width, 1)).view(h, b, count)
        key_scores = key_scores.transpose(0, 1).reshape(b, h * count, 1)
    values = attn.v.weight.view(h, width, d).transpose(1, 2)
    q = q.view(h, b, count, width)
    out = fast.attend_without_kv(q, x, attn.k.weight.view(h, width, d), values, bias, key_scores)
    return out if attn.v.bias is None else out + attn.v.bias
