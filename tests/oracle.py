"""Tiny transformers models of every family, with weights that make each part of them matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
LABELS = {"id2label": {i: f"thing {i}" for i in range(5)}}


def _vit(**changes: Any) -> hf.ViTConfig:
    return hf.ViTConfig(**{**SMALL, "intermediate_size": 96, **LABELS, **changes})


def _deit(**changes: Any) -> hf.DeiTConfig:
    return hf.DeiTConfig(**{**SMALL, "intermediate_size": 96, **LABELS, **changes})


def _dinov2(**changes: Any) -> hf.Dinov2Config:
    return hf.Dinov2Config(**{**SMALL, **LABELS, **changes})


def _registers(**changes: Any) -> hf.Dinov2WithRegistersConfig:
    return hf.Dinov2WithRegistersConfig(**{**SMALL, **LABELS, "num_register_tokens": 3, **changes})


# name: builder. Named after what is special; each has a reason to be here.
MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "vit": lambda: hf.ViTForImageClassification(_vit()),
    "vit base": lambda: hf.ViTModel(_vit()),  # with a pooler
    "vit narrow pooler": lambda: hf.ViTModel(_vit(pooler_output_size=20)),
    "vit masked": lambda: hf.ViTForMaskedImageModeling(_vit(encoder_stride=8)),
    "vit tanh gelu": lambda: hf.ViTForImageClassification(_vit(hidden_act="gelu_pytorch_tanh")),
    "vit quick gelu": lambda: hf.ViTForImageClassification(_vit(hidden_act="quick_gelu")),
    "vit no qkv bias": lambda: hf.ViTForImageClassification(_vit(qkv_bias=False)),
    "vit large eps": lambda: hf.ViTForImageClassification(_vit(layer_norm_eps=1e-3)),
    "vit one channel": lambda: hf.ViTForImageClassification(_vit(num_channels=1)),
    "vit five channels": lambda: hf.ViTForImageClassification(_vit(num_channels=5)),
    "vit not square": lambda: hf.ViTForImageClassification(
        _vit(image_size=[24, 40], patch_size=[8, 4])
    ),
    "vit two classes": lambda: hf.ViTForImageClassification(
        _vit(id2label={0: "LABEL_0", 1: "LABEL_1"})
    ),
    "vit multi label": lambda: hf.ViTForImageClassification(
        _vit(problem_type="multi_label_classification")
    ),
    "deit": lambda: hf.DeiTForImageClassification(_deit()),  # distilled trunk, one head
    "deit two heads": lambda: hf.DeiTForImageClassificationWithTeacher(_deit()),
    "deit base": lambda: hf.DeiTModel(_deit()),
    "dinov2": lambda: hf.Dinov2ForImageClassification(_dinov2()),
    "dinov2 base": lambda: hf.Dinov2Model(_dinov2()),
    "dinov2 no mask token": lambda: hf.Dinov2Model(_dinov2(use_mask_token=False)),
    "dinov2 swiglu": lambda: hf.Dinov2ForImageClassification(_dinov2(use_swiglu_ffn=True)),
    "registers": lambda: hf.Dinov2WithRegistersForImageClassification(_registers()),
    "registers base": lambda: hf.Dinov2WithRegistersModel(_registers()),
    "registers swiglu": lambda: hf.Dinov2WithRegistersModel(_registers(use_swiglu_ffn=True)),
}


def build(name: str, seed: int = 0) -> hf.PreTrainedModel:
    """The model with random weights: gains near 1, so that the signal lives, and no bias zero."""
    torch.manual_seed(seed)
    return randomise(MODELS[name]())


def randomise(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            gain = isinstance(module, nn.LayerNorm) and leaf == "weight"
            if gain or leaf == "lambda1":
                nn.init.normal_(parameter, mean=1.0, std=0.2)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif parameter.ndim == 4:
                nn.init.normal_(parameter, std=(parameter[0].numel()) ** -0.5)
            else:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def saved(name: str, folder: Path, seed: int = 0) -> hf.PreTrainedModel:
    """The same, saved by transformers in `folder`."""
    model = build(name, seed)
    model.save_pretrained(folder)
    return model


def pixels(
    model: hf.PreTrainedModel, batch: int = 2, size: tuple[int, int] | None = None
) -> Tensor:
    cfg = model.config
    side = cfg.image_size if isinstance(cfg.image_size, list | tuple) else [cfg.image_size] * 2
    return torch.randn(batch, cfg.num_channels, *(size or side))


@dataclass
class Answer:
    """What transformers gives: logits, or every token and what its pooler makes of them."""

    logits: Tensor | None
    tokens: Tensor | None
    pooled: Tensor | None


@torch.inference_mode()
def ask(model: hf.PreTrainedModel, images: Tensor) -> Answer:
    resizes = model.config.model_type in ("vit", "deit")
    square = not isinstance(model.config.image_size, list | tuple)
    keywords = {"interpolate_pos_encoding": True} if resizes and square else {}
    base = getattr(model, model.base_model_prefix, model)
    out = base(images, **keywords)
    logits = None
    if "ForImageClassification" in type(model).__name__:
        logits = model(images, **keywords).logits
    return Answer(logits, out.last_hidden_state, getattr(out, "pooler_output", None))


def distance(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|"""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max() / b.abs().max())


def rms(a: Tensor, exact: Tensor) -> float:
    """Root mean square error against a float64 answer, relative to its own root mean square."""
    return float(((a.double() - exact) ** 2).mean().sqrt() / (exact**2).mean().sqrt())
