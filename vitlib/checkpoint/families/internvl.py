"""InternViT (2312.14238, 2504.10479): layer scale and no final norm; the 6B has RMSNorm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from vitlib.checkpoint.families.family import (
    CLS,
    LARGE,
    Config,
    Container,
    Family,
    HfType,
    Mismatch,
    Published,
    Shapes,
    State,
)
from vitlib.checkpoint.families.vit import BICUBIC_POSITIONS, EMBEDDING
from vitlib.checkpoint.families.vit import NUMBERS as VIT_SIZES
from vitlib.checkpoint.layouts.table import NameMatch, Table, fused_qkv
from vitlib.config import ViTConfig
from vitlib.config_parts import Norms
from vitlib.errors import CheckpointError
from vitlib.image.configs.transform import BICUBIC, IMAGENET_STATS, crop, squash

_NUMBERS: dict[str, tuple[str, Any]] = {
    **VIT_SIZES,
    "image_size": ("image_size", (448, 448)),
    "patch_size": ("patch_size", (14, 14)),
    "embed_dim": ("hidden_size", 1024),
    "depth": ("num_hidden_layers", 24),
    "num_heads": ("num_attention_heads", 16),
    "mlp_dim": ("intermediate_size", 4096),
    "norm_eps": ("layer_norm_eps", 1e-6),
    "qkv_bias": ("attention_bias", False),
    "dropout": ("hidden_dropout_prob", 0.0),
    "attention_dropout": ("attention_dropout", 0.0),
    "layer_scale": ("layer_scale_init_value", 0.1),
    "pos_embed": ("use_absolute_position_embeddings", True),
}
_NAMES: Table = {
    **EMBEDDING,
    "blocks.{}.norm1": "encoder.layer.{}.layernorm_before",
    "blocks.{}.norm2": "encoder.layer.{}.layernorm_after",
    "blocks.{}.attn.q": "encoder.layer.{}.attention.q_proj",
    "blocks.{}.attn.k": "encoder.layer.{}.attention.k_proj",
    "blocks.{}.attn.v": "encoder.layer.{}.attention.v_proj",
    "blocks.{}.attn.q_norm": "encoder.layer.{}.attention.q_norm",
    "blocks.{}.attn.k_norm": "encoder.layer.{}.attention.k_norm",
    "blocks.{}.attn.proj": "encoder.layer.{}.attention.projection_layer",
    "blocks.{}.ls1.gamma": "encoder.layer.{}.lambda_1",
    "blocks.{}.ls2.gamma": "encoder.layer.{}.lambda_2",
    "blocks.{}.mlp.fc1": "encoder.layer.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.fc2",
}
# InternVL's own code, whose names the files of Qianfan-OCR have.
_ORIGINAL: Table = {
    **fused_qkv("blocks.{}.attn", "encoder.layers.{}.attn.qkv", "."),
    "patch_embed.pos_embed": "embeddings.position_embedding",
    "blocks.{}.norm1": "encoder.layers.{}.norm1",
    "blocks.{}.norm2": "encoder.layers.{}.norm2",
    "blocks.{}.attn.q_norm": "encoder.layers.{}.attn.q_norm",
    "blocks.{}.attn.k_norm": "encoder.layers.{}.attn.k_norm",
    "blocks.{}.attn.proj": "encoder.layers.{}.attn.proj",
    "blocks.{}.ls1.gamma": "encoder.layers.{}.ls1",
    "blocks.{}.ls2.gamma": "encoder.layers.{}.ls2",
}
_KINDS: dict[str, Literal["layer", "rms"]] = {"layer_norm": "layer", "rms_norm": "rms"}
_QK_EPS = 1e-6  # of the norms of queries and keys, which are RMSNorms whatever the others are
_UNNORMED = {"pool": "mean", "final_norm": "none"}


def _has_final_norm(config: Config) -> bool:
    return not config.get("use_mean_pooling", True)


def _read_norms(config: Config, fields: Config) -> dict[str, Any]:
    """Return the norms; raise CheckpointError where one differs from the others of the model."""
    kind, normed = config.get("norm_type", "layer_norm"), bool(config.get("use_qk_norm", False))
    if kind not in _KINDS:
        raise CheckpointError(f"config.json has norm_type {kind!r}: expected {' or '.join(_KINDS)}")
    mixed = "" if kind == "rms_norm" or not normed else "use_qk_norm, which is of RMSNorms"
    if normed and fields["norm_eps"] != _QK_EPS:
        mixed = f"use_qk_norm, whose eps is {_QK_EPS}, and layer_norm_eps {fields['norm_eps']!r}"
    if kind == "rms_norm" and _has_final_norm(config):
        mixed = "use_mean_pooling false, whose final norm is a LayerNorm"
    if mixed:
        raise CheckpointError(
            f"config.json has norm_type {kind!r} with {mixed}: vitlib's model has norms of one kind"
        )
    return {"norms": Norms(kind=_KINDS[kind], qk="width" if normed else None)}


def _write_more(cfg: ViTConfig) -> dict[str, Any]:
    """Return the keys of config.json that are InternVL's own."""
    kinds = {kind: name for name, kind in _KINDS.items()}
    return {
        "norm_type": kinds[cfg.norms.kind],
        "use_qk_norm": cfg.norms.qk is not None,
        "use_mean_pooling": cfg.final_norm == "none",
        "use_mask_token": cfg.tokens.mask,
    }


