"""A file of Hugging Face's without its config.json: what its tensors and the published models say.

The tensors do not say the number of heads, the norms' eps or the form of GELU. Where all published
models of a shape agree, their value is right; where they differ, and where no published model has
the shape, the caller is asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from vitlib.checkpoint.layouts.facts import Facts, resolve_facts
from vitlib.checkpoint.layouts.hf_config import ACTIVATIONS, beit_norm, refuse_turned_table
from vitlib.checkpoint.layouts.hf_families import Family
from vitlib.checkpoint.layouts.hf_types import TYPES
from vitlib.checkpoint.layouts.infer import Shape, infer_config
from vitlib.checkpoint.layouts.layout import Json, ParsedConfig, sidecar_size
from vitlib.checkpoint.layouts.table import NameMatch
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError


class Published(NamedTuple):
    """The published models of one type and shape; depth and image size say nothing open."""

    model_type: str
    embed_dim: int
    mlp_dim: int
    num_heads: int
    patches: tuple[int, ...]  # pixels
    activation: str = ""  # "": as the type's default
    repository: str = ""  # one of them, in messages


_T, _S, _B = (192, 768, 3), (384, 1536, 6), (768, 3072, 12)
_L, _H, _G = (1024, 4096, 16), (1280, 5120, 16), (1408, 6144, 16)
_BIG_G, _SO, _GIANT = (1664, 8192, 16), (1152, 4304, 16), (1536, 6144, 16)
# From the config.json of each, as transformers reads them.
PUBLISHED: tuple[Published, ...] = (
    Published("vit", *_T, (16,), "", "WinKawaks/vit-tiny-patch16-224"),
    Published("vit", *_S, (8, 16, 32), "", "facebook/dino-vits16"),
    Published("vit", *_B, (8, 16, 32), "", "google/vit-base-patch16-224"),
    Published("vit", *_L, (16, 32), "", "google/vit-large-patch16-224"),
    Published("vit", *_H, (14,), "", "google/vit-huge-patch14-224-in21k"),
    Published("vit_mae", *_B, (16,), "", "facebook/vit-mae-base"),
    Published("vit_mae", *_L, (16,), "", "facebook/vit-mae-large"),
    Published("vit_mae", *_H, (14,), "", "facebook/vit-mae-huge"),
    Published("vit_msn", *_S, (16,), "", "facebook/vit-msn-small"),
    Published("vit_msn", *_B, (4, 16), "", "facebook/vit-msn-base"),
    Published("vit_msn", *_L, (7, 16), "", "facebook/vit-msn-large"),
    Published("deit", *_T, (16,), "", "facebook/deit-tiny-distilled-patch16-224"),
    Published("deit", *_S, (16,), "", "facebook/deit-small-distilled-patch16-224"),
    Published("deit", *_B, (16,), "", "facebook/deit-base-distilled-patch16-224"),
    Published("ijepa", *_H, (14, 16), "", "facebook/ijepa_vith14_1k"),
    Published("ijepa", *_G, (16,), "", "facebook/ijepa_vitg16_22k"),
    Published("dinov2", *_S, (14,), "", "facebook/dinov2-small"),
    Published("dinov2", *_B, (14,), "", "facebook/dinov2-base"),
    Published("dinov2", *_L, (14,), "", "facebook/dinov2-large"),
    Published("dinov2", 1536, 4096, 24, (14,), "swiglu", "facebook/dinov2-giant"),
    Published("dinov2_with_registers", *_S, (14,), "", "facebook/dinov2-with-registers-small"),
    Published("dinov2_with_registers", *_B, (14,), "", "facebook/dinov2-with-registers-base"),
    Published("dinov2_with_registers", *_L, (14,), "", "facebook/dinov2-with-registers-large"),
    Published(
        "dinov2_with_registers",
        1536,
        4096,
        24,
        (14,),
        "swiglu",
        "facebook/dinov2-with-registers-giant",
    ),
    Published("dinov3_vit", *_S, (16,), "", "facebook/dinov3-vits16-pretrain-lvd1689m"),
    Published("dinov3_vit", 384, 1536, 6, (16,), "swiglu", "facebook/dinov3-vits16plus"),
    Published("dinov3_vit", *_B, (16,), "", "facebook/dinov3-vitb16-pretrain-lvd1689m"),
    Published("dinov3_vit", *_L, (16,), "", "facebook/dinov3-vitl16-pretrain-lvd1689m"),
    Published("dinov3_vit", 1280, 5120, 20, (16,), "swiglu", "facebook/dinov3-vith16plus"),
    Published("dinov3_vit", 4096, 8192, 32, (16,), "swiglu", "facebook/dinov3-vit7b16"),
    Published("clip_vision_model", *_B, (16, 32), "quick_gelu", "openai/clip-vit-base-patch32"),
    Published("clip_vision_model", *_B, (16, 32), "gelu", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
    Published("clip_vision_model", *_L, (14,), "quick_gelu", "openai/clip-vit-large-patch14"),
    Published("clip_vision_model", *_L, (14,), "gelu", "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"),
    Published("clip_vision_model", *_H, (14,), "quick_gelu", "facebook/metaclip-h14-fullcc2.5b"),
    Published("clip_vision_model", *_H, (14,), "gelu", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    Published("clip_vision_model", *_G, (14,), "gelu", "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"),
    Published(
        "clip_vision_model", *_BIG_G, (14,), "gelu", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
    ),
    Published("siglip_vision_model", *_B, (16, 32), "", "google/siglip-base-patch16-224"),
    Published("siglip_vision_model", *_L, (16,), "", "google/siglip-large-patch16-256"),
    Published("siglip_vision_model", *_SO, (14, 16), "", "google/siglip-so400m-patch14-384"),
    Published("siglip_vision_model", *_GIANT, (16,), "", "google/siglip2-giant-opt-patch16-384"),
    Published("owlvit_vision_model", *_B, (16, 32), "", "google/owlvit-base-patch32"),
    Published("owlvit_vision_model", *_L, (14,), "", "google/owlvit-large-patch14"),
    Published("git_vision_model", *_B, (16,), "", "microsoft/git-base"),
    Published("git_vision_model", *_L, (14,), "", "microsoft/git-large"),
    Published("kosmos_2_vision_model", *_L, (14,), "", "microsoft/kosmos-2-patch14-224"),
    Published("clipseg_vision_model", *_B, (16,), "", "CIDAS/clipseg-rd64-refined"),
    Published("siglip2_vision_model", *_B, (16,), "", "google/siglip2-base-patch16-naflex"),
    Published("siglip2_vision_model", *_SO, (16,), "", "google/siglip2-so400m-patch16-naflex"),
    Published("idefics3_vision", *_SO, (14,), "", "HuggingFaceM4/Idefics3-8B-Llama3"),
    Published("idefics3_vision", *_B, (16,), "", "HuggingFaceTB/SmolVLM-256M-Instruct"),
    Published("dpt", *_L, (16,), "", "Intel/dpt-large"),
    Published("janus_vision_model", *_L, (16,), "", "deepseek-community/Janus-Pro-1B"),
    Published("blip_vision_model", *_B, (16,), "", "Salesforce/blip-image-captioning-base"),
    Published("blip_vision_model", *_L, (16,), "", "Salesforce/blip-image-captioning-large"),
    Published("blip_2_vision_model", *_G, (14,), "", "Salesforce/blip2-opt-2.7b"),
    Published("beit", *_B, (16,), "", "microsoft/beit-base-patch16-224"),
    Published("beit", *_L, (16,), "", "microsoft/beit-large-patch16-224"),
    Published("data2vec-vision", *_B, (16,), "", "facebook/data2vec-vision-base"),
    Published("data2vec-vision", *_L, (16,), "", "facebook/data2vec-vision-large"),
)
# Types of one structure; which of them a file is, is read from its names or asked for.
_ALIKE = {
    "vit": ("vit", "vit_mae", "vit_msn"),
    "beit": ("beit", "data2vec-vision"),
    "blip": ("blip_vision_model", "blip_2_vision_model"),
}


def read(
    json: Json, shapes: Mapping[str, Shape], name_match: NameMatch, facts: Facts
) -> ParsedConfig:
    """Read a ViT from its tensors, the published models of their shape and what is stated.

    Raises:
        CheckpointError: The tensors are no ViT, or a number stays open: the message says how to
            state it.
    """
    held = infer_config(shapes, sidecar_size(json))
    types = _candidates(held, name_match)
    wanted = facts.architecture
    if wanted is not None:
        types = _narrowed(types, held, wanted)
    rows = [row for row in PUBLISHED if _fits(row, held, types)]
    rows = [row for row in rows if row.repository == wanted] or rows
    settled = resolve_facts({row.repository: _facts_of(row) for row in rows}, facts)
    if rows:
        model_type = next(row.model_type for row in rows if _facts_of(row) == settled)
    else:
        model_type, settled = _unpublished(held, types, facts, json("config.json") is not None)
    name, family = TYPES[model_type]
    held |= family.head if held["num_classes"] and family.head else family.base
    if family.dialect == "beit":
        held |= beit_norm(name_match, has_head=bool(held["num_classes"]))
    if held["pool"] == "map" and not held["attention_pool"]:
        held["pool"] = "mean"
    if held["projection_dim"] and held["pooler_dim"]:
        held["pool"] = "pooler"  # vision-text-dual-encoder
    if name == "dinov3_vit":
        held["rope_theta"] = 100.0
    assumed = ["norm_eps", "activation", "position_resize", "labels", "pool"]
    assumed += [] if "num_heads" in held else ["num_heads"]
    held = settled | held
    held |= {"norm_eps": _eps(model_type), "position_resize": family.fixed["position_resize"]}
    doubtful = [] if rows else ["norm_eps"]
    doubtful += ["activation"] if not rows and facts.activation is None else []
    cfg = ViTConfig(family=name, **held)
    refuse_turned_table(cfg)
    _refuse_other_numbers(json("config.json") or {}, cfg, family)
    return ParsedConfig(cfg, tuple(assumed), tuple(doubtful))


def _refuse_other_numbers(config: Mapping[str, Any], cfg: ViTConfig, family: Family) -> None:
    """Raise CheckpointError where a config.json without model_type says another model."""
    said = {
        family.numbers[name][0]: getattr(cfg, name)
        for name in ("num_heads", "norm_eps", "rope_theta")
        if name in family.numbers
    }
    clashes = [
        f"{key} {config[key]!r} (read as {value!r})"
        for key, value in said.items()
        if key in config and config[key] != value
    ]
    act = config.get("hidden_act")
    if act is not None and cfg.activation != "swiglu" and ACTIVATIONS.get(act) != cfg.activation:
        clashes.append(f"hidden_act {act!r} (read as {cfg.activation!r})")
    if clashes:
        raise CheckpointError(
            f"config.json has no model_type, and {'; '.join(clashes)} of the published models of "
            "these tensors: write the model_type there"
        )


def _candidates(held: Mapping[str, Any], name_match: NameMatch) -> tuple[str, ...]:
    """The types whose files have such tensors, by what there is and how it is called."""
    theirs = {f.file_name for several in name_match.matches.values() for f in several}
    if any(re.search(r"(?:^|\.)layer\.0\.(?:attention|mlp)\..*_proj\.", name) for name in theirs):
        return ("dinov3_vit",)
    if any("self_attn.qkv." in name for name in theirs):
        return _ALIKE["blip"]
    if any("layer_norm1" in name for name in theirs):
        return _candidates_of_clip(held, name_match, theirs)
    if any(name.startswith("dpt.") for name in theirs):
        return ("dpt",)
    if held["relative_position"] or not held["key_bias"] or not held["pos_embed"]:
        return _ALIKE["beit"]
    if any(".layer_scale1." in name for name in theirs):
        return ("dinov2_with_registers",) if held["num_registers"] else ("dinov2",)
    if not held["class_token"]:
        return ("ijepa",)
    if held["dist_token"]:
        return ("deit",)
    if any(name.startswith("decoder.decoder_") for name in name_match.ignored):
        return ("vit_mae",)
    if any(name.startswith("vit_msn.") for name in theirs):
        return ("vit_msn",)
    return ("vit",) if held["pooler_dim"] or held["num_classes"] else _ALIKE["vit"]


def _candidates_of_clip(
    held: Mapping[str, Any], name_match: NameMatch, theirs: set[str]
) -> tuple[str, ...]:
    """The types whose blocks are called as CLIP's."""
    for part, model_type in _BY_NAME.items():
        if any(part in name for name in theirs):
            return (model_type,)
    if held["class_token"]:
        return ("clip_vision_model",)
    patches = name_match.shapes.get(name_match.file_name("patch_embed.proj.weight"), ())
    if len(patches) == 2:
        return ("siglip2_vision_model",)
    idefics = any("connector." in name for name in name_match.ignored)
    return ("idefics3_vision",) if idefics else ("siglip_vision_model",)


