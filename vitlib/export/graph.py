"""The module that an exported file computes: levels or pixels in, named outputs out.

How data flows: a shallow copy of the model shares its weights. Its positions are computed once for
the grid of the file (bake_grid), or by matrices for any grid (dynamic_grid.py). The normalisation
of uint8 levels is folded into its patch projection. torch.export then sees one straight line of
operations.

Shapes: B images, C channels, H W pixels, T tokens, D embed_dim, K width of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from vitlib.adapters.bottleneck import BottleneckAdapter, ParallelAdapter
from vitlib.adapters.lora import LoraLinear
from vitlib.errors import ConfigError
from vitlib.fast.embeddings import fold_uint8_affine
from vitlib.fast.linears import LinearWeights
from vitlib.fast.module_swap import STOCK_TYPES, copy_with_children, has_global_hooks, is_stock
from vitlib.image.pixels import Uint8Affine
from vitlib.patch_embed import PatchEmbed
from vitlib.positions import (
    AttentionPosition,
    RelativePositionBias,
    RotaryEmbedding,
    relative_index,
)
from vitlib.variants import PromptedBlock, PromptedPosition, PromptedPostNormBlock
from vitlib.vit import ViT

# Stock parts, and those of vitlib.adapt.
TYPES = (
    *STOCK_TYPES,
    *(LoraLinear, BottleneckAdapter, ParallelAdapter, PromptedBlock, PromptedPostNormBlock),
)
Output = Literal["logits", "embedding", "tokens", "attention"]
OUTPUTS: tuple[Output, ...] = get_args(Output)


class ExportGraph(nn.Module):
    """A model as an exported file computes it.

    Args:
        model: The model, with the positions of the file's grid.
        outputs: Names of the outputs, in order.
        center: Level of each channel that is taken from uint8 levels before the patch projection;
            None for normalised pixels.
    """

    center: Tensor | None

    def __init__(self, model: ViT, outputs: Sequence[Output], center: Tensor | None) -> None:
        super().__init__()
        _wrap_parameters(model)
        self.model, self.outputs = model, tuple(outputs)
        self.register_buffer("center", None if center is None else center[:, None, None])
        needs_all = not {"tokens", "attention"}.isdisjoint(outputs)
        self.num_queries = None if needs_all else model.count_queries()

    @property
    def takes_uint8(self) -> bool:
        """True if the input is uint8 levels."""
        return self.center is not None

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs, (B, C, H, W) -> one tensor an output.

        Args:
            pixels: uint8 levels, or normalised pixels in float32, (B, C, H, W).

        Returns:
            In the order of `outputs`: logits (B, num_classes); embedding (B, K); tokens (B, T, D);
            attention of the class token in the last block, (B, num_heads, T).
        """
        model = self.model
        images = pixels if self.center is None else pixels.float() - self.center
        before = x = images
        for state in model.iter_hidden_states(images, num_queries=self.num_queries):
            before, x = x, state
        tokens = model.norm(x) if model.config.final_norm == "tokens" else x
        return tuple(self._compute(name, images, before, tokens) for name in self.outputs)

    def _compute(self, name: Output, images: Tensor, before: Tensor, tokens: Tensor) -> Tensor:
        """Compute one output from the tokens before the last block and at the end."""
        model = self.model
        if name == "attention":
            attn_pos = list(model.attn_positions(images))[-1]
            return model.blocks[-1].attention(before, 1, attn_pos)[:, :, 0]
        if name == "tokens":
            return tokens
        if name == "logits":
            return model.forward_head(tokens)
        embedding: Tensor = model.projection(model.pool(tokens))
        return embedding


