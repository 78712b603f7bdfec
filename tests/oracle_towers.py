"""Tiny transformers models of which a ViT is one part, of every model type that vitlib reads.

Each entry builds the model and names its ViT by attributes. The other parts are as small as they
can be; where the ViT's config leaves a number to its class, so does vitlib.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import transformers as hf
from oracle import LABELS, randomise
from torch import Tensor

VISION: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "intermediate_size": 96,
}
DINO = {key: value for key, value in VISION.items() if key != "intermediate_size"}
FOUR = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}  # what a depth model taps
NECK = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _text(**changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "vocab_size": 40, "max_position_embeddings": 16}
    return {**sizes, **IDS, **changes}


def _llama() -> dict[str, Any]:
    return dict(hf.LlamaConfig(**_text(num_key_value_heads=2)).to_dict())


def _opt() -> dict[str, Any]:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 20}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 16, "word_embed_proj_dim": 16}
    return dict(hf.OPTConfig(**sizes).to_dict())


def _two(kind: str, vision: dict[str, Any] | None = None, **text: Any) -> Any:
    """A config of two towers."""
    own = getattr(hf, f"{kind}VisionConfig")(**{**VISION, **(vision or {})}).to_dict()
    other = getattr(hf, f"{kind}TextConfig")(**_text(**text)).to_dict()
    config = getattr(hf, f"{kind}Config")
    return config(vision_config=own, text_config=other, projection_dim=20, **LABELS)


def _vlm(kind: str, vision: Any, text: dict[str, Any] | None = None, **more: Any) -> Any:
    """A model of a tower and a language model."""
    config = getattr(hf, f"{kind}Config")(
        vision_config=vision.to_dict(), text_config=text or _llama(), **more
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def _siglip(**changes: Any) -> Any:
    return hf.SiglipVisionConfig(**{**VISION, "vision_use_head": False, **changes})


def _gemma(kind: Any) -> dict[str, Any]:
    return dict(kind(**_text(num_key_value_heads=1, head_dim=8)).to_dict())


def _kosmos() -> Any:
    text = {"vocab_size": 40, "embed_dim": 16, "layers": 1, "ffn_dim": 20, "attention_heads": 2}
    text = hf.Kosmos2TextConfig(**text, max_position_embeddings=16).to_dict()
    vision = hf.Kosmos2VisionConfig(**VISION).to_dict()
    return hf.Kosmos2Model(
        hf.Kosmos2Config(vision_config=vision, text_config=text, latent_query_num=2)
    )


def _janus() -> Any:
    vision = hf.JanusVisionConfig(**DINO, mlp_ratio=2.0, projection_dim=16, num_image_tokens=16)
    vq = {"embed_dim": 4, "num_embeddings": 6, "latent_channels": 32, "base_channels": 32}
    vq |= {"channel_multiplier": [1, 1], "num_res_blocks": 1, "num_patches": 4}
    vq |= {"projection_dim": 16, "image_token_embed_dim": 16}
    return hf.JanusForConditionalGeneration(
        hf.JanusConfig(vision_config=vision.to_dict(), vq_config=vq, text_config=_llama())
    )


def _blip(kind: Any) -> Any:
    text = hf.BlipTextConfig(**_text(encoder_hidden_size=48)).to_dict()
    vision = hf.BlipVisionConfig(**VISION).to_dict()
    return kind(hf.BlipConfig(vision_config=vision, text_config=text, projection_dim=20))


def _blip_2(kind: str, **vision: Any) -> Any:
    query = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    query |= {"intermediate_size": 20, "encoder_hidden_size": 48, "vocab_size": 40}
    own = getattr(hf, f"{kind}VisionConfig")(**{**VISION, **vision}).to_dict()
    config = getattr(hf, f"{kind}Config")(
        vision_config=own, qformer_config=query, text_config=_opt(), num_query_tokens=2
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def _flava() -> Any:
    fusion = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1}
    return hf.FlavaModel(
        hf.FlavaConfig(
            image_config=hf.FlavaImageConfig(**VISION).to_dict(),
            text_config=hf.FlavaTextConfig(**_text()).to_dict(),
            multimodal_config={**fusion, "num_attention_heads": 2},
            hidden_size=16,
            projection_dim=20,
        )
    )


def _dinov2() -> Any:
    return hf.Dinov2Config(**{**DINO, **FOUR}, reshape_hidden_states=False)


def _beit() -> Any:
    return hf.BeitConfig(
        **{**VISION, **FOUR}, use_relative_position_bias=True, reshape_hidden_states=False
    )


def _captioner(encoder: Any) -> Any:
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 48, "n_layer": 1, "n_head": 2}
    decoder = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, add_cross_attention=True))
    return hf.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)


def _dual(vision: Any) -> Any:
    text = hf.BertConfig(**_text())
    own = hf.VisionTextDualEncoderConfig.from_vision_text_configs
    config = own(vision.config, text, projection_dim=20)
    return hf.VisionTextDualEncoderModel(config, vision_model=vision, text_model=hf.BertModel(text))


def _siglip2() -> Any:
    vision = {key: value for key, value in VISION.items() if key != "image_size"}
    text = hf.Siglip2TextConfig(**_text()).to_dict()
    own = hf.Siglip2VisionConfig(**vision, num_patches=16).to_dict()
    return hf.Siglip2Config(vision_config=own, text_config=text, **LABELS)


class Part(NamedTuple):
    """A model, and where in it the ViT is."""

    build: Callable[[], hf.PreTrainedModel]
    path: str  # attributes from the model to its ViT; "": the model itself
    pooled: bool = True  # its pooler_output is what vitlib's model pools


# Named by model_type, and what is special.
TOWERS: dict[str, Part] = {
    "metaclip_2": Part(lambda: hf.MetaClip2Model(_two("MetaClip2")), "vision_model"),
    "metaclip_2 classifier": Part(
        lambda: hf.MetaClip2ForImageClassification(_two("MetaClip2")), "vision_model", pooled=False
    ),
    "chinese_clip": Part(lambda: hf.ChineseCLIPModel(_two("ChineseCLIP")), "vision_model"),
    "altclip": Part(lambda: hf.AltCLIPModel(_two("AltCLIP", project_dim=20)), "vision_model"),
    "clipseg": Part(lambda: hf.CLIPSegForImageSegmentation(_two("CLIPSeg")), "clip.vision_model"),
    "owlvit": Part(lambda: hf.OwlViTForObjectDetection(_two("OwlViT")), "owlvit.vision_model"),
    "owlv2": Part(lambda: hf.Owlv2ForObjectDetection(_two("Owlv2")), "owlv2.vision_model"),
    "owlv2 both towers": Part(lambda: hf.Owlv2Model(_two("Owlv2")), "vision_model"),
    "kosmos-2": Part(_kosmos, "vision_model"),
    "git": Part(
        lambda: hf.GitForCausalLM(
            hf.GitConfig(vision_config=hf.GitVisionConfig(**VISION).to_dict(), **_text())
        ),
        "git.image_encoder",
        pooled=False,
    ),
    "llava": Part(
        lambda: _vlm("Llava", hf.CLIPVisionConfig(**VISION), image_token_index=3),
        "model.vision_tower",
    ),
    "llava siglip": Part(
        lambda: _vlm("Llava", _siglip(vision_use_head=True), image_token_index=3),
        "model.vision_tower",
    ),
    "llava_next": Part(
        lambda: _vlm("LlavaNext", hf.CLIPVisionConfig(**VISION), image_token_index=3),
        "model.vision_tower",
    ),
    "llava_onevision": Part(
        lambda: _vlm("LlavaOnevision", _siglip(), image_token_index=3), "model.vision_tower"
    ),
    "paligemma": Part(
        lambda: _vlm("PaliGemma", _siglip(), _gemma(hf.GemmaConfig), projection_dim=16),
        "model.vision_tower",
    ),
    "gemma3": Part(
        lambda: _vlm("Gemma3", _siglip(), _gemma(hf.Gemma3TextConfig), mm_tokens_per_image=4),
        "model.vision_tower",
    ),
    "idefics3": Part(
        lambda: _vlm("Idefics3", hf.Idefics3VisionConfig(**VISION), scale_factor=2),
        "model.vision_model",
    ),
    "smolvlm": Part(
        lambda: _vlm("SmolVLM", hf.SmolVLMVisionConfig(**VISION), scale_factor=2),
        "model.vision_model",
    ),
    "janus": Part(_janus, "model.vision_model", pooled=False),
    "blip": Part(partial(_blip, hf.BlipModel), "vision_model", pooled=False),
    "blip captions": Part(
        partial(_blip, hf.BlipForConditionalGeneration), "vision_model", pooled=False
    ),
    "blip-2": Part(partial(_blip_2, "Blip2"), "vision_model", pooled=False),
    "blip-2 no qkv bias": Part(
        partial(_blip_2, "Blip2", qkv_bias=False), "vision_model", pooled=False
    ),
    "instructblip": Part(partial(_blip_2, "InstructBlip"), "vision_model", pooled=False),
    "flava": Part(_flava, "image_model"),
    "dpt": Part(
        lambda: hf.DPTForDepthEstimation(
            hf.DPTConfig(**VISION, backbone_out_indices=[0, 1, 1, 1], **NECK)
        ),
        "dpt",
    ),
    "dpt dinov2": Part(
        lambda: hf.DPTForDepthEstimation(hf.DPTConfig(backbone_config=_dinov2(), **NECK)),
        "backbone",
    ),
    "depth_anything": Part(
        lambda: hf.DepthAnythingForDepthEstimation(
            hf.DepthAnythingConfig(
                backbone_config=_dinov2(), reassemble_hidden_size=48, head_hidden_size=8, **NECK
            )
        ),
        "backbone",
    ),
    "vision-encoder-decoder": Part(
        lambda: _captioner(hf.ViTModel(hf.ViTConfig(**VISION), add_pooling_layer=False)), "encoder"
    ),
    "vision-encoder-decoder deit": Part(
        lambda: _captioner(hf.DeiTModel(hf.DeiTConfig(**VISION))), "encoder"
    ),
    "vision-text-dual-encoder": Part(
        lambda: _dual(hf.ViTModel(hf.ViTConfig(**VISION))), "vision_model"
    ),
    "vision-text-dual-encoder clip": Part(
        lambda: _dual(hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION))), "vision_model"
    ),
    "siglip2": Part(lambda: hf.Siglip2Model(_siglip2()), "vision_model"),
    "siglip2 classifier": Part(
        lambda: hf.Siglip2ForImageClassification(_siglip2()), "vision_model", pooled=False
    ),
    "beit segmentation": Part(
        lambda: hf.BeitForSemanticSegmentation(_segmenter(hf.BeitConfig, [1, 2, 3, 4])), "beit"
    ),
    "data2vec segmentation": Part(
        lambda: hf.Data2VecVisionForSemanticSegmentation(
            _segmenter(hf.Data2VecVisionConfig, [0, 1, 2, 3])
        ),
        "data2vec_vision",
    ),
}


def _segmenter(kind: Any, taps: list[int]) -> Any:
    sizes = {**VISION, "num_hidden_layers": 4, "out_indices": taps}
    return kind(**sizes, use_relative_position_bias=True, auxiliary_channels=8)


def build(name: str) -> hf.PreTrainedModel:
    """The model with random weights, no bias or token of them zero."""
    torch.manual_seed(0)
    model = randomise(TOWERS[name].build())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "position_embedding" in key or key.endswith(("class_embedding", "probe")):
                parameter.normal_(std=0.3)
    return model


@torch.inference_mode()
def ask(name: str, model: hf.PreTrainedModel, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the ViT in it gives: every token after its final norm, and what its pooler makes."""
    path = TOWERS[name].path
    tower = attrgetter(path)(model) if path else model
    if hasattr(tower, "forward_with_filtered_kwargs"):  # a backbone: the last of all its states
        states = tower(images, output_hidden_states=True).hidden_states[-1]
        return (tower.layernorm(states) if hasattr(tower, "layernorm") else states), None
    out = tower(**inputs(tower, images))
    return out.last_hidden_state, getattr(out, "pooler_output", None)


def inputs(tower: hf.PreTrainedModel, images: Tensor) -> dict[str, Any]:
    """What to call a ViT with, at any size of images."""
    if tower.config.model_type.startswith("siglip2"):
        return packed(images, tower.config.patch_size)
    found: dict[str, Any] = {"pixel_values": images}
    resizes = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
    if resizes and list(images.shape[2:]) != [tower.config.image_size] * 2:
        found["interpolate_pos_encoding"] = True
    return found


def packed(images: Tensor, patch: int) -> dict[str, Any]:
    """Images as NaFlex takes them: patches in rows, channels last."""
    b, c, height, width = images.shape
    h, w = height // patch, width // patch
    whole = images[:, :, : h * patch, : w * patch].reshape(b, c, h, patch, w, patch)
    rows = whole.permute(0, 2, 4, 3, 5, 1).reshape(b, h * w, -1)
    shapes = torch.tensor([[h, w]] * b)
    return {
        "pixel_values": rows,
        "pixel_attention_mask": torch.ones(b, h * w, dtype=torch.long),
        "spatial_shapes": shapes,
    }
