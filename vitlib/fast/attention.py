"""Scores and what they gather, by the kernel that serves the shape; and one query without K or V.

Queries come scaled: 1 / sqrt(K) is in their weights.

Shapes: B images, T tokens, Q tokens that ask (the first Q of T), D embed_dim, H num_heads,
K = D / H.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.fast import onednn_graph

# (B, H, Q, K), twice (B, H, T, K), bias (1, H, Q, T) or None -> (B, Q, D).
Gather = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]

# Two ways hold all scores at once (graph only where it is compiled): above this many of them, or of
# tokens, the fused kernel serves, which is then as fast.
MOST_SCORES = 32 * 1024 * 1024
MOST_TOKENS = {torch.float32: 1536, torch.bfloat16: 3072}


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """torch's fused kernel."""
    bias = None if bias is None else bias.to(q.dtype)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    return x.transpose(1, 2).flatten(2)


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Two batched products around a softmax, whose sums are float32 inside."""
    if is_large(q, k):
        return fused(q, k, v, bias)
    (b, h, n, width), t = q.shape, k.shape[2]
    q, k, v = (x.reshape(b * h, -1, width) for x in (q, k, v))
    if bias is None:
        scores = torch.bmm(q, k.transpose(1, 2))
    else:
        start = bias.to(q.dtype).expand(b, -1, -1, -1).reshape(b * h, n, t)
        scores = torch.baddbmm(start, q, k.transpose(1, 2))
    gathered = torch.bmm(scores.softmax(dim=-1), v)
    return gathered.view(b, h, n, width).transpose(1, 2).flatten(2)


def graphed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN Graph's kernel for the shape; where there is none, the best of the others."""
    if is_large(q, k):
        return fused(q, k, v, bias)
    bias = None if bias is None else bias.to(q.dtype)
    kernel = onednn_graph.kernel(q, k, v, bias)
    if kernel is None:
        return (fused if q.dtype == torch.float32 else plain)(q, k, v, bias)
    return kernel(q, k, v) if bias is None else kernel(q, k, v, bias)


def is_large(q: Tensor, k: Tensor) -> bool:
    """Whether all scores at once are too much."""
    (b, h, n, _), t = q.shape, k.shape[2]
    return b * h * n * t > MOST_SCORES or t > MOST_TOKENS[q.dtype]


WAYS: dict[str, Gather] = {"fused": fused, "plain": plain, "graph": graphed}


class FirstTokens:
    """The first tokens' attention with K and V left out: their weights move to the other side.

    q . (x Wk) = (q Wk^T) . x, and the scores' sum over x Wv is (their sum over x) Wv; the bias of k
    adds the same to every score of a query, which softmax does not see. Exact, and it spares two
    products over all T tokens. Always in float32: it is little, and what it gives is the answer.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, biases: tuple[Tensor | None, ...], heads: int
    ):
        """The weights of q, scaled, k and v, (D, D) each; the biases of q and v, (D,)."""
        d = q.shape[1]
        width = d // heads
        self.heads, self.width = heads, width
        self.q, self.q_bias = q, biases[0]
        self.k = k.view(heads, width, d)
        self.v = v.view(heads, width, d).transpose(1, 2)
        self.v_bias = biases[1]

    def __call__(self, x: Tensor, count: int, bias: Tensor | None) -> Tensor:
        """(B, T, D), Q, bias (1, H, Q, T) -> what the first Q tokens gather, (B, Q, D)."""
        (b, t, d), h = x.shape, self.heads
        q = F.linear(x[:, :count], self.q, self.q_bias)
        q = q.view(b * count, h, self.width).transpose(0, 1)  # (H, BQ, K)
        asked = torch.bmm(q, self.k).view(h, b, count, d).transpose(0, 1)  # (B, H, Q, D)
        scores = torch.bmm(asked.reshape(b, h * count, d), x.transpose(1, 2))
        if bias is not None:
            scores = scores + bias.float().reshape(1, h * count, t)
        sums = torch.bmm(scores.softmax(dim=-1), x).view(b, h, count, d)
        gathered = torch.bmm(sums.transpose(0, 1).reshape(h, b * count, d), self.v)  # (H, BQ, K)
        out = gathered.view(h, b, count, self.width).permute(1, 2, 0, 3).reshape(b, count, d)
        return out if self.v_bias is None else out + self.v_bias
