"""timm's plain ViTs: every tag of every architecture that vitlib's table has a row for."""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from census.case import Answer, Case
from census.operators import without_operators
from vitlib.checkpoint.layouts.timm_models import get_architecture
from vitlib.errors import VitlibError

LAYOUT = "timm"
MODULES = (
    *("vision_transformer", "eva", "deit", "beit", "vision_transformer_relpos", "naflexvit"),
    *("vision_transformer_sam", "gemma4_vit", "qwen3_vit", "deepseek_vit"),
)
DEPTH = 2
# What a tag says of the model; all else of it is preprocessing, addresses and licences.
_OF_THE_MODEL = ("num_classes", "input_size", "fixed_input_size", "label_offset")
_NAMES_OF_DEPTH = ("depth", "num_layers", "layers")


@cache
def _timm() -> Any:
    """Import timm without torchvision's compiled operators."""
    with without_operators():
        import timm
        from timm.layers import weight_init

    # Every parameter is filled afterwards, and drawing them takes longer than all else.
    weight_init._trunc_normal_ = lambda tensor, *_, **__: tensor
    nn.init.kaiming_uniform_ = nn.init.uniform_ = lambda tensor, *_, **__: tensor
    nn.init.xavier_uniform_ = nn.init.normal_ = lambda tensor, *_, **__: tensor
    return timm


def cases() -> list[Case]:
    """Return a case for each architecture and for each of its tags that changes the model.

    The other tags, and the names that older versions had for them, are counted with it.
    """
    timm = _timm()
    from timm.models._builder import resolve_pretrained_cfg
    from timm.models._registry import _deprecated_models, _model_to_module, _model_with_tags

    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in timm.list_models():
        if _model_to_module[name] in MODULES:
            for tag in _model_with_tags.get(name) or [name]:
                config = resolve_pretrained_cfg(tag).to_dict()
                key = (name, *(str(config.get(field)) for field in _OF_THE_MODEL))
                groups.setdefault(key, []).append(tag)
    old = {tag: name for name, tag in _deprecated_models.items()}
    for tags in groups.values():
        tags += [old[tag] for tag in tags if tag in old]
    return [
        Case(tag, name, _expected(tag), also=tuple(others))
        for (name, *_), (tag, *others) in groups.items()
    ]


def _expected(tag: str) -> str:
    try:
        get_architecture(tag)
    except VitlibError:
        return "refused"
    return "equal"


def make(case: Case, folder: Path) -> Answer:
    """Build the architecture with two blocks, fill it, and save it as the hub has it."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    model = _create(case.name).eval()
    fill(model, case.name)
    _timm().models.save_for_hf(model, folder, safe_serialization=True)
    _forget_args(folder)
    images = pixels(model, case.name)
    # Where vitlib's table promises a refusal, nothing is there to compare: a change is a crash.
    return compute(model, images) if case.expected == "equal" else Answer(images)


def _create(name: str) -> nn.Module:
    """Build a model of two blocks, in the way its class takes its depth."""
    timm = _timm()
    for argument in _NAMES_OF_DEPTH:
        try:
            return timm.create_model(name, pretrained=False, **{argument: DEPTH})
        except TypeError as error:
            if argument not in str(error):
                raise
        except AssertionError as error:  # Sapiens2 has a number of key heads for each block
            if "num_kv_heads" not in str(error):
                raise
            return timm.create_model(name, depth=DEPTH, num_kv_heads=1)
    raise TypeError(f"{name} takes no depth")


def _forget_args(folder: Path) -> None:
    """Leave out model_args, the depth alone, as a published config has none."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("model_args", None)
    path.write_text(json.dumps(config))


@torch.no_grad()
def fill(model: nn.Module, name: str) -> None:
    """Fill every parameter from a stream named by the case; gains are near 1, biases near 0.3."""
    random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for key, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=random)
        leaf = key.rsplit(".", 1)[-1]
        if "gamma" in leaf or leaf == "scale" or (leaf == "weight" and parameter.ndim == 1):
            values = 1 + 0.2 * values
        elif leaf == "weight" and parameter.ndim > 1:
            values = values / parameter[0].numel() ** 0.5
        else:
            values = 0.3 * values
        parameter.copy_(values)


def pixels(model: Any, name: str) -> Tensor:
    """Return two images of the size that the model was built for."""
    size = getattr(model.patch_embed, "img_size", None) if hasattr(model, "patch_embed") else None
    height, width = size or model.pretrained_cfg["input_size"][1:]
    channels = getattr(model, "in_chans", 3) or 3
    random = torch.Generator().manual_seed(zlib.crc32(name[::-1].encode()))
    return torch.randn(2, channels, height, width, generator=random)


@torch.inference_mode()
def compute(model: Any, images: Tensor) -> Answer:
    """Return what timm gives: logits, the vector that the head reads, and all tokens."""
    tokens = model.forward_features(images)
    pooled = model.forward_head(tokens, pre_logits=True)
    pooled = pooled if isinstance(pooled, Tensor) and pooled.ndim == 2 else None
    # A distilled model gives the mean of its two heads, each of its own token.
    logits = model.forward_head(tokens) if model.num_classes and pooled is not None else None
    return Answer(images, logits, pooled, tokens)


def reopen(case: Case, folder: Path, answer: Answer) -> Answer:  # noqa: ARG001
    """Open with timm what vitlib wrote."""
    model = _timm().create_model(f"local-dir:{folder}", pretrained=True).eval()
    return compute(model, answer.pixels)
