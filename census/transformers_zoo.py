"""transformers' zoo: the families with odd configs, the ViTs within other models, published shapes.

The builders are those of the tests of the tests in tests/fixtures; here their numbers are
drawn, seeded by the case's name. Three groups of cases:

    FAMILY/odd N      a family with widths, heads, grids, eps, GELU, biases and heads of its own
    TYPE/variant N    a model of which a ViT is one part, with other heads, eps and GELU
    published/ID      a published model's shape, two blocks deep: what a bare file may say
"""

# ruff: noqa: E402  (a module is hidden before transformers looks for it)
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

sys.modules["torchvision"] = None  # type: ignore[assignment]  # whose operators do not load here

import transformers as hf

from census.case import Answer, Case
from vitlib.checkpoint.layouts.hf_config import ACTIVATIONS
from vitlib.checkpoint.layouts.hf_types import list_published

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from fixtures import reference_towers, references

hf.logging.set_verbosity_error()
hf.utils.logging.disable_progress_bar()

LAYOUT = "hf"
ODD = 250  # configs of each family
VARIANTS = 6  # of each model of which a ViT is one part
REFUSED_ACTIVATIONS = ("relu", "silu", "gelu_10", "mish", "tanh")
Draw = random.Random


def cases() -> list[Case]:
    """Every case, in an order that spreads the slow ones."""
    found = [
        Case(f"{family}/odd {i}", f"{family} (odd configs)", expected(family, i))
        for i in range(ODD)
        for family in FAMILIES
    ]
    found += [
        Case(f"{name}/variant {i}", f"{name} (part of a model)")
        for i in range(VARIANTS)
        for name in reference_towers.TOWERS
    ]
    found += [
        Case(f"published/{row.repository}", row.repository)
        for row in list_published()
        if row.model_type != "kosmos_2_vision_model"
    ]
    return found


def expected(family: str, index: int) -> str:
    """A config with a function that vitlib does not compute is refused."""
    _, config = odd(family, index)
    gated = getattr(config, "use_gated_mlp", False)
    if getattr(config, "use_swiglu_ffn", False):
        return "equal"
    known = config.hidden_act == "silu" if gated else config.hidden_act in ACTIVATIONS
    return "equal" if known else "refused"


def make(case: Case, folder: Path) -> Answer:
    """Build the model, save it as transformers does, and return transformers' numbers."""
    seed = zlib.crc32(case.name.encode())
    torch.manual_seed(seed)
    group, _, rest = case.name.partition("/")
    if group == "published":
        model = published(rest)
    elif rest.startswith("variant"):
        with_numbers(random.Random(seed))
        model = reference_towers.build(group)
    else:
        kind, config = odd(group, int(rest.removeprefix("odd ")))
        model = randomised(kind(config))
    model.save_pretrained(folder)
    torch.manual_seed(seed)
    return answer(case, model, pixels_of(case, model))


def reopen(case: Case, folder: Path, answer_: Answer) -> Answer:
    """Open what vitlib wrote with the class that its config.json names."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(hf, kind).from_pretrained(folder).eval()
    found = ask(model, answer_.pixels)
    if "git" in case.name:  # its tokens are normed, which save() names as lost; pooled is the same
        found.tokens = None
    return found


def answer(case: Case, model: Any, images: Tensor) -> Answer:
    """What a model gives; of a part, the part's tokens and pooled vector."""
    name = case.name.partition("/")[0]
    if name == "published" and model.config.model_type not in _OF_FAMILIES:
        with torch.inference_mode():
            out = model(**reference_towers.inputs(model, images))
        pools = "pooler_output" in out and model.config.model_type in _POOLED
        pooled = out.pooler_output if pools else None
        if model.config.model_type == "git_vision_model":
            pooled = out.last_hidden_state[:, 0]
        return Answer(images, None, pooled, out.last_hidden_state)
    if name not in reference_towers.TOWERS or "/variant" not in case.name:
        return ask(model, images)
    tokens, pooled = reference_towers.ask(name, model, images)
    tower = attrgetter(reference_towers.TOWERS[name].path)(model)
    if name.endswith("classifier"):
        given = {"pixel_values": images}
        if name.startswith("siglip2"):
            given = reference_towers.packed(images, reference_towers.VISION["patch_size"])
        with torch.inference_mode():
            return Answer(images, model(**given).logits, None, tokens)
    if name == "git":
        return Answer(images, None, tokens[:, 0], tokens)
    comparable = reference_towers.TOWERS[name].pooled and not hasattr(tower, "pooler")
    projection = getattr(model, "visual_projection", None)
    if comparable and pooled is not None and isinstance(projection, torch.nn.Linear):
        with torch.inference_mode():
            pooled = projection(pooled)
    return Answer(images, None, pooled if comparable else None, tokens)


