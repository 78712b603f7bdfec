"""SigLIP (2303.15343) and SigLIP 2 vision towers; Idefics, SmolVLM, Janus, PaliGemma, Molmo2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vitlib.checkpoint.families.clip import LARGE_TOWER, TOWER_NUMBERS
from vitlib.checkpoint.families.clip import NAMES as CLIP_NAMES
from vitlib.checkpoint.families.family import (
    BASE,
    LARGE,
    MEAN,
    Config,
    Container,
    Family,
    HfType,
    Mismatch,
    Published,
    Shapes,
    State,
    two_towers,
)
from vitlib.checkpoint.families.vit import BICUBIC_POSITIONS
from vitlib.checkpoint.layouts.infer import square_side
from vitlib.checkpoint.layouts.table import (
    LINEAR_PATCHES,
    ROWS,
    NameMatch,
    Slice,
    Table,
    fused_qkv,
)
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError, is_number, to_pair
from vitlib.image.configs.transform import BICUBIC, BILINEAR, HALF_STATS, crop, squash

_NAMES: Table = {
    **CLIP_NAMES,
    "attn_pool.probe": "head.probe",
    **fused_qkv("attn_pool", "head.attention.in_proj"),
    "attn_pool.proj": "head.attention.out_proj",
    "attn_pool.norm": "head.layernorm",
    "attn_pool.mlp.fc1": "head.mlp.fc1",
    "attn_pool.mlp.fc2": "head.mlp.fc2",
}
_NAFLEX_NAMES: Table = {
    "patch_embed.proj.weight": Slice("embeddings.patch_embedding.weight", reshape=LINEAR_PATCHES)
}
_JANUS_NAMES: Table = {"blocks.{}.attn.proj": "encoder.layers.{}.self_attn.projection_layer"}
# Molmo2's ViT alone, then its published files, in which it is a part.
_MOLMO2_NAMES: Table = {
    "patch_embed.pos_embed": Slice("positional_embedding", reshape=ROWS),
    "patch_embed.proj.weight": Slice("patch_embedding.weight", reshape=LINEAR_PATCHES),
    "patch_embed.proj.bias": "patch_embedding.bias",
    **{f"blocks.{{}}.norm{n}": f"layers.{{}}.layer_norm{n}" for n in (1, 2)},
    **{f"blocks.{{}}.attn.{n}": f"layers.{{}}.self_attn.{n}_proj" for n in "qkv"},
    "blocks.{}.attn.proj": "layers.{}.self_attn.o_proj",
    **{f"blocks.{{}}.mlp.fc{n}": f"layers.{{}}.mlp.fc{n}" for n in (1, 2)},
}
_MOLMO2_PUBLISHED: Table = {
    "blocks.{}.norm1": "transformer.resblocks.{}.attention_norm",
    "blocks.{}.norm2": "transformer.resblocks.{}.ffn_norm",
    **{f"blocks.{{}}.attn.{n}": f"transformer.resblocks.{{}}.attention.w{n}" for n in "qkv"},
    "blocks.{}.attn.proj": "transformer.resblocks.{}.attention.wo",
    "blocks.{}.mlp.fc1": "transformer.resblocks.{}.feed_forward.w1",
    "blocks.{}.mlp.fc2": "transformer.resblocks.{}.feed_forward.w2",
}


def _list_mismatches(config: Config, tower: Config, shapes: Shapes, _: NameMatch) -> list[Mismatch]:
    """Return vision_use_head where it says another pooling head than the tensors have."""
    if "head.weight" in shapes:
        return []
    has_head = any(name.startswith("attn_pool.") for name in shapes)
    # A tower inside another model (LLaVA) gives its tokens and may have no pooling head.
    # SigLIP itself would draw a pooling head at random.
    is_siglip = str(config.get("model_type")).startswith("siglip")
    pools = bool(tower.get("vision_use_head", is_siglip or has_head))
    if pools == has_head:
        return []
    return [("vision_use_head", pools, "no pooling head" if pools else "a pooling head")]


def _read_naflex_size(config: Config) -> tuple[int, int]:
    """Return the pixels of the square grid that SigLIP 2 NaFlex learned."""
    count = config.get("num_patches", 256)
    p, q = to_pair("patch_size", config.get("patch_size", TOWER_NUMBERS["patch_size"][1]))
    side = square_side(count) if isinstance(count, int) else 0
    if not side:
        raise CheckpointError(f"config.json has num_patches {count!r}: expected a square number")
    return side * p, side * q


def _read_janus(config: Config, fields: Config) -> dict[str, Any]:
    """Return Janus's width of the MLP, a ratio; refuse norms of queries and keys."""
    ratio = config.get("mlp_ratio", 4.0)
    if config.get("use_qk_norm", False) or not is_number(ratio) or not 0 < ratio < 10_000:
        raise CheckpointError(
            f"config.json has use_qk_norm {config.get('use_qk_norm')!r}, mlp_ratio {ratio!r}: "
            "expected false and a number"
        )
    return {
        "mlp_dim": int(fields["embed_dim"] * ratio),
        "qkv_bias": bool(config.get("attention_bias", True)),
    }


