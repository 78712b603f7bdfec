"""Tokens to tokens: attention, MLP and the block that joins them. Nothing here knows of images.

The block normalises the input of each branch (pre-LN). This is the reference forward: the others
give the same numbers for a purpose that each states. `fast/` fuses operations for inference,
`train/fused_step/` saves activations in training, `points/` stores every intermediate.

Shapes: B images, T tokens, Q queries (the first Q of the T tokens), N patches, D embed_dim,
H num_heads, K = D / H, M mlp_dim.
An arrow in a docstring's first line states the shape of the result.
Sources: Vaswani et al. 1706.03762 (attention); Dosovitskiy et al. 2010.11929 (the block).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.config import ViTConfig
from vitlib.dropout import SampleKeys, drop_path, dropout
from vitlib.errors import ConfigError
from vitlib.positions import apply_rope
from vitlib.system.torch_state import without_autocast

QKBias = tuple[Tensor, Tensor, Tensor | None]  # queries, keys, bias of the scores
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # (q, k, v, bias) -> heads


class Linear(nn.Linear):
    """Linear layer with the initial weights of DeiT and timm: normal of 0.02 (2012.12877)."""

    __call__: Callable[..., Tensor]  # nn.Module's may return anything

    def reset_parameters(self) -> None:
        """Initialise weight and bias; the constructor of nn.Linear calls this.

        Nothing is drawn on the meta device, where load() builds the model.
        """
        if not self.weight.is_meta:
            nn.init.trunc_normal_(self.weight, std=0.02)
            if self.bias is not None:
                nn.init.zeros_(self.bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm (1607.06450) that initialises nothing on the meta device."""

    def reset_parameters(self) -> None:
        """Set weight to 1 and bias to 0; the constructor of nn.LayerNorm calls this."""
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.RMSNorm):
    """Norm by the root mean square alone (1910.07467); initialises nothing on the meta device."""

    bias: None = None

    def reset_parameters(self) -> None:
        """Set weight to 1; the constructor of nn.RMSNorm calls this."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis, (B, T, D) -> (B, T, D), or of heads (B, T, H, K).

        Args:
            x: Tokens (B, T, D), or their heads.
        """
        # Under autocast x is in fewer bits: torch would compute the same, but warn that it is slow.
        return super().forward(x.to(self.weight.dtype))


def build_norm(cfg: ViTConfig, dim: int) -> LayerNorm | RMSNorm:
    """Build a norm of the model's kind.

    Args:
        cfg: The model's config.
        dim: Number of channels.
    """
    return (LayerNorm if cfg.norms.kind == "layer" else RMSNorm)(dim, eps=cfg.norm_eps)


