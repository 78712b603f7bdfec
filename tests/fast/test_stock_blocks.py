"""Test the numbers of stock blocks: read when asked for, and not kept."""

from __future__ import annotations

import weakref

import torch

from fixtures.fast_models import tiny
from vitlib.fast.stock_blocks import StockBlocks


def test_blocks_are_read_one_by_one_and_not_kept() -> None:
    model = tiny()
    blocks = StockBlocks(model)
    assert list(blocks) == ["blocks.0", "blocks.1", "blocks.2"]
    assert len(blocks) == 3
    block = blocks["blocks.1"]
    attn = model.blocks[1].attn
    assert torch.equal(block.linears["qkv"].weight[48:96], attn.k.weight)
    weight = weakref.ref(block.linears["qkv"].weight)
    del block
    assert weight() is None


def test_blocks_with_hooks_are_left_out() -> None:
    model = tiny()
    model.blocks[1].register_forward_hook(lambda *_: None)
    assert list(StockBlocks(model)) == ["blocks.0", "blocks.2"]
