"""The model types of transformers whose config.json vitlib reads, and those it refuses by name.

A type is a ViT itself, or a model of several parts of which one is a ViT: the tower of a vision
language model, the backbone of a depth model, the encoder of a captioner. The parts' configs are
nested; what a nested config does not say is its own class's default, never the outer model's.
All defaults are those of the config classes of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, NamedTuple

from vitlib.checkpoint.layouts.hf_families import CLS, FAMILIES, MEAN, Family
from vitlib.errors import CheckpointError


def _like(name: str, model_type: str, /, **changes: Any) -> Family:
    """A family's entry for another model_type; `numbers` here are other defaults by config key."""
    family = FAMILIES[name]
    defaults = changes.pop("defaults", {})
    left_out, more = changes.pop("without", ()), changes.pop("more", {})
    numbers = {
        ours: (key, defaults.get(key, default))
        for ours, (key, default) in family.numbers.items()
        if key not in left_out
    }
    numbers |= more
    fixed = {**family.fixed, **changes.pop("fixed", {})}
    return replace(family, model_type=model_type, numbers=numbers, fixed=fixed, **changes)


_VIT_TOWER: dict[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24}
_VIT_TOWER |= {"num_attention_heads": 16, "intermediate_size": 4096}
_BLIP: dict[str, Any] = {
    "without": ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"),
    "more": {"attention_dropout": ("attention_dropout", 0.0)},
}
_BLIP_2: dict[str, Any] = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39}
_BLIP_2 |= {"num_attention_heads": 16, "patch_size": 14, "layer_norm_eps": 1e-6}
_IDEFICS: dict[str, Any] = {
    "fixed": {"position_resize": "nearest"},
    "base": MEAN,
    "head": None,
    "dialect": "idefics",
}
_WIDE = {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}

