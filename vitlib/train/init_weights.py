"""A new ViT, to train from scratch: its size by a word, and what its weights are at first.

Sources: Dosovitskiy et al. 2010.11929 (the sizes; in its own code linear layers start by Glorot's
rule and the patch projection by LeCun's); Trockman and Kolter 2305.09828 (attention that starts as
trained attention looks); Chen et al. 2104.02057 (positions that start as sines and cosines of both
axes, there fixed, here learned on).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from vitlib.config import SIZES, ViTConfig
from vitlib.encoder import Attention, Block
from vitlib.errors import ConfigError
from vitlib.system.memory import available_memory
from vitlib.train.config import Init
from vitlib.vit import ViT

MOST_BLOCKS = 1000
_SIZE = re.compile(r"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})/([0-9]{1,9})")
# 2305.09828, section 4: how much of the products of queries and keys, and of values and output, is
# noise, and how much the identity.
_LOOK, _MOVE = (0.7, 0.7), (0.4, -0.4)


def fresh(size: str, image_size: int, classes: int, init: Init) -> ViT:
    """A new ViT: a size of the papers such as "S/16", or "96x8x4/4": width, blocks, heads, patch.

    Raises ConfigError for what is neither, and before it takes more memory than there is.
    """
    found = _SIZE.fullmatch(size)
    if found:
        width, depth, heads, patch = map(int, found.groups())
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
    a_block = cfg.embed_dim * (4 * cfg.embed_dim + 2 * cfg.mlp_dim)
    others = cfg.embed_dim * (cfg.num_positions + 3 * cfg.patch_size[0] ** 2 + classes)
    needed, free = 8 * (cfg.depth * a_block + others), available_memory(torch.device("cpu"))
    if cfg.depth > MOST_BLOCKS or (free is not None and needed > free):
        room = "" if free is None else f"; {free / 2**30:.1f} are free"
        raise ConfigError(
            f"a new ViT of {size!r} has {cfg.depth} blocks and takes {needed / 2**30:.1f} GiB with "
            f"its gradients{room}: expected at most {MOST_BLOCKS} blocks, and what fits in memory"
        )
    net = ViT(cfg)
    if init == "mimetic":
        _mimetic(net)
    return net


@torch.no_grad()
def _mimetic(net: ViT) -> None:
    """The fresh weights that small sets of photos want; the head's stay a normal of 0.02."""
    projection = net.patch_embed.proj.weight  # (D, C, p, q)
    nn.init.trunc_normal_(projection, std=projection[0].numel() ** -0.5)
    table = net.patch_embed.pos_embed
    if table is not None:
        patches = sines(net.config.grid_size, net.config.embed_dim)
        table.zero_()[0, len(table[0]) - len(patches) :] = patches
    for block in net.blocks:
        for linear in block.modules():
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
        assert isinstance(block, Block)
        _attend_like_trained(block.attn)


def _attend_like_trained(attn: Attention) -> None:
    """Tokens that are alike start with high scores, and what they gather with its sign turned."""
    width = attn.head_dim
    for first in range(0, attn.num_heads * width, width):
        head = slice(first, first + width)
        # The nearest product of this rank, or nearly: 97 % of its singular values' sum.
        u, s, v = torch.svd_lowrank(_near(attn.q.weight, *_LOOK), width, niter=4)
        attn.q.weight[head], attn.k.weight[head] = (u * s.sqrt()).T, (v * s.sqrt()).T
    u, s, vh = torch.linalg.svd(_near(attn.v.weight, *_MOVE))
    attn.v.weight.copy_(s.sqrt()[:, None] * vh)
    attn.proj.weight.copy_(u * s.sqrt())


def _near(like: Tensor, noise: float, identity: float) -> Tensor:
    """(D, D) -> noise * Z + identity * I, Z of variance 1 / D."""
    drawn: Tensor = torch.randn_like(like) / len(like) ** 0.5
    return noise * drawn + identity * torch.eye(len(like), dtype=like.dtype, device=like.device)


def sines(grid: tuple[int, int], width: int) -> Tensor:
    """(h, w) -> (h * w, width): sine and cosine of each patch's column, then of its row, float32.

    In a quarter of the width each, at wavelengths from 2 pi to 20,000 pi patches, as text has them
    (1706.03762, section 3.5). What a width that is no multiple of 4 has left over is 0.
    """
    quarter = width // 4
    turns = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float32) / max(quarter - 1, 1))
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = [place.flatten()[:, None] * turns for place in (x, y)]
    parts = [f(one) for one in angles for f in (torch.sin, torch.cos)]
    left_over = torch.zeros(grid[0] * grid[1], width - 4 * quarter, dtype=torch.float32)
    return torch.cat([*parts, left_over], dim=1)
