"""Fewer tokens inside the blocks: merging, dropping, or a function of one's own."""

from vitlib.tokens.functions import Drop, Merge, drop, merge
from vitlib.tokens.model import ReducedTokens, ReducedViT
from vitlib.tokens.reduction import BlockTokens

__all__ = ["BlockTokens", "Drop", "Merge", "ReducedTokens", "ReducedViT", "drop", "merge"]