# model_type of a ViT's own config -> which of our families it is, and how it says so.
TYPES: dict[str, tuple[str, Family]] = {f.model_type: (name, f) for name, f in FAMILIES.items()}
TYPES |= {
    family.model_type: (name, family)
    for name, family in (
        ("clip", _like("clip", "metaclip_2_vision_model")),
        ("clip", _like("clip", "chinese_clip_vision_model")),
        ("clip", _like("clip", "altclip_vision_model")),
        ("clip", _like("clip", "clipseg_vision_model")),
        ("clip", _like("clip", "owlvit_vision_model", defaults={"image_size": 768})),
        (
            "clip",
            _like("clip", "owlv2_vision_model", defaults={"image_size": 768, "patch_size": 16}),
        ),
        (
            "clip",
            _like("clip", "kosmos_2_vision_model", defaults={**_VIT_TOWER, "patch_size": 14}),
        ),
        ("clip", _like("clip", "git_vision_model", defaults={"patch_size": 16}, base=CLS)),
        (
            "siglip",
            _like(
                "siglip",
                "siglip2_vision_model",
                fixed={"position_resize": "bilinear_antialias"},
                dialect="siglip2",
            ),
        ),
        ("siglip", _like("siglip", "idefics2_vision", defaults={"patch_size": 32}, **_IDEFICS)),
        ("siglip", _like("siglip", "idefics3_vision", defaults=_WIDE, **_IDEFICS)),
        ("siglip", _like("siglip", "smolvlm_vision", defaults=_WIDE, **_IDEFICS)),
        (
            "siglip",
            _like(
                "siglip",
                "janus_vision_model",
                defaults={**_VIT_TOWER, "image_size": 384},
                without=("intermediate_size",),
                activation="gelu",
                base=MEAN,
                head=None,
                dialect="janus",
            ),
        ),
        (
            "vit",
            _like(
                "vit",
                "blip_vision_model",
                defaults={"image_size": 384, "layer_norm_eps": 1e-5},
                **_BLIP,
            ),
        ),
        ("vit", _like("vit", "blip_2_vision_model", defaults=_BLIP_2, **_BLIP)),
        ("vit", _like("vit", "instructblip_vision_model", defaults=_BLIP_2, **_BLIP)),
        ("vit", _like("vit", "instructblipvideo_vision_model", defaults=_BLIP_2, **_BLIP)),
        ("vit", _like("vit", "flava_image_model")),
        (
            "vit",
            _like(
                "vit",
                "dpt",
                defaults={"image_size": 384},
                without=("drop_path_rate",),
                fixed={"position_resize": "bilinear"},
                dialect="dpt",
            ),
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Container:
    """A model of several parts: where in its config.json the ViT's config lies."""

    key: str  # of config.json
    model_type: str  # of the nested config, where it names none
    any_type: bool = True  # the nested config names its type; False: it is always this one
    absent: Mapping[str, Any] = field(default_factory=dict)  # the config where there is none
    overriding: str | None = None  # a second key, whose values win over the first's


def _two_towers(name: str, *, twice: bool = False) -> Container:
    return Container(
        key="vision_config",
        model_type=f"{name}_vision_model",
        any_type=False,
        overriding="vision_config_dict" if twice else None,
    )


_LLAVA = {**_VIT_TOWER, "patch_size": 14, "image_size": 336}
_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
_SO400M |= {"patch_size": 14, "image_size": 384, "num_hidden_layers": 26, "vision_use_head": False}
_SMALL_DINOV2 = {"image_size": 518, "hidden_size": 384, "num_attention_heads": 6}


def _tower(model_type: str, absent: Mapping[str, Any] | None = None) -> Container:
    return Container(key="vision_config", model_type=model_type, absent=absent or {})


def _own(model_type: str) -> Container:
    return Container(key="vision_config", model_type=model_type, any_type=False)


def _backbone(model_type: str, absent: Mapping[str, Any]) -> Container:
    return Container(key="backbone_config", model_type=model_type, absent=absent)


CONTAINERS: dict[str, Container] = {
    "clip": _two_towers("clip", twice=True),
    "siglip": _two_towers("siglip"),
    "metaclip_2": _two_towers("metaclip_2", twice=True),
    "chinese_clip": _two_towers("chinese_clip", twice=True),
    "altclip": _two_towers("altclip", twice=True),
    "clipseg": _two_towers("clipseg", twice=True),
    "owlvit": _two_towers("owlvit"),
    "owlv2": _two_towers("owlv2"),
    "siglip2": _two_towers("siglip2"),
    "kosmos-2": _two_towers("kosmos_2"),
    "git": _two_towers("git"),
    "blip": _two_towers("blip"),
    "blip-2": _two_towers("blip_2"),
    "instructblip": _two_towers("instructblip"),
    "instructblipvideo": _two_towers("instructblipvideo"),
    "janus": _two_towers("janus"),
    "flava": Container(key="image_config", model_type="flava_image_model", any_type=False),
    "idefics2": _own("idefics2_vision"),
    "idefics3": _own("idefics3_vision"),
    "smolvlm": _own("smolvlm_vision"),
    "llava": _tower("clip_vision_model", _LLAVA),
    "llava_next": _tower("clip_vision_model", _LLAVA),
    "llava_next_video": _tower("clip_vision_model", _LLAVA),
    "vipllava": _tower("clip_vision_model", _LLAVA),
    "llava_onevision": _tower("siglip_vision_model", _SO400M),
    "aya_vision": _tower("siglip_vision_model", {**_SO400M, "num_attention_heads": 14}),
    "paligemma": _tower(
        "siglip_vision_model",
        {**_SO400M, "intermediate_size": 4096, "image_size": 224, "num_hidden_layers": 27},
    ),
    "gemma3": _tower("siglip_vision_model"),
    "vision-text-dual-encoder": _tower(""),
    "vision-encoder-decoder": Container(key="encoder", model_type=""),
    "depth_anything": _backbone("dinov2", _SMALL_DINOV2),
    "prompt_depth_anything": _backbone("dinov2", _SMALL_DINOV2),
    "zoedepth": _backbone(
        "beit", {**_VIT_TOWER, "image_size": 384, "use_relative_position_bias": True}
    ),
}

_WINDOWS = "its attention is within windows"
_CONVOLUTIONS = "a convolutional network"
_PACKED = "its patches are packed, with positions of two or three axes"
REASONS: dict[str, str] = {
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "donut-swin": _WINDOWS,
    "vitdet": _WINDOWS,
    "sam": _WINDOWS,
    "sam_hq": _WINDOWS,
    "sam_vision_model": _WINDOWS,
    "sam2": "a hierarchy of windows",
    "sam3": _WINDOWS,
    "hiera": "a hierarchy of windows",
    "convnext": _CONVOLUTIONS,
    "convnextv2": _CONVOLUTIONS,
    "dinov3_convnext": _CONVOLUTIONS,
    "resnet": _CONVOLUTIONS,
    "bit": _CONVOLUTIONS,
    "efficientnet": _CONVOLUTIONS,
    "align": _CONVOLUTIONS,
    "pvt": "a pyramid",
    "pvt_v2": "a pyramid",
    "segformer": "a pyramid",
    "levit": "a pyramid of convolutions and attention",
    "mobilevit": "convolutions and attention",
    "yolos": "its detection tokens have positions of their own in every block",
    "vilt": "texts and patches in one encoder",
    "vivit": "its patches are of videos",
    "videomae": "its patches are of videos",
    "vjepa2": "its patches are of videos",
    "timesformer": "its patches are of videos",
    "x_clip": "its tokens are exchanged between frames",
    "audio-spectrogram-transformer": "its patches of spectrograms overlap",
    "qwen2_vl": _PACKED,
    "qwen2_5_vl": _PACKED,
    "qwen3_vl": _PACKED,
    "pixtral": _PACKED,
    "mistral3": _PACKED,
    "mllama": "its tiles have gated positions",
    "llama4": _PACKED,
    "internvl": "no norm after its last block, and norms of queries and keys",
    "internvl_vision": "no norm after its last block, and norms of queries and keys",
    "aimv2": "RMSNorm, a gated MLP and no biases",
    "aimv2_vision_model": "RMSNorm, a gated MLP and no biases",
    "ovis2": "RMSNorm, a gated MLP and no biases",
    "mlcd": "rotary positions, with a learned one of the class token",
    "mlcd_vision_model": "rotary positions, with a learned one of the class token",
    "vitpose": "its patches overlap by padding",
    "vitpose_backbone": "its patches overlap by padding",
    "pixio": "eight class tokens",
    "radio": "positions cut from a larger grid, and several class tokens",
    "eomt": "queries that join in its last blocks",
    "eomt_dinov3": "queries that join in its last blocks",
    "sapiens2": "RMSNorm, norms of queries and keys, and shared keys",
    "groupvit": "tokens that are grouped between its blocks",
    "bridgetower": "a norm before and after each block, and two towers that meet",
    "mgp-str": "its patches are read by queries for characters",
    "tipsv2": "its files are not read yet",
    "got_ocr2": _WINDOWS,
    "beit3": "norms within attention and MLP",
    "upernet": "its backbone is one of several, in files of its own names",
    "timm_backbone": "timm's files are read as they are, not in this wrapper",
}


class Described(NamedTuple):
    """What a config.json says a ViT is, before a number of it is read."""

    name: str  # of our family
    family: Family  # how its model_type says things
    flat: Mapping[str, Any]  # the ViT's own config


def describe(config: Mapping[str, Any]) -> Described:
    """Find the ViT that a config.json names.

    Args:
        config: The parsed file.

    Returns:
        Its family and its own, perhaps nested, config.

    Raises:
        CheckpointError: The model_type, or that of the part, is none that vitlib reads, or the part
            is no table.
    """
    model_type = config.get("model_type")
    if model_type == "dpt" and config.get("backbone_config") is not None:
        return _part(config, _backbone("bit", {}), "dpt")
    if isinstance(model_type, str) and model_type in TYPES:
        _refuse_hybrid(config)
        return Described(*TYPES[model_type], config)
    if isinstance(model_type, str) and model_type in CONTAINERS:
        return _part(config, CONTAINERS[model_type], model_type)
    raise CheckpointError(f"config.json has model_type {model_type!r}{_why(model_type)}")


def _part(config: Mapping[str, Any], container: Container, outer: str) -> Described:
    """The ViT's own config within a model of several parts."""
    nested = config.get(container.key)
    if container.overriding is not None and isinstance(config.get(container.overriding), dict):
        nested = config[container.overriding]  # whose class defaults win too, in transformers
    nested = container.absent if nested is None else nested
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"config.json: expected {container.key} to be an object")
    inner = container.model_type
    if container.any_type:
        inner = nested.get("model_type", inner)
    if inner in CONTAINERS and CONTAINERS[inner].key == "vision_config":
        # vision-text-dual-encoder keeps the whole config of a model of two towers
        return _part(nested, CONTAINERS[inner], inner)
    if not isinstance(inner, str) or inner not in TYPES:
        where = f"config.json has model_type {outer!r} with a {container.key} of type {inner!r}"
        raise CheckpointError(f"{where}{_why(inner)}")
    return Described(*TYPES[inner], nested)


def _refuse_hybrid(config: Mapping[str, Any]) -> None:
    other = [key for key in ("backbone", "use_timm_backbone") if config.get(key)]
    if config.get("is_hybrid") or (config.get("model_type") == "dpt" and other):
        raise CheckpointError(
            "config.json has a DPT whose patches come from a convolutional network (is_hybrid, "
            "backbone): vitlib reads those with a ViT alone"
        )


def _why(model_type: object) -> str:
    """Why a type is not read, and the nearest that is."""
    known = [*TYPES, *CONTAINERS]
    reason = REASONS.get(model_type) if isinstance(model_type, str) else None
    near = [] if reason else get_close_matches(str(model_type), known, 1, 0.75)
    nearest = _NEAREST.get(str(model_type), near[0] if near else "vit")
    because = f" ({reason})" if reason else ""
    return (
        f"{because}: vitlib does not read it; the nearest that it reads is {nearest!r}, of 'vit', "
        f"'deit', 'dinov2', 'clip', 'siglip' and {len(known) - 5} more (docs/checkpoints.md)"
    )


_NEAREST = {
    "mllama": "llava",
    "pixtral": "llava",
    "mistral3": "llava",
    "llama4": "llava",
    "qwen2_vl": "llava_onevision",
    "qwen2_5_vl": "llava_onevision",
    "qwen3_vl": "llava_onevision",
    "internvl": "llava",
    "ovis2": "llava",
    "mlcd": "clip",
    "mlcd_vision_model": "clip",
    "aimv2": "siglip",
    "aimv2_vision_model": "siglip",
    "upernet": "beit",
    "timm_backbone": "timm_wrapper",
}
