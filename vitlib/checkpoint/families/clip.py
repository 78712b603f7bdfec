"""CLIP's vision tower (2103.00020), and towers of the same tensors: OWL, Kosmos-2, GIT, LLaVA."""

from __future__ import annotations

from dataclasses import replace

from vitlib.checkpoint.families.family import (
    BASE,
    CLS,
    GIANT,
    HUGE,
    LARGE,
    Container,
    Family,
    HfType,
    Published,
    State,
    two_towers,
)
from vitlib.checkpoint.families.vit import BICUBIC_POSITIONS, NUMBERS
from vitlib.checkpoint.layouts.equivalences import convert_head_to_projection
from vitlib.checkpoint.layouts.table import ROWS, VECTOR, Slice, Table
from vitlib.config import ViTConfig
from vitlib.image.configs.transform import BICUBIC, CLIP_STATS, crop

TOWER_NUMBERS = {
    **NUMBERS,
    "mlp_dim": ("intermediate_size", 3072),
    "norm_eps": ("layer_norm_eps", 1e-6),
    "attention_dropout": ("attention_dropout", 0.0),
}
NAMES: Table = {
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
_OWL_NAMES: Table = {"norm_pre": "pre_layernorm"}
_ALTCLIP_NAMES: Table = {  # as transformers 5.23 saves it; published files have CLIP's names
    name: file_name.replace("encoder.layers.", "encoder.layer.")
    for name, file_name in NAMES.items()
    if isinstance(file_name, str) and "encoder.layers." in file_name
}

_TYPE = "clip_vision_model"
CLIP = HfType(
    model_type=_TYPE,
    class_name="CLIPVision",
    prefix="vision_model.",
    trunk="vision_model",
    names=NAMES,
    numbers={
        **TOWER_NUMBERS,
        "patch_size": ("patch_size", 32),
        "norm_eps": ("layer_norm_eps", 1e-5),
    },
    fixed={**BICUBIC_POSITIONS, "pre_norm": True, "patch_bias": False},
    base={"pool": "cls", "final_norm": "pooled"},
    head={"pool": "mean", "final_norm": "none", "projection_dim": 0},
    activation="quick_gelu",
    nested="clip",
    projects=True,
    write_more=lambda cfg: {"projection_dim": cfg.outputs.projection_dim or 512},
)
# Sizes of ViT-L, which several models have as defaults.
LARGE_TOWER = {"hidden_size": 1024, "num_hidden_layers": 24}
LARGE_TOWER |= {"num_attention_heads": 16, "intermediate_size": 4096}
_LLAVA = Container(model_type=_TYPE, absent={**LARGE_TOWER, "patch_size": 14, "image_size": 336})
_OWLV2 = {"image_size": 768, "patch_size": 16}
_BIG_GIANT = (1664, 8192, 16)


def _to_hf(cfg: ViTConfig, state: State) -> ViTConfig:
    """Return the config with a head as a projection, and with the norm where CLIP has it."""
    if cfg.pool != "cls":
        return cfg
    if cfg.num_classes:
        cfg = convert_head_to_projection(cfg, state)
    # The class token of normed tokens is the normed class token.
    return replace(cfg, final_norm="pooled") if cfg.final_norm == "tokens" else cfg


FAMILY = Family(
    name="clip",
    title="CLIP vision tower",
    hf=CLIP,
    hf_variants=(
        CLIP.variant("metaclip_2_vision_model"),
        CLIP.variant("chinese_clip_vision_model"),
        CLIP.variant("altclip_vision_model"),
        CLIP.variant("clipseg_vision_model"),
        CLIP.variant("owlvit_vision_model", defaults={"image_size": 768}),
        CLIP.variant("owlv2_vision_model", defaults=_OWLV2),
        CLIP.variant("kosmos_2_vision_model", defaults={**LARGE_TOWER, "patch_size": 14}),
        CLIP.variant(
            "idefics_vision",
            defaults={"num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14}
            | {"intermediate_size": 5120},
            numbers={"embed_dim": ("embed_dim", 768)},
            fixed={"position_resize": "bicubic_offset"},
            activation="gelu",
        ),
        CLIP.variant("git_vision_model", defaults={"patch_size": 16}, base=CLS),
    ),
    hf_containers={
        "clip": two_towers(_TYPE, overriding="vision_config_dict"),
        "metaclip_2": two_towers("metaclip_2_vision_model", overriding="vision_config_dict"),
        "chinese_clip": two_towers("chinese_clip_vision_model", overriding="vision_config_dict"),
        "altclip": two_towers("altclip_vision_model", overriding="vision_config_dict"),
        "clipseg": two_towers("clipseg_vision_model", overriding="vision_config_dict"),
        "owlvit": two_towers("owlvit_vision_model"),
        "owlv2": two_towers("owlv2_vision_model"),
        "kosmos-2": two_towers("kosmos_2_vision_model"),
        "git": two_towers("git_vision_model"),
        "idefics": two_towers("idefics_vision"),
        "granite4_vision": Container(model_type=_TYPE),
        "llava": _LLAVA,
        "llava_next": _LLAVA,
        "llava_next_video": _LLAVA,
        "vipllava": _LLAVA,
    },
    hf_names=(_OWL_NAMES, _ALTCLIP_NAMES),
    hf_published=(
        Published(_TYPE, *BASE, (16, 32), "quick_gelu", "openai/clip-vit-base-patch32"),
        Published(
            CLIP.model_type, *BASE, (16, 32), "gelu", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
        ),
        Published(_TYPE, *LARGE, (14,), "quick_gelu", "openai/clip-vit-large-patch14"),
        Published(_TYPE, *LARGE, (14,), "gelu", "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"),
        Published(_TYPE, *HUGE, (14,), "quick_gelu", "facebook/metaclip-h14-fullcc2.5b"),
        Published(_TYPE, *HUGE, (14,), "gelu", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        Published(_TYPE, *GIANT, (14,), "gelu", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"),
        Published(_TYPE, *_BIG_GIANT, (14,), "gelu", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"),
        Published("owlvit_vision_model", *BASE, (16, 32), "", "google/owlvit-base-patch32"),
        Published("owlvit_vision_model", *LARGE, (14,), "", "google/owlvit-large-patch14"),
        Published("git_vision_model", *BASE, (16,), "", "microsoft/git-base"),
        Published("git_vision_model", *LARGE, (14,), "", "microsoft/git-large"),
        Published("kosmos_2_vision_model", *LARGE, (14,), "", "microsoft/kosmos-2-patch14-224"),
        Published("clipseg_vision_model", *BASE, (16,), "", "CIDAS/clipseg-rd64-refined"),
    ),
    to_hf=_to_hf,
    numerics={
        "hf": {"norm_eps": 1e-5, "activation": "quick_gelu"},
        "timm": {"norm_eps": 1e-5, "activation": "quick_gelu"},
        # open_clip's code resizes so.
        "original": {
            "norm_eps": 1e-5,
            "activation": "quick_gelu",
            "position_resize": "bicubic_antialias",
        },
    },
    timm_architecture="vit_base_patch16_clip_224",
    transforms={
        "hf": crop(1.0, BICUBIC, CLIP_STATS, "floor"),
        "timm": crop(1.0, BICUBIC, CLIP_STATS),  # OpenAI's base at 224 has 0.9
        "original": crop(1.0, BICUBIC, CLIP_STATS),
    },
    timm_word="clip",
)
