"""Counterparts of the patch embedding and of the position modules on a GPU.

cuda_modules.py makes them. What depends on the grid alone is computed once for each grid.

Shapes: B images, C channels, H W pixels, T tokens, P prefix tokens, N patches, h w patches down and
across, D embed_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitlib.fast.cuda_attention import align_bias
from vitlib.fast.embeddings import PatchLinear
from vitlib.patch_embed import PatchEmbed
from vitlib.positions import AttentionPosition, RelativePositionBias
from vitlib.variants import PromptedPosition

Grid = tuple[int, int]


class CudaPatchEmbed(PatchEmbed):
    """A PatchEmbed on a GPU: what does not depend on the pixels is computed once for each grid.

    CudaModuleFactory.make_patch_embed makes it.
    """

    stream_dtype: torch.dtype
    centre: Tensor | None  # subtracted from uint8 pixels, (C, 1, 1)
    cached: tuple[Grid, Tensor | None, Tensor | None] | None

    def forward(self, images: Tensor) -> Tensor:
        """Embed patches and put the prefix tokens before them.

        Args:
            images: (B, C, H, W) pixels, normalised or uint8, as it is made for.

        Returns:
            Tokens (B, T, D).
        """
        proj = self.proj
        assert isinstance(proj, PatchLinear)
        _, prefix, pos_embed = self.grid_rows(self.patch_grid(images))
        if self.centre is not None:
            images = images - self.centre  # uint8 less a float is a float, in one kernel
        x = proj.tokens(images)
        x = (x if self.norm is None else self.norm(x)).to(self.stream_dtype)
        if pos_embed is not None:
            x = x + pos_embed
        return x if prefix is None else torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)

    def patch_grid(self, images: Tensor) -> Grid:
        """Return the grid of patches, as PatchEmbed does.

        Args:
            images: (B, C, H, W) pixels; uint8 only where it is made for those.

        Returns:
            Patches down and across, (h, w).

        Raises:
            ImageError: The images do not fit the model.
        """
        if images.dtype == torch.uint8 and self.centre is not None:
            # PatchEmbed refuses uint8 pixels: it gets an empty tensor of the same shape.
            images = torch.empty(images.shape, dtype=self.centre.dtype, device="meta")
        return super().patch_grid(images)

    def grid_rows(self, grid: Grid) -> tuple[Grid, Tensor | None, Tensor | None]:
        """Return what a grid adds to the projected patches.

        Args:
            grid: Patches down and across, (h, w).

        Returns:
            The grid, the prefix tokens with their positions (1, P, D), and the positions of the
            patches (1, N, D).
        """
        # Read once: another thread may store another grid's result at any moment.
        cached = self.cached
        if cached is None or cached[0] != grid:
            class_tokens = (self.cls_token, self.dist_token)
            tokens: list[Tensor] = [token for token in class_tokens if token is not None]
            pos_embed = None
            if self.pos_embed is not None:
                prefix_pos_embed, pos_embed = self.resize_pos_embed(grid)
                pos_embed = pos_embed.to(self.stream_dtype)
                if self.num_prefix_positions:
                    tokens = [torch.cat(tokens, dim=1) + prefix_pos_embed]
            tokens += [t for t in (self.reg_token, self.prompt_token) if t is not None]
            prefix = torch.cat(tokens, dim=1).to(self.stream_dtype) if tokens else None
            cached = self.cached = grid, prefix, pos_embed
        return cached


class CudaAttentionPosition(AttentionPosition):
    """Position tables of another module, as the GPU's kernels take them, once for each grid.

    Args:
        source: The module that computes them, on the device.
        dtype: Dtype of score biases. Rotary tables stay float32.
    """

    def __init__(self, source: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(source, AttentionPosition)
        self.source, self.dtype = source, dtype
        self.cached: tuple[tuple[Grid, int], list[Tensor]] | None = None

    def per_block(self, grid: Grid, device: torch.device, count: int) -> list[Tensor]:
        """Return the position table of each block.

        Args:
            grid: Patches down and across, (h, w).
            device: The device of the tables.
            count: The number of blocks.

        Returns:
            Rotary tables (2, N, K) or (2, H, N, K) float32, or aligned score biases
            (1, H, T, T).
        """
        # Read once: another thread may store another grid's result at any moment.
        cached = self.cached
        if cached is None or cached[0] != (grid, count):
            tables = self.source.per_block(grid, device, count)
            prompted = isinstance(self.source, PromptedPosition) and self.source.is_bias
            if prompted or isinstance(self.source, RelativePositionBias):
                tables = [align_bias(table.to(self.dtype)) for table in tables]
            cached = self.cached = (grid, count), list(tables)
        return cached[1]
