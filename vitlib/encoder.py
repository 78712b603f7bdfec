"""Tokens to tokens: the pre-norm transformer block. Nothing here knows of images.

Shapes: B images, T tokens, Q tokens asked for (the first Q of T), D embed_dim, H num_heads,
K = D / H, M mlp_dim.
Sources: Vaswani et al. 1706.03762 (attention); Dosovitskiy et al. 2010.11929 (the block).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.config import ViTConfig
from vitlib.dropout import SampleKeys, drop_path, dropout

QKBias = tuple[Tensor, Tensor, Tensor | None]  # queries, keys, a bias of their scores


class Linear(nn.Linear):
    """nn.Linear with DeiT's and timm's fresh weights: a normal of 0.02, biases 0 (2012.12877)."""

    def reset_parameters(self) -> None:
        """Called by the constructor; draws nothing on the meta device, where load() builds."""
        if not self.weight.is_meta:
            nn.init.trunc_normal_(self.weight, std=0.02)
            if self.bias is not None:
                nn.init.zeros_(self.bias)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm (1607.06450) that fills in nothing on the meta device either."""

    def reset_parameters(self) -> None:
        """Called by the constructor: gains 1, biases 0."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k^T / sqrt(K)) v (1706.03762, section 3.2)."""

    dropout_keys: SampleKeys | None = None  # what training draws from: see dropout.py

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = cfg.num_heads, cfg.head_dim
        self.dropout = cfg.attention_dropout
        self.q = Linear(cfg.embed_dim, cfg.embed_dim, bias=cfg.qkv_bias)
        self.k = Linear(cfg.embed_dim, cfg.embed_dim, bias=cfg.qkv_bias and cfg.key_bias)
        self.v = Linear(cfg.embed_dim, cfg.embed_dim, bias=cfg.qkv_bias)
        self.out = Linear(cfg.embed_dim, cfg.embed_dim)

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, Q, D); attn_pos: a bias of the scores, (1, H, T, T)."""
        if self.training and self.dropout:
            return self.forward_dropout(x, num_queries, attn_pos)
        q, k, bias = self.project_qk(x, num_queries, attn_pos)
        return self.sdpa(q, k, self.split_heads(self.v(x)), bias)

    def forward_dropout(
        self, x: Tensor, num_queries: int | None, attn_pos: Tensor | None
    ) -> Tensor:
        """(B, T, D) -> (B, Q, D), as forward in training: some probabilities are zeroed."""
        found = dropout(
            self.probabilities(x, num_queries, attn_pos), self.dropout, self.dropout_keys, 0
        )
        return self.apply_probs(found, x)

    def project_qk(self, x: Tensor, num_queries: int | None, attn_pos: Tensor | None) -> QKBias:
        """(B, T, D) -> queries (B, H, Q, K), keys (B, H, T, K), their scores' bias (1, H, Q, T)."""
        q, k = self.split_heads(self.q(x[:, :num_queries])), self.split_heads(self.k(x))
        return q, k, None if attn_pos is None else attn_pos[:, :, :num_queries]

    def probabilities(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) -> what forward weighs the values by, (B, H, Q, T); rows sum to 1.

        At least float32 whatever the weights are, and whichever kernel serves forward.
        """
        q, k, bias = self.project_qk(x, num_queries, attn_pos)
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(wide) * self.head_dim**-0.5) @ k.to(wide).transpose(-1, -2)
        scores = scores if bias is None else scores + bias
        return torch.softmax(scores, dim=-1)

    def apply_probs(self, probabilities: Tensor, x: Tensor) -> Tensor:
        """(B, H, Q, T), (B, T, D) -> forward's output (B, Q, D), the products written out."""
        v = self.split_heads(self.v(x))
        x = probabilities.to(v.dtype) @ v
        return self.out(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, H, Q, K), twice (B, H, T, K) and a bias (1, H, Q, T) -> (B, Q, D)."""
        x = F.scaled_dot_product_attention(q, k, v, bias)
        return self.out(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, K)."""
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


class RotaryAttention(Attention):
    """Attention whose patches' queries and keys are turned by where they lie (2104.09864)."""

    def project_qk(self, x: Tensor, num_queries: int | None, attn_pos: Tensor | None) -> QKBias:
        """As Attention's; attn_pos: cosines and sines of the N patches, (2, N, K)."""
        assert attn_pos is not None
        q, k, _ = super().project_qk(x, num_queries, None)
        first = x.shape[1] - attn_pos.shape[1]  # class tokens and registers are not turned
        return apply_rope(q, first, attn_pos), apply_rope(k, first, attn_pos), None