_BY_NAME = {
    "image_encoder.vision_model.": "git_vision_model",
    "vision_model.model.": "kosmos_2_vision_model",
    "pre_layernorm": "owlvit_vision_model",
    "clip.vision_model.": "clipseg_vision_model",
    ".projection_layer.": "janus_vision_model",
}


def _fits(row: Published, held: Mapping[str, Any], types: tuple[str, ...]) -> bool:
    """Whether a published model has such tensors."""
    p, q = held["patch_size"]
    gated = held.get("activation") == "swiglu"
    shape = (row.embed_dim, row.mlp_dim, row.activation == "swiglu")
    same = shape == (held["embed_dim"], held["mlp_dim"], gated)
    return row.model_type in types and same and p == q and p in row.patches


def _facts_of(row: Published) -> dict[str, Any]:
    activation = row.activation or ACTIVATIONS[TYPES[row.model_type][1].activation]
    eps = _eps(row.model_type)
    return {"num_heads": row.num_heads, "activation": activation, "norm_eps": eps}


def _eps(model_type: str) -> float:
    """A type's eps: I-JEPA's published configs differ from the class's default."""
    name, family = TYPES[model_type]
    return float(1e-6 if name == "ijepa" else family.numbers["norm_eps"][1])


def _narrowed(types: tuple[str, ...], held: Mapping[str, Any], wanted: str) -> tuple[str, ...]:
    """The type that a stated architecture is, by its model_type or a published model's name.

    CLIP's kin differ from it in no name of a tensor: each may be stated. Raises CheckpointError.
    """
    if types == ("clip_vision_model",):
        types = tuple(name for name, (family, _) in TYPES.items() if family == "clip")
    named = {row.repository: row.model_type for row in PUBLISHED if _fits(row, held, types)}
    if wanted not in types and wanted not in named:
        raise CheckpointError(
            f"architecture={wanted!r}: with these tensors vitlib knows "
            f"{', '.join([*types, *named])}"
        )
    return (named.get(wanted, wanted),)


