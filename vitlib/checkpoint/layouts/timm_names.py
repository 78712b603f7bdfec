"""Names of a ViT's tensors in timm, most of which the original code shares."""

from __future__ import annotations

from vitlib.checkpoint.layouts.table import FileName, Reshape, Slice, Table

# The tables without an underscore are also rows of the original code (meta.py).
QKV: Table = {
    f"blocks.{{}}.attn.{name}": Slice("blocks.{}.attn.qkv", part, 3)
    for part, name in enumerate("qkv")
}
TRUNK: Table = {
    "patch_embed.cls_token": "cls_token",
    "patch_embed.dist_token": "dist_token",
    "patch_embed.pos_embed": "pos_embed",
    "patch_embed.proj": "patch_embed.proj",
    "blocks.{}.norm1": "blocks.{}.norm1",
    **QKV,
    "blocks.{}.attn.proj": "blocks.{}.attn.proj",
    "blocks.{}.norm2": "blocks.{}.norm2",
    "blocks.{}.mlp.fc1": "blocks.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "blocks.{}.mlp.fc2",
    "norm": "norm",
    "head": "head",
    "head_dist": "head_dist",
}
LAYER_SCALE: Table = {
    "blocks.{}.ls1.gamma": "blocks.{}.ls1.gamma",
    "blocks.{}.ls2.gamma": "blocks.{}.ls2.gamma",
}
GAMMAS: Table = {
    "blocks.{}.ls1.gamma": "blocks.{}.gamma_1",
    "blocks.{}.ls2.gamma": "blocks.{}.gamma_2",
}
# Eva models without a key bias have one bias for queries and one for values.
Q_AND_V: Table = {
    "blocks.{}.attn.q.bias": "blocks.{}.attn.q_bias",
    "blocks.{}.attn.v.bias": "blocks.{}.attn.v_bias",
    **{
        f"{name}.weight": piece._replace(name=piece.name + ".weight")
        for name, piece in QKV.items()
        if isinstance(piece, Slice)
    },
}
SHARED: Table = {"attn_position.tables.0": "rel_pos_bias.relative_position_bias_table"}
POOLED_NORM: Table = {"norm": "fc_norm"}
GATE: Table = {"blocks.{}.mlp.fc1": ("blocks.{}.mlp.fc1_g", "blocks.{}.mlp.fc1_x")}
OWN: Table = {
    **TRUNK,
    **LAYER_SCALE,
    "patch_embed.reg_token": "reg_token",
    "norm_pre": "norm_pre",
    "patch_embed.norm": "patch_embed.norm",
    "blocks.{}.attn.q_norm": "blocks.{}.attn.q_norm",
    "blocks.{}.attn.k_norm": "blocks.{}.attn.k_norm",
    "blocks.{}.attn.sub_norm": "blocks.{}.attn.norm",
    "blocks.{}.mlp.sub_norm": "blocks.{}.mlp.norm",
    "attn_position.freqs": "rope.freqs",
    "attn_pool.probe": "attn_pool.latent",
    "attn_pool.q": "attn_pool.q",
    "attn_pool.k": Slice("attn_pool.kv", 0, 2),
    "attn_pool.v": Slice("attn_pool.kv", 1, 2),
    "attn_pool.proj": "attn_pool.proj",
    "attn_pool.norm": "attn_pool.norm",
    "attn_pool.mlp.fc1": "attn_pool.mlp.fc1",
    "attn_pool.mlp.fc2": "attn_pool.mlp.fc2",
    "attn_position.tables.{}": "blocks.{}.attn.relative_position_bias_table",
}
# NaFlexVit (1, h, w, D) <-> (1, N, D)
_GRID = Reshape(4, lambda t: t.flatten(1, 2), lambda t, cfg: t.reshape(1, *cfg.grid_size, -1))
_POSITIONS = "patch_embed.pos_embed"
NAFLEX: Table = {
    **{f"patch_embed.{name}": f"embeds.{name}" for name in ("cls_token", "reg_token")},
    **{f"patch_embed.{name}": f"embeds.{name}" for name in ("proj", "norm")},
    _POSITIONS: Slice("embeds.pos_embed", reshape=_GRID),
}
# Positions of rows and of columns, which are summed before the names are matched.
FACTORIZED: Table = {_POSITIONS: Slice("embeds.pos_embed_yx", reshape=_GRID)}
SPLIT: Table = {f"blocks.{{}}.attn.{name}": f"blocks.{{}}.attn.{name}_proj" for name in "qkv"}
PREFIXES = ("vit.", "model.", "net.", "encoder.")  # of modules that often hold the trunk
READ = (OWN, GAMMAS, Q_AND_V, GATE, POOLED_NORM, SHARED, SPLIT)


def replace_attention(table: Table, names: Table) -> dict[str, FileName]:
    """Replace the names of queries, keys and values.

    Args:
        table: vitlib's names -> timm's.
        names: Other rows for queries, keys and values.

    Returns:
        The changed table.
    """
    changed = {name: row for name, row in table.items() if name not in QKV} | {**names}
    if names is Q_AND_V:
        changed["blocks.{}.attn.k.weight"] = Slice("blocks.{}.attn.qkv.weight", 1, 3)
    return changed
