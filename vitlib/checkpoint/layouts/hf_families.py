"""Hugging Face's families: one entry says what the files of a model_type hold and mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vitlib.checkpoint.layouts import hf_names as names
from vitlib.checkpoint.layouts.table import Table

# ours -> the key of config.json, and what transformers takes where the key is missing.
_NUMBERS: dict[str, tuple[str, Any]] = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "in_channels": ("num_channels", 3),
    "embed_dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
}
_VIT = {
    **_NUMBERS,
    "mlp_dim": ("intermediate_size", 3072),
    "norm_eps": ("layer_norm_eps", 1e-12),
    "qkv_bias": ("qkv_bias", True),
    "dropout": ("hidden_dropout_prob", 0.0),
    "attention_dropout": ("attention_probs_dropout_prob", 0.0),
}
_VIT_DROP = {**_VIT, "drop_path": ("drop_path_rate", 0.0)}
_DINOV2 = {
    **{ours: key for ours, key in _VIT_DROP.items() if ours != "mlp_dim"},
    "patch_size": ("patch_size", 14),
    "norm_eps": ("layer_norm_eps", 1e-6),
    "layer_scale": ("layerscale_value", 1.0),
}
_DINOV3 = {
    **_NUMBERS,
    "embed_dim": ("hidden_size", 384),
    "num_heads": ("num_attention_heads", 6),
    "mlp_dim": ("intermediate_size", 1536),
    "norm_eps": ("layer_norm_eps", 1e-5),
    "qkv_bias": ("query_bias", True),
    "key_bias": ("key_bias", False),
    "attention_dropout": ("attention_dropout", 0.0),
    "drop_path": ("drop_path_rate", 0.0),
    "layer_scale": ("layerscale_value", 1.0),
    "rope_theta": ("rope_theta", 100.0),
    "num_registers": ("num_register_tokens", 0),
}
_SIGLIP = {
    **_NUMBERS,
    "mlp_dim": ("intermediate_size", 3072),
    "norm_eps": ("layer_norm_eps", 1e-6),
    "attention_dropout": ("attention_dropout", 0.0),
}
_CLIP = {**_SIGLIP, "patch_size": ("patch_size", 32), "norm_eps": ("layer_norm_eps", 1e-5)}
_BEIT = {
    **{ours: key for ours, key in _VIT.items() if ours != "qkv_bias"},
    "drop_path": ("drop_path_rate", 0.1),
    "layer_scale": ("layer_scale_init_value", 0.1),
    "pos_embed": ("use_absolute_position_embeddings", False),
}
CLS = {"pool": "cls", "final_norm": "tokens"}
MEAN = {"pool": "mean", "final_norm": "tokens"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the files of one `model_type` hold and mean."""

    model_type: str
    prefix: str  # of every tensor but the heads', in files that hold a head
    class_name: str  # of the transformers classes: <class_name>Model and so on
    names: Table
    numbers: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any]  # fields of ViTConfig that the family itself decides
    base: Mapping[str, Any] = field(default_factory=lambda: CLS)  # what its base model pools
    head: Mapping[str, Any] | None = field(
        default_factory=lambda: CLS
    )  # its classifier; None: none
    activation: str = "gelu"  # hidden_act, where config.json has none
    dialect: str = ""  # whose keys of config.json it speaks where a family has some of its own
    nested: str | None = None  # model_type of files whose numbers are under vision_config


_RESIZE = {"position_resize": "bicubic"}
_PLAIN = {**_RESIZE, "class_token": True}
FAMILIES: dict[str, Family] = {
    "vit": Family(
        model_type="vit",
        prefix="vit.",
        class_name="ViT",
        names=names.VIT,
        numbers=_VIT_DROP,
        fixed=_PLAIN,
    ),
    "deit": Family(
        model_type="deit",
        prefix="deit.",
        class_name="DeiT",
        names=names.DEIT,
        numbers=_VIT_DROP,
        fixed={**_PLAIN, "dist_token": True},
    ),
    "vit_mae": Family(
        model_type="vit_mae",
        dialect="mae",
        prefix="vit.",
        class_name="ViTMAE",
        names=names.VIT,
        numbers=_VIT,
        fixed=_PLAIN,
        head=None,
    ),
    "vit_msn": Family(
        model_type="vit_msn",
        prefix="vit.",
        class_name="ViTMSN",
        names=names.VIT,
        numbers={**_VIT, "norm_eps": ("layer_norm_eps", 1e-6)},
        fixed=_PLAIN,
    ),
    "ijepa": Family(
        model_type="ijepa",
        prefix="ijepa.",
        class_name="IJepa",
        names=names.VIT,
        numbers=_VIT,
        fixed={**_RESIZE, "class_token": False},
        base=MEAN,
        head=MEAN,
    ),
    "dinov2": Family(
        model_type="dinov2",
        dialect="dinov2",
        prefix="dinov2.",
        class_name="Dinov2",
        names=names.DINOV2,
        numbers=_DINOV2,
        fixed={"position_resize": "bicubic_fp32"},
        head={"pool": "cls+mean", "final_norm": "tokens"},
    ),
    "dinov2_with_registers": Family(
        model_type="dinov2_with_registers",
        dialect="dinov2",
        prefix="dinov2_with_registers.",
        class_name="Dinov2WithRegisters",
        names=names.DINOV2,
        numbers={
            **_DINOV2,
            "patch_size": ("patch_size", 16),
            "num_registers": ("num_register_tokens", 4),
        },
        fixed={"position_resize": "bicubic_antialias"},
        head={"pool": "cls+mean", "final_norm": "tokens"},
    ),
    "dinov3_vit": Family(
        model_type="dinov3_vit",
        dialect="dinov3",
        prefix="",
        class_name="DINOv3ViT",
        names=names.DINOV3,
        numbers=_DINOV3,
        fixed={**_RESIZE, "pos_embed": False},
        head=None,
    ),
    "clip": Family(
        model_type="clip_vision_model",
        dialect="clip",
        prefix="vision_model.",
        class_name="CLIPVision",
        names=names.CLIP,
        numbers=_CLIP,
        fixed={**_RESIZE, "pre_norm": True, "patch_bias": False},
        base={"pool": "cls", "final_norm": "pooled"},
        head={"pool": "mean", "final_norm": "none", "projection_dim": 0},
        activation="quick_gelu",
        nested="clip",
    ),
    "siglip": Family(
        model_type="siglip_vision_model",
        dialect="siglip",
        prefix="vision_model.",
        class_name="SiglipVision",
        names=names.SIGLIP,
        numbers=_SIGLIP,
        fixed={**_RESIZE, "class_token": False},
        base={"pool": "map", "final_norm": "tokens"},
        head=MEAN,
        activation="gelu_pytorch_tanh",
        nested="siglip",
    ),
    "beit": Family(
        model_type="beit",
        dialect="beit",
        prefix="beit.",
        class_name="Beit",
        names=names.BEIT,
        numbers=_BEIT,
        fixed={**_RESIZE, "key_bias": False},
        base={"pool": "mean", "final_norm": "pooled"},
        head={"pool": "mean", "final_norm": "pooled"},
    ),
    "data2vec": Family(
        model_type="data2vec-vision",
        dialect="beit",
        prefix="data2vec_vision.",
        class_name="Data2VecVision",
        names=names.BEIT,
        numbers=_BEIT,
        fixed={**_RESIZE, "key_bias": False},
        base={"pool": "mean", "final_norm": "pooled"},
        head={"pool": "mean", "final_norm": "pooled"},
    ),
}
