"""The numbers of the stock blocks of a model, read when they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vitlib.encoder import Block
from vitlib.fast.block import BlockWeights, extract_weights
from vitlib.fast.module_swap import is_stock_tree
from vitlib.vit import ViT


class StockBlocks(Mapping[str, BlockWeights]):
    """The numbers of the stock blocks of a model in float32, by path.

    Each access reads a block anew: q, k and v are copied into one weight. So the copies of one
    block alone are in memory while the blocks are packed one by one, and the next block reuses
    that memory, which takes less time than fresh pages.

    Args:
        model: The model, which is only read.
    """

    def __init__(self, model: ViT) -> None:
        """Find the stock blocks."""
        self.blocks = {
            path: part
            # A block that is used twice has two paths, and is replaced at both.
            for path, part in model.named_modules(remove_duplicate=False)
            if isinstance(part, Block) and is_stock_tree(part)
        }

    def __getitem__(self, path: str) -> BlockWeights:
        """Read the numbers of a block."""
        return extract_weights(self.blocks[path])

    def __iter__(self) -> Iterator[str]:
        """Iterate over the paths."""
        return iter(self.blocks)

    def __len__(self) -> int:
        """Count the blocks."""
        return len(self.blocks)
