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
from vitlib.errors import VitlibError
from vitlib.layouts.timm_models import published

LAYOUT = "timm"
MODULES = (
    *("vision_transformer", "eva", "deit", "beit", "vision_transformer_relpos", "naflexvit"),
    *("vision_transformer_sam", "gemma4_vit", "qwen3_vit", "deepseek_vit"),
)
DEPTH = 2
_NAMES_OF_DEPTH = ("depth", "num_layers", "layers")


@cache
def _timm() -> Any:
    """Import timm without torchvision's compiled operators."""
    register_fake = torch.library.register_fake

    def register(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register_fake(op, *args, **kwargs)

    torch.library.register_fake = register
    import timm

    return timm


def cases() -> list[Case]:
    """Return one case for each tag, with or without weights."""
    timm = _timm()
    from timm.models._registry import _model_to_module, _model_with_tags

    names = [name for name in timm.list_models() if _model_to_module[name] in MODULES]
    tags = [tag for name in names for tag in _model_with_tags.get(name) or [name]]
    return [Case(tag, tag.partition(".")[0], _expected(tag)) for tag in tags]


def _expected(tag: str) -> str:
    try:
        published(tag)
    except VitlibError:
        return "refused"
    return "equal"


def make(case: Case, folder: Path) -> Answer:
    """Build the architecture with two blocks, fill it, and save it as the hub has it."""
    timm = _timm()
    from timm.models._builder import resolve_pretrained_cfg

    tag = resolve_pretrained_cfg(case.name).to_dict()
    model, answer = _built(case.architecture, case.name, tag["num_classes"], tag["input_size"])
    model.pretrained_cfg = model.default_cfg = tag | {"architecture": case.architecture}
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    _forget_args(folder)
    return answer


_last: dict[tuple[Any, ...], tuple[Any, Answer]] = {}  # one model: tags come one after another


def _built(name: str, tag: str, *what_tags_change: Any) -> tuple[Any, Answer]:
    """Return a filled model and its answer, the last one where only the preprocessing differs."""
    key = (name, *what_tags_change)
    if key not in _last:
        _last.clear()
        torch.manual_seed(zlib.crc32(name.encode()))
        model = _create(tag).eval()
        fill(model, name)
        _last[key] = model, compute(model, pixels(model, name))
    return _last[key]


def _create(name: str) -> nn.Module:
    """Build a model of two blocks, in the way its class takes its depth."""
    timm = _timm()
    for argument in _NAMES_OF_DEPTH:
        try:
            return timm.create_model(name, pretrained=False, **{argument: DEPTH})
        except TypeError as error:
            if argument not in str(error):
                raise
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
