"""The Vision Transformer: patches and positions -> blocks -> norm -> pool -> head.

Shapes: B images, C channels, H W pixels, T tokens (prefix tokens first, then patches in row-major
order), D embed_dim, Q tokens the head reads.
Sources: Dosovitskiy et al. 2010.11929; Touvron et al. 2012.12877 (distillation); Oquab et al.
2304.07193 (DINOv2); Darcet et al. 2309.16588 (registers); Radford et al. 2103.00020 (CLIP); Zhai
et al. 2303.15343 (SigLIP); Bao et al. 2106.08254 (BEiT); Simeoni et al. 2508.10104 (DINOv3).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitlib.config import Pool, ViTConfig
from vitlib.encoder import AttentionPool, Block, LayerNorm, Linear
from vitlib.errors import ConfigError, ImageError
from vitlib.patch_embed import PatchEmbed
from vitlib.positions import AttentionPosition, build_attn_position, is_tracing
from vitlib.system.memory import available_memory


class ViT(nn.Module):
    """One plain trunk for every family; `config` says which. Fresh weights are those of DeiT."""

    # What load() found beside the weights, for save() to write back. The model never reads it.
    image_processor: object | None = None
    # The labels of the head that load() read: another head has others. See reconcile.py.
    loaded_labels: tuple[str, ...] = ()

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(config)
        norm = LayerNorm(config.embed_dim, eps=config.norm_eps) if config.pre_norm else None
        self.pre_norm = norm or nn.Identity()
        self.positions: AttentionPosition | None = None
        if config.rope_theta is not None or config.relative_position is not None:
            self.positions = build_attn_position(config)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm = LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.pooler = self._new_pooler() if config.pooler_dim else None
        self.attn_pool = AttentionPool(config) if config.attention_pool else None
        self.projection = self._new_projection() if config.projection_dim else nn.Identity()
        self._new_head()

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) pixels -> logits (B, num_classes); without a head, what embed gives."""
        return self.forward_head(self._encode(images, self._num_pooled()))

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
        tokens = self._encode(images, self._num_pooled())
        return self.projection(self.pool(tokens))  # type: ignore[no-any-return]

    def pool(self, tokens: Tensor) -> Tensor:
        """The tokens of forward_features (B, T, D) -> one vector an image (B, D), not projected.

        cls+mean: (B, 2D). With two heads, the mean of the two tokens that they read.
        """
        plain = self.config.pool == "cls" and self.head_dist is None
        x = tokens[:, 0] if plain else self._pool(tokens)
        return self.norm(x) if self.config.final_norm == "pooled" else x

    def _pool(self, tokens: Tensor) -> Tensor:
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

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
    ) -> list[Any]:
        """(B, C, H, W) pixels -> the patch tokens after each block asked for, a list of (B, N, D).

        indices: as in timm: None all blocks, a number the last so many, a list their numbers from
        0, or from the end below 0; in any case the list is in the order of the blocks, and no block
        after the last of them is computed. norm: through the final norm. reshape: as maps
        (B, D, h, w). return_prefix_tokens: a list of pairs, the patches and the class, distillation
        and register tokens (B, P, D). Raises ConfigError for blocks that are not there.
        """
        wanted = resolve_block_indices(indices, len(self.blocks), "indices")
        grid, first = self.patch_grid(images), self.num_prefix_tokens
        found: list[Any] = []
        for index, x in enumerate(self.iter_hidden_states(images, max(wanted, default=-1) + 1)):
            if index - 1 not in wanted:
                continue
            tokens = self.norm(x) if norm else x
            patches = tokens[:, first:]
            if reshape:
                patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
            found.append((patches, tokens[:, :first]) if return_prefix_tokens else patches)
        return found

    def attention(
        self,
        images: Tensor,
        layers: int | Sequence[int] | None = None,
        rows: Literal["all", "prefix"] = "all",
    ) -> list[Tensor]:
        """(B, C, H, W) pixels -> how much each token draws from each, a list of (B, H, T, T).

        The probabilities that forward uses, whichever kernel serves it: softmax of the layer's own
        queries and keys, each row sums to 1; float32 or wider, as the weights are. Differentiable.
        layers: as forward_intermediates' indices. rows: "prefix" gives those of the class,
        distillation and register tokens alone, (B, H, P, T), in memory that grows with T. Patches
        are columns from num_prefix_tokens on, by row of patch_grid(images).

        Raises ConfigError for layers that are not there and for rows="prefix" where no token is
        before the patches; ImageError where the answer would not fit in memory.
        """
        if rows not in ("all", "prefix"):
            raise ConfigError(f"rows={rows!r}: expected 'all' or 'prefix'")
        wanted = resolve_block_indices(layers, len(self.blocks), "layers")
        num_queries = None
        if rows == "prefix":
            num_queries = self.num_prefix_tokens
            if not num_queries:
                raise ConfigError(
                    "this model has no class token to ask what it looks at: use rows='all'"
                )
        self.check_attention_memory(images, len(wanted), num_queries)
        places = list(self.attn_positions(images))
        found = []
        for index, x in enumerate(self.iter_hidden_states(images, max(wanted, default=0))):
            if index in wanted:
                block: Any = self.blocks[index]
                found.append(block.attention(x, num_queries, places[index]))
        return found

    def iter_hidden_states(self, images: Tensor, count: int) -> Iterator[Tensor]:
        """(B, C, H, W) -> tokens (B, T, D) before the first block, and after each of `count`."""
        x = self.pre_norm(self.patch_embed(images))
        yield x
        for block, attn_pos in zip(self.blocks[:count], self.attn_positions(images), strict=False):
            x = self._run_block(block, x, None, attn_pos)
            yield x

    def check_attention_memory(
        self, images: Tensor, layers: int, num_queries: int | None = None, copies: int = 1
    ) -> None:
        """Raises ImageError where attention of so many layers, or of its first rows, that
        many times, does not fit in what is free. A trace or an export runs elsewhere, at any batch:
        it is not checked."""
        if is_tracing() or torch.compiler.is_compiling():
            return
        (h, w), (p, q), (height, width) = (
            self.patch_grid(images), self.config.patch_size, images.shape[2:]
        )  # fmt: skip
        tokens = h * w + self.num_prefix_tokens
        # Beside the answer, one layer's scores.
        each = (copies * layers + 1) * len(images) * self.config.num_heads * 4
        need, free = each * (num_queries or tokens) * tokens, available_memory(images.device)
        if free is None or need <= free:
            return
        most = free / each / num_queries if num_queries else math.sqrt(free / each)
        side = math.isqrt(max(int(most) - self.num_prefix_tokens, 0))
        fits = f"images of {side * p}x{side * q} pixels fit" if side else "no image fits"
        raise ImageError(
            f"attention of {layers} layers on {len(images)} images of {height}x{width} pixels "
            f"takes {need / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: {fits}; or "
            "ask for fewer layers=, fewer images, or rows='prefix'"
        )

    def patch_grid(self, images: Tensor) -> tuple[int, int]:
        """(B, C, H, W) -> the patches down and across, (h, w). Raises ImageError for a misfit."""
        return self.patch_embed.patch_grid(images)

    def _encode(self, images: Tensor, num_queries: int | None) -> Tensor:
        """(B, C, H, W) -> (B, Q, D); the last block computes only the first tokens."""
        x, last = self.pre_norm(self.patch_embed(images)), len(self.blocks) - 1
        places = repeat(None) if self.positions is None else self.attn_positions(images)
        for index, (block, attn_pos) in enumerate(zip(self.blocks, places, strict=False)):
            x = self._run_block(block, x, num_queries if index == last else None, attn_pos)
        return self.norm(x) if self.config.final_norm == "tokens" else x  # type: ignore[no-any-return]

    def _run_block(
        self, block: Any, x: Tensor, num_queries: int | None, attn_pos: Tensor | None
    ) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, x, num_queries, attn_pos, use_reentrant=False)  # type: ignore[no-any-return]
        return block(x, num_queries, attn_pos)  # type: ignore[no-any-return]

    def attn_positions(self, images: Tensor) -> Iterable[Tensor | None]:
        """For each block, what its attention must know of where the tokens lie (positions.py).

        Raises ConfigError where there are other blocks than positions are learned for.
        """
        count = len(self.blocks)
        if self.positions is None:
            return [None] * count
        return self.positions.per_block(self.patch_embed.patch_grid(images), images.device, count)

    def _num_pooled(self) -> int | None:
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
                head.to(next(self.patch_embed.parameters())).train(self.training)

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
        width = num_outputs(self.head)
        return self.config.num_classes if width is None else width