def _unpublished(
    held: Mapping[str, Any], types: tuple[str, ...], facts: Facts, has_config: bool
) -> tuple[str, dict[str, Any]]:
    """The type and numbers that are stated of a shape in which nothing is published.

    has_config: a config.json lies beside the file, without a model_type. Raises CheckpointError
    where a number stays open.
    """
    model_type = types[0]
    family = TYPES[model_type][1]
    open_numbers = []
    if len(types) > 1:
        open_numbers.append(f"architecture={' or '.join(map(repr, types))} (--architecture)")
    if facts.num_heads is None and "num_heads" not in held:
        open_numbers.append("num_heads= (--num-heads)")
    if family.model_type == "clip_vision_model" and facts.activation is None:
        open_numbers.append("activation='quick_gelu' or 'gelu' (--activation)")
    if open_numbers:
        p, q = held["patch_size"]
        lacking = "the config.json beside this file has no model_type"
        mend = "write it there" if has_config else "put its config.json beside it"
        raise CheckpointError(
            f"{lacking if has_config else 'no config.json lies beside this file'}, and no "
            f"published model is of width {held['embed_dim']}, MLP {held['mlp_dim']} and patches "
            f"of {p}x{q}: {mend}, or state {', '.join(open_numbers)}"
        )
    activation = facts.activation or ACTIVATIONS[family.activation]
    heads = held.get("num_heads", facts.num_heads)
    return model_type, {"num_heads": heads, "activation": activation}
