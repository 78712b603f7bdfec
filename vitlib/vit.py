"""The Vision Transformer: patches and positions -> blocks -> norm -> pool -> head.

Shapes: B images, C channels, H W pixels, T tokens (prefix tokens first, then patches in row-major
order), D embed_dim, Q tokens the head reads.
Sources: Dosovitskiy et al. 2010.11929; Touvron et al. 2012.12877 (distillation); Oquab et al.
2304.07193 (DINOv2); Darcet et al. 2309.16588 (registers).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitlib.config import Pool, ViTConfig
from vitlib.encoder import Block, LayerNorm, Linear
from vitlib.errors import ConfigError
from vitlib.patch_embed import PatchEmbed


class ViT(nn.Module):
    """One plain trunk for every family; `config` says which. Fresh weights are those of DeiT."""

    # What load() found beside the weights, for save() to write back. The model never reads it.
    image_processor: object | None = None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.pooler: nn.Linear | None = None
        if config.pooler_dim:  # frozen, because no loss reaches it through forward
            self.pooler = Linear(config.embed_dim, config.pooler_dim).requires_grad_(False)
        self._new_head()

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) pixels -> logits (B, num_classes); without a head, what embed gives."""
        return self.forward_head(self._encode(images, self._num_read()))

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) pixels -> every token after the final norm (B, T, D), prefix first."""
        return self._encode(images, None)

    def forward_head(self, tokens: Tensor) -> Tensor:
        """Tokens after the final norm (B, T, D) -> what forward gives, (B, num_classes)."""
        if self.head_dist is not None:  # 2012.12877, section 4: both classifiers, averaged
            return (self.head(tokens[:, 0]) + self.head_dist(tokens[:, 1])) / 2  # type: ignore[no-any-return]
        return self.head(self.pool(tokens))  # type: ignore[no-any-return]

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, H, W) pixels -> the vector that the head reads (B, D); cls+mean: (B, 2D)."""
        return self.pool(self._encode(images, self._num_read()))

    def pool(self, tokens: Tensor) -> Tensor:
        """Tokens after the final norm (B, T, D) -> the vector the head reads (B, D) or (B, 2D).

        With two heads, the mean of the two tokens that they read.
        """
        if self.head_dist is not None:
            return tokens[:, :2].mean(dim=1)
        if self.config.pool == "cls":
            return tokens[:, 0]
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
        x = self.patch_embed(images)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            asked = keep if index == last else None
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, asked, use_reentrant=False)
            else:
                x = block(x, asked)
        return self.norm(x)  # type: ignore[no-any-return]

    def _num_read(self) -> int | None:
        """How many of the first tokens the head reads; None: the patches too."""
        if self.config.pool != "cls":
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
        cfg = self.config
        width = 2 * cfg.embed_dim if cfg.pool == "cls+mean" else cfg.embed_dim
        self.head = Linear(width, cfg.num_classes) if cfg.num_classes else nn.Identity()
        self.head_dist = Linear(width, cfg.num_classes) if cfg.dist_head else None

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
    def num_classes(self) -> int:
        """Width of the logits; 0 where there is no head."""
        return self.config.num_classes
