"""Pixels to tokens: cut into patches, project each, add its position, put [CLS] and others first.

Shapes: B images, C channels, H W pixels, h w patches (down, across), N = h * w, D embed_dim,
K class tokens (class, distillation), R registers, V prompts, T = K + R + V + N tokens.
Sources: Dosovitskiy et al. 2010.11929 (patches, [CLS], learned positions); Touvron et al.
2012.12877 (distillation token); Darcet et al. 2309.16588 (registers).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.config import ViTConfig
from vitlib.config_parts import PositionResize
from vitlib.dropout import SampleKeys, dropout
from vitlib.encoder import build_norm
from vitlib.errors import ConfigError, ImageError
from vitlib.positions import is_tracing, pin_traced_grid


class PatchProjection(nn.Conv2d):
    """Convolution whose kernel is its stride.

    In float32 on a GPU it is computed as a matrix product, which is the same: cuDNN convolves in
    TF32 by default, with an error of 1e-3, where products are exact.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Project each patch, (B, C, H, W) -> (B, D, h, w).

        Args:
            images: Normalised pixels, (B, C, H, W).

        Returns:
            Patch embeddings, (B, D, h, w).
        """
        is_rounded = images.is_cuda and images.dtype == torch.float32
        return self.project_by_matmul(images) if is_rounded else super().forward(images)

    def project_by_matmul(self, images: Tensor) -> Tensor:
        """Compute `forward` as a product of patches and kernel, (B, C, H, W) -> (B, D, h, w).

        Args:
            images: Normalised pixels, (B, C, H, W).

        Returns:
            Patch embeddings, (B, D, h, w).
        """
        (p, q), (b, c, height, width) = self.kernel_size, images.shape
        h, w = height // p, width // q
        patches = images[:, :, : h * p, : w * q].reshape(b, c, h, p, w, q)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Patch projection, prefix tokens (class, distillation, registers) and position embeddings.

    `prompt_token` are prompts, (1, V, D), which `vitlib.adapt` adds to a model (2203.12119).
    `mask_token` is a buffer, not a parameter: no forward reads it, so it gets no gradient
    (2111.06377 and 2304.07193 put it in place of hidden patches in pre-training).

    Args:
        cfg: The model's config.
    """

    dropout_keys: SampleKeys | None = None  # seeds of the draws in training, see dropout.py

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        if not isinstance(cfg, ViTConfig):
            raise ConfigError(
                f"config={cfg!r:.40}: expected a ViTConfig, such as ViTConfig.named('B/16'); "
                "vitlib.load() opens a checkpoint"
            )
        self.patch_size, self.grid_size = cfg.patch_size, cfg.grid_size
        self.position_resize, self.dropout = cfg.positions.resize, cfg.regularization.dropout
        self.num_prefix_positions = cfg.num_prefix_positions

        def token(count: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(1, count, cfg.embed_dim)) if count else None

        self.proj = PatchProjection(
            cfg.in_channels, cfg.embed_dim, cfg.patch_size, cfg.patch_size, bias=cfg.biases.patch
        )
        self.norm = build_norm(cfg, cfg.embed_dim) if cfg.norms.patch else None
        self.cls_token = token(int(cfg.tokens.cls))
        self.dist_token = token(int(cfg.tokens.dist))
        self.reg_token = token(cfg.tokens.registers)
        self.prompt_token: nn.Parameter | None = None  # of vitlib.adapt
        self.pos_embed = token(cfg.num_positions)
        mask_token = torch.zeros(1, 1, cfg.embed_dim) if cfg.tokens.mask else None
        self.register_buffer("mask_token", mask_token)
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)
        tokens = (self.cls_token, self.dist_token, self.reg_token, self.pos_embed)
        for parameter in (self.proj.weight, *(t for t in tokens if t is not None)):
            nn.init.trunc_normal_(parameter, std=0.02)  # as encoder.Linear

    def forward(self, images: Tensor) -> Tensor:
        """Turn pixels into tokens, (B, C, H, W) -> (B, T, D): class tokens, registers, patches.

        Args:
            images: Normalised pixels, (B, C, H, W), of a float dtype; they are cast to the dtype of
                the weights. H and W are at least a patch. Rows and columns after the last whole
                patch are dropped, as a convolution does (SigLIP so400m: 384 / 14).

        Returns:
            Tokens, (B, T, D).

        Raises:
            ImageError: The images cannot be cut into patches.
        """
        grid = self.patch_grid(images)
        x = self.proj(images.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)  # (B, N, D)
        x = x if self.norm is None else self.norm(x)
        tokens: list[Tensor] = [t for t in (self.cls_token, self.dist_token) if t is not None]
        if self.pos_embed is not None:
            prefix_positions, patch_positions = self.resize_pos_embed(grid)
            x = x + patch_positions
            if self.num_prefix_positions:
                tokens = [torch.cat(tokens, dim=1) + prefix_positions]
        others = [t for t in (self.reg_token, self.prompt_token) if t is not None]  # no positions
        x = torch.cat([*(t.expand(x.shape[0], -1, -1) for t in (*tokens, *others)), x], dim=1)
        return dropout(x, self.dropout, self.dropout_keys, 0) if self.training else x

    def resize_pos_embed(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Resample the position embeddings to a grid.

        Args:
            grid: Patches down and across, (h, w).

        Returns:
            Position embeddings of the class tokens, (1, K, D), and of the patches, (1, N, D).
        """
        assert self.pos_embed is not None
        prefix = self.pos_embed[:, : self.num_prefix_positions]
        patches = self.pos_embed[:, self.num_prefix_positions :]
        return prefix, resize_positions(patches, self.grid_size, grid, self.position_resize)

    def patch_grid(self, images: Tensor) -> tuple[int, int]:
        """Count the patches down and across, (B, C, H, W) -> (h, w).

        Args:
            images: Normalised pixels, (B, C, H, W).

        Returns:
            Patches down and across, (h, w).

        Raises:
            ImageError: The images cannot be cut into patches.
        """
        if not isinstance(images, Tensor):
            raise ImageError(
                f"images: expected a tensor of normalised pixels, got a {type(images).__name__}: "
                "an ImageProcessor makes one, and a Predictor takes images as they are"
            )
        (p, q), shape = self.patch_size, images.shape
        fits = len(shape) == 4 and shape[1] == self.proj.in_channels
        if not fits or shape[2] < p or shape[3] < q or not images.is_floating_point():
            raise ImageError(self._misfit(images))
        return shape[2] // p, shape[3] // q

    def _misfit(self, images: Tensor) -> str:
        """Explain why images cannot be cut into patches, and which can."""
        (p, q), shape, channels = self.patch_size, tuple(images.shape), self.proj.in_channels
        if len(shape) != 4 or shape[1] != channels:
            return f"pixels of shape {shape}: expected (images, {channels}, height, width)"
        if not images.is_floating_point():
            return f"pixels are {images.dtype}: normalise them with an ImageProcessor"
        return (
            f"images of {shape[2]}x{shape[3]} pixels (height x width) hold no whole patch of "
            f"{p}x{q}: use at least {max(shape[2], p)}x{max(shape[3], q)}"
        )


class ResizeRule(NamedTuple):
    """Arguments of the interpolation that resamples position embeddings; see POSITION_RESIZE.

    Attributes:
        mode: Mode of torch's interpolate.
        antialias: Whether it filters before it samples fewer points.
        align_corners: Whether corner points of both grids coincide.
        float32: True computes in float32, False in the dtype of the weights.
        offset: Patches added to the grid before its ratio to the old one is taken.
        square: Whether it resizes to the square of the longer side, and cuts the grid out of its
            upper left corner: this keeps the aspect ratio.
    """

    mode: str
    antialias: bool = False
    align_corners: bool = False
    float32: bool = True
    offset: float = 0.0
    square: bool = False


# The rules of the checkpoints' own code that interpolate. On the learned grid each is the identity.
# "sincos" (AIMv2 native) is no row: it computes the positions of each grid.
POSITION_RESIZE: dict[PositionResize, ResizeRule] = {
    "bicubic": ResizeRule("bicubic", float32=False),  # Hugging Face, but for DINOv2
    "bicubic_fp32": ResizeRule("bicubic"),  # Hugging Face DINOv2
    "bicubic_antialias": ResizeRule("bicubic", antialias=True),  # DINOv2 with registers; timm
    "bicubic_antialias_square": ResizeRule("bicubic", antialias=True, square=True),  # NaFlexVit
    "bicubic_offset": ResizeRule("bicubic", offset=0.1),  # DINO and DINOv2 as published
    "bicubic_corners": ResizeRule("bicubic", align_corners=True),  # torchvision
    "nearest": ResizeRule("nearest", float32=False),  # Idefics2, Idefics3, SmolVLM
    "bilinear": ResizeRule("bilinear"),  # timm on a Google .npz; DPT
    "bilinear_antialias": ResizeRule("bilinear", antialias=True),  # SigLIP 2 NaFlex
    "bilinear_corners": ResizeRule("bilinear", align_corners=True),  # Google JAX
    "bilinear_square": ResizeRule("bilinear", square=True),  # NaFlexVit, C-RADIO
    "bilinear_corners_square": ResizeRule("bilinear", align_corners=True, square=True),  # C-RADIO
}


def resize_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], rule: PositionResize
) -> Tensor:
    """Resample the position embeddings of patches to a grid, by the checkpoint's rule.

    Args:
        positions: Position embeddings of the old grid, (1, h * w, D).
        old: Patches down and across of the old grid.
        new: Patches down and across of the new grid.
        rule: Name of the rule, a key of POSITION_RESIZE; "sincos" computes the positions anew.

    Returns:
        Position embeddings of the new grid, (1, h * w, D).
    """
    if old == new:
        return pin_traced_grid(positions, old, new) if is_tracing() else positions
    return _resize_off_grid(positions, old, new, rule)


def _resize_off_grid(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], rule: PositionResize
) -> Tensor:
    """Interpolate the positions, or compute them again where the rule is "sincos"."""
    if rule == "sincos":
        return _recompute_positions(positions, new)
    return resample_positions(positions, old, new, POSITION_RESIZE[rule])


def _recompute_positions(positions: Tensor, new: tuple[int, int]) -> Tensor:
    """Compute the positions of another grid, in the dtype and on the device of the old ones."""
    sides = int(new[0]), int(new[1])
    table = compute_sincos_positions(sides, positions.shape[-1]).to(positions)
    return pin_traced_grid(table, sides, new) if is_tracing() else table


def compute_sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Compute AIMv2's positions: sines and cosines of each patch's column, then of its row.

    The wavelengths are those of text (1706.03762, section 3.5). They are a step apart from those of
    new models in train/init_weights.py, whose last one is 20,000 pi.

    Args:
        grid: Patches down and across, (h, w).
        width: D, a multiple of 4.

    Returns:
        Positions, (1, h * w, D), float64.
    """
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (x, y)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)[None]


