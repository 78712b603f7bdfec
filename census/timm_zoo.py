"""Zoo of timm's ViTs: every tag of the architectures in vitlib's table of timm's models."""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from census.case import Case, ReferenceOutputs
from census.operators import without_operators
from vitlib.checkpoint.layouts.timm_models import get_architecture
from vitlib.errors import VitlibError

LAYOUT = "timm"
MODULES = (
    *("vision_transformer", "eva", "deit", "beit", "vision_transformer_relpos", "naflexvit"),
    *("vision_transformer_sam", "gemma4_vit", "qwen3_vit", "deepseek_vit"),
)
DEPTH = 2
# Fields of a tag that change the model. The others are preprocessing, addresses and licences.
_MODEL_FIELDS = ("num_classes", "input_size", "fixed_input_size", "label_offset")
_DEPTH_ARGUMENTS = ("depth", "num_layers", "layers")


@cache
def _timm() -> Any:
    """Import timm without torchvision's compiled operators."""
    with without_operators():
        import timm
        from timm.layers import weight_init

    # fill() sets every parameter, so the random initialisation is a waste of most of the time.
    weight_init._trunc_normal_ = lambda tensor, *_, **__: tensor
    nn.init.kaiming_uniform_ = nn.init.uniform_ = lambda tensor, *_, **__: tensor
    nn.init.xavier_uniform_ = nn.init.normal_ = lambda tensor, *_, **__: tensor
    return timm


def cases() -> list[Case]:
    """Return a case for each architecture and for each of its tags that changes the model.

    A case also counts for tags that differ in preprocessing alone, and for older names.
    """
    timm = _timm()
    from timm.models._builder import resolve_pretrained_cfg
    from timm.models._registry import _deprecated_models, _model_to_module, _model_with_tags

    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in timm.list_models():
        if _model_to_module[name] in MODULES:
            for tag in _model_with_tags.get(name) or [name]:
                config = resolve_pretrained_cfg(tag).to_dict()
                key = (name, *(str(config.get(field)) for field in _MODEL_FIELDS))
                groups.setdefault(key, []).append(tag)
    old_names = {tag: name for name, tag in _deprecated_models.items()}
    for tags in groups.values():
        tags += [old_names[tag] for tag in tags if tag in old_names]
    return [
        Case(tag, name, _predict_verdict(tag), also=tuple(others))
        for (name, *_), (tag, *others) in groups.items()
    ]


def _predict_verdict(tag: str) -> str:
    """Return the verdict that vitlib's table predicts: "equal" or "refused"."""
    try:
        get_architecture(tag)
    except VitlibError:
        return "refused"
    return "equal"


def make(case: Case, folder: Path) -> ReferenceOutputs:
    """Build the architecture with two blocks, save it in the hub's format and run it."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    model = _create(case.name).eval()
    fill(model, case.name)
    _timm().models.save_for_hf(model, folder, safe_serialization=True)
    _remove_model_args(folder)
    images = make_images(model, case.name)
    # If vitlib's table predicts a refusal, there is nothing to compare. Were the model loaded
    # nevertheless, the census reports a crash.
    return run_model(model, images) if case.expected == "equal" else ReferenceOutputs(images)


def _create(name: str) -> nn.Module:
    """Build a model of two blocks; its class decides the name of the argument."""
    timm = _timm()
    for argument in _DEPTH_ARGUMENTS:
        try:
            return timm.create_model(name, pretrained=False, **{argument: DEPTH})
        except TypeError as error:
            if argument not in str(error):
                raise
        except AssertionError as error:
            # Sapiens2 takes the number of key heads of each block, which must match the depth.
            if "num_kv_heads" not in str(error):
                raise
            return timm.create_model(name, depth=DEPTH, num_kv_heads=1)
    raise TypeError(f"{name} has no argument for its depth")


def _remove_model_args(folder: Path) -> None:
    """Remove model_args, which only state the depth: published configs have none."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("model_args", None)
    path.write_text(json.dumps(config))


@torch.no_grad()
def fill(model: nn.Module, name: str) -> None:
    """Fill all parameters, seeded by the case's name: gains near 1, biases of size 0.3."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for key, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        leaf = key.rsplit(".", 1)[-1]
        if "gamma" in leaf or leaf == "scale" or (leaf == "weight" and parameter.ndim == 1):
            values = 1 + 0.2 * values
        elif leaf == "weight" and parameter.ndim > 1:
            values = values / parameter[0].numel() ** 0.5
        else:
            values = 0.3 * values
        parameter.copy_(values)


def make_images(model: Any, name: str) -> Tensor:
    """Return two random images of the model's size."""
    size = getattr(model.patch_embed, "img_size", None) if hasattr(model, "patch_embed") else None
    height, width = size or model.pretrained_cfg["input_size"][1:]
    channels = getattr(model, "in_chans", 3) or 3
    generator = torch.Generator().manual_seed(zlib.crc32(name[::-1].encode()))
    return torch.randn(2, channels, height, width, generator=generator)


@torch.inference_mode()
def run_model(model: Any, images: Tensor) -> ReferenceOutputs:
    """Compute timm's logits, the input of its head, and all tokens."""
    tokens = model.forward_features(images)
    pooled = model.forward_head(tokens, pre_logits=True)
    pooled = pooled if isinstance(pooled, Tensor) and pooled.ndim == 2 else None
    # For a distilled model this is the mean of the logits of its two heads.
    logits = model.forward_head(tokens) if model.num_classes and pooled is not None else None
    return ReferenceOutputs(images, logits, pooled, tokens)


def reopen(
    case: Case,  # noqa: ARG001
    folder: Path,
    expected: ReferenceOutputs,
) -> ReferenceOutputs:
    """Load a folder that vitlib wrote with timm, and run it."""
    model = _timm().create_model(f"local-dir:{folder}", pretrained=True).eval()
    return run_model(model, expected.pixels)
