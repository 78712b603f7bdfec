"""Zoo of transformers: families with random configs, ViTs within other models, published shapes.

The builders of tests/fixtures make the models. The case's name seeds all random numbers. There are
three groups of cases:

    FAMILY/odd N      a model of a family with random sizes, eps, GELU, biases and head
    TYPE/variant N    a model with a ViT as one part, with random attention heads, eps and GELU
    published/ID      a model with the shape of a published one, but two blocks
"""

# ruff: noqa: E402  (torchvision is disabled before transformers tries to import it)
from __future__ import annotations

import json
import random
import sys
import zlib
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.modules["torchvision"] = None  # type: ignore[assignment]  # its operators may not load

import transformers as hf

from census.case import Case, ReferenceOutputs
from vitlib.checkpoint.layouts.hf_config import ACTIVATIONS
from vitlib.checkpoint.layouts.hf_types import list_published

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from fixtures import language_towers, reference_towers, references

hf.logging.set_verbosity_error()
hf.utils.logging.disable_progress_bar()

LAYOUT = "hf"
NUM_CONFIGS = 250  # random configs of each family
NUM_VARIANTS = 6  # random configs of each model that has a ViT as one part
REFUSED_ACTIVATIONS = ("relu", "silu", "gelu_10", "mish", "tanh")
Draw = random.Random
# Families that tests/fixtures/references.py can run.
_REFERENCE_FAMILIES = (*references.RESIZING, "dinov2", "dinov2_with_registers", "dinov3_vit")
_REFERENCE_FAMILIES += ("data2vec-vision", "clip_vision_model", "siglip_vision_model")
_REFERENCE_FAMILIES += ("radio", "tipsv2_vision_model")
# Other types whose pooler vitlib reads.
_POOLED = ("owlvit_vision_model", "kosmos_2_vision_model", "clipseg_vision_model")
_POOLED += ("siglip2_vision_model",)


_TOWERS = {**reference_towers.TOWERS, **language_towers.TOWERS}


def cases() -> list[Case]:
    """Return all cases, in an order that spreads the slow ones over the workers."""
    result = [
        Case(f"{family}/odd {i}", f"{family} (odd configs)", predict_verdict(family, i))
        for i in range(NUM_CONFIGS)
        for family in FAMILIES
    ]
    result += [
        Case(f"{name}/variant {i}", f"{name} (part of a model)")
        for i in range(NUM_VARIANTS)
        for name in reference_towers.TOWERS
    ]
    result += [
        Case(f"{name}/tower", f"{name} (part of a model)") for name in language_towers.TOWERS
    ]
    result += [
        Case(f"published/{row.repository}", row.repository)
        for row in list_published()
        # transformers has no class for the ViT of Kosmos-2 alone. It is among the variants.
        if row.model_type != "kosmos_2_vision_model"
    ]
    return result


def predict_verdict(family: str, index: int) -> str:
    """Return "refused" if vitlib does not compute the config's activation, else "equal"."""
    _, config = draw_config(family, index)
    gated = getattr(config, "use_gated_mlp", False)
    if getattr(config, "use_swiglu_ffn", False):
        return "equal"
    is_supported = config.hidden_act == "silu" if gated else config.hidden_act in ACTIVATIONS
    return "equal" if is_supported else "refused"


def _is_part(case: Case) -> bool:
    """Return True if the ViT of a case is a part of a larger model."""
    return case.name.endswith("/tower") or "/variant" in case.name


def make(case: Case, folder: Path) -> ReferenceOutputs:
    """Build the model, save it with transformers and run it."""
    seed = zlib.crc32(case.name.encode())
    torch.manual_seed(seed)
    group, _, rest = case.name.partition("/")
    if group == "published":
        model = build_published(rest)
    elif rest.startswith("variant"):
        draw_variant(random.Random(seed))
        model = reference_towers.build(_TOWERS[group])
    elif rest == "tower":
        model = reference_towers.build(_TOWERS[group])
    else:
        kind, config = draw_config(group, int(rest.removeprefix("odd ")))
        model = randomise(kind(config))
    model.save_pretrained(folder)
    torch.manual_seed(seed)
    return run_case(case, model, make_pixels(case, model))