def num_outputs(head: nn.Module) -> int | None:
    """Classes of a head, read from its modules: 0 of an Identity; None where they do not say.

    Args:
        head: an Identity, a linear layer, or a Sequential that ends in one (layers that have no
            width of their own, such as Dropout, may follow it).
    """
    if isinstance(head, nn.Identity):
        return 0
    if isinstance(head, nn.Sequential):
        widths = [num_outputs(layer) for layer in head if not isinstance(layer, _KEEP_WIDTH)]
        return widths[-1] if widths else 0
    width = getattr(head, "out_features", None)
    return width if isinstance(width, int) and not isinstance(width, bool) else None


_KEEP_WIDTH = (nn.Identity, nn.Dropout, nn.LayerNorm, nn.BatchNorm1d, nn.ReLU, nn.GELU, nn.Tanh)


def resolve_block_indices(asked: int | Sequence[int] | None, count: int, name: str) -> set[int]:
    """timm's way to name blocks, of `count`: None all, a number the last so many, or a list.

    Raises ConfigError, by the argument's name, for blocks that are not there.
    """
    if asked is None:
        return set(range(count))
    if isinstance(asked, Integral) and not isinstance(asked, bool):
        last = int(asked)
        if not 1 <= last <= count:
            raise ConfigError(f"{name}={last}: expected 1 to {count}, the last so many blocks")
        return set(range(count - last, count))
    blocks = list(asked) if isinstance(asked, Iterable) else [asked]
    if isinstance(asked, str | bool) or not all(
        isinstance(i, Integral) and -count <= int(i) < count for i in blocks
    ):
        raise ConfigError(
            f"{name}={asked!r}: expected numbers of blocks, 0 to {count - 1}, or from the end, -1 "
            f"to {-count}"
        )
    return {int(i) % count for i in blocks}
