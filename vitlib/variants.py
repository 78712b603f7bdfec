"""Parts of a ViT that few models have: the attention pool, norms at the ends of blocks, prompts.

Shapes: as in encoder.py.
Sources: Zhai et al. 2106.04560 (the pool); Zhai et al. 2303.15343 (SigLIP); Jia et al. 2203.12119
(prompts).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitlib.config import ViTConfig
from vitlib.config_parts import Norms, Pooling
from vitlib.encoder import MLP, Attention, Block, QKBias, SwiGLU, build_norm
from vitlib.positions import AttentionPosition, RelativePositionBias


class AttentionPool(Attention):
    """Pool by attention: a learned query, then a norm and an MLP around it (2106.04560; SigLIP).

    AIMv2 (2411.14402) has the attention alone.

    Args:
        cfg: The model's config.
    """

    __call__: Callable[..., Tensor]

    def __init__(self, cfg: ViTConfig) -> None:
        pooling = cfg.attention_pool or Pooling()
        cfg = replace(
            cfg,
            num_heads=pooling.num_heads or cfg.num_heads,
            mlp_dim=pooling.mlp_dim or cfg.mlp_dim,
            norms=Norms(kind=cfg.norms.kind),
            biases=replace(cfg.biases, proj=cfg.biases.proj or not pooling.mlp),
            rope=None,
        )
        super().__init__(cfg)
        # The probabilities of the pool are never dropped.
        self.dropout = 0.0
        self.first = 0 if pooling.prefix_tokens else cfg.num_prefix_tokens
        self.probe = nn.Parameter(torch.empty(1, 1, cfg.embed_dim))
        if not pooling.q_proj:
            del self.q
        self.projects_query = pooling.q_proj
        self.norm = build_norm(cfg, cfg.embed_dim) if pooling.mlp else None
        self.mlp: SwiGLU | MLP | None = None
        if pooling.mlp:
            self.mlp = SwiGLU(cfg) if cfg.activation == "swiglu" else MLP(cfg)
        nn.init.trunc_normal_(self.probe, std=0.02)

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """Pool tokens to one vector an image, (B, T, D) -> (B, D).

        Args:
            x: Tokens, (B, T, D).
            num_queries: Unused: the learned probe is the only query.
            attn_pos: Unused: the probe has no position.

        Returns:
            The pooled vector, (B, D).
        """
        return self.residual_mlp(super().forward(x[:, self.first :], num_queries, attn_pos))

    def project_qk(self, x: Tensor, num_queries: int | None, attn_pos: Tensor | None) -> QKBias:  # noqa: ARG002
        """Project the learned probe to a query, and tokens to keys.

        Args:
            x: Tokens, (B, T, D).
            num_queries: Unused: the learned probe is the only query.
            attn_pos: Unused: the probe has no position.

        Returns:
            Queries (B, H, 1, K), keys (B, H, T, K), and None.
        """
        probe = self.probe.expand(x.shape[0], -1, -1)
        q = self.q(probe) if self.projects_query else probe
        return self.split_heads(q), self.split_heads(self.k(x)), None

    def residual_mlp(self, x: Tensor) -> Tensor:
        """Apply the norm and the MLP around the attended query, if any, (B, 1, D) -> (B, D).

        Args:
            x: Output of the attention, (B, 1, D).
        """
        x = x[:, 0]
        return x if self.mlp is None or self.norm is None else x + self.mlp(self.norm(x))


class PostNormBlock(Block):
    """Block that norms its branches: x + norm1(attn(x)), then x + norm2(mlp(x)), as EVA-02-E."""

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """Run attention and MLP on the residual stream, (B, T, D) -> (B, Q, D).

        Args:
            x: Tokens, (B, T, D).
            num_queries: As in `Block.forward`.
            attn_pos: As in `Attention.forward`.

        Returns:
            The first Q tokens after the block, (B, Q, D).
        """
        branch = self.norm1(self.attn(x, num_queries, attn_pos))
        x = x[:, :num_queries] + self.residual(branch, self.ls1, 1)
        return x + self.residual(self.norm2(self.mlp(x)), self.ls2, 3)

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
        return self.attn.probabilities(x, num_queries, attn_pos)


class PromptedBlock(Block):
    """Block with prompts of its own in place of those that the block before it gave (VPT-deep).

    `vitlib.adapt` makes it of a Block.
    """

    prompt_token: nn.Parameter  # (1, V, D)
    first_prompt: int  # index of the first prompt among the tokens

    def replace_prompts(self, x: Tensor) -> Tensor:
        """Put the block's own prompts in place of those among the tokens, (B, T, D) -> (B, T, D).

        Args:
            x: Tokens after the block before, (B, T, D).
        """
        first, end = self.first_prompt, self.first_prompt + self.prompt_token.shape[1]
        prompts = self.prompt_token.to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.cat([x[:, :first], prompts, x[:, end:]], dim=1)

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        """Run the block on tokens with its prompts, (B, T, D) -> (B, Q, D).

        Args:
            x: Tokens, (B, T, D).
            num_queries: As in `Block.forward`.
            attn_pos: As in `Attention.forward`.

        Returns:
            The first Q tokens after the block, (B, Q, D).
        """
        return super().forward(self.replace_prompts(x), num_queries, attn_pos)

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
        return super().attention(self.replace_prompts(x), num_queries, attn_pos)


class PromptedPostNormBlock(PromptedBlock, PostNormBlock):
    """PostNormBlock with prompts of its own."""


class PromptedPosition(AttentionPosition):
    """Positions of another module, with none for the prompts between its prefix and its patches.

    Args:
        base: The module.
        first: Index of the first prompt among the tokens.
        count: Number of prompts.
    """

    def __init__(self, base: AttentionPosition, first: int, count: int) -> None:
        super().__init__()
        self.base, self.first, self.count = base, first, count
        self.is_bias = isinstance(base, RelativePositionBias)

    def per_block(
        self, grid: tuple[int, int], device: torch.device, count: int
    ) -> Iterator[Tensor]:
        """Compute `attn_pos` of each block.

        Args:
            grid: Patches down and across, (h, w).
            device: Device of the result.
            count: Number of blocks.

        Returns:
            Rotary tables, (2, N, K), with rows of the prompts that rotate by an angle of 0; or
            biases, (1, H, T, T), that are 0 in rows and columns of prompts.
        """
        before = widened = None
        for table in self.base.per_block(grid, device, count):
            if widened is None or table is not before:  # one table may serve every block
                before, widened = table, self.widen(table, grid)
            yield widened

    def widen(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """Add the rows of the prompts to a table.

        Args:
            table: A table of the other module.
            grid: Patches down and across, (h, w).

        Returns:
            A table for all tokens.
        """
        if self.is_bias:
            columns = table.new_zeros(*table.shape[:-1], self.count)
            table = torch.cat([table[..., : self.first], columns, table[..., self.first :]], dim=-1)
            rows = table.new_zeros(1, table.shape[1], self.count, table.shape[-1])
            parts = table[:, :, : self.first], rows, table[:, :, self.first :]
            return torch.cat(parts, dim=2)
        # Rows of the class token or of registers stand before those of patches.
        at = table.shape[-2] - grid[0] * grid[1]
        ones = table.new_ones(1, self.count, table.shape[-1])
        parts = table[:, :at], torch.cat([ones, torch.zeros_like(ones)]), table[:, at:]
        return torch.cat(parts, dim=1)