def _allow(cfg: ViTConfig) -> dict[str, tuple[Any, ...]]:
    """Return the values that InternVL's class computes: RMSNorm only without a final norm."""
    more = (Norms(kind="rms"), Norms(kind="rms", qk="width")) if cfg.final_norm == "none" else ()
    return {
        "norms": (Norms(), *more),
        "norm_eps": (cfg.norm_eps if cfg.norms.qk is None else _QK_EPS,),
        "layer_scale": (cfg.layer_scale if cfg.layer_scale is not None else "a number",),
    }


def _list_mismatches(_: Config, tower: Config, shapes: Shapes, __: NameMatch) -> list[Mismatch]:
    """Return use_mean_pooling where it says another final norm than the tensors have."""
    has_norm = "norm.weight" in shapes
    if has_norm == _has_final_norm(tower):
        return []
    return [("use_mean_pooling", not has_norm, "a final norm" if has_norm else "no final norm")]


def _to_hf(cfg: ViTConfig, state: State) -> ViTConfig:
    """Return the config without the final norm that no forward reads; files do not have it."""
    if cfg.final_norm != "none":
        return cfg
    for name in [name for name in state if name.startswith("norm.")]:
        del state[name]
    # transformers returns the tokens: save logs another pool as lost.
    return cfg if cfg.num_classes else replace(cfg, pool="mean")


_TYPE = HfType(
    model_type="internvl_vision",
    class_name="InternVLVision",
    prefix="",
    trunk="",
    names=_NAMES,
    numbers=_NUMBERS,
    fixed=BICUBIC_POSITIONS,
    base=_UNNORMED,
    base_pools={"cls": "tokens"},
    head=None,
    read_more=_read_norms,
    write_more=_write_more,
    infer_pooling=lambda match, _: CLS if match and "norm.weight" in match.matches else {},
    list_mismatches=_list_mismatches,
    allowed=_allow,
)

FAMILY = Family(
    name="internvl",
    title="InternViT",
    hf=_TYPE,
    hf_variants=(
        _TYPE.variant(
            "qianfan_ocr_vision",
            defaults={"attention_bias": True},
            numbers={"drop_path": ("drop_path_rate", 0.1)},
        ),
    ),
    hf_containers={
        "internvl": Container(model_type="internvl_vision"),
        "qianfan_ocr": Container(model_type="qianfan_ocr_vision"),
    },
    hf_names=(_ORIGINAL,),
    hf_published=(
        Published("internvl_vision", *LARGE, (14,), "", "OpenGVLab/InternVL3-1B-hf"),
        Published("internvl_vision", 3200, 12800, 25, (14,), "", "OpenGVLab/InternVL3-38B-hf"),
    ),
    to_hf=_to_hf,
    num_heads={3200: 25},
    timm_architecture="vit_intern300m_patch14_448",
    timm_word="intern",
    libraries=("hf", "timm"),
    transforms={
        "hf": squash(BICUBIC, IMAGENET_STATS),
        "timm": crop(1.0, BICUBIC, IMAGENET_STATS),
    },
)