class LayerScale(nn.Module):
    """Multiply each channel of a branch by a learned gamma (2103.17239).

    Args:
        dim: Number of channels, D.
        init_value: Initial gamma of each channel.
    """

    def __init__(self, dim: int, init_value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels, (B, Q, D) -> (B, Q, D).

        Args:
            x: Output of a branch, (B, Q, D).
        """
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k^T / sqrt(K)) v (1706.03762, section 3.2).

    Queries, keys and values have a projection each: an adapter can target one of them, and every
    layout maps them one to one.

    Args:
        cfg: The model's config.
    """

    dropout_keys: SampleKeys | None = None  # seeds of the draws in training, see dropout.py
    attend: Attend | None  # in place of torch's attention, see ViT.with_attention
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    norms_heads = False  # True: q_norm and k_norm are of each head, not of the whole width

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = cfg.num_heads, cfg.head_dim
        self.dropout = cfg.regularization.attention_dropout
        self.q = Linear(cfg.embed_dim, cfg.embed_dim, bias=cfg.biases.qkv)
        self.k = Linear(cfg.embed_dim, cfg.embed_dim, bias=cfg.biases.qkv and cfg.biases.key)
        self.v = Linear(cfg.embed_dim, cfg.embed_dim, bias=cfg.biases.qkv)
        self.proj = Linear(cfg.embed_dim, cfg.embed_dim, bias=cfg.biases.proj)
        self.q_norm = self.k_norm = self.attend = None
        self.sub_norm = build_norm(cfg, cfg.embed_dim) if cfg.norms.attn else None
        if cfg.norms.qk is not None:
            self._add_qk_norms(cfg)

    def _add_qk_norms(self, cfg: ViTConfig) -> None:
        """Build norms of queries and keys, of each head or of the whole width (2302.05442)."""
        self.norms_heads = cfg.norms.qk == "head"
        width = cfg.head_dim if self.norms_heads else cfg.embed_dim
        self.q_norm, self.k_norm = build_norm(cfg, width), build_norm(cfg, width)

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """Attend from the queries to every token, (B, T, D) -> (B, Q, D).

        Args:
            x: Normalised tokens, (B, T, D).
            num_queries: Number of leading tokens that are queries, Q; None means all T.
            attn_pos: Positions for this block, from `ViT.attn_positions`: a bias of the scores,
                (1, H, T, T); with rotary embeddings a table, (2, N, K) or (2, H, N, K); None where
                the model has neither.

        Returns:
            The attended tokens, (B, Q, D).
        """
        if self.training and self.dropout:
            probs = self.probabilities(x, num_queries, attn_pos)
            return self.apply_probs(dropout(probs, self.dropout, self.dropout_keys, 0), x)
        q, k, bias = self.project_qk(x, num_queries, attn_pos)
        attend = self.attend or F.scaled_dot_product_attention
        x = attend(q, k, self.split_heads(self.v(x)), bias).transpose(1, 2).flatten(2)
        return self.proj(x if self.sub_norm is None else self.sub_norm(x))

    def project_qk(self, x: Tensor, num_queries: int | None, attn_pos: Tensor | None) -> QKBias:
        """Project tokens to queries and keys, and choose the bias of their scores.

        Args:
            x: Normalised tokens, (B, T, D).
            num_queries: As in `forward`.
            attn_pos: As in `forward`.

        Returns:
            Queries (B, H, Q, K), keys (B, H, T, K), and a bias (1, H, Q, T) or None.
        """
        q, k = self.split_heads(self.q(x[:, :num_queries])), self.split_heads(self.k(x))
        if self.q_norm is not None:
            q, k = self._normalize_qk(q, k)
        return q, k, None if attn_pos is None else attn_pos[:, :, :num_queries]

    def probabilities(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """Compute the weights that `forward` gives to the values, (B, T, D) -> (B, H, Q, T).

        Args:
            x: Normalised tokens, (B, T, D).
            num_queries: As in `forward`.
            attn_pos: As in `forward`.

        Returns:
            Probabilities (B, H, Q, T) in at least float32, whatever the dtype of the weights and
            whichever kernel serves `forward`. Each row sums to 1.

        Raises:
            ConfigError: The attention is a function of the user's own, see `with_attention`.
        """
        if self.attend is not None:
            raise ConfigError("attention of your own has no probabilities: ask other blocks")
        scores = self.scores(*self.project_qk(x, num_queries, attn_pos))
        with without_autocast(scores):
            return torch.softmax(scores, dim=-1)

    def scores(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the scores in at least float32, whose softmax is taken, -> (B, H, Q, T).

        Args:
            q: Queries, (B, H, Q, K).
            k: Keys, (B, H, T, K).
            bias: Bias of the scores, (1, H, Q, T), or None.
        """
        wide = torch.promote_types(q.dtype, torch.float32)
        with without_autocast(q):  # which would round the scores to bfloat16
            scores: Tensor = (q.to(wide) * self.head_dim**-0.5) @ k.to(wide).transpose(-1, -2)
            return scores if bias is None else scores + bias

    def apply_probs(self, probabilities: Tensor, x: Tensor) -> Tensor:
        """Compute the output of `forward` from its probabilities, (B, H, Q, T) -> (B, Q, D).

        Args:
            probabilities: Attention probabilities, (B, H, Q, T).
            x: The normalised tokens that they were computed from, (B, T, D).
        """
        v = self.split_heads(self.v(x))
        x = (probabilities.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return self.proj(x if self.sub_norm is None else self.sub_norm(x))

    def _normalize_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise queries (B, H, Q, K) and keys (B, H, T, K), each head or their whole width."""
        assert self.q_norm is not None
        assert self.k_norm is not None
        if self.norms_heads:
            return self.q_norm(q), self.k_norm(k)
        q, k = (x.transpose(1, 2).flatten(2) for x in (q, k))
        return self.split_heads(self.q_norm(q)), self.split_heads(self.k_norm(k))

    def extra_repr(self) -> str:
        """Describe the heads for repr()."""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"

    def split_heads(self, x: Tensor) -> Tensor:
        """Split channels into heads, (B, T, D) -> (B, H, T, K).

        Args:
            x: Projected tokens, (B, T, D).
        """
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


class RotaryAttention(Attention):
    """Attention that rotates queries and keys of patches by their positions (2104.09864)."""

    def project_qk(self, x: Tensor, num_queries: int | None, attn_pos: Tensor | None) -> QKBias:
        """Project tokens to rotated queries and keys.

        Args:
            x: Normalised tokens, (B, T, D).
            num_queries: As in `Attention.forward`.
            attn_pos: Cosines and sines of the patches, (2, N, K), or of each head, (2, H, N, K).

        Returns:
            Queries (B, H, Q, K), keys (B, H, T, K), and None: rotary scores have no bias.
        """
        assert attn_pos is not None
        q, k, _ = super().project_qk(x, num_queries, None)
        first = x.shape[1] - attn_pos.shape[-2]
        return apply_rope(q, first, attn_pos), apply_rope(k, first, attn_pos), None


class MLP(nn.Module):
    """Two linears around a GELU (1606.08415): in its erf, tanh or x * sigmoid(1.702 x) form.

    Args:
        cfg: The model's config.
    """

    num_inputs = 1  # of the activation

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.activation = cfg.activation
        self.fc1 = Linear(cfg.embed_dim, self.num_inputs * cfg.mlp_dim, bias=cfg.biases.proj)
        self.sub_norm = build_norm(cfg, cfg.mlp_dim) if cfg.norms.mlp else None
        self.fc2 = Linear(cfg.mlp_dim, cfg.embed_dim, bias=cfg.biases.proj)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token by itself, (B, T, D) -> (B, T, M) -> (B, T, D).

        Args:
            x: Normalised tokens, (B, T, D).
        """
        x = self.activate(self.fc1(x))
        return self.fc2(x if self.sub_norm is None else self.sub_norm(x))

    def activate(self, x: Tensor) -> Tensor:
        """Apply the activation, (B, T, M) -> (B, T, M).

        Args:
            x: Output of the first linear, (B, T, M).
        """
        if self.activation == "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        return F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")

    def extra_repr(self) -> str:
        """Describe the activation for repr()."""
        return f"activation={self.activation!r}"


class SwiGLU(MLP):
    """MLP of silu(gate) * up, both from one linear, gate first (2002.05202; DINOv2-g, DINOv3).

    Args:
        cfg: The model's config.
    """

    num_inputs = 2

    def activate(self, x: Tensor) -> Tensor:
        """Multiply the gate and the other half of the channels, (B, T, 2M) -> (B, T, M).

        Args:
            x: Output of the first linear, (B, T, 2M).
        """
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


class Block(nn.Module):
    """Transformer block: x + attn(norm1(x)), then x + mlp(norm2(x)) (2010.11929, equations 2, 3).

    Each branch is scaled by LayerScale where the model has it, and in training passes through
    dropout and stochastic depth.

    Args:
        cfg: The model's config.
        index: Number of the block, from 0: stochastic depth rises with it (2012.12877).
    """

    dropout_keys: SampleKeys | None = None  # seeds of the draws in training, see dropout.py

    def __init__(self, cfg: ViTConfig, index: int) -> None:
        super().__init__()
        scale, rates = cfg.layer_scale, cfg.regularization
        self.ls1 = None if scale is None else LayerScale(cfg.embed_dim, scale)
        self.ls2 = None if scale is None else LayerScale(cfg.embed_dim, scale)
        self.norm1 = build_norm(cfg, cfg.embed_dim)
        self.attn = Attention(cfg) if cfg.rope is None else RotaryAttention(cfg)
        self.norm2 = build_norm(cfg, cfg.embed_dim)
        self.mlp = SwiGLU(cfg) if cfg.activation == "swiglu" else MLP(cfg)
        self.dropout = rates.dropout
        self.drop_path = rates.drop_path * index / max(cfg.depth - 1, 1)

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """Run attention and MLP on the residual stream, (B, T, D) -> (B, Q, D).

        Args:
            x: Tokens, (B, T, D).
            num_queries: Number of leading tokens to compute, Q; None means all T. The others are
                still keys and values.
            attn_pos: Positions for this block, as in `Attention.forward`.

        Returns:
            The first Q tokens after the block, (B, Q, D).
        """
        x = x[:, :num_queries] + self.residual(
            self.attn(self.norm1(x), num_queries, attn_pos), self.ls1, 1
        )
        return x + self.residual(self.mlp(self.norm2(x)), self.ls2, 3)

    def attention(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """Compute the attention probabilities of `forward`, (B, T, D) -> (B, H, Q, T).

        Args:
            x: The tokens that `forward` takes, (B, T, D).
            num_queries: As in `forward`.
            attn_pos: As in `forward`.

        Returns:
            Probabilities (B, H, Q, T) in at least float32.
        """
        return self.attn.probabilities(self.norm1(x), num_queries, attn_pos)

    def residual(self, x: Tensor, layer_scale: nn.Module | None, site: int) -> Tensor:
        """Scale the output of a branch and, in training, drop from it, (B, Q, D) -> (B, Q, D).

        Args:
            x: Output of the branch, (B, Q, D).
            layer_scale: The branch's LayerScale; None where the model has none.
            site: First of the two random sites that the branch draws from, see dropout.py.
        """
        x = x if layer_scale is None else layer_scale(x)
        return self._drop_residual(x, site) if self.training else x

    def _drop_residual(self, x: Tensor, site: int) -> Tensor:
        """Apply dropout at the site, and stochastic depth at the next, (B, Q, D) -> (B, Q, D)."""
        x = dropout(x, self.dropout, self.dropout_keys, site)
        return drop_path(x, self.drop_path, self.dropout_keys, site + 1)
