"""Visual prompts: learned tokens after the prefix tokens (Jia et al. 2203.12119, section 3.2).

The patch embedding adds the prompts of the first block, as it adds registers. With deep prompts
each later block puts its own in their place (variants.py). A prompt has no position: it is not
rotated, and its scores have no bias. Shapes: as in vitlib/vit.py.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from vitlib.adapters.settings import PromptSettings
from vitlib.encoder import Block
from vitlib.errors import ConfigError
from vitlib.patch_embed import PatchEmbed
from vitlib.positions import LearnedRotaryEmbedding, RelativePositionBias, RotaryEmbedding
from vitlib.variants import (
    PostNormBlock,
    PromptedBlock,
    PromptedPosition,
    PromptedPostNormBlock,
)
from vitlib.vit import ViT

_PROMPTED = {Block: PromptedBlock, PostNormBlock: PromptedPostNormBlock}


def add_prompts(model: ViT, settings: PromptSettings, device: torch.device) -> None:
    """Add prompts to a model.

    Args:
        model: The model, changed in place.
        settings: Number and kind of prompts.
        device: Device of the prompts; on "meta" nothing is drawn.

    Raises:
        ConfigError: The patch embedding, the positions or a block are not vitlib's own.
    """
    embed, count, first = model.patch_embed, settings.count, model.config.num_prefix_tokens
    if type(embed) is not PatchEmbed:
        kind = type(embed).__name__
        raise ConfigError(f"prompts: patch_embed is a {kind}: expected vitlib's PatchEmbed")
    embed.prompt_token = new_prompts(model, count, device)
    model.num_prompts = count
    position = model.attn_position
    if needs_rows(position):
        assert position is not None
        model.attn_position = PromptedPosition(position, first, count)
    pool = model.attn_pool
    if pool is not None and pool.first:  # one that reads patches alone
        pool.first += count
    if not settings.deep:
        return
    for index, block in enumerate(list(model.blocks)[1:], 1):
        kind_of_block = _PROMPTED.get(type(block))
        if kind_of_block is None:
            raise ConfigError(
                f"prompts: blocks.{index} is a {type(block).__name__}: expected vitlib's Block, or "
                "deep=False"
            )
        block.__class__ = kind_of_block
        assert isinstance(block, PromptedBlock)
        block.first_prompt, block.prompt_token = first, new_prompts(model, count, device)


def needs_rows(position: nn.Module | None) -> bool:
    """Return True if positions of attention count the prefix tokens, which prompts come after.

    Args:
        position: `attn_position` of a model.

    Raises:
        ConfigError: It is not vitlib's own.
    """
    if position is None or type(position) is LearnedRotaryEmbedding:
        return False
    if type(position) is RotaryEmbedding:
        return position.cls_angles is not None or position.rope.register_rope is not None
    if type(position) is not RelativePositionBias:
        kind = type(position).__name__
        raise ConfigError(f"prompts: attn_position is a {kind}: expected vitlib's own positions")
    return True


def new_prompts(model: ViT, count: int, device: torch.device) -> nn.Parameter:
    """Draw prompts from the paper's uniform distribution.

    Args:
        model: The model that they are for.
        count: Number of prompts.
        device: Their device.

    Returns:
        Prompts, (1, count, D).
    """
    cfg = model.config
    prompts = torch.empty(1, count, cfg.embed_dim, dtype=model.dtype, device=device)
    if device.type != "meta":
        # Xavier's bound for the patch projection, as the paper's code draws them.
        fan_in = cfg.in_channels * cfg.patch_size[0] * cfg.patch_size[1]
        bound = math.sqrt(6 / (fan_in + cfg.embed_dim))
        noise = torch.rand(prompts.shape, dtype=torch.float32, device="cpu")
        prompts.copy_((noise * 2 - 1) * bound)
    return nn.Parameter(prompts)
