"""Tiny transformers models of every family, with weights that make each part of them matter."""

from __future__ import annotations

import copy
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


def _plain(kind: Any, **changes: Any) -> Any:
    return kind(**{**SMALL, "intermediate_size": 96, **LABELS, **changes})


def _mae(**changes: Any) -> hf.ViTMAEConfig:
    decoder = {f"decoder_{key}": value for key, value in SMALL.items() if "size" not in key[:6]}
    decoder |= {"decoder_hidden_size": 16, "decoder_intermediate_size": 20, "mask_ratio": 0.0}
    decoder = {k: v for k, v in decoder.items() if k not in ("decoder_patch_size",)}
    return _plain(hf.ViTMAEConfig, **{**decoder, **changes})


def _dinov3(**changes: Any) -> hf.DINOv3ViTConfig:
    return _plain(hf.DINOv3ViTConfig, **{"num_register_tokens": 3, **changes})


def _beit(**changes: Any) -> hf.BeitConfig:
    return _plain(hf.BeitConfig, **{"use_relative_position_bias": True, **changes})


def _clip(**changes: Any) -> hf.CLIPVisionConfig:
    return _plain(hf.CLIPVisionConfig, **{"projection_dim": 20, **changes})


def _full(kind: Any, vision: Any, **changes: Any) -> Any:
    """A config of two towers around one of images, with labels."""
    return kind(vision_config=vision.to_dict(), **{**LABELS, **changes})