def reopen(case: Case, folder: Path, expected: ReferenceOutputs) -> ReferenceOutputs:
    """Load a folder that vitlib wrote with the class that its config.json names, and run it."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(hf, kind).from_pretrained(folder).eval()
    outputs = run_model(model, expected.pixels)
    if "git" in case.name:
        # GIT norms all tokens, the class that vitlib writes only the pooled one. save() reports it.
        outputs.tokens = None
    return outputs


def run_case(case: Case, model: Any, images: Tensor) -> ReferenceOutputs:
    """Run a model, or its ViT if that is one part, and return the outputs that vitlib has too."""
    name = case.name.partition("/")[0]
    if name == "published" and model.config.model_type not in _REFERENCE_FAMILIES:
        with torch.inference_mode():
            output = model(**reference_towers.model_inputs(model, images))
        has_pooler = "pooler_output" in output and model.config.model_type in _POOLED
        pooled = output.pooler_output if has_pooler else None
        if model.config.model_type == "git_vision_model":
            pooled = output.last_hidden_state[:, 0]
        return ReferenceOutputs(images, None, pooled, output.last_hidden_state)
    if not _is_part(case):
        return run_model(model, images)
    part = _TOWERS[name]
    tokens, pooled = reference_towers.run_tower(part, model, images)
    tower = attrgetter(part.path)(model) if part.path else model
    if name.endswith("classifier"):
        inputs = {"pixel_values": images}
        if name.startswith("siglip2"):
            inputs = reference_towers.pack_patches(images, reference_towers.VISION["patch_size"])
        with torch.inference_mode():
            return ReferenceOutputs(images, model(**inputs).logits, None, tokens)
    if name == "git":
        return ReferenceOutputs(images, None, tokens[:, 0], tokens)
    is_comparable = part.is_pooled and not hasattr(tower, "pooler")
    projection = getattr(model, "visual_projection", None)
    if is_comparable and pooled is not None and isinstance(projection, torch.nn.Linear):
        with torch.inference_mode():
            pooled = projection(pooled)
    return ReferenceOutputs(images, None, pooled if is_comparable else None, tokens)


def run_model(model: Any, images: Tensor) -> ReferenceOutputs:
    """Run a model of a family and return the outputs that vitlib has too."""
    outputs = references.run_reference(model, images)
    pooled = outputs.projected if outputs.projected is not None else outputs.pooled
    # The poolers of these types are a dense layer and a tanh; embed() returns the class token.
    has_tanh = model.config.model_type in ("vit", "deit", "flava_image_model")
    if outputs.logits is not None or (has_tanh and outputs.projected is None):
        pooled = None
    return ReferenceOutputs(images, outputs.logits, pooled, outputs.tokens)


def make_pixels(case: Case, model: Any) -> Tensor:
    """Return two normally distributed images of the model's size."""
    if _is_part(case):
        side = reference_towers.VISION["image_size"]
        return torch.randn(2, 3, side, side)
    if case.name.startswith("published/"):
        side = 3 * model.config.patch_size
        return torch.randn(2, 3, side, side)
    return references.make_pixels(model)


def randomise(model: Any) -> Any:
    """Give a model random weights, positions and tokens large enough to change outputs."""
    references.randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_embedding" in name or name.endswith(("class_embedding", "probe")):
                parameter.normal_(std=0.3)
            # One or two logits may be near zero: rounding would then be a large relative error.
            if name.endswith("classifier.bias") and len(parameter) < 3:
                parameter += 2.0
    return model


# --- random configs -------------------------------------------------------------------------------


def draw_common(draw: Draw, *, square: bool = True, mlp: bool = True) -> dict[str, Any]:
    """Draw the settings that all families have."""
    heads = draw.choice([1, 2, 3, 4, 6])
    patch: Any = draw.choice([2, 3, 4, 5, 7, 8])
    side = patch * draw.choice([1, 2, 3, 4]) + draw.choice([0, 0, 0, 1, patch - 1])
    image: Any = side
    if not square and draw.random() < 0.25:
        image = [side, patch * draw.choice([2, 3, 5])]
    values = {
        "hidden_size": heads * draw.choice([4, 8, 12, 16, 20]),
        "num_attention_heads": heads,
        "num_hidden_layers": draw.choice([1, 2, 2, 3]),
        "image_size": image,
        "patch_size": patch,
        "num_channels": draw.choice([1, 3, 3, 3, 4, 5]),
        "layer_norm_eps": draw.choice([1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 1e-1]),
    }
    name = draw.choice([*ACTIVATIONS, "gelu", "gelu", "gelu", None])
    if draw.random() < 0.06:
        name = draw.choice(REFUSED_ACTIVATIONS)
    if name is not None:
        values["hidden_act"] = name
    if mlp:
        values["intermediate_size"] = draw.choice([5, 17, 24, 32, 50])
    return values