_OF_FAMILIES = (*references._RESIZING, "dinov2", "dinov2_with_registers", "dinov3_vit")
_OF_FAMILIES += ("data2vec-vision", "clip_vision_model", "siglip_vision_model")
_POOLED = ("owlvit_vision_model", "kosmos_2_vision_model", "clipseg_vision_model")
_POOLED += ("siglip2_vision_model",)


def ask(model: Any, images: Tensor) -> Answer:
    """What a model of one of the families gives, where vitlib's has the same."""
    found = references.ask(model, images)
    pooled = found.projected if found.projected is not None else found.pooled
    tanh = model.config.model_type in ("vit", "deit", "flava_image_model")
    if found.logits is not None or (tanh and found.projected is None):
        pooled = None
    return Answer(images, found.logits, pooled, found.tokens)


def pixels_of(case: Case, model: Any) -> Tensor:
    """Normal pixels of the size that the model learned."""
    if "/variant" in case.name:
        side = reference_towers.VISION["image_size"]
        return torch.randn(2, 3, side, side)
    if case.name.startswith("published/"):
        side = 3 * model.config.patch_size
        return torch.randn(2, 3, side, side)
    return references.pixels(model)


def randomised(model: Any) -> Any:
    """Random weights; positions and tokens that are tables of rows are large enough to matter."""
    references.randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_embedding" in name or name.endswith(("class_embedding", "probe")):
                parameter.normal_(std=0.3)
            # One or two logits near zero are what is left of larger terms: rounding, no error.
            if name.endswith("classifier.bias") and len(parameter) < 3:
                parameter += 2.0
    return model


# --- odd configs ----------------------------------------------------------------------------------


