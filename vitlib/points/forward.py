"""The forward of a ViT with every intermediate tensor at hand: read, edited, or differentiated.

Why it has a forward of its own: `ViT.forward` runs fused attention, which stores no scores and no
probabilities, and has no place for a caller to reach in. Modules and their order are the model's
own; logits equal those of `ViT.forward`, to rounding where probabilities are wanted. No hook is
registered, nothing of the model or of the process changes, and gradients pass.

How data flows: each tensor with a name goes through `at(name, tensor)`, which returns the tensor
that the forward goes on with. Shapes: as in vitlib/vit.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.dropout import dropout
from vitlib.encoder import MLP, Attention, Block, SwiGLU
from vitlib.errors import ConfigError
from vitlib.points.names import (
    ALL_TOKEN_POINTS,
    BLOCK_TYPES,
    has_pooled_point,
    has_stock_forward,
)
from vitlib.system.torch_state import without_autocast
from vitlib.variants import PostNormBlock, PromptedBlock
from vitlib.vit import ViT

Edit = Callable[[Tensor], Tensor]


class Points:
    """Tensors to read from one forward, and edits to make in it.

    Args:
        read: Full names of the points to read.
        edits: By the full name of a point, the function that edits its tensor.
        prefix: Prefix of the names that a call of this object takes.
    """

    def __init__(self, read: Iterable[str], edits: Mapping[str, Edit], prefix: str = "") -> None:
        self.read, self.edits, self.prefix = frozenset(read), edits, prefix
        self.values: dict[str, Tensor] = {}

    def within(self, prefix: str) -> Points:
        """Return a view for the points whose names begin with a prefix.

        Args:
            prefix: The prefix, with its dot.

        Returns:
            Points that share the tensors read.
        """
        view = Points(self.read, self.edits, prefix)
        view.values = self.values
        return view

    def wants(self, *names: str) -> bool:
        """Return True if a point is read or edited.

        Args:
            *names: Names without the prefix.
        """
        full = [self.prefix + name for name in names]
        return any(name in self.read or name in self.edits for name in full)

    def positions(self, attn_pos: Tensor | None) -> Tensor | None:
        """Return the positions that a block's attention takes; a subclass may select some.

        Args:
            attn_pos: Positions of the block, as `ViT.attn_positions` gives them.
        """
        return attn_pos

    def bias(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:  # noqa: ARG002
        """Return the bias of a block's scores; a subclass may add to it.

        Args:
            bias: Bias of the scores, (1, H, Q, T), or None.
            dtype: Dtype of the queries.
        """
        return bias

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Edit a tensor, and keep it if it is read.

        Args:
            name: Name of the point, without the prefix.
            x: Its tensor.

        Returns:
            The tensor that the forward goes on with.

        Raises:
            ConfigError: The edit returned no tensor of the same shape, dtype and device.
        """
        name = self.prefix + name
        if name in self.edits:
            # A copy: an edit in place would change what other points and images have.
            x = check_edited(name, x, self.edits[name](x.clone()))
        if name in self.read:
            self.values[name] = x
        return x


def check_edited(name: str, x: Tensor, edited: object) -> Tensor:
    """Check what an edit returned.

    Args:
        name: Name of the point.
        x: The tensor that the edit took.
        edited: What it returned.

    Returns:
        The edited tensor.

    Raises:
        ConfigError: It is no tensor of the shape, dtype and device of `x`.
    """
    expected = f"expected a tensor {tuple(x.shape)} {x.dtype} on {x.device}"
    if not isinstance(edited, Tensor):
        raise ConfigError(f"edit of {name!r} returned {type(edited).__name__}: {expected}")
    if (edited.shape, edited.dtype, edited.device) != (x.shape, x.dtype, x.device):
        shape, dtype = tuple(edited.shape), edited.dtype
        raise ConfigError(
            f"edit of {name!r} returned {shape} {dtype} on {edited.device}: {expected}"
        )
    return edited


def forward_with_points(model: ViT, images: Tensor, at: Points) -> Tensor:
    """Compute logits, passing each named tensor through `at`, (B, C, H, W) -> (B, num_classes).

    Args:
        model: The model.
        images: Normalised pixels, (B, C, H, W).
        at: The points.

    Returns:
        What `ViT.forward` gives.

    Raises:
        ConfigError: The model has a forward of its own, whose points are not known.
    """
    if type(model).forward is not ViT.forward:
        raise ConfigError(
            f"a {type(model).__name__} has a forward of its own, whose points are not known: "
            "expected a ViT, or a subclass with other methods"
        )
    x = at("embed", model.norm_pre(model.patch_embed(images)))
    last = len(model.blocks) - 1
    block: Any
    for index, (block, attn_pos) in enumerate(
        zip(model.blocks, model.attn_positions(images), strict=False)
    ):
        within = at.within(f"blocks.{index}.")
        needs_all = index < last or within.wants(*ALL_TOKEN_POINTS) or at.wants("norm")
        num_queries = None if needs_all else model.count_queries()
        x = forward_block(block, x, num_queries, attn_pos, within)
    x = at("norm", model.norm(x) if model.config.final_norm == "tokens" else x)
    if not has_pooled_point(model):
        return at("logits", model.forward_head(x))
    vector = at("pooled", model.projection(pool_with_points(model, x, at)))
    return at("logits", model.head(vector))


