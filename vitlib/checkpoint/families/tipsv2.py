"""TIPSv2 (2604.12012): DINOv2 with one register, its second class token, and a text tower."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vitlib.checkpoint.families.dinov2 import DINOV2, NUMBERS, find_mlp_ratio
from vitlib.checkpoint.families.family import BASE, LARGE, Container, Family, Published
from vitlib.checkpoint.layouts.table import ROWS, Slice, Table, fused_qkv
from vitlib.image.configs.transform import BICUBIC, BILINEAR, crop, squash

# Files have the names of DINOv2's own code, but for the MLP.
_NAMES: Table = {
    "patch_embed.cls_token": "cls_token",
    "patch_embed.reg_token": "register_tokens",
    "patch_embed.pos_embed": "pos_embed",
    "patch_embed.mask_token": Slice("mask_token", reshape=ROWS),
    "patch_embed.proj": "patch_embed.proj",
    **fused_qkv("blocks.{}.attn", "blocks.{}.attn.qkv", "."),
    "blocks.{}.attn.proj": "blocks.{}.attn.proj",
    "blocks.{}.norm1": "blocks.{}.norm1",
    "blocks.{}.norm2": "blocks.{}.norm2",
    "blocks.{}.ls1.gamma": "blocks.{}.ls1.gamma",
    "blocks.{}.ls2.gamma": "blocks.{}.ls2.gamma",
    "blocks.{}.mlp.fc1": "blocks.{}.mlp.c_fc",
    "blocks.{}.mlp.fc2": "blocks.{}.mlp.c_proj",
    "norm": "norm",
}
_GATED: Table = {"blocks.{}.mlp.fc1": "blocks.{}.mlp.w12", "blocks.{}.mlp.fc2": "blocks.{}.mlp.w3"}
_UNNORMED = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
_RESIZE = {"position_resize": "bilinear_antialias"}
_TYPE = "tipsv2_vision_model"
_NUMBERS: dict[str, tuple[str, Any]] = {
    **NUMBERS,
    "image_size": ("image_size", 448),
    "num_registers": ("num_register_tokens", 1),
}

FAMILY = Family(
    name="tipsv2",
    title="TIPSv2 vision tower",
    hf=replace(
        DINOV2,
        model_type=_TYPE,
        class_name="Tipsv2Vision",
        prefix="",
        names=_NAMES,
        more_names=lambda cfg: _GATED if cfg.activation == "swiglu" else {},
        numbers=_NUMBERS,
        fixed=_RESIZE,
        head=None,
        write_more=lambda cfg: {
            "mlp_ratio": find_mlp_ratio(cfg, whole=False),
            "use_swiglu_ffn": cfg.activation == "swiglu",
        },
    ),
    hf_containers={
        "tipsv2": Container(model_type=_TYPE),
        "tipsv2_dpt": Container(key="backbone_config", model_type=_TYPE),
    },
    hf_names=(_GATED,),
    hf_starts=("blocks.0.mlp.c_fc.", "blocks.0.mlp.w12."),
    hf_published=(
        Published(_TYPE, *BASE, (14,), "", "google/tipsv2-b14"),
        Published(_TYPE, *LARGE, (14,), "", "timm/vit_large_patch14_reg1_tipsv2.webli"),
        Published(_TYPE, 1152, 4304, 16, (14,), "", "timm/vit_so400m_patch14_reg1_tipsv2.webli"),
        Published(
            _TYPE, 1536, 4096, 24, (14,), "swiglu", "timm/vit_giant_patch14_reg1_tipsv2.webli"
        ),
    ),
    numerics={"hf": {"norm_eps": 1e-6, **_RESIZE}, "original": _RESIZE},
    timm_architecture="vit_base_patch14_reg1_tipsv2",
    timm_only=True,
    timm_word="tipsv2",
    libraries=("hf", "timm"),
    transforms={
        "hf": squash(BILINEAR, _UNNORMED),
        "timm": crop(1.0, BICUBIC, _UNNORMED),
        "original": squash(BILINEAR, _UNNORMED),
    },
)
