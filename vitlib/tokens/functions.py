"""Token functions: merge similar tokens, or drop those that attention reads least.

Shapes: as in vitlib/vit.py; T tokens before, U after, A and C the even and odd ones of T.
Sources: Bolya et al. 2210.09461 (ToMe); Liang et al. 2202.07800 (EViT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitlib.errors import ConfigError, check_int, is_number
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
        count = self.r if isinstance(self.r, int) else (*self.r, *[0] * block.index)[block.index]
        t, p = x.shape[1], block.num_prefix_tokens
        count = min(count, (t - p) // 2)
        if count <= 0:
            return x, number_tokens(x)
        with torch.no_grad():
            new_index = match_tokens(block.keys.float().mean(dim=1), count, p)
        return average(x, block.sizes, new_index, t - count), new_index


@dataclass(frozen=True)
class Drop:
    """Drop the patches that the class token attends to least (2202.07800).

    Attributes:
        keep: Share of the patches to keep in each chosen block, 0 to 1.
        blocks: The blocks, from 0.
    """

    keep: float
    blocks: tuple[int, ...]

    def __call__(self, x: Tensor, block: BlockTokens) -> tuple[Tensor, Tensor]:
        """Drop patches, (B, T, D) -> (B, U, D) and a map (B, T).

        Args:
            x: Tokens, (B, T, D).
            block: Facts of them.
        """
        t, p, index = x.shape[1], block.num_prefix_tokens, number_tokens(x)
        if block.index not in self.blocks:
            return x, index
        count = max(1, round((t - p) * self.keep))
        with torch.no_grad():
            rows = attended_patches(block, count)
        rows = torch.cat([index[:, :p], rows.sort(dim=1).values + p], dim=1)
        new_index = torch.full_like(index, -1).scatter(1, rows, index[:, : p + count])
        return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2])), new_index


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
        return Merge(tuple(check_int("r", value, at_least=0) for value in r))
    return Merge(check_int("r", r, at_least=0))


def drop(keep: float = 0.7, blocks: Sequence[int] = (3, 6, 9)) -> Drop:
    """Make a function that drops the patches which the class token attends to least (EViT).

    Without a class token, it is the attention of all tokens that counts.

    Args:
        keep: Share of the patches to keep in each of the blocks, above 0 and at most 1.
        blocks: The blocks, from 0; those of the paper for a model of 12.

    Returns:
        The function, for `ViT.with_tokens`.

    Raises:
        ConfigError: The share or a block cannot be.
    """
    if not is_number(keep) or not 0 < keep <= 1:
        raise ConfigError(f"keep={keep!r}: expected a share above 0 and at most 1")
    return Drop(float(keep), tuple(check_int("blocks", i, at_least=0) for i in blocks))


def match_tokens(keys: Tensor, count: int, num_prefix: int) -> Tensor:
    """Match even tokens with odd ones, and merge the most similar pairs.

    Args:
        keys: A vector of each token, (B, T, K).
        count: Number of pairs to merge.
        num_prefix: Number of leading tokens that are not merged.

    Returns:
        The map, (B, T) int64. Prefix tokens stay first; then come the even tokens that are left,
        then the odd ones.
    """
    unit = keys / keys.norm(dim=-1, keepdim=True)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # (B, A, C)
    even, odd = (num_prefix + 1) // 2, num_prefix // 2  # prefix tokens among them
    scores[:, :even] = float("-inf")
    scores[:, :, :odd] = float("-inf")
    similarity, target = scores.max(dim=2)
    order = similarity.argsort(dim=1, descending=True)
    merged, left = order[:, :count], order[:, count:]
    if num_prefix:  # so that the prefix tokens are the first of those left
        left = left.sort(dim=1).values
    batch, a, c = scores.shape

    def new_places(length: int, prefix: int, parity: int, first: int) -> Tensor:
        """Number tokens: those of the prefix where they were, the others from `first` on."""
        index = torch.arange(length, device=keys.device, dtype=torch.int64)
        index = torch.where(index < prefix, 2 * index + parity, index - prefix + first)
        return index.expand(batch, length)

    odd_index = new_places(c, odd, 1, num_prefix + a - count - even)
    even_index = torch.empty_like(target)
    even_index.scatter_(1, left, new_places(a - count, even, 0, num_prefix))
    even_index.scatter_(1, merged, odd_index.gather(1, target.gather(1, merged)))
    new_index = torch.empty(keys.shape[:2], device=keys.device, dtype=torch.int64)
    new_index[:, ::2], new_index[:, 1::2] = even_index, odd_index
    return new_index


def average(x: Tensor, sizes: Tensor, new_index: Tensor, count: int) -> Tensor:
    """Average the tokens that become one, each as often as it counts, (B, T, D) -> (B, U, D).

    Args:
        x: Tokens, (B, T, D).
        sizes: Number of original tokens in each, (B, T).
        new_index: The map, (B, T), without -1.
        count: Number of new tokens, U.
    """
    batch, _, width = x.shape
    # Whole rows are added, which is faster than scattering every channel.
    rows = new_index + count * torch.arange(batch, device=x.device, dtype=torch.int64)[:, None]
    sums = x.new_zeros(batch * count, width)
    sums = sums.index_add(0, rows.flatten(), (x * sizes[:, :, None].to(x.dtype)).flatten(0, 1))
    totals = sizes.new_zeros(batch, count).scatter_add(1, new_index, sizes)
    return sums.view(batch, count, width) / totals[:, :, None].to(x.dtype)


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
