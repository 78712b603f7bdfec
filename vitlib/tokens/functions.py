"""Token functions: merge similar tokens, or drop those that attention reads least.

Shapes: as in vitlib/vit.py; T tokens before, U after, A and C the even and odd ones of T.
Sources: Bolya et al. 2210.09461 (ToMe); Liang et al. 2202.07800 (EViT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.errors import ConfigError, check_int, is_number, resolve_block_indices
from vitlib.tokens.reduction import BlockTokens, number_tokens


@dataclass(frozen=True)
class Merge:
    """Merge the most similar tokens of each block by bipartite soft matching (2210.09461).

    Tokens at even indices are each matched with the most similar odd one, by the cosine of their
    keys' mean over heads. The r most similar pairs become one token, the mean of all that it
    stands for. Prefix tokens are not merged.

    Attributes:
        r: Number of tokens to merge in a block, or a number for each block.
    """

    r: int | tuple[int, ...]

    def __call__(self, x: Tensor, block: BlockTokens) -> tuple[Tensor, Tensor]:
        """Merge tokens, (B, T, D) -> (B, U, D) and a map (B, T).

        Args:
            x: Tokens, (B, T, D).
            block: Facts of them.
        """
        r = (self.r,) * block.depth if isinstance(self.r, int) else self.r
        count = r[block.index] if block.index < len(r) else 0
        t, p = x.shape[1], block.num_prefix_tokens
        count = min(count, (t - p) // 2)
        if count <= 0:
            return x, number_tokens(x)
        with torch.no_grad():
            matches = match_tokens(block.keys.float().mean(dim=1), count, p)
        return average(x, block.sizes, matches), matches.new_index()

    def resolve(self, chosen: set[int] | None, depth: int) -> Merge:  # noqa: ARG002
        """Check that each number belongs to a block.

        Args:
            chosen: The blocks that call the function; None means all.
            depth: Number of blocks of the model.

        Returns:
            The function for this model.

        Raises:
            ConfigError: There are more numbers than blocks.
        """
        if not isinstance(self.r, int) and len(self.r) > depth:
            raise ConfigError(f"r has {len(self.r)} numbers: expected at most {depth}, one a block")
        return self


@dataclass(frozen=True)
class Drop:
    """Drop the patches that the class token attends to least (2202.07800).

    Attributes:
        keep: Share of the patches to keep in each chosen block, 0 to 1.
        blocks: The blocks, as `indices` of `forward_intermediates`; None for those that the model
            chooses, or at a quarter, half and three quarters of its depth.
    """

    keep: float
    blocks: int | tuple[int, ...] | None

    def __call__(self, x: Tensor, block: BlockTokens) -> tuple[Tensor, Tensor]:
        """Drop patches, (B, T, D) -> (B, U, D) and a map (B, T).

        Args:
            x: Tokens, (B, T, D).
            block: Facts of them.
        """
        t, p, index = x.shape[1], block.num_prefix_tokens, number_tokens(x)
        if block.index not in self.list_blocks(block.depth):
            return x, index
        count = max(1, round((t - p) * self.keep))
        with torch.no_grad():
            rows = attended_patches(block, count)
        rows = torch.cat([index[:, :p], rows.sort(dim=1).values + p], dim=1)
        new_index = torch.full_like(index, -1).scatter(1, rows, index[:, : p + count])
        return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2])), new_index

    def list_blocks(self, depth: int) -> set[int]:
        """List the indices of the blocks.

        Args:
            depth: Number of blocks of the model.

        Returns:
            Indices from 0, without negative ones.

        Raises:
            ConfigError: A block is not there.
        """
        if self.blocks is None:
            return {quarter * depth // 4 for quarter in (1, 2, 3)}
        return resolve_block_indices(self.blocks, depth, "drop: blocks")

    def resolve(self, chosen: set[int] | None, depth: int) -> Drop:
        """Decide in which blocks of a model patches are dropped.

        Args:
            chosen: The blocks that call the function; None means all.
            depth: Number of blocks of the model.

        Returns:
            The function for this model.

        Raises:
            ConfigError: A block is not there, or does not call the function.
        """
        if chosen is None or self.blocks is not None:
            blocks = self.list_blocks(depth)
            if left := blocks - (blocks if chosen is None else chosen):
                raise ConfigError(
                    f"drop: block {min(left)} is not among the blocks of with_tokens: name them "
                    "there or here"
                )
        else:
            blocks = chosen
        return replace(self, blocks=tuple(sorted(blocks)))


def merge(r: int | Sequence[int] = 8) -> Merge:
    """Make a function that merges r tokens in each block (ToMe, 2210.09461).

    Args:
        r: Number of tokens to merge in a block, at most half of the patches; a sequence has a
            number for each block, and none for blocks beyond it.

    Returns:
        The function, for `ViT.with_tokens`.

    Raises:
        ConfigError: A number is not a whole one from 0.
    """
    if isinstance(r, Sequence) and not isinstance(r, str):
        return Merge(tuple(_check_count(value) for value in r))
    return Merge(_check_count(r))


def _check_count(r: object) -> int:
    """Return a number of tokens as an int; NumPy's whole numbers are some too."""
    if isinstance(r, Integral) and not isinstance(r, bool):
        r = int(r)
    return check_int("r", r, at_least=0)