class BakedPatchEmbed(PatchEmbed):
    """A patch embedding whose positions are those of one grid."""

    def resize_pos_embed(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return the positions as they are.

        Args:
            grid: Patches down and across, (h, w); that of the positions.

        Returns:
            Positions of the class tokens, (1, K, D), and of the patches, (1, N, D).
        """
        assert self.pos_embed is not None
        first = self.num_prefix_positions
        return self.pos_embed[:, :first], self.pos_embed[:, first:]


class BakedRotary(AttentionPosition):
    """Rotary table of one grid.

    Args:
        table: Cosines and sines, (2, N, K).
    """

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def per_block(
        self,
        grid: tuple[int, int],  # noqa: ARG002
        device: torch.device,  # noqa: ARG002
        count: int,
    ) -> Iterable[Tensor]:
        """Return the table for each block.

        Args:
            grid: Patches down and across, (h, w); that of the table.
            device: Device of the table.
            count: Number of blocks.
        """
        return repeat(self.table, count)


class BakedRelativeBias(AttentionPosition):
    """Tables of relative positions, resized to one grid. The file looks the biases up.

    Args:
        tables: Rows of the grid's offsets for each block, or one for all, each (rows, H).
        index: Row of each pair of tokens, (T, T).
    """

    index: Tensor

    def __init__(self, tables: Sequence[Tensor], index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.num_tables = len(tables)
        for number, table in enumerate(tables):
            self.register_buffer(f"table{number}", table)

    def per_block(
        self,
        grid: tuple[int, int],  # noqa: ARG002
        device: torch.device,  # noqa: ARG002
        count: int,
    ) -> Iterable[Tensor]:
        """Return the bias of each block, (1, H, T, T).

        Args:
            grid: Patches down and across, (h, w); that of the tables.
            device: Device of the tables.
            count: Number of blocks.
        """
        tables = [self.get_buffer(f"table{number}") for number in range(self.num_tables)]
        biases = [table[self.index].permute(2, 0, 1)[None] for table in tables]
        return repeat(biases[0], count) if len(biases) == 1 else biases


def check_outputs(model: ViT, outputs: Sequence[str]) -> tuple[Output, ...]:
    """Check that a model has the outputs that a caller names.

    Args:
        model: The model.
        outputs: Names of outputs; empty: logits, or the embedding of a model without a head.

    Returns:
        The names.

    Raises:
        ConfigError: A name is unknown or twice there, or the model has no such output.
    """
    if isinstance(outputs, str):
        outputs = (outputs,)
    names = tuple(outputs) or (("logits",) if model.num_classes else ("embedding",))
    if unknown := [name for name in names if name not in OUTPUTS]:
        raise ConfigError(f"output {unknown[0]!r}: expected one of {', '.join(OUTPUTS)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"outputs {', '.join(names)}: expected each name once")
    if "logits" in names and not model.num_classes:
        raise ConfigError("this model has no head: expected outputs embedding, tokens or attention")
    if "attention" in names and not model.config.tokens.cls:
        raise ConfigError(
            "this model has no class token whose attention a file could give: expected outputs "
            "logits, embedding or tokens"
        )
    return cast("tuple[Output, ...]", names)


def check_stock(model: ViT) -> None:
    """Check that a model is as vitlib built it.

    Args:
        model: The model.

    Raises:
        ConfigError: It has modules, hooks or methods of the caller's own.
    """
    if has_global_hooks() or not all(is_stock(module, TYPES) for module in model.modules()):
        raise ConfigError(
            "this model has parts of your own (a module, a hook or a method), whose numbers no "
            "check of vitlib covers: export it with torch.export or torch.onnx (docs/inside.md)"
        )


def find_center(affine: Uint8Affine) -> Tensor:
    """Return the level of each channel that becomes 0, (C,) float32.

    Products of levels less this are as well rounded as those of normalised pixels. Products of the
    levels themselves are much larger than their sum with the bias.

    Args:
        affine: Normalisation of uint8 levels.
    """
    pairs = zip(affine.factor, affine.offset, strict=True)
    return torch.tensor([-offset / factor for factor, offset in pairs], dtype=torch.float32)


def copy_for_export(
    model: ViT, affine: Uint8Affine | None, convert: Callable[[ViT], dict[str, nn.Module | None]]
) -> ViT:
    """Copy a model without its weights, with positions for export.

    Args:
        model: The model in float32, which is only read.
        affine: Normalisation of uint8 levels, which is folded into the patch projection; None for
            normalised pixels.
        convert: Makes the modules `patch_embed` and `attn_position` of the copy.

    Returns:
        The copy, in eval mode, which shares the weights of the blocks.
    """
    changes = convert(model)
    embed = changes["patch_embed"]
    assert isinstance(embed, PatchEmbed)
    changes["patch_embed"] = _fold(embed, affine)
    copied = copy_with_children(model, {**model._modules, **changes})
    assert isinstance(copied, ViT)
    copied.compute_all_tokens = False
    return copied


def _wrap_parameters(model: ViT) -> None:
    """Make parameters of the plain tensors of copied modules: torch.export expects them."""
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                module._parameters[name] = nn.Parameter(tensor, requires_grad=False)


def _fold(embed: PatchEmbed, affine: Uint8Affine | None) -> PatchEmbed:
    """Return a patch embedding that takes levels, or the same where there is no normalisation."""
    if affine is None:
        return embed
    bias = None if embed.proj.bias is None else embed.proj.bias.detach()
    weights = LinearWeights(embed.proj.weight.detach(), bias)
    folded = fold_uint8_affine(weights, affine, tuple(find_center(affine).tolist()))
    proj = copy_with_children(embed.proj, {})
    assert folded.bias is not None  # the fold has the offset of each channel
    proj.weight, proj.bias = nn.Parameter(folded.weight), nn.Parameter(folded.bias)
    copied = copy_with_children(embed, {**embed._modules, "proj": proj})
    assert isinstance(copied, PatchEmbed)
    return copied


@torch.no_grad()
def bake_grid(model: ViT, grid: tuple[int, int]) -> dict[str, nn.Module | None]:
    """Compute the positions of one grid.

    Args:
        model: The model, which is only read.
        grid: Patches down and across, (h, w).

    Returns:
        The modules `patch_embed` and `attn_position`. Tables that are large beside the weights are
        left to the file: learned rotary frequencies and biases of the scores.
    """
    embed = copy_with_children(model.patch_embed, dict(model.patch_embed._modules))
    assert isinstance(embed, PatchEmbed)
    embed.__class__ = BakedPatchEmbed
    if model.patch_embed.pos_embed is not None:
        positions = torch.cat(model.patch_embed.resize_pos_embed(grid), dim=1).clone()
        embed.pos_embed = nn.Parameter(positions, requires_grad=False)
    source, device = model.attn_position, model.device
    attn_position: nn.Module | None = source
    base = source.base if isinstance(source, PromptedPosition) else source
    if source is not None and isinstance(base, RotaryEmbedding):
        attn_position = BakedRotary(next(iter(source.per_block(grid, device, 1))).clone())
    elif source is not None and isinstance(base, RelativePositionBias):
        tables = [base.resize_table(table, grid).clone() for table in base.tables]
        attn_position = BakedRelativeBias(tables, relative_index(grid, device))
        if source is not base:
            attn_position = copy_with_children(source, {"base": attn_position})
    return {"patch_embed": embed, "attn_position": attn_position}