def draw_head(draw: Draw) -> dict[str, Any]:
    """Draw the settings of a head: number of classes, their names, type of problem."""
    count = draw.choice([1, 2, 3, 5, 7])
    values: dict[str, Any] = {"num_labels": count}
    if draw.random() < 0.5:
        values = {"id2label": {i: draw.choice(["crane", f"thing {i}"]) for i in range(count)}}
    if draw.random() < 0.3:
        values["problem_type"] = draw.choice(
            ["single_label_classification", "multi_label_classification", "regression"]
            if count > 1
            else ["regression"]
        )
    return values


def draw_encoder(draw: Draw, *, square: bool = True) -> dict[str, Any]:
    """Draw the settings of the families that follow ViT."""
    rates = {"hidden_dropout_prob": draw.choice([0.0, 0.1])}
    rates["attention_probs_dropout_prob"] = draw.choice([0.0, 0.2])
    return draw_common(draw, square=square) | rates


def draw_vit(draw: Draw) -> tuple[Any, Any]:
    kind = draw.choice([hf.ViTForImageClassification, hf.ViTModel, hf.ViTForMaskedImageModeling])
    values = draw_encoder(draw, square=False) | {"qkv_bias": draw.random() < 0.7}
    if kind is hf.ViTForMaskedImageModeling:
        values["encoder_stride"] = values["patch_size"]
    elif draw.random() < 0.3:
        values["pooler_output_size"] = draw.choice([3, 10])
    return kind, hf.ViTConfig(**values, **draw_head(draw))


def draw_deit(draw: Draw) -> tuple[Any, Any]:
    kinds = [hf.DeiTForImageClassification, hf.DeiTModel]
    kind = draw.choice([*kinds, hf.DeiTForImageClassificationWithTeacher])
    values = draw_encoder(draw, square=False) | {"qkv_bias": draw.random() < 0.7}
    return kind, hf.DeiTConfig(**values, **draw_head(draw))


def draw_mae(draw: Draw) -> tuple[Any, Any]:
    values = draw_encoder(draw) | {"qkv_bias": draw.random() < 0.7, "mask_ratio": 0.0}
    values |= {"decoder_hidden_size": 16, "decoder_intermediate_size": 20}
    values |= {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    return draw.choice([hf.ViTMAEModel, hf.ViTMAEForPreTraining]), hf.ViTMAEConfig(**values)


def draw_msn(draw: Draw) -> tuple[Any, Any]:
    kind = draw.choice([hf.ViTMSNForImageClassification, hf.ViTMSNModel])
    values = draw_encoder(draw) | {"qkv_bias": draw.random() < 0.7}
    return kind, hf.ViTMSNConfig(**values, **draw_head(draw))


def draw_ijepa(draw: Draw) -> tuple[Any, Any]:
    kind = draw.choice([hf.IJepaForImageClassification, hf.IJepaModel])
    values = draw_encoder(draw) | {"qkv_bias": draw.random() < 0.7}
    return kind, hf.IJepaConfig(**values, **draw_head(draw))


def draw_dinov2_values(draw: Draw) -> dict[str, Any]:
    values = draw_common(draw, mlp=False) | {"mlp_ratio": draw.choice([1, 2, 3, 4])}
    values |= {"qkv_bias": draw.random() < 0.7, "use_swiglu_ffn": draw.random() < 0.3}
    return values | {"layerscale_value": draw.choice([1.0, 0.1, 1e-5])}


def draw_dinov2(draw: Draw) -> tuple[Any, Any]:
    kind = draw.choice([hf.Dinov2ForImageClassification, hf.Dinov2Model])
    values = draw_dinov2_values(draw) | {"use_mask_token": draw.random() < 0.5}
    return kind, hf.Dinov2Config(**values, **draw_head(draw))


def draw_registers(draw: Draw) -> tuple[Any, Any]:
    kind = draw.choice([hf.Dinov2WithRegistersForImageClassification, hf.Dinov2WithRegistersModel])
    values = draw_dinov2_values(draw) | {"num_register_tokens": draw.choice([0, 1, 3, 4])}
    return kind, hf.Dinov2WithRegistersConfig(**values, **draw_head(draw))


def draw_tipsv2(draw: Draw) -> tuple[Any, Any]:
    values = draw_dinov2_values(draw) | {"num_register_tokens": draw.choice([1, 2])}
    values["mlp_ratio"] = draw.choice([1, 4, 3.7361, 2.66667])
    return hf.Tipsv2VisionModel, hf.Tipsv2VisionConfig(**values)


def draw_radio(draw: Draw) -> tuple[Any, Any]:
    values = draw_dinov2_values(draw) | {"mlp_ratio": draw.choice([1.0, 4.0, 3.7361, 2.66667])}
    side, patch = values["image_size"], values["patch_size"]
    values["max_img_size"] = draw.choice([side, 2 * side, 3 * patch, 7 * patch])
    count, channels = draw.choice([1, 2, 3, 4]), draw.choice([1, 3, 3])
    # Without a final norm, transformers' tokens of narrower heads are rounded by more than 2e-6.
    values["hidden_size"] *= 4
    values |= {
        "num_channels": channels,
        "num_cls_tokens": count,
        "num_registers": draw.choice([0, 1, 7]),
    }
    # Their order is that of vitlib's tokens only where these come first.
    values["summary_idxs"] = list(range(draw.randint(1, count)))
    values |= {"norm_mean": [draw.choice([0.0, 0.4])] * channels, "norm_std": [0.3] * channels}
    return hf.RadioModel, hf.RadioConfig(**values)


def draw_dinov3(draw: Draw) -> tuple[Any, Any]:
    gated = draw.random() < 0.4
    values = draw_common(draw) | {"use_gated_mlp": gated}
    if gated and draw.random() < 0.8:
        values["hidden_act"] = "silu"
    bias = draw.random() < 0.7
    values |= {"query_bias": bias, "value_bias": bias, "key_bias": bias and draw.random() < 0.4}
    values |= {"num_register_tokens": draw.choice([0, 1, 4])}
    values |= {"rope_theta": draw.choice([10.0, 100.0, 1e4])}
    return hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**values)


