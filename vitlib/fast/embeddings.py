"""Fast counterparts of the patch embedding and of the position modules.

How data flows: the patch projection is one matrix product, as patches do not overlap. For uint8
pixels the normalisation (scale, mean, std) is folded into its weights, so that the model takes
images as they are decoded. What depends on the grid alone is computed once a grid.

Shapes: B images, C channels, H W pixels, p q pixels of a patch, h w patches, D embed_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitlib.fast.cpu import KernelPlan
from vitlib.fast.int8_linears import make_linear
from vitlib.fast.linears import FastLinear, LinearWeights, own_copy
from vitlib.fast.module_swap import copy_as_float32, copy_with_children
from vitlib.image.pixels import Uint8Affine
from vitlib.patch_embed import PatchEmbed
from vitlib.positions import AttentionPosition
from vitlib.system.torch_state import float64_device


class FastPatchEmbed(PatchEmbed):
    """A PatchEmbed that resamples its positions once for each grid off the learned one."""

    cached: tuple[tuple[int, int], tuple[Tensor, Tensor]] | None = None

    def resize_pos_embed(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the position embeddings of a grid, as PatchEmbed.resize_pos_embed does.

        Args:
            grid: Patches down and across, (h, w).

        Returns:
            Those of the prefix tokens and of the patches.
        """
        # Read once: another thread may store another grid's result at any moment.
        cached = self.cached
        if cached is None or cached[0] != grid:
            cached = self.cached = grid, super().resize_pos_embed(grid)
        return cached[1]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies and pickles."""
        return {**self.__dict__, "cached": None}


class FastAttentionPosition(AttentionPosition):
    """Position tables of another module, computed once for each grid.

    Args:
        source: The module that computes them.
    """

    def __init__(self, source: AttentionPosition) -> None:
        super().__init__()
        self.source = source
        self.cached: tuple[object, list[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies and pickles."""
        return {**self.__dict__, "cached": None}

    def per_block(self, grid: tuple[int, int], device: torch.device, count: int) -> list[Tensor]:
        """Return the position table of each block.

        Args:
            grid: Patches down and across, (h, w).
            device: The device of the tables.
            count: The number of blocks.

        Returns:
            The tables of the other module, always as a list.
        """
        key = grid, device, count
        # Read once: another thread may store another grid's result at any moment.
        cached = self.cached
        if cached is None or cached[0] != key:
            cached = self.cached = key, list(self.source.per_block(grid, device, count))
        return cached[1]


class PatchTokens(nn.Module):
    """A patch projection that computes tokens, and takes the place of a convolution.

    Args:
        kernel: The shape of the convolution's weight, (D, C, p, q).
    """

    def __init__(self, kernel: torch.Size) -> None:
        super().__init__()
        self.kernel, self.in_channels = kernel, kernel[1]
        self.weight = torch.empty(0, dtype=torch.float32)  # PatchEmbed casts pixels to its dtype

    def forward(self, images: Tensor) -> Tensor:
        """Project images as the convolution does.

        Args:
            images: Pixels (B, C, H, W).

        Returns:
            (B, D, h, w) float32, a view of (B, h * w, D).
        """
        _, _, p, q = self.kernel
        tokens = self.tokens(images).float().transpose(1, 2)
        return tokens.view(*tokens.shape[:2], images.shape[2] // p, images.shape[3] // q)

    def tokens(self, images: Tensor) -> Tensor:
        """Project images to tokens, (B, h * w, D).

        Args:
            images: Pixels (B, C, H, W).
        """
        raise NotImplementedError


class PatchLinear(PatchTokens):
    """The patch projection as one matrix product.

    Args:
        linear: The linear layer over flattened patches, (C p q) to D.
        kernel: The shape of the convolution's weight, (D, C, p, q).
    """

    def __init__(self, linear: FastLinear, kernel: torch.Size) -> None:
        super().__init__(kernel)
        self.linear = linear

    def tokens(self, images: Tensor) -> Tensor:
        """Project images to tokens.

        Args:
            images: Pixels (B, C, H, W).

        Returns:
            (B, h * w, D) in the linear's dtype.
        """
        _, c, p, q = self.kernel
        b, h, w = len(images), images.shape[2] // p, images.shape[3] // q
        cropped = images[:, :, : h * p, : w * q]  # a convolution ignores the rest too
        patches = cropped.view(b, c, h, p, w, q).permute(0, 2, 4, 1, 3, 5)
        tokens: Tensor = self.linear(patches.reshape(b, h * w, c * p * q))
        return tokens


def fold_uint8_affine(
    weights: LinearWeights, affine: Uint8Affine, centre: tuple[float, ...] | None = None
) -> LinearWeights:
    """Fold the normalisation of uint8 pixels into a patch projection.

    Args:
        weights: The projection of normalised pixels, weight (D, C, p, q).
        affine: The normalisation.
        centre: What is subtracted from the uint8 pixels of each channel before the projection.

    Returns:
        The projection of uint8 pixels less `centre`, computed in float64 and rounded once.
    """
    device = weights.weight.device
    wide = float64_device(device)
    exact = weights.weight.to(wide, torch.float64)
    factor, offset = (torch.tensor(v, dtype=torch.float64, device=wide) for v in affine)
    if centre is not None:
        offset = offset + factor * torch.tensor(centre, dtype=torch.float64, device=wide)
    bias = (exact.sum(dim=(2, 3)) * offset).sum(dim=1)
    if weights.bias is not None:
        bias = bias + weights.bias.to(wide, torch.float64)
    weight = (exact * factor[:, None, None]).float()
    return LinearWeights(weight.to(device), bias.float().to(device))


def make_patch_linear(
    conv: nn.Conv2d, plan: KernelPlan, affine: Uint8Affine | None = None
) -> PatchLinear:
    """Make the fast patch projection of a convolution.

    Args:
        conv: The convolution, whose stride is its kernel size.
        plan: The kernels of this machine.
        affine: The normalisation to fold in for uint8 pixels; None for normalised pixels.

    Returns:
        The projection.
    """
    # Beside 8-bit blocks bfloat16 is exact enough. Beside bfloat16 blocks it would change labels,
    # and gain little.
    plan = plan if plan.arithmetic == "int8" else plan._replace(arithmetic="fp32")
    dtype = plan.attention_dtype if plan.arithmetic == "int8" else torch.float32
    weight = conv.weight.detach().to(dtype).float()  # rounded before the fold, as save() writes it
    bias = None if conv.bias is None else own_copy(conv.bias.to(dtype))
    weights = LinearWeights(weight, bias)
    if affine is not None:
        weights = fold_uint8_affine(weights, affine)
    flat = LinearWeights(weights.weight.flatten(1), weights.bias)
    return PatchLinear(make_linear(flat, plan), weight.shape)


def make_patch_embed(
    embed: PatchEmbed, plan: KernelPlan, affine: Uint8Affine | None = None
) -> PatchEmbed:
    """Make the fast counterpart of a stock PatchEmbed.

    Args:
        embed: The module, which is only read.
        plan: The kernels of this machine.
        affine: The normalisation to fold in for uint8 pixels; None for normalised pixels.

    Returns:
        A FastPatchEmbed.
    """
    children: dict[str, nn.Module | None] = {"proj": make_patch_linear(embed.proj, plan, affine)}
    if embed.norm is not None:
        children["norm"] = copy_as_float32(embed.norm)
    fast = copy_with_children(embed, children)
    fast.__class__ = FastPatchEmbed
    assert isinstance(fast, PatchEmbed)
    return fast