def _read_molmo2(config: Config, fields: Config) -> dict[str, Any]:
    """Raise CheckpointError for attention of Molmo2's class that vitlib does not compute."""
    heads = config.get("num_key_value_heads", 16), config.get("head_dim", 72)
    expected = fields["num_heads"], fields["embed_dim"] // max(fields["num_heads"], 1)
    if heads != expected or not config.get("attention_bias", True):
        raise CheckpointError(
            f"config.json has num_key_value_heads {heads[0]!r}, head_dim {heads[1]!r}, "
            f"attention_bias {config.get('attention_bias')!r}: expected {expected[0]}, "
            f"{expected[1]} and true"
        )
    return {}


def _convert_molmo2(config: Config) -> Config | None:
    """Return the vision_config of Molmo2's published files, as transformers converts it.

    They state more blocks than they hold: the last block is the last that the adapter reads.
    """
    older, adapter = config.get("vit_config"), config.get("adapter_config")
    if not isinstance(older, dict):
        return None
    adapter = adapter if isinstance(adapter, dict) else {}
    keys = {"image_default_input_size": "image_size", "image_patch_size": "patch_size"}
    nested = {keys.get(str(key), str(key)): value for key, value in older.items()}
    layers = adapter.get("vit_layers", adapter.get("vision_feature_layer")) or [24, 18]
    depth = nested.get("num_hidden_layers", 25)
    if not all(isinstance(n, int) for n in (depth, *layers)) or depth < 1:
        raise CheckpointError(
            f"config.json has num_hidden_layers {depth!r} and vit_layers {layers!r}: expected "
            "whole numbers"
        )
    return {**nested, "num_hidden_layers": max(layer % depth for layer in layers) + 1}


def _check_idefics_positions(_: Config, fields: Config) -> dict[str, Any]:
    """Raise CheckpointError for grids on which Idefics gives patches a neighbour's position.

    Idefics looks positions up by fractions in float32, whose rounding moves some patches.
    """
    side = to_pair("image_size", fields["image_size"])[0] // max(
        to_pair("patch_size", fields["patch_size"])[0], 1
    )
    numbers = torch.arange(side, dtype=torch.float32)
    fractions = numbers * (1.0 / torch.tensor([side], dtype=torch.float32))
    edges = torch.arange(1 / max(side, 1), 1.0, 1 / max(side, 1), dtype=torch.float32)
    buckets = torch.bucketize(fractions.clamp(max=1 - 1e-6), edges, right=True)
    if not torch.equal(buckets, torch.arange(side, dtype=torch.int64)):
        raise CheckpointError(
            f"config.json has {side}x{side} patches, of which transformers' rounding gives some "
            "the position of their neighbour: vitlib does not"
        )
    return {}


def _to_hf(cfg: ViTConfig, state: State) -> ViTConfig:
    """Return the config without a pooling head that is not used; transformers would pool by it."""
    if cfg.num_classes or cfg.pool != "mean":
        return cfg
    for name in [name for name in state if name.startswith("attn_pool.")]:
        del state[name]
    return replace(cfg, attention_pool=None)


