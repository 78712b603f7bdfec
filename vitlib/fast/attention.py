"""Attention on a CPU: the kernels to choose from, and attention of few queries without K and V.

Queries come scaled: 1 / sqrt(K) is in their weights.

Shapes: B images, T tokens, Q queries (the first Q tokens), D embed_dim, H num_heads, K = D / H.
Source: Vaswani et al. 1706.03762.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.fast import onednn_graph

# (B, H, Q, K), twice (B, H, T, K), bias (1, H, Q, T) or None -> (B, Q, D).
AttentionFunction = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]

# The bmm and graph kernels hold every score in memory (the graph kernel only while it compiles).
# Above this many scores, or tokens, the fused kernel is as fast and needs no memory for them.
MAX_SCORES = 32 * 1024 * 1024
MAX_TOKENS = {torch.float32: 1536, torch.bfloat16: 3072}


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attend by torch's fused kernel.

    Args:
        q: Scaled queries (B, H, Q, K).
        k: Keys (B, H, T, K).
        v: Values (B, H, T, K).
        bias: Bias of the scores (1, H, Q, T), or None.

    Returns:
        (B, Q, D).
    """
    bias = None if bias is None else bias.to(q.dtype)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    return x.transpose(1, 2).flatten(2)


def bmm_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attend by two batched matrix products around a softmax, whose sums are float32 inside.

    Args:
        q: Scaled queries (B, H, Q, K).
        k: Keys (B, H, T, K).
        v: Values (B, H, T, K).
        bias: Bias of the scores (1, H, Q, T), or None.

    Returns:
        (B, Q, D).
    """
    if is_large(q, k):
        return fused_attention(q, k, v, bias)
    (b, h, n, head_dim), t = q.shape, k.shape[2]
    q, k, v = (x.reshape(b * h, -1, head_dim) for x in (q, k, v))
    if bias is None:
        scores = torch.bmm(q, k.transpose(1, 2))
    else:
        start = bias.to(q.dtype).expand(b, -1, -1, -1).reshape(b * h, n, t)
        scores = torch.baddbmm(start, q, k.transpose(1, 2))
    x = torch.bmm(scores.softmax(dim=-1), v)
    return x.view(b, h, n, head_dim).transpose(1, 2).flatten(2)


def graph_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attend by oneDNN Graph's kernel, or by the best of the others where it has none.

    Args:
        q: Scaled queries (B, H, Q, K).
        k: Keys (B, H, T, K).
        v: Values (B, H, T, K).
        bias: Bias of the scores (1, H, Q, T), or None.

    Returns:
        (B, Q, D).
    """
    if is_large(q, k):
        return fused_attention(q, k, v, bias)
    bias = None if bias is None else bias.to(q.dtype)
    kernel = onednn_graph.attention_kernel(q, k, v, bias)
    if kernel is None:
        return (fused_attention if q.dtype == torch.float32 else bmm_attention)(q, k, v, bias)
    return kernel(q, k, v) if bias is None else kernel(q, k, v, bias)


def is_large(q: Tensor, k: Tensor) -> bool:
    """Return True if the scores are too many to be held in memory at once.

    Args:
        q: Queries (B, H, Q, K).
        k: Keys (B, H, T, K).

    Returns:
        True above MAX_SCORES scores, or MAX_TOKENS tokens of q's dtype.
    """
    (b, h, n, _), t = q.shape, k.shape[2]
    return b * h * n * t > MAX_SCORES or t > MAX_TOKENS[q.dtype]


# By the names of KernelPlan.attention.
ATTENTION_KERNELS: dict[str, AttentionFunction] = {
    "fused": fused_attention,
    "bmm": bmm_attention,
    "graph": graph_attention,
}


def attend_without_kv(
    q: Tensor,
    x: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    bias: Tensor | None,
    key_scores: Tensor | None = None,
) -> Tensor:
    """Attend from few queries to all tokens without computing keys and values.

    The weights of K and V move to the other side of the products: q . (x Wk) = (q Wk^T) . x, and
    the weighted sum of x Wv is (the weighted sum of x) Wv. This is exact, and saves two products
    over all T tokens. Inference and training share it; it is differentiable.

    Args:
        q: Scaled queries by head, (H, B, Q, K).
        x: The normed tokens (B, T, D).
        k_weight: Weights of the keys by head, (H, K, D).
        v_weight: Weights of the values by head, transposed, (H, D, K).
        bias: Bias of the scores in x's dtype, of the shape (B, H, Q, T) or with 1 in place of any
            of the first three, or None.
        key_scores: What the bias of K adds to all scores of a query, (B, H * Q, 1), or None. Only
            its gradient needs it, as softmax ignores what is the same for all tokens.

    Returns:
        (B, Q, D), without the bias of V.
    """
    (b, t, d), (h, _, count, head_dim) = x.shape, q.shape
    projected = (
        torch.bmm(q.flatten(1, 2), k_weight).view(h, b, count, d).transpose(0, 1)
    )  # (B, H, Q, D)
    scores = torch.bmm(projected.reshape(b, h * count, d), x.transpose(1, 2))
    if key_scores is not None:
        scores = scores + key_scores
    if bias is not None:
        scores = scores + bias.expand(-1, h, count, t).reshape(-1, h * count, t)
    sums = torch.bmm(scores.softmax(dim=-1), x).view(b, h, count, d)
    out = torch.bmm(sums.transpose(0, 1).reshape(h, b * count, d), v_weight)  # (H, B * Q, K)
    return out.view(h, b, count, head_dim).permute(1, 2, 0, 3).reshape(b, count, d)


class AbsorbedAttention:
    """Attention of the first tokens without K and V, see attend_without_kv.

    It is always in float32: it is little work, and gives the model's answer. The bias of K is left
    out, as softmax ignores it.

    Args:
        q: Weight of the scaled queries (D, D).
        k: Weight of the keys (D, D).
        v: Weight of the values (D, D).
        biases: The biases of q and v, (D,) or None each.
        num_heads: H.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, biases: tuple[Tensor | None, ...], num_heads: int
    ):
        d = q.shape[1]
        self.num_heads, self.head_dim = num_heads, d // num_heads
        self.q, self.q_bias = q, biases[0]
        self.k = k.view(num_heads, self.head_dim, d)
        self.v = v.view(num_heads, self.head_dim, d).transpose(1, 2)
        self.v_bias = biases[1]

    def __call__(self, x: Tensor, num_queries: int, bias: Tensor | None) -> Tensor:
        """Attend from the first tokens.

        Args:
            x: Normed tokens (B, T, D) float32.
            num_queries: Q.
            bias: Bias of the scores (1, H, Q, T), or None.

        Returns:
            (B, Q, D).
        """
        q = F.linear(x[:, :num_queries], self.q, self.q_bias)
        q = q.view(*q.shape[:2], self.num_heads, self.head_dim).permute(2, 0, 1, 3)
        bias = None if bias is None else bias.float()
        out = attend_without_kv(q, x, self.k, self.v, bias)
        return out if self.v_bias is None else out + self.v_bias
