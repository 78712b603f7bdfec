"""Read and edit tensors of one forward by name.

How data flows: patterns become names of points, the forward of points/forward.py runs, and each
tensor with a name is edited, kept, and handed on. Sources: Amir et al. 2112.05814 (facets).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from torch import Tensor

from vitlib.encoder import Attention, Block
from vitlib.errors import ConfigError, resolve_block_indices
from vitlib.points.forward import Edit, Points, forward_with_points
from vitlib.points.names import expand_patterns
from vitlib.variants import PostNormBlock, PromptedBlock
from vitlib.vit import ViT

Facet = Literal["query", "key", "value", "token"]


def trace(
    model: ViT,
    images: Tensor,
    points: Iterable[str] = (),
    edit: Mapping[str, Edit] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute logits, and tensors of the forward by name; edit some for this call.

    Args:
        model: The model, which is not changed.
        images: Normalised pixels, (B, C, H, W).
        points: Names to read, with `*` for any characters.
        edit: By name or pattern, a function of a tensor. It returns one of the same shape, dtype
            and device, which the forward goes on with.

    Returns:
        Logits as `ViT.forward` gives, and the tensors read, as edited, in the order of the forward.

    Raises:
        ConfigError: A name is no point, two patterns edit the same point, or an edit returned
            another shape, dtype or device.
    """
    if isinstance(points, str) or not isinstance(points, Iterable):
        raise ConfigError(f"points={points!r}: expected a list of names, such as ['norm']")
    if edit is not None and not isinstance(edit, Mapping):
        raise ConfigError(f"edit={edit!r:.60}: expected functions by name, {{'norm': function}}")
    read = expand_patterns(model, points, "points")
    edits: dict[str, Edit] = {}
    given = {} if edit is None else edit
    for pattern, names in expand_patterns(model, given, "edit").items():
        if not callable(given[pattern]):
            raise ConfigError(f"edit[{pattern!r}]: expected a function of a tensor")
        for name in names:
            if name in edits:
                raise ConfigError(f"edit: two patterns name {name!r}: expected one edit of a point")
            edits[name] = given[pattern]
    # A model whose tokens become fewer has points of its own.
    make_points: type[Points] = getattr(model, "make_points", Points)
    at = make_points([name for names in read.values() for name in names], edits)
    logits = forward_with_points(model, images, at)
    return logits, at.values


def facets(
    model: ViT, images: Tensor, layer: int, what: Facet = "key", *, grid: bool = False
) -> Tensor:
    """Compute what a block projects its tokens to, as features of patches (2112.05814).

    Args:
        model: The model.
        images: Normalised pixels, (B, C, H, W).
        layer: The block; negative numbers count from the end.
        what: "query", "key" or "value": the output of that projection, before norms of heads and
            rotation, whose heads are side by side; "token": the tokens after the block.
        grid: Return a map of the patches, without prefix tokens.

    Returns:
        Features of every token (B, T, D), prefix tokens first; of patches (B, h, w, D) for a grid.

    Raises:
        ConfigError: The block is not there, or `what` is none of the facets.
    """
    if what not in get_args(Facet):
        raise ConfigError(f"what={what!r}: expected one of {', '.join(get_args(Facet))}")
    (index,) = resolve_block_indices([layer], len(model.blocks), "layer")
    states = model.iter_hidden_states(images, index + (what == "token"))
    for x in states:
        features = x
    if what != "token":
        block = model.blocks[index]
        if not isinstance(block, Block) or not isinstance(block.attn, Attention):
            raise ConfigError(f"blocks.{index} is not vitlib's own: expected what='token'")
        x = block.replace_prompts(features) if isinstance(block, PromptedBlock) else features
        x = x if isinstance(block, PostNormBlock) else block.norm1(x)
        features = getattr(block.attn, what[0])(x)
    if not grid:
        return features
    patches = features[:, model.num_prefix_tokens :]
    return patches.reshape(len(patches), *model.patch_grid(images), -1)