def drop(keep: float = 0.7, blocks: int | Sequence[int] | None = None) -> Drop:
    """Make a function that drops the patches which the class token attends to least (EViT).

    Without a class token, it is the attention of all tokens that counts.

    Args:
        keep: Share of the patches to keep in each of the blocks, above 0 and at most 1.
        blocks: The blocks, as `indices` of `forward_intermediates`. None: those that `with_tokens`
            names; if it names none, those at a quarter, half and three quarters of the depth, as in
            the paper: 3, 6 and 9 of 12.

    Returns:
        The function, for `ViT.with_tokens`.

    Raises:
        ConfigError: The share cannot be.
    """
    if not is_number(keep) or not 0 < keep <= 1:
        raise ConfigError(f"keep={keep!r}: expected a share above 0 and at most 1")
    if isinstance(blocks, Sequence | range):
        return Drop(float(keep), tuple(blocks))
    return Drop(float(keep), blocks)


class Matches(NamedTuple):
    """Pairs of tokens to merge, and the order of the new tokens.

    Attributes:
        rows: The old token at each new index, (B, U): prefix tokens, then the even tokens that are
            not merged into others, then the odd ones.
        sources: Old indices of the tokens that are merged into others, (B, R).
        targets: New indices of these others, (B, R).
    """

    rows: Tensor
    sources: Tensor
    targets: Tensor

    def new_index(self) -> Tensor:
        """Compute the map, (B, T) int64."""
        (batch, count), merged = self.rows.shape, self.sources.shape[1]
        index = self.rows.new_empty(batch, count + merged)
        index.scatter_(1, self.rows, number_tokens(self.rows))
        return index.scatter_(1, self.sources, self.targets)


def match_tokens(keys: Tensor, count: int, num_prefix: int) -> Matches:
    """Match even tokens with odd ones, and choose the most similar pairs.

    Args:
        keys: A vector of each token, (B, T, K).
        count: Number of pairs to merge, R.
        num_prefix: Number of leading tokens that are not merged.

    Returns:
        The pairs.
    """
    unit = F.normalize(keys, dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # (B, A, C)
    even, odd = (num_prefix + 1) // 2, num_prefix // 2  # prefix tokens among them
    scores[:, :even] = float("-inf")
    scores[:, :, :odd] = float("-inf")
    similarity, target = scores.max(dim=2)
    order = similarity.argsort(dim=1, descending=True)
    merged, left = order[:, :count], order[:, count:]
    if num_prefix:  # so that the prefix tokens are the first of those left
        left = left.sort(dim=1).values
    evens, odds = 2 * left[:, even:], 2 * number_tokens(target.new_empty(scores.shape[::2])) + 1
    rows = torch.cat([number_tokens(keys)[:, :num_prefix], evens, odds[:, odd:]], dim=1)
    targets = target.gather(1, merged) - odd + num_prefix + evens.shape[1]
    return Matches(rows, 2 * merged, targets)


def average(x: Tensor, sizes: Tensor, matches: Matches) -> Tensor:
    """Average the tokens that become one, each as often as it counts, (B, T, D) -> (B, U, D).

    Only the rows of pairs are computed; the others are copied.

    Args:
        x: Tokens, (B, T, D).
        sizes: Number of original tokens in each, (B, T).
        matches: The tokens to merge.
    """
    (batch, t, _), (count, merged) = x.shape, (matches.rows.shape[1], matches.sources.shape[1])
    image = torch.arange(batch, device=x.device, dtype=torch.int64)[:, None]
    flat = x.flatten(0, 1)
    tokens = flat.index_select(0, (matches.rows + t * image).flatten())
    source_sizes = sizes.gather(1, matches.sources)
    before = sizes.gather(1, matches.rows)
    after = before.scatter_add(1, matches.targets, source_sizes)
    total = after.gather(1, matches.targets)
    targets = (matches.targets + count * image).flatten()
    # A target of several sources is scaled once: each of its rows here has the same value.
    share = (before.gather(1, matches.targets) / total).to(x.dtype).view(batch * merged, 1)
    scaled = tokens.index_select(0, targets) * share
    share = (source_sizes / total).to(x.dtype).view(batch * merged, 1)
    added = flat.index_select(0, (matches.sources + t * image).flatten()) * share
    tokens = tokens.index_copy(0, targets, scaled).index_add(0, targets, added)
    return tokens.view(batch, count, x.shape[2])


def attended_patches(block: BlockTokens, count: int) -> Tensor:
    """Select the patches with the largest attention.

    Args:
        block: Facts of the tokens.
        count: Number of patches to select.

    Returns:
        Indices of patches, (B, count), by falling attention.
    """
    p = block.num_prefix_tokens
    queries = block.queries[:, :, : 1 if p else None].float()
    scores: Tensor = queries @ block.keys.float().transpose(2, 3) * block.scale
    probs = scores.softmax(dim=-1).mean(dim=(1, 2))
    return probs[:, p:].topk(count, dim=1).indices