def resample_positions(
    positions: Tensor, old: tuple[int, int], new: tuple[int, int], rule: ResizeRule
) -> Tensor:
    """Interpolate the position embeddings of patches to another grid.

    Args:
        positions: Position embeddings of the old grid, (1, h * w, D).
        old: Patches down and across of the old grid.
        new: Patches down and across of the new grid, which differs from the old one.
        rule: Arguments of the interpolation.

    Returns:
        Position embeddings of the new grid, (1, h * w, D).
    """
    grid = positions.reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, D, h, w)
    ratio = [(n + rule.offset) / o for n, o in zip(new, old, strict=True)]
    # There sides are tensors, and interpolate takes numbers.
    if is_tracing():
        ratio = [float(r) for r in ratio]
    # A trace holds the ratio, and the side of the square, as constants.
    is_pinned = is_tracing() and bool(rule.offset or rule.square)
    height, width = (int(new[0]), int(new[1])) if is_pinned else new
    side = max(height, width) if rule.square else 0
    grid = F.interpolate(
        grid.float() if rule.float32 else grid,
        size=None if rule.offset else (side, side) if rule.square else new,
        # A ratio instead of a size moves the sampling points; the offset keeps floor() from losing
        # a patch, and is itself part of what those checkpoints were trained with.
        scale_factor=ratio if rule.offset else None,
        mode=rule.mode,
        align_corners=None if rule.mode == "nearest" else rule.align_corners,
        antialias=rule.antialias,
    )
    grid = grid[:, :, :height, :width] if rule.square else grid
    rows = grid.flatten(2).transpose(1, 2).to(positions.dtype)
    return pin_traced_grid(rows, (height, width), new) if is_pinned else rows