def apply_rope(x: Tensor, first: int, attn_pos: Tensor) -> Tensor:
    """(B, H, Q, K) -> the same, tokens from `first` on turned: half against half (2508.10104).

    In float32 whatever the weights are, as a turn by a rounded angle is another place.
    """
    patches = x[:, :, first:]
    cos, sin = attn_pos[:, : patches.shape[2]].unbind()
    left, right = patches.chunk(2, dim=-1)
    turned = patches * cos + torch.cat((-right, left), dim=-1) * sin
    return torch.cat((x[:, :, :first], turned.to(x.dtype)), dim=2)


class MLP(nn.Module):
    """Two layers around a GELU (1606.08415): in its erf, tanh or x * sigmoid(1.702 x) form."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.activation = cfg.activation
        self.fc1 = Linear(cfg.embed_dim, cfg.mlp_dim)
        self.fc2 = Linear(cfg.mlp_dim, cfg.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, M) -> (B, T, D)."""
        x = self.fc1(x)
        if self.activation == "quick_gelu":
            x = x * torch.sigmoid(1.702 * x)
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.fc2(x)  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """silu(gate) * up, both from one layer, gate first (2002.05202; DINOv2-giant, DINOv3)."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.fc1 = Linear(cfg.embed_dim, 2 * cfg.mlp_dim)
        self.fc2 = Linear(cfg.mlp_dim, cfg.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, 2M) -> (B, T, D)."""
        gate, up = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * up)  # type: ignore[no-any-return]


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); each branch scaled and dropped where asked."""

    dropout_keys: SampleKeys | None = None  # what training draws from: see dropout.py

    def __init__(self, cfg: ViTConfig, index: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(cfg.embed_dim, eps=cfg.norm_eps)
        self.attn = Attention(cfg) if cfg.rope_theta is None else RotaryAttention(cfg)
        self.norm2 = LayerNorm(cfg.embed_dim, eps=cfg.norm_eps)
        self.mlp = SwiGLU(cfg) if cfg.activation == "swiglu" else MLP(cfg)
        self.scale1: nn.Parameter | None = None  # LayerScale: a gain a channel (2103.17239)
        self.scale2: nn.Parameter | None = None
        if cfg.layer_scale is not None:
            self.scale1 = nn.Parameter(torch.full((cfg.embed_dim,), float(cfg.layer_scale)))
            self.scale2 = nn.Parameter(torch.full((cfg.embed_dim,), float(cfg.layer_scale)))
        # Stochastic depth rises from 0 (2012.12877).
        self.dropout, self.drop_path = cfg.dropout, cfg.drop_path * index / max(cfg.depth - 1, 1)

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, Q, D), the first `num_queries` alone; attn_pos: positions.py."""
        x = x[:, :num_queries] + self.residual(
            self.attn(self.norm1(x), num_queries, attn_pos), self.scale1, 1
        )
        return x + self.residual(self.mlp(self.norm2(x)), self.scale2, 3)

    def attention(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """The tokens given to forward (B, T, D) -> its attention's probabilities (B, H, Q, T)."""
        return self.attn.probabilities(self.norm1(x), num_queries, attn_pos)

    def residual(self, x: Tensor, gamma: Tensor | None, site: int) -> Tensor:
        """(B, Q, D) -> (B, Q, D): what a branch adds, with its gain and, in training, drops."""
        x = x if gamma is None else x * gamma
        return self.drop_residual(x, site) if self.training else x

    def drop_residual(self, x: Tensor, site: int) -> Tensor:
        """(B, Q, D) -> the same, dropped by the draws of `site` and the next, of dropout.py's."""
        x = dropout(x, self.dropout, self.dropout_keys, site)
        return drop_path(x, self.drop_path, self.dropout_keys, site + 1)


class AttentionPool(Attention):
    """One learned token asks all tokens, then a norm and an MLP around it (2106.04560; SigLIP)."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__(cfg)
        self.probe = nn.Parameter(torch.empty(1, 1, cfg.embed_dim))
        self.norm = LayerNorm(cfg.embed_dim, eps=cfg.norm_eps)
        self.mlp = SwiGLU(cfg) if cfg.activation == "swiglu" else MLP(cfg)
        nn.init.trunc_normal_(self.probe, std=0.02)

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, D)."""
        q, k, _ = self.project_qk(x, num_queries, attn_pos)
        return self.residual_mlp(self.sdpa(q, k, self.split_heads(self.v(x))))

    def project_qk(self, x: Tensor, num_queries: int | None, attn_pos: Tensor | None) -> QKBias:  # noqa: ARG002
        """As Attention's; the learned token asks."""
        return (
            self.split_heads(self.q(self.probe.expand(x.shape[0], -1, -1))),
            self.split_heads(self.k(x)),
            None,
        )

    def residual_mlp(self, x: Tensor) -> Tensor:
        """What the learned token gathered (B, 1, D) -> (B, D)."""
        x = x[:, 0]
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]
