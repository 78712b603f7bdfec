"""A ViT whose tokens become fewer from block to block.

How data flows: as in ViT, by the forward of vitlib/points/forward.py, whose point after attention
reduces the tokens. Shapes: as in vitlib/vit.py; U tokens after the last block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast

import torch
from torch import Tensor

from vitlib.errors import ConfigError, resolve_block_indices
from vitlib.parts.attention import check_signature, describe_function
from vitlib.parts.sharing import copy_sharing_weights
from vitlib.points.forward import Edit, forward_block
from vitlib.points.names import block_points
from vitlib.tokens.functions import Drop, Merge, drop, merge
from vitlib.tokens.reduction import ReductionPoints, TokenFunction
from vitlib.vit import ViT


@dataclass(frozen=True)
class ReducedTokens:
    """The tokens of images after blocks that made them fewer.

    Attributes:
        tokens: (B, U, D), prefix tokens first.
        map: For each original token the index of the one that it is in, or -1, (B, T).
        sizes: Number of original tokens in each, (B, U).
        grid: Patches down and across, (h, w).
        num_prefix_tokens: P.
    """

    tokens: Tensor
    map: Tensor
    sizes: Tensor
    grid: tuple[int, int]
    num_prefix_tokens: int

    def unmerge(self) -> Tensor:
        """Give each patch the token that it is in, (B, h, w, D); zeros where it was dropped.

        Returns:
            Tokens of the patches on their grid, (B, h, w, D).
        """
        patches = self.all_tokens()[:, self.num_prefix_tokens :]
        return patches.reshape(len(patches), *self.grid, patches.shape[2])

    def all_tokens(self) -> Tensor:
        """Give each original token the one that it is in, (B, T, D); zeros where it was dropped.

        Returns:
            Tokens of the original grid, prefix tokens first, (B, T, D).
        """
        index = self.map[:, :, None]
        rows = self.tokens.gather(1, index.clamp(min=0).expand(-1, -1, self.tokens.shape[2]))
        return torch.where(index < 0, 0.0, rows)


class ReducedViT(ViT):
    """A ViT with token functions; `ViT.with_tokens` makes it.

    Its `forward_features` gives the tokens that are left, `forward_tokens` where each patch is.

    Args:
        config: The config, as for ViT.
    """

    token_functions: tuple[tuple[TokenFunction, ...], ...]  # of each block

    def iter_hidden_states(
        self, images: Tensor, num_blocks: int | None = None, num_queries: int | None = None
    ) -> Iterator[Tensor]:
        """Run the blocks, yielding the tokens before the first one and after each.

        Args:
            images: Normalised pixels, (B, C, H, W).
            num_blocks: Number of blocks to run; None runs all.
            num_queries: Number of leading tokens that the last block computes; None means all.

        Yields:
            Tokens before the final norm, (B, T, D), fewer after each block.
        """
        for x, _ in self.iter_states(images, num_blocks, num_queries):
            yield x

    def iter_states(
        self, images: Tensor, num_blocks: int | None = None, num_queries: int | None = None
    ) -> Iterator[tuple[Tensor, ReductionPoints]]:
        """Run the blocks, yielding the tokens and the points that know where each patch is.

        Args:
            images: Normalised pixels, (B, C, H, W).
            num_blocks: As in `iter_hidden_states`.
            num_queries: As in `iter_hidden_states`.

        Yields:
            Tokens before the first block and after each, and the points of this forward.
        """
        if self.gradient_checkpointing and self.training:
            raise ConfigError(
                "a model with fewer tokens stores its activations: call "
                "set_grad_checkpointing(False)"
            )
        at = self.make_points((), {})
        x = self.norm_pre(self.patch_embed(images))
        yield x, at
        last = len(self.blocks) - 1
        blocks: Iterable[Any] = self.blocks
        for index, (block, attn_pos) in enumerate(
            zip(blocks, self.attn_positions(images), strict=False)
        ):
            if index == num_blocks:
                return
            within = at.within(f"blocks.{index}.")
            queries = num_queries if index == last else None
            # An optimized block has such a method too.
            run = getattr(block, "forward_with_points", None)
            if run is None:
                x = forward_block(block, x, queries, attn_pos, within)
            else:
                x = run(x, queries, attn_pos, within)
            yield x, at

    def make_points(self, read: Iterable[str], edits: Mapping[str, Edit]) -> ReductionPoints:
        """Make the points of one forward.

        Args:
            read: Full names of the points to read.
            edits: Edits by the full name of a point.

        Returns:
            Points that also record where each token went.
        """
        return ReductionPoints(read, edits, self.token_functions, self.num_prefix_tokens)

    def forward_tokens(self, images: Tensor) -> ReducedTokens:
        """Compute the tokens that are left, and where each patch is, (B, C, H, W) -> (B, U, D).

        Args:
            images: Normalised pixels, (B, C, H, W).

        Returns:
            Tokens after the final norm, as `forward_features` gives them, and their map.
        """
        for state, points in self.iter_states(images):
            x, at = state, points
        x = self.norm(x) if self.config.final_norm == "tokens" else x
        return self.collect(x, at, images)

    def collect(self, x: Tensor, at: ReductionPoints, images: Tensor) -> ReducedTokens:
        """Put tokens and their map together.

        Args:
            x: Tokens, (B, U, D).
            at: The points of their forward.
            images: Pixels, (B, C, H, W).

        Returns:
            The tokens with the map, sizes and grid of this forward.
        """
        state = at.current_state(x)
        return ReducedTokens(
            x, state.source(), state.sizes, self.patch_grid(images), self.num_prefix_tokens
        )

    def tokens_after_blocks(self, images: Tensor, chosen: set[int], *, norm: bool) -> list[Tensor]:
        """Compute every token after some blocks, back on the grid.

        Args:
            images: Normalised pixels, (B, C, H, W).
            chosen: Indices of the blocks.
            norm: Apply the final norm to the tokens.

        Returns:
            Tokens (B, T, D). Every patch has the one that it is in, or zeros where it was dropped.
        """
        norm, outputs = norm and self.config.final_norm != "none", list[Tensor]()
        states = self.iter_states(images, max(chosen, default=-1) + 1)
        next(states)  # the tokens before the blocks
        for index, (x, at) in enumerate(states):
            if index in chosen:
                x = self.norm(x) if norm else x
                outputs.append(self.collect(x, at, images).all_tokens())
        return outputs

    def attention(
        self,
        images: Tensor,  # noqa: ARG002
        layers: int | Sequence[int] | None = None,  # noqa: ARG002
        rows: Literal["all", "prefix"] = "all",  # noqa: ARG002
    ) -> NoReturn:
        """Refuse attention maps, whose columns would be no patches.

        Args:
            images: As in `ViT.attention`.
            layers: As in `ViT.attention`.
            rows: As in `ViT.attention`.

        Raises:
            ConfigError: Always; the message says what to call.
        """
        raise ConfigError(
            "a model with fewer tokens has attention between merged tokens: read the points "
            "blocks.N.attn.probs by trace(), or call attention() of the model that it was made from"
        )

    def facets(
        self,
        images: Tensor,  # noqa: ARG002
        layer: int,  # noqa: ARG002
        what: Literal["query", "key", "value", "token"] = "key",  # noqa: ARG002
        *,
        grid: bool = False,  # noqa: ARG002
    ) -> NoReturn:
        """Refuse facets, whose rows would be no patches.

        Args:
            images: As in `ViT.facets`.
            layer: As in `ViT.facets`.
            what: As in `ViT.facets`.
            grid: As in `ViT.facets`.

        Raises:
            ConfigError: Always; the message says what to call.
        """
        raise ConfigError(
            "a model with fewer tokens has facets of merged tokens: read points by trace(), or "
            "call facets() of the model that it was made from"
        )

    def extra_repr(self) -> str:
        """Describe the config and the token functions for repr().

        Returns:
            The fields and functions as text.
        """
        functions = {repr(function) for many in self.token_functions for function in many}
        return f"{super().extra_repr()}, tokens={', '.join(sorted(functions))}"


def with_tokens(
    model: ViT,
    fn: TokenFunction,
    blocks: int | Sequence[int] | None = None,
) -> ReducedViT:
    """Make a model whose tokens become fewer after the attention of its blocks.

    Args:
        model: The model, which is not changed.
        fn: The token function.
        blocks: The blocks that call it, as `indices` of `forward_intermediates`; None means all.

    Returns:
        A new model that shares the weights. Its functions come after those that `model` has.

    Raises:
        ConfigError: `fn` is no function, a block is not there or not vitlib's own.
    """
    makers: tuple[object, ...] = (merge, drop)  # named without their parentheses
    expected = "with_tokens: expected fn(tokens, block), such as vitlib.tokens.merge(r=8)"
    if fn in makers:
        raise ConfigError(f"{expected}, got {describe_function(fn)} itself: call it")
    check_signature(fn, 2, expected)
    for index, block in enumerate(model.blocks):
        if "attn.k" not in block_points(block):
            raise ConfigError(
                f"blocks.{index} or its attn is not vitlib's own: its tokens cannot be made fewer"
            )
    depth, chosen = len(model.blocks), resolve_block_indices(blocks, len(model.blocks), "blocks")
    if isinstance(fn, Merge | Drop):
        fn = fn.resolve(None if blocks is None else chosen, depth)
    reduced = cast("ReducedViT", copy_sharing_weights(model))
    functions = getattr(model, "token_functions", ((),) * depth)
    reduced.__class__ = ReducedViT
    reduced.token_functions = tuple(
        (*functions[index], fn) if index in chosen else functions[index] for index in range(depth)
    )
    return reduced