def common(draw: Draw, *, square: bool = True, mlp: bool = True) -> dict[str, Any]:
    """Numbers that every family has."""
    heads = draw.choice([1, 2, 3, 4, 6])
    patch: Any = draw.choice([2, 3, 4, 5, 7, 8])
    side = patch * draw.choice([1, 2, 3, 4]) + draw.choice([0, 0, 0, 1, patch - 1])
    image: Any = side
    if not square and draw.random() < 0.25:
        image = [side, patch * draw.choice([2, 3, 5])]
    found = {
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
        found["hidden_act"] = name
    if mlp:
        found["intermediate_size"] = draw.choice([5, 17, 24, 32, 50])
    return found


def labels(draw: Draw) -> dict[str, Any]:
    """Of a head: how many classes, how they are called, for what problem."""
    count = draw.choice([1, 2, 3, 5, 7])
    found: dict[str, Any] = {"num_labels": count}
    if draw.random() < 0.5:
        found = {"id2label": {i: draw.choice(["crane", f"thing {i}"]) for i in range(count)}}
    if draw.random() < 0.3:
        found["problem_type"] = draw.choice(
            ["single_label_classification", "multi_label_classification", "regression"]
            if count > 1
            else ["regression"]
        )
    return found


def encoder(draw: Draw, *, square: bool = True) -> dict[str, Any]:
    """Numbers of the families that follow ViT."""
    rates = {"hidden_dropout_prob": draw.choice([0.0, 0.1])}
    rates["attention_probs_dropout_prob"] = draw.choice([0.0, 0.2])
    return common(draw, square=square) | rates


def draw_vit(draw: Draw) -> tuple[Any, Any]:
    kind = draw.choice([hf.ViTForImageClassification, hf.ViTModel, hf.ViTForMaskedImageModeling])
    values = encoder(draw, square=False) | {"qkv_bias": draw.random() < 0.7}
    if kind is hf.ViTForMaskedImageModeling:
        values["encoder_stride"] = values["patch_size"]
    elif draw.random() < 0.3:
        values["pooler_output_size"] = draw.choice([3, 10])
    return kind, hf.ViTConfig(**values, **labels(draw))


def draw_deit(draw: Draw) -> tuple[Any, Any]:
    kinds = [hf.DeiTForImageClassification, hf.DeiTModel]
    kind = draw.choice([*kinds, hf.DeiTForImageClassificationWithTeacher])
    values = encoder(draw, square=False) | {"qkv_bias": draw.random() < 0.7}
    return kind, hf.DeiTConfig(**values, **labels(draw))


def draw_mae(draw: Draw) -> tuple[Any, Any]:
    values = encoder(draw) | {"qkv_bias": draw.random() < 0.7, "mask_ratio": 0.0}
    values |= {"decoder_hidden_size": 16, "decoder_intermediate_size": 20}
    values |= {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    return draw.choice([hf.ViTMAEModel, hf.ViTMAEForPreTraining]), hf.ViTMAEConfig(**values)


def draw_msn(draw: Draw) -> tuple[Any, Any]:
    kind = draw.choice([hf.ViTMSNForImageClassification, hf.ViTMSNModel])
    values = encoder(draw) | {"qkv_bias": draw.random() < 0.7}
    return kind, hf.ViTMSNConfig(**values, **labels(draw))


def draw_ijepa(draw: Draw) -> tuple[Any, Any]:
    kind = draw.choice([hf.IJepaForImageClassification, hf.IJepaModel])
    values = encoder(draw) | {"qkv_bias": draw.random() < 0.7}
    return kind, hf.IJepaConfig(**values, **labels(draw))


def _dinov2(draw: Draw) -> dict[str, Any]:
    values = common(draw, mlp=False) | {"mlp_ratio": draw.choice([1, 2, 3, 4])}
    values |= {"qkv_bias": draw.random() < 0.7, "use_swiglu_ffn": draw.random() < 0.3}
    return values | {"layerscale_value": draw.choice([1.0, 0.1, 1e-5])}


def draw_dinov2(draw: Draw) -> tuple[Any, Any]:
    kind = draw.choice([hf.Dinov2ForImageClassification, hf.Dinov2Model])
    values = _dinov2(draw) | {"use_mask_token": draw.random() < 0.5}
    return kind, hf.Dinov2Config(**values, **labels(draw))


def draw_registers(draw: Draw) -> tuple[Any, Any]:
    kind = draw.choice([hf.Dinov2WithRegistersForImageClassification, hf.Dinov2WithRegistersModel])
    values = _dinov2(draw) | {"num_register_tokens": draw.choice([0, 1, 3, 4])}
    return kind, hf.Dinov2WithRegistersConfig(**values, **labels(draw))


def draw_dinov3(draw: Draw) -> tuple[Any, Any]:
    gated = draw.random() < 0.4
    values = common(draw) | {"use_gated_mlp": gated}
    if gated and draw.random() < 0.8:
        values["hidden_act"] = "silu"
    bias = draw.random() < 0.7
    values |= {"query_bias": bias, "value_bias": bias, "key_bias": bias and draw.random() < 0.4}
    values |= {"num_register_tokens": draw.choice([0, 1, 4])}
    values |= {"rope_theta": draw.choice([10.0, 100.0, 1e4])}
    return hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**values)


def _beit(draw: Draw) -> dict[str, Any]:
    block, shared = draw.choice([(True, False), (False, True), (False, False)])
    values = encoder(draw) | {"use_relative_position_bias": block}
    values |= {"use_shared_relative_position_bias": shared}
    values |= {"use_absolute_position_embeddings": draw.random() < 0.4}
    values |= {"use_mean_pooling": draw.random() < 0.6, "use_mask_token": draw.random() < 0.4}
    return values | {"layer_scale_init_value": draw.choice([0.1, 1e-5, 0.0])}


def draw_beit(draw: Draw) -> tuple[Any, Any]:
    kinds = [hf.BeitForImageClassification, hf.BeitModel, hf.BeitForMaskedImageModeling]
    kind, values = draw.choice(kinds), _beit(draw)
    if kind is hf.BeitForMaskedImageModeling:
        values |= {"use_mask_token": True, "vocab_size": 9}
    return kind, hf.BeitConfig(**values, **labels(draw))


def draw_data2vec(draw: Draw) -> tuple[Any, Any]:
    kind = draw.choice([hf.Data2VecVisionForImageClassification, hf.Data2VecVisionModel])
    return kind, hf.Data2VecVisionConfig(**_beit(draw), **labels(draw))


def draw_clip(draw: Draw) -> tuple[Any, Any]:
    own = common(draw) | {"attention_dropout": draw.choice([0.0, 0.1])}
    own |= {"projection_dim": draw.choice([6, 20])}
    vision = hf.CLIPVisionConfig(**own)
    kinds = [hf.CLIPForImageClassification, hf.CLIPVisionModel, hf.CLIPVisionModelWithProjection]
    kind = draw.choice([*kinds, hf.CLIPModel])
    if kind in kinds[1:]:
        return kind, vision
    config = references._full(
        hf.CLIPConfig, vision, text_config=references._text(hf.CLIPTextConfig), projection_dim=20
    )
    config.hidden_act = vision.hidden_act
    return kind, config


def draw_siglip(draw: Draw) -> tuple[Any, Any]:
    own = common(draw) | {"attention_dropout": draw.choice([0.0, 0.1])}
    vision = hf.SiglipVisionConfig(**own, vision_use_head=draw.random() < 0.7)
    kind = draw.choice([hf.SiglipForImageClassification, hf.SiglipVisionModel, hf.SiglipModel])
    if kind is hf.SiglipVisionModel:
        return kind, vision
    if kind is hf.SiglipModel:  # it compares what the pool gives
        vision.vision_use_head = True
    text = references._text(hf.SiglipTextConfig)
    config = references._full(hf.SiglipConfig, vision, text_config=text)
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
    "dinov3_vit": draw_dinov3,
    "beit": draw_beit,
    "data2vec-vision": draw_data2vec,
    "clip": draw_clip,
    "siglip": draw_siglip,
}


