"""Images of different shapes in one forward, each attending to itself alone (2307.06304).

How data flows: images of similar length are packed end to end into one long sequence, (1, S, D).
Norms, linear layers and MLPs run on the whole sequence, as they take each token by itself.
Attention runs on groups of images with the same number of tokens: no mask, no padding. Of four ways
to attend this is the fastest on a CPU; benchmarks/packed.py measures them.

Shapes: n images, S tokens in a sequence, T tokens of an image, G images in a group; others as in
vitlib/vit.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitlib.encoder import MLP, Attention, Block, RotaryAttention, SwiGLU
from vitlib.errors import ConfigError, ImageError
from vitlib.parts.sequence import (
    AttnPos,
    Group,
    join_tables,
    list_groups,
    run_groups,
)
from vitlib.variants import PostNormBlock
from vitlib.vit import ViT

RunBlock = Callable[[nn.Module, Tensor, Sequence[Group], AttnPos], Tensor]

# Tokens of a sequence. On a CPU its activations stay in the caches, and in memory that the
# allocator has at hand: with 1600 tokens each GELU waits for pages of the system.
MAX_TOKENS = {"cpu": 800}
MAX_TOKENS_OF_GPU = 32 * 1024


@dataclass(frozen=True, eq=False)
class Packed:
    """Result of `ViT.packed`.

    Attributes:
        logits: Logits of each image in the order given, (n, num_classes).
        tokens: Tokens of all images, end to end in that order, as `forward_features` gives them,
            (sum of T, D); None where they were not wanted.
        lengths: Number of tokens of each image, T.
        grids: Patches down and across of each image, (h, w).
    """

    logits: Tensor
    tokens: Tensor | None
    lengths: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]

    def split(self) -> list[Tensor]:
        """Split the tokens into those of each image.

        Returns:
            Tokens of each image, (T, D), prefix tokens first.

        Raises:
            ConfigError: The tokens were not wanted.
        """
        if self.tokens is None:
            raise ConfigError("packed(tokens=False) gives no tokens: call packed(images)")
        return list(torch.split(self.tokens, list(self.lengths)))


def packed(
    model: ViT,
    images: Iterable[Tensor],
    *,
    tokens: bool = True,
    run: RunBlock | None = None,
    max_tokens: int | None = None,
) -> Packed:
    """Compute images of different shapes in one forward.

    Args:
        model: The model. Parts of the user's own run as they are, a group of images at a time.
        images: Normalised pixels of each image, (C, H, W).
        tokens: False gives logits alone. The last block then computes only what the head reads.
        run: Runs a block on a sequence; None means `run_block`.
        max_tokens: Tokens of a sequence; None means MAX_TOKENS.

    Returns:
        What the model gives for each image by itself, to rounding.

    Raises:
        ConfigError: The model runs its blocks in a way of its own.
        ImageError: There is no image, or one cannot be cut into patches; the message has its index.
    """
    if type(model).iter_hidden_states is not ViT.iter_hidden_states:
        raise ConfigError(
            f"packed: a {type(model).__name__} runs its blocks in its own way: expected a ViT; "
            "call it with images of one shape"
        )
    if not isinstance(images, Iterable):
        raise ImageError(f"packed: images is a {type(images).__name__}: expected a list of tensors")
    pixels = list(images)
    grids = list_grids(model, pixels)
    num_queries = None if tokens else model.count_queries()
    order: list[int] = []
    logits: list[Tensor] = []
    features: list[Tensor] = []
    limit = max_tokens or MAX_TOKENS.get(model.device.type, MAX_TOKENS_OF_GPU)
    lengths = [h * w + model.num_prefix_tokens for h, w in grids]
    for indices in split_into_sequences(pixels, lengths, limit):
        sequence = [pixels[i] for i in indices]
        x, groups = run_sequence(model, sequence, num_queries, run or run_block)
        order += indices
        for group in groups:
            states = group.take(x)
            logits.append(model.forward_head(states))
            features += states.unbind() if tokens else ()
    given = sorted(range(len(order)), key=order.__getitem__)
    at = torch.tensor(given, device=logits[0].device, dtype=torch.int64)
    return Packed(
        logits=torch.cat(logits)[at],
        tokens=torch.cat([features[i] for i in given]) if tokens else None,
        lengths=tuple(lengths),
        grids=tuple(grids),
    )


def list_grids(model: ViT, pixels: Sequence[Tensor]) -> list[tuple[int, int]]:
    """List the patches down and across of each image.

    Args:
        model: The model.
        pixels: Normalised pixels of each image, (C, H, W).

    Returns:
        (h, w) of each image.

    Raises:
        ImageError: There is no image, or one cannot be cut into patches.
    """
    if not pixels:
        raise ImageError("no images: expected one or more")
    grids = []
    for index, image in enumerate(pixels):
        if isinstance(image, Tensor) and image.ndim != 3:
            shape, channels = tuple(image.shape), model.config.in_channels
            raise ImageError(
                f"image {index}: pixels of shape {shape}: expected ({channels}, height, width)"
            )
        try:
            grids.append(model.patch_grid(image[None] if isinstance(image, Tensor) else image))
        except ImageError as error:
            raise ImageError(f"image {index}: {error}") from error
    return grids


def split_into_sequences(
    pixels: Sequence[Tensor], lengths: Sequence[int], limit: int
) -> Iterator[list[int]]:
    """Choose the images of each sequence, with images of the same shape side by side.

    Args:
        pixels: Normalised pixels of each image, (C, H, W).
        lengths: Number of tokens of each image.
        limit: Tokens of a sequence. An image of more tokens has a sequence of its own.

    Yields:
        Indices of the images of a sequence.
    """
    sequence: list[int] = []
    total = 0
    for index in sorted(range(len(pixels)), key=lambda i: (lengths[i], tuple(pixels[i].shape))):
        if sequence and total + lengths[index] > limit:
            yield sequence
            sequence, total = [], 0
        sequence.append(index)
        total += lengths[index]
    yield sequence


def run_sequence(
    model: ViT, pixels: Sequence[Tensor], num_queries: int | None, run: RunBlock
) -> tuple[Tensor, list[Group]]:
    """Run every block and the final norm on one sequence, -> (1, S, D).

    Args:
        model: The model.
        pixels: Normalised pixels of each image, (C, H, W), with equal shapes side by side.
        num_queries: Number of leading tokens of each image that the last block computes, Q; None
            means all.
        run: Runs a block on the sequence.

    Returns:
        The sequence after the final norm, (1, S, D), and its groups; of Q tokens an image where
        that is a number.
    """
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for image in pixels:
        by_shape.setdefault(tuple(image.shape), []).append(image)
    batches = [torch.stack(same) for same in by_shape.values()]
    embedded = [model.patch_embed(batch) for batch in batches]
    groups = list_groups(embedded, merge=model.attn_position is None)
    # Models without positions in attention have groups of several shapes, and None for each.
    positions = [model.attn_positions(batch) for batch in batches[: len(groups)]]
    x = model.norm_pre(torch.cat([tokens.flatten(0, 1) for tokens in embedded])[None])
    last = len(model.blocks) - 1
    for index, (block, *attn_pos) in enumerate(zip(model.blocks, *positions, strict=False)):
        if index == last and num_queries is not None:
            x, groups = run_last_block(block, x, groups, attn_pos, num_queries)
        elif model.gradient_checkpointing and model.training:
            x = checkpoint(run, block, x, groups, attn_pos, use_reentrant=False)
        else:
            x = run(block, x, groups, attn_pos)
    return (model.norm(x) if model.config.final_norm == "tokens" else x), groups


def run_block(block: nn.Module, x: Tensor, groups: Sequence[Group], attn_pos: AttnPos) -> Tensor:
    """Run a block as `Block.forward` or `PostNormBlock.forward`, (1, S, D) -> (1, S, D).

    Args:
        block: The block. One that is not vitlib's, or has hooks, runs as it is on each group.
        x: The sequence, (1, S, D).
        groups: Its groups.
        attn_pos: Positions of each group, as `Block.forward` takes them.

    Returns:
        The sequence after the block.
    """
    if not takes_sequences(block):
        return run_groups(partial(run_tokens, block), x, groups, attn_pos)
    assert isinstance(block, Block)
    is_post = isinstance(block, PostNormBlock)
    attend = partial(run_attention, block.attn, groups=groups, attn_pos=attn_pos)
    branches: tuple[tuple[Callable[[Tensor], Tensor], nn.Module, nn.Module | None, int], ...] = (
        (attend, block.norm1, block.ls1, 1),
        (block.mlp, block.norm2, block.ls2, 3),
    )
    for branch, norm, layer_scale, site in branches:
        y = norm(branch(x)) if is_post else branch(norm(x))
        if block.training and block.drop_path:  # drops the branch of an image, not of a sequence
            parts = (block.residual(group.take(y), layer_scale, site) for group in groups)
            x = x + torch.cat([part.flatten(0, 1) for part in parts])
        else:
            x = x + block.residual(y, layer_scale, site)
    return x


def run_tokens(
    module: Callable[..., Tensor],
    tokens: Tensor,
    attn_pos: Tensor | None,
    num_queries: int | None = None,
) -> Tensor:
    """Run a block or its attention on images of one shape, (G, T, D) -> (G, Q, D).

    Args:
        module: The block or the attention.
        tokens: Tokens of the images, (G, T, D).
        attn_pos: Their positions.
        num_queries: Number of leading tokens to compute, Q; None means all T.
    """
    return module(tokens, num_queries, attn_pos)


def run_last_block(
    block: nn.Module, x: Tensor, groups: Sequence[Group], attn_pos: AttnPos, num_queries: int
) -> tuple[Tensor, list[Group]]:
    """Compute the leading tokens of each image alone, (1, S, D) -> (1, n * Q, D).

    Args:
        block: The last block.
        x: The sequence, (1, S, D).
        groups: Its groups.
        attn_pos: Positions of each group, as `Block.forward` takes them.
        num_queries: Number of leading tokens, Q.

    Returns:
        The sequence of these tokens, and its groups.
    """
    x = run_groups(partial(run_tokens, block, num_queries=num_queries), x, groups, attn_pos)
    ends = accumulate(group.num_images * num_queries for group in groups)
    pairs = zip(groups, ends, strict=True)
    return x, [
        Group(end - group.num_images * num_queries, group.num_images, num_queries)
        for group, end in pairs
    ]


def takes_sequences(block: nn.Module) -> bool:
    """Return True if all of a block but its attention takes each token by itself.

    Args:
        block: A block of the model.
    """
    if not isinstance(block, Block) or type(block) not in (Block, PostNormBlock):
        return False
    has_hooks = any(m._forward_hooks or m._forward_pre_hooks for m in (block, block.attn))
    return type(block.mlp) in (MLP, SwiGLU) and not has_hooks


def run_attention(attn: Attention, x: Tensor, groups: Sequence[Group], attn_pos: AttnPos) -> Tensor:
    """Attend within each image as `Attention.forward`, (1, S, D) -> (1, S, D).

    Args:
        attn: The attention. A class of the user's own runs as it is on each group.
        x: Normalised tokens of the sequence, (1, S, D).
        groups: Its groups.
        attn_pos: Positions of each group.

    Returns:
        The attended tokens.
    """
    drops = attn.training and attn.dropout > 0
    if drops or type(attn) not in (Attention, RotaryAttention):
        return run_groups(partial(run_tokens, attn), x, groups, attn_pos)
    is_rotary = isinstance(attn, RotaryAttention)
    table = join_tables(groups, attn_pos) if is_rotary else None
    biases = [None] * len(groups) if is_rotary else attn_pos
    q, k, _ = attn.project_qk(x, None, table)
    v = attn.split_heads(attn.v(x))
    attend = attn.attend or F.scaled_dot_product_attention
    heads = [
        attend(group.take_heads(q), group.take_heads(k), group.take_heads(v), bias)
        for group, bias in zip(groups, biases, strict=True)
    ]
    x = torch.cat([z.transpose(1, 2).flatten(2).flatten(0, 1) for z in heads])[None]
    y: Tensor = attn.proj(x if attn.sub_norm is None else attn.sub_norm(x))
    return y
