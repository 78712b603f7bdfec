"""Operations of a forward, counted from the config."""

from __future__ import annotations

from vitlib.config import ViTConfig


def flops(cfg: ViTConfig) -> int:
    """Count the multiplications and additions of one image, every token in every block.

    The count is nominal: linears, the patch projection and the two products of attention, even
    where an optimized form skips some. ViT-B/16 at 224 pixels has 35.13e9.

    Args:
        cfg: The model's config.

    Returns:
        Operations at cfg.image_size.
    """
    patches = cfg.grid_size[0] * cfg.grid_size[1]
    t, d = patches + cfg.num_prefix_tokens, cfg.embed_dim
    embed = patches * cfg.in_channels * cfg.patch_size[0] * cfg.patch_size[1] * d
    mlp = (3 if cfg.activation == "swiglu" else 2) * d * cfg.mlp_dim  # for one token
    block = t * (4 * d * d + mlp) + 2 * t * t * d
    pool = 0
    # One query; keys and values of all tokens.
    if cfg.pool == "map":
        pool = 2 * t * d * d + 2 * d * d + 2 * t * d + mlp
    elif cfg.pool == "pooler":
        pool = d * cfg.outputs.pooler_dim
    pooled = (
        2 * d if cfg.pool == "cls+mean" else cfg.outputs.pooler_dim if cfg.pool == "pooler" else d
    )
    head = cfg.num_features * cfg.num_classes * (2 if cfg.outputs.dist_head else 1)
    return 2 * (embed + cfg.depth * block + pool + pooled * cfg.outputs.projection_dim + head)