def odd(family: str, index: int) -> tuple[Any, Any]:
    """The class and config of a case, always the same."""
    return FAMILIES[family](random.Random(f"{family} {index}"))


# --- parts of models, and published shapes --------------------------------------------------------


def with_numbers(draw: Draw) -> None:
    """Give the ViTs of oracle_towers other numbers, which their other parts do not depend on."""
    numbers = {
        "num_attention_heads": draw.choice([1, 2, 3, 4, 6, 8]),
        "layer_norm_eps": draw.choice([1e-12, 1e-6, 1e-5, 1e-3]),
        "hidden_act": draw.choice(list(ACTIVATIONS)),
        "num_hidden_layers": draw.choice([1, 2, 3]),
    }
    reference_towers.VISION.update(numbers, intermediate_size=draw.choice([20, 33, 96]))
    reference_towers.DINO.update(numbers)


# Classes that AutoModel does not know. Kosmos has none of its own: it is among the variants.
_ALONE = {
    "owlvit_vision_model": "OwlViTVisionModel",
    "git_vision_model": "GitVisionModel",
    "clipseg_vision_model": "CLIPSegVisionModel",
    "janus_vision_model": "JanusVisionModel",
    "blip_vision_model": "BlipVisionModel",
    "blip_2_vision_model": "Blip2VisionModel",
}


def published(repository: str) -> Any:
    """A model of a published shape, two blocks deep and of few patches."""
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
    if "dinov2" in row.model_type:
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
    if row.model_type == "janus_vision_model":
        config.mlp_ratio = row.mlp_dim / row.embed_dim
    if row.model_type == "vit_mae":
        config.mask_ratio = 0.0
    if row.model_type in _ALONE:
        return randomised(getattr(hf, _ALONE[row.model_type])(config))
    if "dino-" in repository:
        return randomised(hf.ViTModel(config, add_pooling_layer=False))
    return randomised(hf.AutoModel.from_config(config))