SIGLIP = HfType(
    model_type="siglip_vision_model",
    class_name="SiglipVision",
    prefix="vision_model.",
    trunk="vision_model",
    names=_NAMES,
    numbers=TOWER_NUMBERS,
    fixed={**BICUBIC_POSITIONS, "class_token": False},
    base={"pool": "map", "final_norm": "tokens"},
    base_pools={"mean": "tokens"},
    head=MEAN,
    activation="gelu_pytorch_tanh",
    nested="siglip",
    write_more=lambda cfg: {"vision_use_head": cfg.attention_pool is not None},
    list_mismatches=_list_mismatches,
)
_IDEFICS: dict[str, Any] = {
    "fixed": {"position_resize": "nearest"},
    "base": MEAN,
    "head": None,
    "read_more": _check_idefics_positions,
    "list_mismatches": lambda *_: [],
}
_SO400M: dict[str, Any] = {"hidden_size": 1152, "intermediate_size": 4304}
_SO400M |= {"num_attention_heads": 16, "patch_size": 14, "image_size": 384}
_SO400M |= {"num_hidden_layers": 26, "vision_use_head": False}
_COHERE = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 12}
_COHERE |= {"image_size": 512}
_PALIGEMMA = {**_SO400M, "intermediate_size": 4096, "image_size": 224, "num_hidden_layers": 27}
_PI0 = {"vision_config": {**_PALIGEMMA, "intermediate_size": 4304}}
_WIDE = {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}
_MOLMO2: dict[str, Any] = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 25}
_MOLMO2 |= {"num_attention_heads": 16, "patch_size": 14, "image_size": [378, 378]}
_SO, _GIANT_OPT = (1152, 4304, 16), (1536, 6144, 16)
_NAFLEX = SIGLIP.variant(
    "siglip2_vision_model",
    class_name="Siglip2Vision",
    nested="siglip2",
    names={**_NAMES, **_NAFLEX_NAMES},
    fixed={"position_resize": "bilinear_antialias"},
    read_size=_read_naflex_size,
    read_more=lambda config, _: {"image_size": _read_naflex_size(config)},
    write_more=lambda cfg: {
        "num_patches": cfg.grid_size[0] * cfg.grid_size[1],
        "vision_use_head": cfg.attention_pool is not None,
    },
)


def _tower(model_type: str, absent: Config | None = None, *, any_type: bool = True) -> Container:
    return Container(model_type=model_type, any_type=any_type, absent=absent or {})


def _choose_variant(cfg: ViTConfig) -> HfType | None:
    """Return NaFlex for its rule of positions: its class knows square grids and patches alone."""
    is_square = len({*cfg.grid_size}) == len({*cfg.patch_size}) == 1
    has_rule = cfg.positions.embed and cfg.positions.resize == "bilinear_antialias"
    return _NAFLEX if has_rule and is_square else None


_TRANSFORMS = {
    "timm": crop(0.9, BICUBIC, HALF_STATS),  # so400m's gap_378 and larger have 1.0
    "original": squash(BILINEAR, HALF_STATS),
}

