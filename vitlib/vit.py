"""The Vision Transformer: patches and positions -> blocks -> norm -> pool -> head.

Shapes: B images, C channels, H W pixels, T tokens (prefix tokens first, then patches in row-major
order), D embed_dim, Q tokens the head reads.
Sources: Dosovitskiy et al. 2010.11929; Touvron et al. 2012.12877 (distillation); Oquab et al.
2304.07193 (DINOv2); Darcet et al. 2309.16588 (registers); Radford et al. 2103.00020 (CLIP); Zhai
et al. 2303.15343 (SigLIP); Bao et al. 2106.08254 (BEiT); Simeoni et al. 2508.10104 (DINOv3).
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitlib.config import Pool, ViTConfig
from vitlib.encoder import AttentionPool, Block, LayerNorm, Linear
from vitlib.errors import ConfigError
from vitlib.patch_embed import PatchEmbed
from vitlib.positions import AttentionPositions, attention_positions


class ViT(nn.Module):
    """One plain trunk for every family; `config` says which. Fresh weights are those of DeiT."""

    # What load() found beside the weights, for save() to write back. The model never reads it.
    image_processor: object | None = None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(config)
        norm = LayerNorm(config.embed_dim, eps=config.norm_eps) if config.pre_norm else None
        self.pre_norm = norm or nn.Identity()
        self.positions: AttentionPositions | None = None
        if config.rope_theta is not None or config.relative_position is not None:
            self.positions = attention_positions(config)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.pooler = self._new_pooler() if config.pooler_dim else None
        self.attn_pool = AttentionPool(config) if config.attention_pool else None
        self.projection = self._new_projection() if config.projection_dim else nn.Identity()
        self._new_head()

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) pixels -> logits (B, num_classes); without a head, what embed gives."""
        return self.forward_head(self._encode(images, self._num_read()))

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) pixels -> every token after the final norm (B, T, D), prefix first.

        Where the final norm is the pooled vector's (final_norm), the tokens come without it.
        """
        return self._encode(images, None)

    def forward_head(self, tokens: Tensor) -> Tensor:
        """The tokens of forward_features (B, T, D) -> what forward gives, (B, num_classes)."""
        if self.head_dist is not None:  # 2012.12877, section 4: both classifiers, averaged
            return (self.head(tokens[:, 0]) + self.head_dist(tokens[:, 1])) / 2  # type: ignore[no-any-return]
        return self.head(self.projection(self.pool(tokens)))  # type: ignore[no-any-return]

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) pixels -> the vector that the head reads (B, D).

        cls+mean: (B, 2D). CLIP: the projection (B, projection_dim). pooler: (B, pooler_dim).
        """
        tokens = self._encode(images, self._num_read())
        return self.projection(self.pool(tokens))  # type: ignore[no-any-return]

    def pool(self, tokens: Tensor) -> Tensor:
        """The tokens of forward_features (B, T, D) -> one vector an image (B, D), not projected.

        cls+mean: (B, 2D). With two heads, the mean of the two tokens that they read.
        """
        plain = self.config.pool == "cls" and self.head_dist is None
        x = tokens[:, 0] if plain else self._pool_otherwise(tokens)
        return self.norm(x) if self.config.final_norm == "pooled" else x

    def _pool_otherwise(self, tokens: Tensor) -> Tensor:
        """(B, T, D) -> (B, D) or (B, 2D): every way to pool but [CLS] alone."""
        if self.head_dist is not None:
            return tokens[:, :2].mean(dim=1)
        if self.config.pool == "pooler":
            assert self.pooler is not None
            return torch.tanh(self.pooler(tokens[:, 0]))
        if self.config.pool == "map":
            assert self.attn_pool is not None
            return self.attn_pool(tokens)  # type: ignore[no-any-return]
        mean = tokens[:, self.config.num_prefix_tokens :].mean(dim=1)
        return mean if self.config.pool == "mean" else torch.cat([tokens[:, 0], mean], dim=1)

    def forward_pooler(self, images: Tensor) -> Tensor:
        """(B, C, H, W) pixels -> tanh(dense([CLS])) (B, pooler_dim): Hugging Face's pooler_output.

        Raises ConfigError where the checkpoint has no pooler.
        """
        if self.pooler is None:
            raise ConfigError("this checkpoint has no pooler: use embed() for the class token")
        return torch.tanh(self.pooler(self._encode(images, 1)[:, 0]))

    def _encode(self, images: Tensor, keep: int | None) -> Tensor:
        """(B, C, H, W) -> (B, Q, D); the last block computes only the first `keep` tokens."""
        x, last = self.pre_norm(self.patch_embed(images)), len(self.blocks) - 1
        places = repeat(None) if self.positions is None else self.where(images)
        for index, (block, where) in enumerate(zip(self.blocks, places, strict=False)):
            asked = keep if index == last else None
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, asked, where, use_reentrant=False)
            else:
                x = block(x, asked, where)
        return self.norm(x) if self.config.final_norm == "tokens" else x  # type: ignore[no-any-return]

    def where(self, images: Tensor) -> Iterable[Tensor | None]:
        """For each block, what its attention must know of where the tokens lie (positions.py)."""
        if self.positions is None:
            return [None] * len(self.blocks)
        return self.positions.for_blocks(self.patch_embed.patch_grid(images), images.device)

    def _num_read(self) -> int | None:
        """How many of the first tokens the head reads; None: the patches too."""
        if self.config.pool not in ("cls", "pooler"):
            return None
        return 1 if self.head_dist is None else 2

    def reset_classifier(self, num_classes: int, pool: Pool | None = None) -> None:
        """A new, untrained head of `num_classes` (0: none), reading `pool` where one is given.

        The labels go; a distilled model gets two new heads. Raises ConfigError for a wrong number.
        """
        self.config = replace(
            self.config,
            num_classes=num_classes,
            pool=self.config.pool if pool is None else pool,
            dist_head=self.config.dist_head and num_classes > 0 and pool in (None, "cls"),
            labels=(),
        )
        self._new_head()
        for head in (self.head, self.head_dist):
            if head is not None:
                head.to(self.norm.weight).train(self.training)

    def _new_head(self) -> None:
        cfg, width = self.config, self.config.num_features
        self.head = Linear(width, cfg.num_classes) if cfg.num_classes else nn.Identity()
        self.head_dist = Linear(width, cfg.num_classes) if cfg.dist_head else None

    def _new_pooler(self) -> nn.Linear:
        """Frozen where forward does not read it, and so no loss reaches it."""
        pooler = Linear(self.config.embed_dim, self.config.pooler_dim)
        pooler.requires_grad_(self.config.pool == "pooler")
        return pooler

    def _new_projection(self) -> nn.Linear:
        """To the space that images share with texts (2103.00020, section 2.3)."""
        return Linear(self.config.embed_dim, self.config.projection_dim, bias=False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only each block's input and compute the rest again (1604.06174)."""
        self.gradient_checkpointing = enable

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens: the patches start after them."""
        return self.config.num_prefix_tokens

    @property
    def embed_dim(self) -> int:
        """D, the width of a token."""
        return self.config.embed_dim

    @property
    def num_features(self) -> int:
        """Width of the vector that the head reads."""
        return self.config.num_features

    @property
    def num_classes(self) -> int:
        """Width of the logits; 0 where there is no head."""
        return self.config.num_classes