def pool_with_points(model: ViT, x: Tensor, at: Points) -> Tensor:
    """Pool as `ViT.pool`, with the probabilities of an attention pool as a point.

    Args:
        model: The model.
        x: Tokens after the final norm, (B, T, D).
        at: The points.

    Returns:
        The pooled vector, (B, D) or a multiple of D.
    """
    pool = model.attn_pool
    if pool is None or not at.wants("pool.probs"):
        return model.pool(x)
    tokens = x[:, pool.first :]
    # Tokens that the pool does not read have a probability of 0.
    probs = at("pool.probs", F.pad(pool.probabilities(tokens), (pool.first, 0)))
    vector = pool.residual_mlp(pool.apply_probs(probs[..., pool.first :], tokens))
    return model.norm(vector) if model.config.final_norm == "pooled" else vector


def forward_block(
    block: Block, x: Tensor, num_queries: int | None, attn_pos: Tensor | None, at: Points
) -> Tensor:
    """Run a block as `Block.forward` or `PostNormBlock.forward`, (B, T, D) -> (B, Q, D).

    Args:
        block: The block. One that is not vitlib's runs as it is, between its ends.
        x: Tokens, (B, T, D).
        num_queries: Number of leading tokens to compute, Q; None means all T.
        attn_pos: Positions for this block.
        at: The points of this block.

    Returns:
        The first Q tokens after the block, (B, Q, D).
    """
    is_known = type(block) in BLOCK_TYPES
    if is_known and isinstance(block, PromptedBlock):
        x = block.replace_prompts(x)
    x, attn_pos = at("resid_pre", x), at.positions(attn_pos)
    if not is_known:
        return at("resid", block(x, num_queries, attn_pos))
    is_post = isinstance(block, PostNormBlock)
    y = forward_attention(block.attn, x if is_post else block.norm1(x), num_queries, attn_pos, at)
    y = block.norm1(y) if is_post else y
    x = at("resid_mid", x[:, :num_queries] + block.residual(y, block.ls1, 1))
    y = forward_mlp(block.mlp, x if is_post else block.norm2(x), at)
    y = block.norm2(y) if is_post else y
    return at("resid", x + block.residual(y, block.ls2, 3))


def forward_attention(
    attn: Attention, x: Tensor, num_queries: int | None, attn_pos: Tensor | None, at: Points
) -> Tensor:
    """Attend as `Attention.forward`, (B, T, D) -> (B, Q, D).

    Args:
        attn: The attention. A class of the user's own runs as it is.
        x: Normalised tokens, (B, T, D).
        num_queries: Number of leading tokens that are queries, Q; None means all T.
        attn_pos: Positions for this block.
        at: The points of this block.

    Returns:
        The attended tokens, (B, Q, D).
    """
    if not has_stock_forward(attn):
        return at("attn.out", attn(x, num_queries, attn_pos))
    every_query = None if at.wants("attn.q") else num_queries
    q, k, bias = attn.project_qk(x, every_query, attn_pos)
    q = at("attn.q", q)[:, :, :num_queries]
    k, v = at("attn.k", k), at("attn.v", attn.split_heads(attn.v(x)))
    bias = at.bias(None if bias is None else bias[:, :, :num_queries], q.dtype)
    drops = attn.training and attn.dropout > 0
    if drops or at.wants("attn.scores", "attn.probs"):
        heads = attend_with_points(attn, q, k, v, bias, at)
    else:
        heads = (attn.attend or F.scaled_dot_product_attention)(q, k, v, bias)
    x = at("attn.heads", heads).transpose(1, 2).flatten(2)
    return at("attn.out", attn.proj(x if attn.sub_norm is None else attn.sub_norm(x)))


def attend_with_points(
    attn: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, at: Points
) -> Tensor:
    """Attend by stored scores and probabilities, -> (B, H, Q, K).

    Args:
        attn: The attention.
        q: Queries, (B, H, Q, K).
        k: Keys, (B, H, T, K).
        v: Values, (B, H, T, K).
        bias: Bias of the scores, (1, H, Q, T), or None.
        at: The points of this block.

    Returns:
        The attended values of each head, in the dtype of `v`.
    """
    with without_autocast(q):  # a softmax of edited scores stays in their dtype
        probs = at("attn.probs", torch.softmax(at("attn.scores", attn.scores(q, k, bias)), dim=-1))
    if attn.training and attn.dropout > 0:
        probs = dropout(probs, attn.dropout, attn.dropout_keys, 0)
    return probs.to(v.dtype) @ v


def forward_mlp(mlp: MLP, x: Tensor, at: Points) -> Tensor:
    """Run the MLP as `MLP.forward`, (B, Q, D) -> (B, Q, D).

    Args:
        mlp: The MLP. A class of the user's own runs as it is.
        x: Normalised tokens, (B, Q, D).
        at: The points of this block.

    Returns:
        Output of the branch, (B, Q, D).
    """
    if type(mlp) not in (MLP, SwiGLU):
        return at("mlp.out", mlp(x))
    x = at("mlp.hidden", mlp.activate(mlp.fc1(x)))
    return at("mlp.out", mlp.fc2(x if mlp.sub_norm is None else mlp.sub_norm(x)))
