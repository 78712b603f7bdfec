"""Images of different shapes in one forward of an optimized model.

How data flows: as in vitlib/parts/packed.py, with fused layers on all tokens of a sequence.

Shapes: as in vitlib/parts/sequence.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitlib.fast.block import FastBlock, LastBlock
from vitlib.fast.norms import normalize
from vitlib.parts.packed import Packed, run_block
from vitlib.parts.packed import packed as run_packed
from vitlib.parts.sequence import AttnPos, Group, run_groups
from vitlib.system.torch_state import strict_float32

if TYPE_CHECKING:
    from vitlib.fast.model import FastViT


def packed(
    model: FastViT, images: Iterable[Tensor], *, tokens: bool, max_tokens: int | None
) -> Packed:
    """Compute images of different shapes in one forward.

    Args:
        model: The optimized model.
        images: Normalised pixels of each image, (C, H, W).
        tokens: False gives logits alone.
        max_tokens: Tokens of a sequence; None means those of vitlib/parts/packed.py.

    Returns:
        Logits, tokens, lengths and grids, as the model gives them.

    Raises:
        ConfigError: Gradients are wanted.
        ImageError: There is no image, or one cannot be cut into patches.
    """
    pixels = list(images)
    for index, image in enumerate(pixels):
        # Anything else is left to the check of the images, which refuses it.
        if isinstance(image, Tensor) and image.is_floating_point():
            model.refuse_gradients(image)
            pixels[index] = image.to(model.device, model.input_dtype)
    with torch.no_grad(), strict_float32():
        out = run_packed(
            model.trunk, pixels, tokens=tokens, run=run_fast_block, max_tokens=max_tokens
        )
        features = None if out.tokens is None else out.tokens.to(model.dtype)
        return replace(out, logits=out.logits.to(model.dtype), tokens=features)


def run_fast_block(
    block: nn.Module, x: Tensor, groups: Sequence[Group], attn_pos: AttnPos
) -> Tensor:
    """Run a block as `FastBlock.forward`, (1, S, D) -> (1, S, D).

    Args:
        block: The block. One of another class runs as in the model.
        x: The sequence, (1, S, D).
        groups: Its groups.
        attn_pos: Positions of each group.

    Returns:
        The sequence after the block.
    """
    block = block.full_block if isinstance(block, LastBlock) else block
    if not isinstance(block, FastBlock):
        return run_block(block, x, groups, attn_pos)
    fast, x = block, x.float()
    qkv = fast.qkv(x if fast.post else normalize(x, fast.norm1))
    y = run_groups(lambda part, pos: fast.attend(part, None, pos), qkv, groups, attn_pos)
    return fast.add_branches(x, y)
