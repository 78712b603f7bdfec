"""Changes to a whole ViT that make it as another module, where no point inside is known.

Each trial changes every block at once, as a file that computes something otherwise does it in every
block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitlib.config import Activation
from vitlib.config_parts import PositionResize, Rope
from vitlib.encoder import MLP, Attention, Block, SwiGLU
from vitlib.patch_embed import POSITION_RESIZE
from vitlib.testing.case import Side
from vitlib.variants import PostNormBlock
from vitlib.vit import ViT

Change = Callable[[ViT], None]
_GELUS: tuple[Activation, ...] = ("gelu", "gelu_tanh", "quick_gelu")
_EPS = (1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 1e-2)
_NORMS = ("norm1", "norm2")


def explain_by_trials(side: Side) -> str | None:
    """Change a ViT until it gives what the other module gives.

    Args:
        side: The module that is changed, and the other.

    Returns:
        A sentence, or None.
    """
    if side.own.vit is None:
        return None
    for label, change in _list_changes(side.own.vit, side.case.images):
        changed = copy.deepcopy(side.own.vit)
        change(changed)
        if side.explains(changed(side.case.images).to(torch.float64)):
            return f"{label}: that gives the {side.other.role}'s outputs in the {side.own.role}"
    return None


def explain_block_by_trials(side: Side, index: int) -> str | None:
    """Change a block of a ViT until it gives what the other module's block gives.

    Args:
        side: The module that is changed, and the other.
        index: Number of the block; both modules give it the same tokens.

    Returns:
        A sentence, or None.
    """
    vit, x = side.own.vit, side.states.get(f"blocks.{index}.resid_pre")
    if vit is None or x is None:
        return None
    position = list(vit.attn_positions(side.case.images))[index]
    alone: Any = copy.deepcopy(vit)  # its blocks have a type of their own
    alone.blocks = nn.ModuleList([alone.blocks[index]])
    for label, change in list_block_changes(alone):
        changed = copy.deepcopy(alone)
        change(changed)
        tokens = changed.blocks[0](x, None, position)
        if side.explains(tokens[:, : side.y.shape[1]]):
            return (
                f"{label}, in block {index}: that gives the {side.other.role}'s tokens in the "
                f"{side.own.role}"
            )
    return None


def _list_changes(vit: ViT, images: Tensor) -> Iterator[tuple[str, Change]]:
    """Yield a name and a function for each change that suits the model."""
    if not all(isinstance(block, Block) for block in vit.blocks):
        return
    # A file may have its eps in blocks alone, and torch's default in the final norm.
    for eps in _EPS:
        yield f"eps {eps:g} of every norm (here {vit.config.norm_eps:g})", partial(_set_eps, eps)
    yield from list_block_changes(vit)
    grid = vit.patch_grid(images)
    if vit.patch_embed.pos_embed is not None and grid != vit.patch_embed.grid_size:
        for rule in POSITION_RESIZE:
            label = f"position resize rule {rule!r} (here {vit.patch_embed.position_resize!r})"
            yield label, partial(_set_rule, rule)
    if vit.patch_embed.pos_embed is not None:
        yield "positions: none", _drop_positions
    if vit.config.rope is not None:
        rope = vit.config.rope
        axes = replace(rope, axes="xy" if rope.axes == "ij" else "ij")
        yield "rotary positions with the axes exchanged", partial(_set_rope, axes)


def list_block_changes(vit: ViT) -> Iterator[tuple[str, Change]]:
    """Yield a name and a function for each change that suits all blocks of a model.

    Args:
        vit: The model, which is not changed.

    Yields:
        A name, and a function that changes a model.
    """
    blocks = [block for block in vit.blocks if isinstance(block, Block)]
    if len(blocks) < len(vit.blocks):
        return
    for eps in _EPS:
        yield f"eps {eps:g} of the norms of blocks", partial(_set_block_eps, eps, _NORMS)
        for name in _NORMS:
            yield f"eps {eps:g} of {name} of blocks", partial(_set_block_eps, eps, (name,))
    if all(type(block.mlp) is MLP for block in blocks):
        for form in _GELUS:
            yield f"activation {form} (here {vit.config.activation})", partial(_set_gelu, form)
    if all(isinstance(block.mlp, SwiGLU) for block in blocks):
        yield "order of gate and the other half of SwiGLU", _swap_gate
    if all(isinstance(block.attn, Attention) for block in blocks):
        yield "q and k are swapped", _swap_qk
        yield "no scale of the scores", _unscale
    if all(block.ls1 is not None for block in blocks):
        yield "LayerScale: none", _drop_scales
    yield "pre-norm and post-norm: norms on the other side of branches", _move_norms


def _set_eps(eps: float, vit: ViT) -> None:
    for part in vit.modules():
        if isinstance(part, nn.LayerNorm | nn.RMSNorm):
            part.eps = eps


def _set_block_eps(eps: float, names: tuple[str, ...], vit: ViT) -> None:
    for block in vit.blocks:
        for name in names:
            getattr(block, name).eps = eps


def _set_gelu(form: Activation, vit: ViT) -> None:
    for block in vit.blocks:
        block.mlp.activation = form


def _swap_gate(vit: ViT) -> None:
    for block in vit.blocks:
        for parameter in filter(None, (block.mlp.fc1.weight, block.mlp.fc1.bias)):
            parameter.copy_(parameter.roll(len(parameter) // 2, dims=0))


def _swap_qk(vit: ViT) -> None:
    for block in vit.blocks:
        block.attn.q, block.attn.k = block.attn.k, block.attn.q


def _unscale(vit: ViT) -> None:
    for block in vit.blocks:
        # Scores are divided by sqrt(head_dim) later.
        for parameter in block.attn.q.parameters():
            parameter.mul_(block.attn.head_dim**0.5)


def _drop_scales(vit: ViT) -> None:
    for block in vit.blocks:
        block.ls1 = block.ls2 = None


def _move_norms(vit: ViT) -> None:
    for block in vit.blocks:
        block.__class__ = PostNormBlock if type(block) is Block else Block


def _set_rule(rule: PositionResize, vit: ViT) -> None:
    vit.patch_embed.position_resize = rule


def _drop_positions(vit: ViT) -> None:
    assert vit.patch_embed.pos_embed is not None
    vit.patch_embed.pos_embed.zero_()


def _set_rope(rope: Rope, vit: ViT) -> None:
    position: Any = vit.attn_position
    position.rope = rope
