"""Layout of a packed sequence: images end to end, in groups that attention takes as a batch.

Shapes: S tokens in a sequence, T tokens of an image, G images in a group; others as in
vitlib/vit.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

AttnPos = Sequence[Tensor | None]  # positions of each group, for one block
GroupFunction = Callable[[Tensor, Tensor | None], Tensor]  # (tokens, positions) -> tokens


@dataclass(frozen=True)
class Group:
    """Neighbours in a sequence that have the same number of tokens and the same positions.

    Attributes:
        start: Index of their first token.
        num_images: Number of images, G.
        num_tokens: Tokens of each, T.
    """

    start: int
    num_images: int
    num_tokens: int

    def take(self, x: Tensor) -> Tensor:
        """Take the tokens of the group from a sequence, (1, S, D) -> (G, T, D).

        Args:
            x: The sequence, (1, S, D).
        """
        end = self.start + self.num_images * self.num_tokens
        return x[0, self.start : end].view(self.num_images, self.num_tokens, *x.shape[2:])

    def take_heads(self, x: Tensor) -> Tensor:
        """Take the heads of the group, (1, H, S, K) -> (G, H, T, K).

        Args:
            x: Queries, keys or values of the sequence, (1, H, S, K).
        """
        return self.take(x.transpose(1, 2)).transpose(1, 2)


def list_groups(embedded: Sequence[Tensor], *, merge: bool) -> list[Group]:
    """List the groups of a sequence.

    Args:
        embedded: Tokens of the images of each shape, (G, T, D), in the order of the sequence.
        merge: Images of different shapes with the same number of tokens are one group.

    Returns:
        The groups.
    """
    groups: list[Group] = []
    start = 0
    for tokens in embedded:
        num_images, num_tokens = tokens.shape[:2]
        if merge and groups and groups[-1].num_tokens == num_tokens:
            before = groups.pop()
            groups.append(replace(before, num_images=before.num_images + num_images))
        else:
            groups.append(Group(start, num_images, num_tokens))
        start += num_images * num_tokens
    return groups


def join_tables(groups: Sequence[Group], tables: AttnPos) -> Tensor:
    """Join the rotary tables of images to that of a sequence, -> (2, S, K) or (2, H, S, K).

    Args:
        groups: Groups of the sequence.
        tables: Cosines and sines of the patches of each group, (2, N, K) or (2, H, N, K).

    Returns:
        The cosines and sines of every token; those of tokens without a position turn by nothing.
    """
    parts = []
    for group, table in zip(groups, tables, strict=True):
        assert table is not None
        *sizes, num_patches, width = table.shape[1:]
        ones = table.new_ones(*sizes, group.num_tokens - num_patches, width)
        still = torch.stack((ones, torch.zeros_like(ones)))
        parts += [still, table] * group.num_images
    return torch.cat(parts, dim=-2)


def run_groups(fn: GroupFunction, x: Tensor, groups: Sequence[Group], attn_pos: AttnPos) -> Tensor:
    """Run a function on each group of a sequence, and join what it returns.

    Args:
        fn: A function of the tokens of a group (G, T, D) and of its positions -> (G, Q, D).
        x: The sequence, (1, S, D).
        groups: Its groups.
        attn_pos: Positions of each group.

    Returns:
        The tokens of all groups end to end, as a sequence.
    """
    pairs = zip(groups, attn_pos, strict=True)
    return torch.cat([fn(group.take(x), pos).flatten(0, 1) for group, pos in pairs])[None]
