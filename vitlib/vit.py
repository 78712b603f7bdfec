"""The Vision Transformer: patches and positions -> blocks -> norm -> pool -> head.

Shapes: B images, C channels, H W pixels, h w patches (down, across), T tokens (prefix tokens first,
then patches in row-major order), P prefix tokens, N = h * w, D embed_dim, Q queries of the last
block, which are the tokens that the head reads.
An arrow in a docstring's first line states the shape of the result.
Sources: Dosovitskiy et al. 2010.11929; Touvron et al. 2012.12877 (distillation); Oquab et al.
2304.07193 (DINOv2); Darcet et al. 2309.16588 (registers); Radford et al. 2103.00020 (CLIP).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitlib.config import Pool, ViTConfig, describe_config
from vitlib.config_parts import LEADING_TOKENS
from vitlib.encoder import Block, Linear, build_norm
from vitlib.errors import ConfigError, resolve_block_indices
from vitlib.methods.research import ResearchMethods
from vitlib.methods.timm import TimmMethods
from vitlib.patch_embed import PatchEmbed
from vitlib.positions import AttentionPosition, build_attn_position, is_tracing
from vitlib.scores import num_outputs
from vitlib.system.memory import check_attention_memory
from vitlib.variants import AttentionPool, PostNormBlock

if TYPE_CHECKING:
    from vitlib.image.processor import ImageProcessor

    class Blocks(nn.ModuleList):
        """The blocks as type checkers see them; at run time a plain nn.ModuleList."""

        @overload
        def __getitem__(self, idx: slice) -> "Blocks": ...
        @overload
        def __getitem__(self, idx: int) -> Block: ...
        def __getitem__(self, idx: int | slice) -> "Block | Blocks": ...
        def __iter__(self) -> Iterator[Block]: ...
else:
    Blocks = nn.ModuleList


class ViT(ResearchMethods, TimmMethods):
    """One trunk for every family of plain ViTs, with DeiT's initial weights (2012.12877).

    Every method that takes images raises ImageError where they cannot be cut into patches.

    Args:
        config: Every size and choice of the model.
    """

    # Preprocessing that load() read, for save() to write back.
    image_processor: "ImageProcessor | None" = None
    # Labels of the head that load() read, which a new head does not have: checkpoint/reconcile.py.
    loaded_labels: tuple[str, ...] = ()
    # Differences that load(strict=False) accepted.
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    compute_all_tokens = False  # True: the last block computes every token, for hooks on it

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(config)
        self.norm_pre = build_norm(config, config.embed_dim) if config.pre_norm else nn.Identity()
        self.attn_position: AttentionPosition | None = None
        if config.rope or config.positions.relative:
            self.attn_position = build_attn_position(config)
        kind = PostNormBlock if config.norms.post else Block
        self.blocks = Blocks(kind(config, index) for index in range(config.depth))
        self.norm = build_norm(config, config.embed_dim).requires_grad_(config.final_norm != "none")
        self.pooler = self._new_pooler() if config.outputs.pooler_dim else None
        self.attn_pool = AttentionPool(config) if config.attention_pool else None
        self.projection: nn.Module = nn.Identity()
        if width := config.outputs.projection_dim:  # to the space shared with texts (2103.00020)
            self.projection = Linear(config.embed_dim, width, bias=False)
        self._new_head()

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits, (B, C, H, W) -> (B, num_classes); without a head, the output of `embed`.

        Args:
            images: Normalised pixels, (B, C, H, W).

        Returns:
            Logits, (B, num_classes), or vectors, (B, num_features).
        """
        return self.forward_head(self._encode(images, self.count_queries()))

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute every token after the final norm, (B, C, H, W) -> (B, T, D).

        Args:
            images: Normalised pixels, (B, C, H, W).

        Returns:
            Tokens, (B, T, D), prefix tokens first. Where the final norm belongs to the pooled
            vector (`config.final_norm == "pooled"`), they come without it.
        """
        return self._encode(images, None)

    def forward_head(self, tokens: Tensor, *, pre_logits: bool = False) -> Tensor:
        """Compute logits from the tokens of `forward_features`, (B, T, D) -> (B, num_classes).

        Args:
            tokens: Output of `forward_features`, (B, T, D).
            pre_logits: Return the vector that the head reads, as `embed`: timm's argument.

        Returns:
            Logits, (B, num_classes), or vectors, (B, num_features).
        """
        if self.head_dist is not None and not pre_logits:  # the mean of both, 2012.12877, sec. 4
            return (self.head(tokens[:, 0]) + self.head_dist(tokens[:, 1])) / 2
        x: Tensor = self.projection(self.pool(tokens))
        return x if pre_logits else self.head(x)

    def embed(self, images: Tensor) -> Tensor:
        """Compute the vector that the head reads, (B, C, H, W) -> (B, num_features).

        Args:
            images: Normalised pixels, (B, C, H, W).

        Returns:
            The pooled vector, not normalised, (B, D), 2D for pool="cls+mean", or num_features.
        """
        x: Tensor = self.projection(self.pool(self._encode(images, self.count_queries())))
        return x

    def pool(self, tokens: Tensor) -> Tensor:
        """Pool tokens to one vector an image, (B, T, D) -> (B, D), or a multiple of D.

        Args:
            tokens: Output of `forward_features`, (B, T, D).

        Returns:
            Pooled vector before the projection; of two heads, the mean of the tokens they read.
        """
        only_cls = self.config.pool == "cls" and self.head_dist is None
        x = tokens[:, 0] if only_cls else self._pool(tokens)
        return self.norm(x) if self.config.final_norm == "pooled" else x

    def _pool(self, tokens: Tensor) -> Tensor:
        """Pool by any rule but the class token alone, (B, T, D) -> (B, D) or a multiple of D."""
        if self.head_dist is not None:
            return tokens[:, :2].mean(dim=1)
        if self.config.pool == "prefix":
            return tokens[:, : self.config.num_prefix_tokens].mean(dim=1)
        if self.config.pool == "pooler" and self.pooler is not None:
            return torch.tanh(self.pooler(tokens[:, 0]))
        if self.config.pool in LEADING_TOKENS:
            return tokens[:, : LEADING_TOKENS[self.config.pool]].flatten(1)
        if self.config.pool == "map" and self.attn_pool is not None:
            return self.attn_pool(tokens)
        mean = tokens[:, self.num_prefix_tokens :].mean(dim=1)
        return mean if self.config.pool == "mean" else torch.cat([tokens[:, 0], mean], dim=1)

    def forward_pooler(self, images: Tensor) -> Tensor:
        """Compute tanh(dense([CLS])), HF's pooler_output, (B, C, H, W) -> (B, pooler_dim).

        Args:
            images: Normalised pixels, (B, C, H, W).

        Returns:
            The output of the pooler, (B, pooler_dim), from -1 to 1.

        Raises:
            ConfigError: The checkpoint has no pooler.
        """
        if self.pooler is None:
            raise ConfigError("this checkpoint has no pooler: use embed() for the class token")
        num_queries = None if self.compute_all_tokens else 1
        return torch.tanh(self.pooler(self._encode(images, num_queries)[:, 0]))

    def attention(
        self,
        images: Tensor,
        layers: int | Sequence[int] | None = None,
        rows: Literal["all", "prefix"] = "all",
    ) -> list[Tensor]:
        """Compute attention probabilities, (B, C, H, W) -> list of (B, H, T, T).

        They are those that `forward` uses, whichever kernel serves it, and differentiable.

        Args:
            images: Normalised pixels, (B, C, H, W).
            layers: Blocks, as `indices` of `forward_intermediates`.
            rows: "all", or "prefix" for the rows of class, distillation and register tokens alone,
                (B, H, P, T): their memory grows with T, not with its square.

        Returns:
            Probabilities of each chosen block, (B, H, T, T), float32 or wider; rows sum to 1.
            Columns from num_prefix_tokens on are patches, row by row of `patch_grid(images)`.

        Raises:
            ConfigError: A layer is out of range, or rows="prefix" and the model has no prefix
                tokens.
            ImageError: The result does not fit in memory.
        """
        if rows not in ("all", "prefix"):
            raise ConfigError(f"rows={rows!r}: expected 'all' or 'prefix'")
        chosen = resolve_block_indices(layers, len(self.blocks), "layers")
        num_queries = self.num_prefix_tokens if rows == "prefix" else None
        if num_queries == 0:
            raise ConfigError("this model has no class token: expected rows='all'")
        self.check_attention_memory(images, len(chosen), num_queries)
        positions = list(self.attn_positions(images))
        probabilities: list[Tensor] = []
        for index, x in enumerate(self.iter_hidden_states(images, max(chosen, default=0))):
            if index in chosen:
                probabilities.append(self.blocks[index].attention(x, num_queries, positions[index]))
        return probabilities

    def iter_hidden_states(
        self, images: Tensor, num_blocks: int | None = None, num_queries: int | None = None
    ) -> Iterator[Tensor]:
        """Run the blocks, yielding the tokens before the first one and after each, (B, T, D).

        Args:
            images: Normalised pixels, (B, C, H, W).
            num_blocks: Number of blocks to run; None runs all.
            num_queries: Number of leading tokens that the model's last block computes, Q; None
                means all T. Exact: no later block reads the others.

        Yields:
            Tokens before the final norm, (B, T, D); after the last block (B, Q, D).
        """
        x, last = self.norm_pre(self.patch_embed(images)), len(self.blocks) - 1
        yield x
        steps = zip(self.blocks, self.attn_positions(images), strict=False)
        for index, (block, attn_pos) in enumerate(islice(steps, num_blocks)):
            queries = num_queries if index == last else None
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, queries, attn_pos, use_reentrant=False)
            else:
                x = block(x, queries, attn_pos)
            yield x

    def _encode(self, images: Tensor, num_queries: int | None) -> Tensor:
        """Run every block and the final norm, (B, C, H, W) -> (B, Q, D)."""
        for state in self.iter_hidden_states(images, num_queries=num_queries):
            x = state
        return self.norm(x) if self.config.final_norm == "tokens" else x

    def attn_positions(self, images: Tensor) -> Iterable[Tensor | None]:
        """Compute the positions that attention takes, a tensor for each block (see positions.py).

        Args:
            images: Pixels, (B, C, H, W): their size, and the device of the result.

        Returns:
            The `attn_pos` of each block; None for each where `patch_embed` adds all positions.

        Raises:
            ConfigError: The number of blocks is not that of the learned tables of positions.
        """
        if self.attn_position is None:
            return [None] * len(self.blocks)
        grid, count = self.patch_grid(images), len(self.blocks)
        return self.attn_position.per_block(grid, images.device, count)

    def count_queries(self) -> int | None:
        """Count the leading tokens that the head reads, Q; None where it reads patches too.

        Returns:
            Q, or None.
        """
        cfg, heads = self.config, 1 + self.config.outputs.dist_head
        counts = {**LEADING_TOKENS, "cls": heads, "prefix": cfg.num_prefix_tokens}
        return None if self.compute_all_tokens else counts.get(cfg.pool)

    def check_attention_memory(
        self, images: Tensor, num_layers: int, num_queries: int | None = None, copies: int = 1
    ) -> None:
        """Check that attention probabilities fit in free memory.

        Args:
            images: Pixels, (B, C, H, W).
            num_layers: Number of blocks whose probabilities are stored.
            num_queries: Number of rows stored of each; None means all T.
            copies: How many tensors of that size are stored for each block.

        Raises:
            ImageError: They do not fit; the message states a size that does.
        """
        if not (is_tracing() or torch.compiler.is_compiling()):  # a traced model runs elsewhere
            cfg, sizes = self.config, (num_layers, num_queries, copies)
            tokens = self.patch_grid(images), cfg.patch_size, self.num_prefix_tokens
            check_attention_memory(images, *tokens, cfg.num_heads, *sizes)

    def patch_grid(self, images: Tensor) -> tuple[int, int]:
        """Count the patches down and across, (B, C, H, W) -> (h, w).

        Args:
            images: Pixels, (B, C, H, W).

        Returns:
            Rows and columns of patches, h and w.
        """
        return self.patch_embed.patch_grid(images)

    def reset_classifier(self, num_classes: int, pool: Pool | None = None) -> None:
        """Replace the head by an untrained one, without labels; a distilled model gets two.

        Args:
            num_classes: Number of classes, 0 or more; 0 removes the head.
            pool: What the new head reads; None leaves it as it is.

        Raises:
            ConfigError: The number or the pool does not suit the model.
        """
        cfg, outputs = self.config, self.config.outputs
        has_two = outputs.dist_head and num_classes > 0 and pool in (None, "cls")
        self.config = replace(
            cfg, num_classes=num_classes, pool=cfg.pool if pool is None else pool, labels=(),
            outputs=replace(outputs, dist_head=has_two),
        )  # fmt: skip
        self._new_head()
        for head in filter(None, (self.head, self.head_dist)):
            head.to(device=self.device, dtype=self.dtype).train(self.training)

    def _new_head(self) -> None:
        """Create the head, and the second one of a distilled model."""
        cfg, width = self.config, self.config.num_features
        self.head = Linear(width, cfg.num_classes) if cfg.num_classes else nn.Identity()
        self.head_dist = Linear(width, cfg.num_classes) if cfg.outputs.dist_head else None

    def _new_pooler(self) -> nn.Linear:
        """Create the pooler, frozen where `forward` does not read it: no loss would reach it."""
        cfg = self.config
        return Linear(cfg.embed_dim, cfg.outputs.pooler_dim).requires_grad_(cfg.pool == "pooler")

    def extra_repr(self) -> str:
        """Describe the config for repr(): every field that is not the default, without labels.

        Returns:
            The fields as text, which torch prints in the parentheses of `repr(model)`.
        """
        return describe_config(self.config)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.patch_embed.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; pixels are cast to it."""
        return next(self.patch_embed.parameters()).dtype

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class, distillation, register and prompt tokens, which precede the patches."""
        return self.config.num_prefix_tokens + self.num_prompts

    @property
    def embed_dim(self) -> int:
        """Width of a token, D."""
        return self.config.embed_dim

    @property
    def num_features(self) -> int:
        """Width of the vector that the head reads."""
        return self.config.num_features

    @property
    def num_classes(self) -> int:
        """Width of the logits; 0 for a model without a head."""
        width = num_outputs(self.head)
        return self.config.num_classes if width is None else width