def draw_beit_values(draw: Draw) -> dict[str, Any]:
    block, shared = draw.choice([(True, False), (False, True), (False, False)])
    values = draw_encoder(draw) | {"use_relative_position_bias": block}
    values |= {"use_shared_relative_position_bias": shared}
    values |= {"use_absolute_position_embeddings": draw.random() < 0.4}
    values |= {"use_mean_pooling": draw.random() < 0.6, "use_mask_token": draw.random() < 0.4}
    return values | {"layer_scale_init_value": draw.choice([0.1, 1e-5, 0.0])}


def draw_beit(draw: Draw) -> tuple[Any, Any]:
    kinds = [hf.BeitForImageClassification, hf.BeitModel, hf.BeitForMaskedImageModeling]
    kind, values = draw.choice(kinds), draw_beit_values(draw)
    if kind is hf.BeitForMaskedImageModeling:
        values |= {"use_mask_token": True, "vocab_size": 9}
    return kind, hf.BeitConfig(**values, **draw_head(draw))


def draw_data2vec(draw: Draw) -> tuple[Any, Any]:
    kind = draw.choice([hf.Data2VecVisionForImageClassification, hf.Data2VecVisionModel])
    return kind, hf.Data2VecVisionConfig(**draw_beit_values(draw), **draw_head(draw))


def draw_clip(draw: Draw) -> tuple[Any, Any]:
    values = draw_common(draw) | {"attention_dropout": draw.choice([0.0, 0.1])}
    values |= {"projection_dim": draw.choice([6, 20])}
    vision = hf.CLIPVisionConfig(**values)
    kinds = [hf.CLIPForImageClassification, hf.CLIPVisionModel, hf.CLIPVisionModelWithProjection]
    kind = draw.choice([*kinds, hf.CLIPModel])
    if kind in kinds[1:]:
        return kind, vision
    config = references.two_tower_config(
        hf.CLIPConfig,
        vision,
        text_config=references.text_config(hf.CLIPTextConfig),
        projection_dim=20,
    )
    config.hidden_act = vision.hidden_act
    return kind, config