def _text(kind: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    ids = {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return kind(num_attention_heads=2, max_position_embeddings=8, **sizes, **ids).to_dict()


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
    "mae": lambda: hf.ViTMAEModel(_mae()),
    "mae pre-training": lambda: hf.ViTMAEForPreTraining(_mae()),
    "msn": lambda: hf.ViTMSNForImageClassification(_plain(hf.ViTMSNConfig)),
    "msn base": lambda: hf.ViTMSNModel(_plain(hf.ViTMSNConfig)),
    "ijepa": lambda: hf.IJepaForImageClassification(_plain(hf.IJepaConfig)),
    "ijepa base": lambda: hf.IJepaModel(_plain(hf.IJepaConfig)),
    "dinov3": lambda: hf.DINOv3ViTModel(_dinov3()),
    "dinov3 gated": lambda: hf.DINOv3ViTModel(_dinov3(use_gated_mlp=True, hidden_act="silu")),
    "dinov3 key bias": lambda: hf.DINOv3ViTModel(_dinov3(key_bias=True, rope_theta=50.0)),
    "dinov3 no bias": lambda: hf.DINOv3ViTModel(_dinov3(query_bias=False, value_bias=False)),
    "clip": lambda: hf.CLIPForImageClassification(_full(hf.CLIPConfig, _clip())),
    "clip base": lambda: hf.CLIPVisionModel(_clip()),
    "clip projection": lambda: hf.CLIPVisionModelWithProjection(_clip()),
    "clip erf gelu": lambda: hf.CLIPVisionModel(_clip(hidden_act="gelu")),
    "clip both towers": lambda: hf.CLIPModel(
        _full(hf.CLIPConfig, _clip(), text_config=_text(hf.CLIPTextConfig), projection_dim=20)
    ),
    "siglip": lambda: hf.SiglipForImageClassification(
        _full(
            hf.SiglipConfig, _plain(hf.SiglipVisionConfig), text_config=_text(hf.SiglipTextConfig)
        )
    ),
    "siglip base": lambda: hf.SiglipVisionModel(_plain(hf.SiglipVisionConfig)),
    "siglip no pool": lambda: hf.SiglipVisionModel(
        _plain(hf.SiglipVisionConfig, vision_use_head=False)
    ),
    "siglip both towers": lambda: hf.SiglipModel(
        _full(
            hf.SiglipConfig, _plain(hf.SiglipVisionConfig), text_config=_text(hf.SiglipTextConfig)
        )
    ),
    "beit": lambda: hf.BeitForImageClassification(_beit()),
    "beit base": lambda: hf.BeitModel(_beit()),
    "beit shared": lambda: hf.BeitForImageClassification(
        _beit(use_relative_position_bias=False, use_shared_relative_position_bias=True)
    ),
    "beit absolute": lambda: hf.BeitForImageClassification(
        _beit(use_relative_position_bias=False, use_absolute_position_embeddings=True)
    ),
    "beit class token": lambda: hf.BeitModel(_beit(use_mean_pooling=False, use_mask_token=True)),
    "beit no gains": lambda: hf.BeitForImageClassification(_beit(layer_scale_init_value=0.0)),
    "data2vec": lambda: hf.Data2VecVisionForImageClassification(
        _plain(hf.Data2VecVisionConfig, use_relative_position_bias=True)
    ),
    "siglip 35 pixels": lambda: hf.SiglipVisionModel(
        _plain(hf.SiglipVisionConfig, image_size=35)  # as so400m-patch14-384: 27 patches
    ),
    "beit 35 pixels": lambda: hf.BeitForImageClassification(_beit(image_size=35)),
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
            if gain or leaf in ("lambda1", "lambda_1", "lambda_2"):
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


def tower(config: Any) -> Any:
    """The config of the image tower, where there are two."""
    return getattr(config, "vision_config", config)


def pixels(
    model: hf.PreTrainedModel, batch: int = 2, size: tuple[int, int] | None = None
) -> Tensor:
    cfg = tower(model.config)
    side = cfg.image_size if isinstance(cfg.image_size, list | tuple) else [cfg.image_size] * 2
    return torch.randn(batch, cfg.num_channels, *(size or side))


@dataclass
class Answer:
    """What transformers gives: logits, or every token and what its pooler makes of them."""

    logits: Tensor | None
    tokens: Tensor
    pooled: Tensor | None
    projected: Tensor | None = None  # CLIP's image_embeds


_RESIZING: tuple[str, ...] = (
    "vit",
    "deit",
    "vit_msn",
    "vit_mae",
    "ijepa",
    "beit",
    "clip",
    "siglip",
)


def tower_of(model: hf.PreTrainedModel, images: Tensor) -> tuple[Any, dict[str, Any]]:
    """The part of a model that sees, and what to call it with beside images."""
    kind = model.config.model_type.removesuffix("_vision_model")
    square = not isinstance(tower(model.config).image_size, list | tuple)
    keywords: dict[str, Any] = {}
    if kind in _RESIZING and square:
        keywords["interpolate_pos_encoding"] = True
    base = getattr(model, model.base_model_prefix, model)
    if kind in ("clip", "siglip"):
        base = getattr(model, "vision_model", model)
    if kind == "dinov3_vit":  # its base_model_prefix names the blocks alone
        base = model
    if kind == "vit_mae":  # its order of patches is drawn; this keeps it
        p = model.config.patch_size
        count = images.shape[2] // p * (images.shape[3] // p)
        keywords["noise"] = torch.arange(count).expand(len(images), -1).float()
    return base, keywords


@torch.inference_mode()
def ask(model: hf.PreTrainedModel, images: Tensor) -> Answer:
    base, keywords = tower_of(model, images)
    out = base(images, **keywords)
    logits = None
    if "ForImageClassification" in type(model).__name__:
        keywords.pop("noise", None)
        logits = model(images, **keywords).logits
    projected = None
    if hasattr(model, "visual_projection"):
        projected = model.visual_projection(out.pooler_output)
    return Answer(logits, out.last_hidden_state, getattr(out, "pooler_output", None), projected)


@torch.inference_mode()
def inside(
    model: hf.PreTrainedModel, images: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What transformers says of every layer, by eager attention: attentions, hidden_states."""
    eager = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    base, keywords = tower_of(eager.eval().to(images.dtype), images)
    out = base(images, output_attentions=True, output_hidden_states=True, **keywords)
    return out.attentions, out.hidden_states


def distance(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|"""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max() / b.abs().max())


def rms(a: Tensor, exact: Tensor) -> float:
    """Root mean square error against a float64 answer, relative to its own root mean square."""
    return float(((a.double() - exact) ** 2).mean().sqrt() / (exact**2).mean().sqrt())
