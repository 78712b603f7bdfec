"""Mistakes that people make in a ViT, each a function that makes it.

A function changes a copy, and returns False where the model has no such part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitlib.config import Pool
from vitlib.encoder import MLP, Attention, Block, SwiGLU
from vitlib.positions import AttentionPosition, RelativePositionBias, RotaryEmbedding
from vitlib.variants import PostNormBlock
from vitlib.vit import ViT


def _middle(model: ViT) -> Any:
    """Return the block to damage; None where it is not vitlib's."""
    block = model.blocks[len(model.blocks) // 2] if len(model.blocks) else None
    return block if isinstance(block, Block) else None


def _attention(model: ViT) -> Attention | None:
    """Return the attention of the block to damage; None where it is not vitlib's."""
    attn = getattr(_middle(model), "attn", None)
    return attn if isinstance(attn, Attention) else None


def swap_q_and_k(model: ViT) -> bool:
    """Exchange the projections of queries and keys.

    Args:
        model: The copy.
    """
    attn = _attention(model)
    if attn is None:
        return False
    attn.q, attn.k = attn.k, attn.q
    return True


def exchange_key_heads(model: ViT) -> bool:
    """Exchange the keys of the two heads in the middle.

    Args:
        model: The copy.
    """
    attn = _attention(model)
    if attn is None or attn.num_heads < 2:
        return False
    # The heads in the middle: where heads share keys, the first two may have the same.
    heads = attn.k.weight.view(attn.num_heads, attn.head_dim, -1)
    second = attn.num_heads // 2
    heads[second - 1 : second + 1] = heads[second - 1 : second + 1].flip(0)
    return True


def flip_bias(model: ViT) -> bool:
    """Change the sign of the bias of the MLP's first layer.

    Args:
        model: The copy.
    """
    bias = getattr(getattr(getattr(_middle(model), "mlp", None), "fc1", None), "bias", None)
    if bias is None:
        return False
    bias.neg_()
    return True


def change_eps(model: ViT) -> bool:
    """Set the eps of the block's first norm to 0.01.

    Args:
        model: The copy.
    """
    norm = getattr(_middle(model), "norm1", None)
    if norm is None:
        return False
    norm.eps = 1e-2
    return True


def change_gelu(model: ViT) -> bool:
    """Compute another form of GELU.

    Args:
        model: The copy.
    """
    mlp = getattr(_middle(model), "mlp", None)
    if not isinstance(mlp, MLP) or isinstance(mlp, SwiGLU):
        return False
    mlp.activation = "gelu" if mlp.activation == "gelu_tanh" else "gelu_tanh"
    return True


def move_norms(model: ViT) -> bool:
    """Norm the branches in place of their inputs, or the other way round.

    Args:
        model: The copy.
    """
    block = _middle(model)
    if type(block) not in (Block, PostNormBlock):
        return False
    block.__class__ = PostNormBlock if type(block) is Block else Block
    return True


def drop_layer_scale(model: ViT) -> bool:
    """Leave out the LayerScale of the block's attention.

    Args:
        model: The copy.
    """
    block = _middle(model)
    if getattr(block, "ls1", None) is None:
        return False
    block.ls1 = None
    return True


def change_key_norm(model: ViT) -> bool:
    """Change a weight of the norm of keys.

    Args:
        model: The copy.
    """
    weight = getattr(getattr(_attention(model), "k_norm", None), "weight", None)
    if weight is None:
        return False
    weight[0] += 0.1
    return True


def drop_position(model: ViT) -> bool:
    """Set the position of a patch to zero.

    Args:
        model: The copy.
    """
    table = model.patch_embed.pos_embed
    if table is None:
        return False
    table[:, (model.patch_embed.num_prefix_positions + table.shape[1]) // 2] = 0
    return True


def shift_positions(model: ViT) -> bool:
    """Give each patch the position of the one before it.

    Args:
        model: The copy.
    """
    table = model.patch_embed.pos_embed
    if table is None:
        return False
    # The class token has a position of its own.
    first = model.patch_embed.num_prefix_positions
    table[:, first:] = table[:, first:].roll(1, dims=1)
    return True


class ShiftedPositions(AttentionPosition):
    """Rotary tables of another module, one row later.

    Args:
        position: The module.
    """

    def __init__(self, position: AttentionPosition) -> None:
        super().__init__()
        self.position = position

    def per_block(
        self, grid: tuple[int, int], device: torch.device, count: int
    ) -> Iterable[Tensor]:
        """Compute the tables of the module, and shift each.

        Args:
            grid: Patches down and across, (h, w).
            device: Device of the result.
            count: Number of blocks.

        Returns:
            Cosines and sines of each block, as from the module.
        """
        tables = self.position.per_block(grid, device, count)
        return (table.roll(1, dims=-2) for table in tables)


def shift_rotary_table(model: ViT) -> bool:
    """Rotate each patch by the angles of the one before it.

    Args:
        model: The copy.
    """
    if model.config.rope is None or model.attn_position is None:
        return False
    model.attn_position = ShiftedPositions(model.attn_position)
    return True


def change_rotary_base(model: ViT) -> bool:
    """Lower the base of rotary periods by a tenth.

    Args:
        model: The copy.
    """
    position = model.attn_position
    if not isinstance(position, RotaryEmbedding):
        return False
    position.rope = replace(position.rope, theta=0.9 * position.rope.theta)
    return True


def change_class_angles(model: ViT) -> bool:
    """Turn the class token by another rotary angle.

    Args:
        model: The copy.
    """
    angles = getattr(model.attn_position, "cls_angles", None)
    if angles is None:
        return False
    angles[0, 1] += 0.1
    return True


def shift_relative_bias(model: ViT) -> bool:
    """Give each offset of patches the bias of the one before it, in every block.

    Args:
        model: The copy.
    """
    position = model.attn_position
    if not isinstance(position, RelativePositionBias):
        return False
    for table in position.tables:
        # The last three rows are of the class token, not of offsets.
        table[:-3] = table[:-3].roll(1, dims=0)
    return True


def drop_norm_pre(model: ViT) -> bool:
    """Leave out the norm before the first block.

    Args:
        model: The copy.
    """
    if isinstance(model.norm_pre, nn.Identity):
        return False
    model.norm_pre = nn.Identity()
    return True


def drop_final_norm(model: ViT) -> bool:
    """Leave out the final norm.

    Args:
        model: The copy.
    """
    if model.config.final_norm == "none":
        return False
    changed: Any = model  # norms have a type of their own
    changed.norm = nn.Identity()
    return True


def change_probe(model: ViT) -> bool:
    """Change the learned query of the attention pool.

    Args:
        model: The copy.
    """
    if model.config.pool != "map" or model.attn_pool is None:
        return False
    model.attn_pool.probe[0, 0, 0] += 0.1
    return True


def change_pool(model: ViT) -> bool:
    """Read the mean of patches in place of the class token, or the other way round.

    Args:
        model: The copy.
    """
    cfg = model.config
    others: dict[Pool, Pool] = {"cls": "mean", "mean": "cls"}
    other = others.get(cfg.pool)
    if other is None or not cfg.tokens.cls or model.head_dist is not None:
        return False
    model.config = replace(cfg, pool=other)
    return True


def transpose_head(model: ViT) -> bool:
    """Read the numbers of the head's weight by columns, as of a JAX kernel.

    Args:
        model: The copy.
    """
    weight = getattr(model.head, "weight", None)
    if weight is None or weight.ndim != 2 or 1 in weight.shape:
        return False
    weight.copy_(weight.mT.reshape(weight.shape))
    return True


MISTAKES: dict[str, Callable[[ViT], bool]] = {
    "swapped q and k": swap_q_and_k,
    "exchanged heads of keys": exchange_key_heads,
    "flipped bias": flip_bias,
    "wrong eps": change_eps,
    "other GELU": change_gelu,
    "moved norms": move_norms,
    "missing LayerScale": drop_layer_scale,
    "other norm of keys": change_key_norm,
    "dropped position row": drop_position,
    "shifted positions": shift_positions,
    "shifted rotary table": shift_rotary_table,
    "other rotary base": change_rotary_base,
    "other class angles": change_class_angles,
    "shifted relative bias": shift_relative_bias,
    "missing norm before the blocks": drop_norm_pre,
    "missing final norm": drop_final_norm,
    "other probe": change_probe,
    "other pool": change_pool,
    "transposed head": transpose_head,
}