FAMILY = Family(
    name="siglip",
    title="SigLIP and SigLIP 2 vision tower",
    hf=SIGLIP,
    hf_variants=(
        _NAFLEX,
        SIGLIP.variant("idefics2_vision", defaults={"patch_size": 32}, **_IDEFICS),
        SIGLIP.variant("idefics3_vision", defaults=_WIDE, **_IDEFICS),
        SIGLIP.variant("smolvlm_vision", defaults=_WIDE, **_IDEFICS),
        SIGLIP.variant(
            "granite_docling_vision",
            defaults={"image_size": 512},
            base=MEAN,
            head=None,
            list_mismatches=lambda *_: [],
        ),
        SIGLIP.variant(
            "molmo2_vision",
            class_name="Molmo2Vision",
            prefix="",
            trunk="",
            defaults=_MOLMO2,
            base={"pool": "mean", "final_norm": "none"},
            base_pools={},
            head=None,
            read_more=_read_molmo2,
            list_mismatches=lambda *_: [],
        ),
        SIGLIP.variant(
            "janus_vision_model",
            defaults={**LARGE_TOWER, "image_size": 384},
            without=("intermediate_size",),
            activation="gelu",
            base=MEAN,
            head=None,
            read_more=_read_janus,
            list_mismatches=lambda *_: [],
        ),
    ),
    hf_containers={
        "molmo2": Container(
            model_type="molmo2_vision", any_type=False, convert_older=_convert_molmo2
        ),
        "siglip": two_towers("siglip_vision_model"),
        "siglip2": two_towers(_NAFLEX.model_type),
        "janus": two_towers("janus_vision_model"),
        "idefics2": _tower("idefics2_vision", any_type=False),
        "idefics3": _tower("idefics3_vision", any_type=False),
        "smolvlm": _tower("smolvlm_vision", any_type=False),
        "llava_onevision": _tower("siglip_vision_model", _SO400M),
        "aya_vision": _tower("siglip_vision_model", {**_SO400M, "num_attention_heads": 14}),
        "paligemma": _tower("siglip_vision_model", _PALIGEMMA),
        "gemma3": _tower("siglip_vision_model"),
        "shieldgemma2": _tower("siglip_vision_model"),
        "cohere2_vision": _tower("siglip_vision_model", _COHERE),
        "deepseek_vl": _tower("siglip_vision_model"),
        "deepseek_vl_hybrid": _tower("siglip_vision_model"),
        "modernvbert": _tower("siglip_vision_model"),
        "ultravbert": _tower("siglip_vision_model", {"vision_use_head": False}),
        "lfm2_vl": _tower(_NAFLEX.model_type),
        "aria": _tower("idefics3_vision"),
        "granite_docling": _tower("granite_docling_vision", any_type=False),
        "t5gemma2_encoder": _tower("siglip_vision_model"),
        "t5gemma2": Container(key="encoder", model_type="t5gemma2_encoder"),
        "colpali": Container(key="vlm_config", model_type="paligemma"),
        "pi0": Container(key="vlm_config", model_type="paligemma", absent=_PI0),
        "colmodernvbert": Container(key="vlm_config", model_type="modernvbert"),
    },
    hf_names=(_NAFLEX_NAMES, _JANUS_NAMES, _MOLMO2_NAMES, _MOLMO2_PUBLISHED),
    hf_published=(
        Published(SIGLIP.model_type, *BASE, (16, 32), "", "google/siglip-base-patch16-224"),
        Published(SIGLIP.model_type, *LARGE, (16,), "", "google/siglip-large-patch16-256"),
        Published(SIGLIP.model_type, *_SO, (14, 16), "", "google/siglip-so400m-patch14-384"),
        Published(
            SIGLIP.model_type, *_GIANT_OPT, (16,), "", "google/siglip2-giant-opt-patch16-384"
        ),
        Published(_NAFLEX.model_type, *BASE, (16,), "", "google/siglip2-base-patch16-naflex"),
        Published(_NAFLEX.model_type, *_SO, (16,), "", "google/siglip2-so400m-patch16-naflex"),
        Published("idefics3_vision", *_SO, (14,), "", "HuggingFaceM4/Idefics3-8B-Llama3"),
        Published("idefics3_vision", *BASE, (16,), "", "HuggingFaceTB/SmolVLM-256M-Instruct"),
        Published("janus_vision_model", *LARGE, (16,), "", "deepseek-community/Janus-Pro-1B"),
    ),
    choose_variant=_choose_variant,
    to_hf=_to_hf,
    numerics={
        "hf": {"norm_eps": 1e-6, "activation": "gelu_tanh"},
        # open_clip runs timm's tower.
        "original": {"position_resize": "bicubic_antialias"},
    },
    timm_architecture="vit_base_patch16_siglip_224",
    transforms={"hf": squash(BICUBIC, HALF_STATS), **_TRANSFORMS},
    transform_variants={"siglip2": {"hf": squash(BILINEAR, HALF_STATS), **_TRANSFORMS}},
    libraries=("hf", "timm", "original", "jax"),
    timm_word="siglip",
)
