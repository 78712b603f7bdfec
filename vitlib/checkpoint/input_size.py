"""Make another image size, or another patch, the learned one of a model."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitlib.checkpoint.adapt import adapt_processor, resample_kernel, resize_tables
from vitlib.checkpoint.reconcile import reconcile
from vitlib.errors import ConfigError, to_pair
from vitlib.patch_embed import PatchEmbed, PatchProjection
from vitlib.positions import RelativePositionBias
from vitlib.system.torch_state import outside_inference_mode
from vitlib.vit import ViT

logger = logging.getLogger("vitlib")


@outside_inference_mode()
@torch.no_grad()
def set_input_size(
    model: ViT,
    img_size: int | tuple[int, int] | None = None,
    patch_size: int | tuple[int, int] | None = None,
) -> None:
    """Resample positions, and the kernel of the patches, of a model in place.

    Args:
        model: The model; its config and its preprocessing follow.
        img_size: Pixels (height, width), or an int for a square; None: as it is.
        patch_size: Pixels (height, width) of a patch; None: as it is.

    Raises:
        ConfigError: No ViT has such sizes, or the patch embedding is not vitlib's.
    """
    embed = model.patch_embed
    if not isinstance(embed, PatchEmbed) or not isinstance(embed.proj, PatchProjection):
        raise ConfigError(
            f"patch_embed is a {type(embed).__name__} of your own: expected vitlib's, whose "
            "positions and patches can be resized"
        )
    old = reconcile(model)
    new = replace(
        old,
        image_size=old.image_size if img_size is None else to_pair("img_size", img_size),
        patch_size=old.patch_size if patch_size is None else to_pair("patch_size", patch_size),
    )
    state, log = dict[str, Tensor](model.named_parameters()), list[str]()
    resize_tables(state, old, new, log)
    if new.patch_size != old.patch_size:
        kernel = resample_kernel(embed.proj.weight, new.patch_size)
        embed.proj.weight = _parameter(kernel, embed.proj.weight)
        embed.proj.kernel_size = embed.proj.stride = new.patch_size
    if embed.pos_embed is not None:
        embed.pos_embed = _parameter(state["patch_embed.pos_embed"], embed.pos_embed)
    if isinstance(model.attn_position, RelativePositionBias):
        tables = model.attn_position.tables
        for index, table in enumerate(tables):
            tables[index] = _parameter(state[f"attn_position.tables.{index}"], table)
        model.attn_position.grid_size = new.grid_size
    embed.grid_size, embed.patch_size, model.config = new.grid_size, new.patch_size, new
    if model.image_processor is not None:
        model.image_processor = adapt_processor(model.image_processor, old, new, None, log)
    if log:
        logger.info("; ".join(log))


def _parameter(values: Tensor, old: Tensor) -> nn.Parameter:
    """Return the old parameter where nothing changed, else a new one that trains as it does."""
    if values is old and isinstance(old, nn.Parameter):
        return old
    return nn.Parameter(values, requires_grad=old.requires_grad)
