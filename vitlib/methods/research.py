"""Methods of ViT for research: tensors of the forward by name, and parts of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from vitlib.adapters.settings import Adaptation
    from vitlib.parts.packed import Packed
    from vitlib.tokens.model import ReducedViT
    from vitlib.tokens.reduction import BlockTokens
    from vitlib.vit import ViT


class ResearchMethods(nn.Module):
    """Methods that read and edit a forward; each leaves the model as it is."""

    adaptation: Adaptation | None = None  # parts that vitlib.adapt added
    num_prompts = 0  # tokens among them, after the prefix tokens of the config

    def trace(
        self,
        images: Tensor,
        points: Iterable[str] = (),
        edit: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute logits, and tensors of the forward by name; edit some for this call.

        No hook is registered, gradients pass, and torch.compile takes it whole. docs/research.md
        lists the points.

        Args:
            images: Normalised pixels, (B, C, H, W).
            points: Names to read, such as "blocks.3.attn.q" or "blocks.*.resid"; `*` stands for
                any characters.
            edit: By name or pattern, a function of a tensor. It returns one of the same shape,
                dtype and device, which the forward goes on with.

        Returns:
            Logits as `forward` gives, and the tensors read, as edited, in the order of the forward.

        Raises:
            ConfigError: A name is no point, two patterns edit the same point, or an edit returned
                another shape, dtype or device.
        """
        from vitlib.points.trace import trace

        return trace(cast("ViT", self), images, points, edit)

    def facets(
        self,
        images: Tensor,
        layer: int,
        what: Literal["query", "key", "value", "token"] = "key",
        *,
        grid: bool = False,
    ) -> Tensor:
        """Compute what a block projects its tokens to, as features of patches (2112.05814).

        Args:
            images: Normalised pixels, (B, C, H, W).
            layer: The block; negative numbers count from the end.
            what: "query", "key" or "value": the output of that projection, before norms of heads
                and rotation, whose heads are side by side; "token": the tokens after the block.
            grid: Return a map of the patches, without prefix tokens.

        Returns:
            Features of every token (B, T, D), prefix tokens first; for a grid (B, h, w, D).

        Raises:
            ConfigError: The block is not there, or `what` is none of the facets.
        """
        from vitlib.points.trace import facets

        return facets(cast("ViT", self), images, layer, what, grid=grid)

    def with_attention(
        self,
        fn: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
        blocks: int | Sequence[int] | None = None,
    ) -> ViT:
        """Make a model that attends by a function of one's own.

        Args:
            fn: `fn(q, k, v, bias)` with the meaning of torch's scaled_dot_product_attention:
                queries, keys and values (B, H, T, K), rotated and normalised where the model does
                so, a bias of the scores (1, H, T, T) or None -> (B, H, T, K). An nn.Module becomes
                a part of the model, with its parameters.
            blocks: The blocks that use it, as `indices` of `forward_intermediates`; None means all.

        Returns:
            A new model that shares the weights. `attention` knows no probabilities of these blocks.

        Raises:
            ConfigError: `fn` is no function, a block is not there or its attention is not vitlib's
                own, or the model drops attention probabilities. Its forward raises it where `fn`
                returns another shape or dtype.
        """
        from vitlib.parts.attention import with_attention

        return with_attention(cast("ViT", self), fn, blocks)

    def with_tokens(
        self,
        fn: Callable[[Tensor, BlockTokens], tuple[Tensor, Tensor]],
        blocks: int | Sequence[int] | None = None,
    ) -> ReducedViT:
        """Make a model whose tokens become fewer after the attention of its blocks.

        Args:
            fn: `vitlib.tokens.merge(r=8)`, `vitlib.tokens.drop(keep=0.7)`, or a function of one's
                own, `fn(tokens, block) -> tokens, map`: from tokens (B, T, D) to fewer (B, U, D),
                and for each old token the index of the new one, or -1 where it is dropped, (B, T)
                int64. Prefix tokens stay the first. `block` has the keys and more.
            blocks: The blocks that call it, as `indices` of `forward_intermediates`; None means
                all.

        Returns:
            A new model that shares the weights, with `forward_tokens(images).unmerge()`, the tokens
            back on the grid.

        Raises:
            ConfigError: `fn` is no function, or a block is not there or not vitlib's own.
        """
        from vitlib.tokens.model import with_tokens

        return with_tokens(cast("ViT", self), fn, blocks)

    def packed(self, images: Iterable[Tensor], *, tokens: bool = True) -> Packed:
        """Compute images of different shapes in one forward (2307.06304).

        Each image attends to itself alone, at the positions of its own grid. Gradients pass, and
        training drops as for each image by itself.

        Args:
            images: Normalised pixels of each image, (C, H, W).
            tokens: False gives logits alone. The last block then computes only what the head reads.

        Returns:
            Logits, tokens, lengths and grids, as the model gives them for each image by itself, to
            rounding.

        Raises:
            ConfigError: The model runs its blocks in a way of its own.
            ImageError: There is no image, or one cannot be cut into patches; the message has its
                index.
        """
        from vitlib.parts.packed import packed

        return packed(cast("ViT", self), images, tokens=tokens)
