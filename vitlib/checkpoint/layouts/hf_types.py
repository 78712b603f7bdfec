"""Model types of transformers whose config.json vitlib reads, and those it refuses by name.

A type is a ViT itself, or a model of several parts of which one is a ViT: the tower of a vision
language model, the backbone of a depth model, the encoder of a captioner. The parts' configs are
nested. A key that a nested config lacks has its own class's default, never the outer model's value.
All defaults are those of the config classes of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, NamedTuple

from vitlib.checkpoint.families import list_families
from vitlib.checkpoint.families.family import Container, HfType, Published
from vitlib.errors import CheckpointError

# Models of which any ViT is a part: their nested config names its own type.
_ANY_VIT = {
    "vision-text-dual-encoder": Container(model_type=""),
    "vision-encoder-decoder": Container(key="encoder", model_type=""),
}


@cache
def list_types() -> dict[str, tuple[str, HfType]]:
    """Return the model types that are a ViT -> the name of the family, and the type."""
    families = list_families()
    own = {family.hf.model_type: (family.name, family.hf) for family in families if family.hf}
    variants = {
        variant.model_type: (family.name, variant)
        for family in families
        for variant in family.hf_variants
    }
    return own | variants


@cache
def list_containers() -> dict[str, Container]:
    """Return the model types of which a ViT is a part -> where its config lies."""
    containers = _ANY_VIT.copy()
    for family in list_families():
        containers |= family.hf_containers
    return containers


@cache
def list_published() -> tuple[Published, ...]:
    """Return the published models of every family."""
    return tuple(row for family in list_families() for row in family.hf_published)


_WINDOWS = "its attention is within windows"
_CONVOLUTIONS = "a convolutional network"
_PADDED = "its patches begin two pixels outside the image, which no weights of whole patches give"
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
    "vitpose": _PADDED,
    "vitpose_backbone": _PADDED,
    "eomt": "queries that join in its last blocks",
    "eomt_dinov3": "queries that join in its last blocks",
    "groupvit": "tokens that are grouped between its blocks",
    "bridgetower": "a norm before and after each block, and two towers that meet",
    "mgp-str": "its patches are read by queries for characters",
    "got_ocr2": _WINDOWS,
    "beit3": "norms within attention and MLP",
    "upernet": "its backbone is one of several, in files of its own names",
    "timm_backbone": "timm's files are read as they are, not in this wrapper",
}


def list_reasons() -> dict[str, str]:
    """Return the model types that vitlib refuses by name -> the reason."""
    from vitlib.checkpoint.layouts.hf_refused import REFUSED  # for messages and lists alone

    return {**REFUSED, **REASONS}


class TowerConfig(NamedTuple):
    """A ViT that a config.json describes.

    Attributes:
        family: Its family, as `ViTConfig.family`.
        type: How its model_type says things.
        values: Its own config, which may be a part of the file.
    """

    family: str
    type: HfType
    values: Mapping[str, Any]


def find_tower_config(config: Mapping[str, Any]) -> TowerConfig:
    """Find the ViT that a config.json names.

    Args:
        config: The parsed file.

    Returns:
        Its family and its own, perhaps nested, config.

    Raises:
        CheckpointError: vitlib does not read the model_type, or that of the part, or the part is
            no object.
    """
    model_type = config.get("model_type")
    if model_type == "dpt" and config.get("backbone_config") is not None:
        return _find_part(config, Container(key="backbone_config", model_type="bit"), "dpt")
    if model_type == "dinov2" and config.get("num_register_tokens"):
        model_type = "dinov2_with_registers"  # Hibou's own class (2406.05074), which adds them
    if isinstance(model_type, str) and model_type in list_types():
        _refuse_hybrid(config)
        return TowerConfig(*list_types()[model_type], config)
    if isinstance(model_type, str) and model_type in list_containers():
        return _find_part(config, list_containers()[model_type], model_type)
    raise CheckpointError(f"config.json has model_type {model_type!r}{_explain(model_type)}")


def _find_part(config: Mapping[str, Any], container: Container, outer: str) -> TowerConfig:
    """Find the ViT's own config within a model of several parts."""
    nested = config.get(container.key)
    if container.overriding is not None and isinstance(config.get(container.overriding), dict):
        nested = config[container.overriding]  # its class's defaults win too, in transformers
    nested = container.convert_older(config) if nested is None else nested
    nested = container.absent if nested is None else nested
    if not isinstance(nested, Mapping):
        raise CheckpointError(f"config.json: expected {container.key} to be an object")
    inner = container.model_type
    if container.any_type:
        inner = nested.get("model_type", inner)
    if inner in list_containers() and list_containers()[inner].key == "vision_config":
        # vision-text-dual-encoder nests the whole config of a model of two towers.
        return _find_part(nested, list_containers()[inner], inner)
    if not isinstance(inner, str) or inner not in list_types():
        part = f"config.json has model_type {outer!r} with a {container.key} of type {inner!r}"
        raise CheckpointError(f"{part}{_explain(inner)}")
    return TowerConfig(*list_types()[inner], nested)


def _refuse_hybrid(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a DPT whose patches come from a convolutional network."""
    other = [key for key in ("backbone", "use_timm_backbone") if config.get(key)]
    if config.get("is_hybrid") or (config.get("model_type") == "dpt" and other):
        raise CheckpointError(
            "config.json has a DPT whose patches come from a convolutional network (is_hybrid, "
            "backbone): vitlib reads those with a ViT alone"
        )


def _explain(model_type: object) -> str:
    """Explain why a type is not read, and name the nearest that is."""
    names = [*list_types(), *list_containers()]
    reason = list_reasons().get(model_type) if isinstance(model_type, str) else None
    close = [] if reason else get_close_matches(str(model_type), names, 1, 0.75)
    nearest = _NEAREST.get(str(model_type), close[0] if close else "vit")
    because = f" ({reason})" if reason else ""
    return (
        f"{because}: vitlib does not read it; the nearest that it reads is {nearest!r}, of 'vit', "
        f"'deit', 'dinov2', 'clip', 'siglip' and {len(names) - 5} more (docs/checkpoints.md)"
    )


_NEAREST = {
    "mllama": "llava",
    "pixtral": "llava",
    "mistral3": "llava",
    "llama4": "llava",
    "qwen2_vl": "llava_onevision",
    "qwen2_5_vl": "llava_onevision",
    "qwen3_vl": "llava_onevision",
    "upernet": "beit",
    "timm_backbone": "timm_wrapper",
}