def draw_siglip(draw: Draw) -> tuple[Any, Any]:
    values = draw_common(draw) | {"attention_dropout": draw.choice([0.0, 0.1])}
    vision = hf.SiglipVisionConfig(**values, vision_use_head=draw.random() < 0.7)
    kind = draw.choice([hf.SiglipForImageClassification, hf.SiglipVisionModel, hf.SiglipModel])
    if kind is hf.SiglipVisionModel:
        return kind, vision
    if kind is hf.SiglipModel:  # it needs the output of the attention pool
        vision.vision_use_head = True
    text = references.text_config(hf.SiglipTextConfig)
    config = references.two_tower_config(hf.SiglipConfig, vision, text_config=text)
    config.hidden_act = vision.hidden_act
    return kind, config


FAMILIES: dict[str, Callable[[Draw], tuple[Any, Any]]] = {
    "vit": draw_vit,
    "deit": draw_deit,
    "vit_mae": draw_mae,
    "vit_msn": draw_msn,
    "ijepa": draw_ijepa,
    "dinov2": draw_dinov2,
    "dinov2_with_registers": draw_registers,
    "tipsv2_vision_model": draw_tipsv2,
    "radio": draw_radio,
    "dinov3_vit": draw_dinov3,
    "beit": draw_beit,
    "data2vec-vision": draw_data2vec,
    "clip": draw_clip,
    "siglip": draw_siglip,
}


def draw_config(family: str, index: int) -> tuple[Any, Any]:
    """Return the class and the config of a case, the same at every call."""
    return FAMILIES[family](random.Random(f"{family} {index}"))


# --- parts of models, and published shapes --------------------------------------------------------


def draw_variant(draw: Draw) -> None:
    """Draw settings of the ViTs in reference_towers on which their other parts do not depend."""
    values = {
        "num_attention_heads": draw.choice([1, 2, 3, 4, 6, 8]),
        "layer_norm_eps": draw.choice([1e-12, 1e-6, 1e-5, 1e-3]),
        "hidden_act": draw.choice(list(ACTIVATIONS)),
        "num_hidden_layers": draw.choice([1, 2, 3]),
    }
    reference_towers.VISION.update(values, intermediate_size=draw.choice([20, 33, 96]))
    reference_towers.DINO.update(values)


# Classes of model types that AutoModel does not have.
_CLASSES = {
    "owlvit_vision_model": "OwlViTVisionModel",
    "git_vision_model": "GitVisionModel",
    "clipseg_vision_model": "CLIPSegVisionModel",
    "janus_vision_model": "JanusVisionModel",
    "blip_vision_model": "BlipVisionModel",
    "blip_2_vision_model": "Blip2VisionModel",
}


def build_published(repository: str) -> Any:
    """Build a model with the shape of a published one, but two blocks and few patches."""
    row = next(row for row in list_published() if row.repository == repository)
    config = hf.AutoConfig.for_model(row.model_type)
    config.hidden_size, config.num_attention_heads = row.embed_dim, row.num_heads
    config.num_hidden_layers = 1 if row.embed_dim > 1500 else 2
    config.patch_size = row.patches[0]
    if row.model_type == "siglip2_vision_model":
        config.num_patches = 9
    else:
        config.image_size = 3 * row.patches[0]
    gated = row.activation == "swiglu"
    if "dinov2" in row.model_type or row.model_type in ("radio", "tipsv2_vision_model"):
        config.use_swiglu_ffn = gated
    elif row.model_type == "dinov3_vit":
        config.use_gated_mlp, config.hidden_act = gated, "silu" if gated else "gelu"
        config.num_register_tokens = 4
    elif row.activation:
        config.hidden_act = row.activation
    if row.model_type == "ijepa":
        config.layer_norm_eps = 1e-6
    if row.model_type in ("beit", "data2vec-vision"):
        config.use_relative_position_bias = True
    config.intermediate_size = row.mlp_dim
    if row.model_type == "radio":
        config.max_img_size = 6 * row.patches[0]
    if row.model_type in ("radio", "tipsv2_vision_model") and not gated:
        config.mlp_ratio = (row.mlp_dim + 0.5) / row.embed_dim
    if row.model_type == "janus_vision_model":
        config.mlp_ratio = row.mlp_dim / row.embed_dim
    if row.model_type == "vit_mae":
        config.mask_ratio = 0.0
    if row.model_type in _CLASSES:
        return randomise(getattr(hf, _CLASSES[row.model_type])(config))
    if "dino-" in repository:
        return randomise(hf.ViTModel(config, add_pooling_layer=False))
    return randomise(hf.AutoModel.from_config(config))
