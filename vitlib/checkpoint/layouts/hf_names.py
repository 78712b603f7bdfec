"""Hugging Face's names of tensors, for every family: what files hold, and memory.

Files hold `encoder.layer.0.attention.attention.query`; transformers 5 holds the same tensor in
memory as `layers.0.attention.q_proj`, and some tools save that: both are read, files get the first.
"""

from __future__ import annotations

from vitlib.checkpoint.layouts.table import LINEAR_PATCHES, ROWS, VECTOR, Slice, Table, fused_qkv

_EMBED: Table = {
    "patch_embed.cls_token": "embeddings.cls_token",
    "patch_embed.pos_embed": "embeddings.position_embeddings",
    "patch_embed.mask_token": "embeddings.mask_token",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_ATTENTION: Table = {
    "blocks.{}.attn.q": "encoder.layer.{}.attention.attention.query",
    "blocks.{}.attn.k": "encoder.layer.{}.attention.attention.key",
    "blocks.{}.attn.v": "encoder.layer.{}.attention.attention.value",
    "blocks.{}.attn.proj": "encoder.layer.{}.attention.output.dense",
}
VIT: Table = {
    **_EMBED,
    **_ATTENTION,
    "blocks.{}.norm1": "encoder.layer.{}.layernorm_before",
    "blocks.{}.norm2": "encoder.layer.{}.layernorm_after",
    "blocks.{}.mlp.fc1": "encoder.layer.{}.intermediate.dense",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.output.dense",
    "pooler": "pooler.dense",
}
DEIT: Table = {**VIT, "patch_embed.dist_token": "embeddings.distillation_token"}
_BEIT_TABLE = "relative_position_bias.relative_position_bias_table"
BEIT: Table = {
    **VIT,
    "blocks.{}.ls1.gamma": "encoder.layer.{}.lambda_1",
    "blocks.{}.ls2.gamma": "encoder.layer.{}.lambda_2",
    "attn_position.tables.{}": f"encoder.layer.{{}}.attention.attention.{_BEIT_TABLE}",
}
BEIT_SHARED: Table = {**BEIT, "attn_position.tables.{}": f"encoder.{_BEIT_TABLE}"}
BEIT_POOLED: Table = {"norm": "pooler.layernorm"}
DINOV2: Table = {
    **_EMBED,
    **_ATTENTION,
    "patch_embed.mask_token": Slice("embeddings.mask_token", reshape=ROWS),
    "patch_embed.reg_token": "embeddings.register_tokens",
    "blocks.{}.norm1": "encoder.layer.{}.norm1",
    "blocks.{}.norm2": "encoder.layer.{}.norm2",
    "blocks.{}.ls1.gamma": "encoder.layer.{}.layer_scale1.lambda1",
    "blocks.{}.ls2.gamma": "encoder.layer.{}.layer_scale2.lambda1",
    "blocks.{}.mlp.fc1": "encoder.layer.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.fc2",
}
# What a SwiGLU has instead: one tensor in files, gate and up in memory.
DINOV2_SWIGLU: Table = {
    **DINOV2,
    "blocks.{}.mlp.fc1": "encoder.layer.{}.mlp.weights_in",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.weights_out",
}
DINOV3: Table = {
    "patch_embed.cls_token": "embeddings.cls_token",
    "patch_embed.mask_token": "embeddings.mask_token",
    "patch_embed.reg_token": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings",
    "blocks.{}.norm1": "layer.{}.norm1",
    "blocks.{}.norm2": "layer.{}.norm2",
    "blocks.{}.attn.q": "layer.{}.attention.q_proj",
    "blocks.{}.attn.k": "layer.{}.attention.k_proj",
    "blocks.{}.attn.v": "layer.{}.attention.v_proj",
    "blocks.{}.attn.proj": "layer.{}.attention.o_proj",
    "blocks.{}.ls1.gamma": "layer.{}.layer_scale1.lambda1",
    "blocks.{}.ls2.gamma": "layer.{}.layer_scale2.lambda1",
    "blocks.{}.mlp.fc1": "layer.{}.mlp.up_proj",
    "blocks.{}.mlp.fc2": "layer.{}.mlp.down_proj",
    "norm": "norm",
}
DINOV3_GATED: Table = {
    **DINOV3,
    "blocks.{}.mlp.fc1": ("layer.{}.mlp.gate_proj", "layer.{}.mlp.up_proj"),
}
CLIP: Table = {
    "patch_embed.cls_token": Slice("embeddings.class_embedding", reshape=VECTOR),
    "patch_embed.pos_embed": Slice("embeddings.position_embedding.weight", reshape=ROWS),
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm_pre": "pre_layrnorm",
    "blocks.{}.norm1": "encoder.layers.{}.layer_norm1",
    "blocks.{}.norm2": "encoder.layers.{}.layer_norm2",
    "blocks.{}.attn.q": "encoder.layers.{}.self_attn.q_proj",
    "blocks.{}.attn.k": "encoder.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.v": "encoder.layers.{}.self_attn.v_proj",
    "blocks.{}.attn.proj": "encoder.layers.{}.self_attn.out_proj",
    "blocks.{}.mlp.fc1": "encoder.layers.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "encoder.layers.{}.mlp.fc2",
    "norm": "post_layernorm",
}
SIGLIP: Table = {
    **CLIP,
    "attn_pool.probe": "head.probe",
    **fused_qkv("attn_pool", "head.attention.in_proj"),
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp.fc1": "head.mlp.fc1",
    "attn_pool.mlp.fc2": "head.mlp.fc2",
}
# BLIP: queries, keys and values in one tensor; Janus and BLIP call the output otherwise.
BLIP: Table = {
    "patch_embed.pos_embed": "embeddings.position_embedding",
    **{
        f"blocks.{{}}.attn.{name}.{leaf}": Slice(
            f"encoder.layers.{{}}.self_attn.qkv.{leaf}", part, 3
        )
        for part, name in enumerate("qkv")
        for leaf in ("weight", "bias")
    },
    "blocks.{}.attn.proj": "encoder.layers.{}.self_attn.projection",
}
JANUS: Table = {"blocks.{}.attn.proj": "encoder.layers.{}.self_attn.projection_layer"}
OWL: Table = {"norm_pre": "pre_layernorm"}
ALTCLIP: Table = {  # as transformers 5.23 saves it; published files are CLIP's
    ours: theirs.replace("encoder.layers.", "encoder.layer.")
    for ours, theirs in CLIP.items()
    if isinstance(theirs, str) and "encoder.layers." in theirs
}
SIGLIP2: Table = {
    "patch_embed.proj.weight": Slice("embeddings.patch_embedding.weight", reshape=LINEAR_PATCHES)
}
HEAD: Table = {"head": "classifier"}
TWO_HEADS: Table = {"head": "cls_classifier", "head_dist": "distillation_classifier"}
PROJECTION: Table = {"projection": "visual_projection"}

_VIT_IN_MEMORY: Table = {
    "blocks.{}.attn.q": "layers.{}.attention.q_proj",
    "blocks.{}.attn.k": "layers.{}.attention.k_proj",
    "blocks.{}.attn.v": "layers.{}.attention.v_proj",
    "blocks.{}.attn.proj": "layers.{}.attention.o_proj",
    "blocks.{}.norm1": "layers.{}.layernorm_before",
    "blocks.{}.norm2": "layers.{}.layernorm_after",
    "blocks.{}.mlp.fc1": "layers.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "layers.{}.mlp.fc2",
    "blocks.{}.ls1.gamma": "layers.{}.lambda_1",
    "blocks.{}.ls2.gamma": "layers.{}.lambda_2",
    "attn_position.tables.{}": f"layers.{{}}.{_BEIT_TABLE}",
}
_SHARED_IN_FILES: Table = {"attn_position.tables.0": f"encoder.{_BEIT_TABLE}"}
_SHARED_IN_MEMORY: Table = {
    "attn_position.tables.0": "shared_position_bias.relative_position_bias_table"
}
_DINOV2_IN_MEMORY: Table = {
    "blocks.{}.attn.q": "encoder.layer.{}.attention.q_proj",
    "blocks.{}.attn.k": "encoder.layer.{}.attention.k_proj",
    "blocks.{}.attn.v": "encoder.layer.{}.attention.v_proj",
    "blocks.{}.attn.proj": "encoder.layer.{}.attention.o_proj",
    "blocks.{}.mlp.fc1": ("encoder.layer.{}.mlp.gate_proj", "encoder.layer.{}.mlp.up_proj"),
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.down_proj",
}
# A name means the same in whichever family's file it stands: one reading serves all.
READ = (
    DINOV2,
    BEIT,
    DEIT,
    SIGLIP,
    SIGLIP2,
    BLIP,
    JANUS,
    OWL,
    ALTCLIP,
    DINOV2_SWIGLU,
    BEIT_POOLED,
    HEAD,
    TWO_HEADS,
    PROJECTION,
    _VIT_IN_MEMORY,
    _SHARED_IN_FILES,
    _SHARED_IN_MEMORY,
    _DINOV2_IN_MEMORY,
)
