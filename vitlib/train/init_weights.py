"""A new ViT to train from scratch: its size by a short name, and its first weights.

Sources: Dosovitskiy et al. 2010.11929 (the sizes; in its own code linear layers start by Glorot's
rule and the patch projection by LeCun's); Trockman and Kolter 2305.09828 (attention that starts
like trained attention); Chen et al. 2104.02057 (positions that start as sines and cosines of both
axes, fixed in the paper, trained here).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from vitlib.config import SIZES, ViTConfig
from vitlib.encoder import Attention, Block
from vitlib.errors import ConfigError
from vitlib.system.memory import available_memory
from vitlib.train.settings import Init
from vitlib.vit import ViT

MAX_BLOCKS = 1000
_SIZE = re.compile(r"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})/([0-9]{1,9})")
# Shares of noise and of the identity in the products W_q^T W_k, and W_v W_out (2305.09828,
# section 4).
_QK_MIX, _VALUE_MIX = (0.7, 0.7), (0.4, -0.4)


def build_from_scratch(size: str, image_size: int, classes: int, init: Init) -> ViT:
    """Build a new ViT.

    Args:
        size: A size of the papers such as "S/16"; or width x blocks x heads / patch, as in
            "96x8x4/4".
        image_size: Pixels of a side.
        classes: Number of classes of the head.
        init: First weights, "mimetic" or "normal".

    Returns:
        The model.

    Raises:
        ConfigError: There is no such size, or the model does not fit in memory.
    """
    numbers = _SIZE.fullmatch(size)
    if numbers:
        width, depth, heads, patch = map(int, numbers.groups())
        cfg = ViTConfig(
            embed_dim=width, depth=depth, num_heads=heads, patch_size=(patch, patch),
            image_size=(image_size, image_size), num_classes=classes,
        )  # fmt: skip
    else:
        name, _, patches = size.partition("/")
        if name not in SIZES or not (patches.isdecimal() and len(patches) <= 4):
            raise ConfigError(
                f"no new ViT of {size!r} can be made: expected one of {', '.join(SIZES)}, a slash "
                "and the patch in pixels, as in S/16; or width x blocks x heads / patch, as in "
                "96x8x4/4"
            )
        cfg = ViTConfig.named(size, image_size=image_size, num_classes=classes)
    _check_memory(size, cfg)
    model = ViT(cfg)
    if init == "mimetic":
        _init_mimetic(model)
    return model


def _check_memory(size: str, cfg: ViTConfig) -> None:
    """Raise ConfigError for a model that does not fit, before it takes any memory."""
    per_block = cfg.embed_dim * (4 * cfg.embed_dim + 2 * cfg.mlp_dim)
    others = cfg.embed_dim * (cfg.num_positions + 3 * cfg.patch_size[0] ** 2 + cfg.num_classes)
    needed, free = 8 * (cfg.depth * per_block + others), available_memory(torch.device("cpu"))
    if cfg.depth > MAX_BLOCKS or (free is not None and needed > free):
        available = "" if free is None else f"; {free / 2**30:.1f} are free"
        raise ConfigError(
            f"a new ViT of {size!r} has {cfg.depth} blocks and takes {needed / 2**30:.1f} GiB with "
            f"its gradients{available}: expected at most {MAX_BLOCKS} blocks, and what fits in "
            "memory"
        )


@torch.no_grad()
def _init_mimetic(model: ViT) -> None:
    """Set first weights for small sets of photos; the head keeps its normal of 0.02."""
    projection = model.patch_embed.proj.weight  # (D, C, p, q)
    nn.init.trunc_normal_(projection, std=projection[0].numel() ** -0.5)
    table = model.patch_embed.pos_embed
    if table is not None:
        patches = sincos_positions(model.config.grid_size, model.config.embed_dim)
        # The class token, if there is one, comes first and gets zeros.
        table.zero_()[0, len(table[0]) - len(patches) :] = patches
    for block in model.blocks:
        for linear in block.modules():
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
        assert isinstance(block, Block)
        _init_attention(block.attn)


def _init_attention(attn: Attention) -> None:
    """Make scores of similar tokens high, and the output the negated values (2305.09828)."""
    width = attn.head_dim
    for first in range(0, attn.num_heads * width, width):
        head = slice(first, first + width)
        # Nearly the best product of this rank: it has 97 % of the sum of singular values.
        u, s, v = torch.svd_lowrank(_mix_identity(attn.q.weight, *_QK_MIX), width, niter=4)
        attn.q.weight[head], attn.k.weight[head] = (u * s.sqrt()).T, (v * s.sqrt()).T
    u, s, vh = torch.linalg.svd(_mix_identity(attn.v.weight, *_VALUE_MIX))
    attn.v.weight.copy_(s.sqrt()[:, None] * vh)
    attn.proj.weight.copy_(u * s.sqrt())


def _mix_identity(like: Tensor, noise: float, identity: float) -> Tensor:
    """Return noise * Z + identity * I like a matrix (D, D); Z has a variance of 1 / D."""
    z: Tensor = torch.randn_like(like) / len(like) ** 0.5
    return noise * z + identity * torch.eye(len(like), dtype=like.dtype, device=like.device)


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Compute sines and cosines of each patch's column, then of its row.

    Each of the four has a quarter of the width, at wavelengths of 2 pi to 20,000 pi patches, as for
    text (1706.03762, section 3.5).

    Args:
        grid: Patches down and across, (h, w).
        width: D. What is left over of a width that is no multiple of 4 is 0.

    Returns:
        (h * w, D) float32.
    """
    quarter = width // 4
    frequencies = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float32) / max(quarter - 1, 1))
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (x, y)]
    parts = [f(angle) for angle in angles for f in (torch.sin, torch.cos)]
    left_over = torch.zeros(grid[0] * grid[1], width - 4 * quarter, dtype=torch.float32)
    return torch.cat([*parts, left_over], dim=1)
