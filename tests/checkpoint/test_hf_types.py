"""Model types of transformers of which a ViT is one part: its numbers, and what is left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers as hf
from PIL import Image

import vitlib
from fixtures import reference_towers, references
from paths import FIXTURES
from vitlib.checkpoint.layouts.hf import read_config
from vitlib.checkpoint.layouts.hf_config import ACTIVATIONS, parse_activation
from vitlib.checkpoint.layouts.hf_types import (
    REASONS,
    find_tower_config,
    list_containers,
    list_types,
)
from vitlib.encoder import MLP

TINY = 2e-6


def saved(name: str, folder: Path) -> hf.PreTrainedModel:
    model = reference_towers.build(name)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", reference_towers.TOWERS)
def test_the_vit_of_a_larger_model(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = saved(name, tmp_path)
    model = vitlib.load(tmp_path)
    assert ("not loaded: " in caplog.text) == ("classifier" not in name)
    for size in ((32, 32), (43, 24)):
        images = torch.randn(2, 3, *size)
        tokens, pooled = reference_towers.ask(name, reference, images)
        with torch.inference_mode():
            ours = model.forward_features(images)
            assert references.distance(ours, tokens) < TINY
            if pooled is not None and reference_towers.TOWERS[name].pooled:
                other = model.pool(ours) if model.pooler is None else model.forward_pooler(images)
                assert references.distance(other, pooled) < TINY


@pytest.mark.parametrize("name", ["metaclip_2 classifier", "siglip2 classifier"])
def test_a_classifier_of_a_larger_model(name: str, tmp_path: Path) -> None:
    reference = saved(name, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    given = reference_towers.packed(images, 8) if "siglip2" in name else {"pixel_values": images}
    with torch.inference_mode():
        logits = reference(**given).logits
        model = vitlib.load(tmp_path)
        assert references.distance(model(images), logits) < TINY
    assert model.config.labels == tuple(references.LABELS["id2label"].values())


@pytest.mark.parametrize("name", ["owlv2 both towers", "vision-text-dual-encoder"])
def test_projection_of_a_dual_encoder(name: str, tmp_path: Path) -> None:
    reference = saved(name, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        projected = reference.get_image_features(pixel_values=images).pooler_output
        assert references.distance(vitlib.load(tmp_path)(images), projected) < TINY


def test_parts_left_out_are_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved("llava", tmp_path)
    vitlib.load(tmp_path)
    for part in ("language_model (12 tensors)", "multi_modal_projector (4 tensors)"):
        assert part in caplog.text


@pytest.mark.parametrize("name", ["siglip2", "idefics3", "git", "dpt", "blip-2"])
def test_a_part_opens_alone_in_transformers(name: str, tmp_path: Path) -> None:
    """Written as the family that computes the same on the learned grid."""
    saved(name, tmp_path / "whole")
    model = vitlib.load(tmp_path / "whole")
    lost = vitlib.save(model, tmp_path / "vit")
    assert lost.keys() <= {"position_resize", "final_norm"}
    opened = hf.AutoModel.from_pretrained(tmp_path / "vit").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        out = opened(images)
        wanted = model(images)
        ours = out.pooler_output if name in ("siglip2", "git") else out.last_hidden_state[:, 0]
        if name == "idefics3":
            ours = out.last_hidden_state.mean(dim=1)
        assert references.distance(wanted, ours) < TINY


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", list_types())
def test_defaults_are_transformers(model_type: str) -> None:
    """What a config leaves out is what its class in transformers takes."""
    _, family = list_types()[model_type]
    config = hf.AutoConfig.for_model(model_type)
    for ours, (key, default) in family.numbers.items():
        if hasattr(config, key) and (ours != "image_size" or model_type != "siglip2_vision_model"):
            assert getattr(config, key) == default, key
    assert config.hidden_act == family.activation


@pytest.mark.parametrize("model_type", list_containers())
def test_defaults_of_a_part_are_transformers(model_type: str) -> None:
    container = list_containers()[model_type]
    if not container.model_type:  # a dual encoder has no default
        return
    config = getattr(hf.AutoConfig.for_model(model_type), container.key)
    assert config.model_type == container.model_type
    _, family, flat = find_tower_config({"model_type": model_type})
    assert family.model_type == config.model_type
    for key, default in family.numbers.values():
        if hasattr(config, key):
            assert flat.get(key, default) == getattr(config, key), key
    assert flat.get("vision_use_head", True) == getattr(config, "vision_use_head", True)


# Keys that no number of the ViT's forward depends on, and why.
HARMLESS = {
    "initializer_range", "initializer_factor",  # of training from scratch
    "hidden_dropout_rate", "projection_dropout",  # of training
    "pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale",  # of training
    "mask_ratio", "norm_pix_loss", "encoder_stride", "vocab_size", "mask_token",  # masked images
    "decoder_num_attention_heads", "decoder_hidden_size", "decoder_num_hidden_layers",
    "decoder_intermediate_size",
    "use_mask_token",  # tensors say it
    "apply_layernorm", "reshape_hidden_states", "stage_names", "out_features", "out_indices",
    "add_fpn", "pool_scales", "use_auxiliary_head", "auxiliary_loss_weight", "auxiliary_channels",
    "auxiliary_num_convs", "auxiliary_concat_input", "semantic_loss_ignore_index",
    "semantic_classifier_dropout", "readout_type", "reassemble_factors", "neck_hidden_sizes",
    "fusion_hidden_size", "head_in_index", "use_batch_norm_in_fusion_residual",
    "use_bias_in_fusion_residual", "add_projection", "backbone_out_indices", "neck_ignore_stages",
    "backbone_featmap_shape",  # of what reads the ViT
    "depth", "num_image_tokens",  # of Janus's aligner
    "image_size",  # of NaFlex's class alone, where num_patches says it
}  # fmt: skip
SPECIAL = {
    "hidden_act", "mlp_ratio", "use_swiglu_ffn", "use_gated_mlp", "use_qk_norm", "attention_bias",
    "value_bias", "proj_bias", "mlp_bias", "use_relative_position_bias", "num_patches",
    "use_shared_relative_position_bias", "use_mean_pooling", "pooler_act", "is_hybrid",
    "backbone_config", "vision_use_head", "pooler_output_size", "projection_dim",
}  # fmt: skip


@pytest.mark.parametrize("model_type", list_types())
def test_every_key_is_read_or_known_to_be_harmless(model_type: str) -> None:
    _, family = list_types()[model_type]
    base = hf.PreTrainedConfig().to_dict().keys()
    keys = hf.AutoConfig.for_model(model_type).to_dict().keys() - base
    read = {key for key, _ in family.numbers.values()}
    assert keys - read - SPECIAL - HARMLESS - {"model_type"} == set()


def test_a_second_config_of_clip_wins(tmp_path: Path) -> None:
    references.saved("clip both towers", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["vision_config_dict"] = {**config["vision_config"], "hidden_act": "gelu"}
    path.write_text(json.dumps(config))
    reference = hf.CLIPModel.from_pretrained(tmp_path).eval()
    assert reference.config.vision_config.hidden_act == "gelu"
    model = vitlib.load(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        theirs = reference.get_image_features(pixel_values=images).pooler_output
        assert model.config.activation == "gelu"
        assert references.distance(model(images), theirs) < TINY


def test_outer_numbers_are_not_the_parts(tmp_path: Path) -> None:
    """PaliGemma's own hidden_size and projection_dim are its language model's."""
    saved("paligemma", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["vision_config"]["hidden_act"], config["vision_config"]["layer_norm_eps"]
    config |= {"hidden_act": "relu", "layer_norm_eps": 0.5, "num_attention_heads": 3}
    path.write_text(json.dumps(config))
    assert vitlib.load(tmp_path).config.activation == "gelu_tanh"
    assert vitlib.load(tmp_path).config.norm_eps == 1e-6


@pytest.mark.parametrize("name", ["gelu_python", "gelu_python_tanh", "gelu_new", "gelu_fast",
                                  "gelu_accurate", "gelu_pytorch_tanh", "quick_gelu"])  # fmt: skip
def test_other_names_of_gelu(name: str) -> None:
    x = torch.linspace(-30, 30, 20001)
    ours = activate(ACTIVATIONS[name], x)
    assert references.distance(ours, hf.activations.ACT2FN[name](x)) < TINY


def test_gelu_that_is_cut_off_is_refused() -> None:
    x = torch.linspace(-30, 30, 20001)
    assert references.distance(activate("gelu", x), hf.activations.ACT2FN["gelu_10"](x)) > 1
    with pytest.raises(vitlib.VitlibError, match="hidden_act 'gelu_10'"):
        parse_activation({"hidden_act": "gelu_10"}, list_types()["vit"][1])


def activate(name: str, x: torch.Tensor) -> torch.Tensor:
    mlp = MLP(vitlib.ViTConfig(activation=name, embed_dim=4, num_heads=1, depth=1))  # type: ignore[arg-type]
    mlp.fc1 = mlp.fc2 = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        return mlp(x)


@pytest.mark.parametrize("model_type", [*REASONS, "vivitt", "my_vit"])
def test_other_types_are_refused_by_name(model_type: str) -> None:
    with pytest.raises(vitlib.VitlibError, match=f"model_type '{model_type}'") as error:
        find_tower_config({"model_type": model_type})
    assert REASONS.get(model_type, "") in str(error.value)
    assert "'vit'" in str(error.value)
    with pytest.raises(vitlib.VitlibError, match=f"vision_config of type '{model_type}'"):
        find_tower_config({"model_type": "llava", "vision_config": {"model_type": model_type}})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"vision_config": 3}, "expected vision_config to be an object"),
        ({"vision_config": {"model_type": "clip_vision_model", "num_attention_heads": 4}}, "width"),
    ],
)
def test_a_part_that_is_not_described(change: dict[str, object], told: str, tmp_path: Path) -> None:
    saved("llava", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(vitlib.VitlibError) as error:
        vitlib.load(tmp_path)
    assert told in str(error.value) or "contradicts the tensors" in str(error.value)


def test_a_hybrid_dpt_is_refused() -> None:
    with pytest.raises(vitlib.VitlibError, match="is_hybrid"):
        find_tower_config({"model_type": "dpt", "is_hybrid": True})
    with pytest.raises(vitlib.VitlibError, match="backbone_config of type 'bit'"):
        find_tower_config({"model_type": "dpt", "backbone_config": {"model_type": "bit"}})


def test_norms_of_queries_are_refused() -> None:
    config = {"model_type": "janus_vision_model", "use_qk_norm": True}
    with pytest.raises(vitlib.VitlibError, match="use_qk_norm True"):
        read_config(config, {})


def test_positions_that_transformers_rounds_away_are_refused() -> None:
    config = {"model_type": "idefics3_vision", "image_size": 19 * 14, "patch_size": 14}
    with pytest.raises(vitlib.VitlibError, match="19x19 patches"):
        read_config(config, {})


def test_biases_of_dinov3_are_refused_by_name() -> None:
    for key, told in (("value_bias", "value_bias False"), ("mlp_bias", "mlp_bias False")):
        with pytest.raises(vitlib.VitlibError, match=told):
            read_config({"model_type": "dinov3_vit", key: False}, {})
    config = {"model_type": "dinov3_vit", "query_bias": False, "value_bias": False}
    with pytest.raises(vitlib.VitlibError, match="key_bias True with query_bias False"):
        read_config({**config, "key_bias": True}, {})


@pytest.mark.parametrize("name", ["vit", "dinov2", "beit", "clip", "siglip", "dinov3"])
@pytest.mark.parametrize("head_dim", [12, 24, None])
def test_a_head_dim_of_another_width_is_refused(
    head_dim: int | None, name: str, tmp_path: Path
) -> None:
    """transformers refuses it where its attention reads the key, and passes it over elsewhere."""
    reference = references.build(name)
    reference.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    inner = config.get("vision_config", config)
    assert inner["hidden_size"] // inner["num_attention_heads"] == 12
    inner["head_dim"] = head_dim
    path.write_text(json.dumps(config))
    try:
        type(reference).from_pretrained(tmp_path)
    except (RuntimeError, TypeError):
        with pytest.raises(vitlib.VitlibError, match=r"head_dim .* take head_dim out"):
            vitlib.load(tmp_path)
        del inner["head_dim"]
        path.write_text(json.dumps(config))
    assert vitlib.load(tmp_path).config.head_dim == 12


def test_registers_without_a_patch_size_have_sixteen(tmp_path: Path) -> None:
    config = references._registers(patch_size=16, image_size=64)
    references.randomise(hf.Dinov2WithRegistersModel(config)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    del written["patch_size"]
    path.write_text(json.dumps(written))
    assert vitlib.load(tmp_path).config.patch_size == (16, 16)


@pytest.mark.parametrize("kind", ["beit", "data2vec"])
def test_a_masked_model_that_norms_every_token(kind: str, tmp_path: Path) -> None:
    """Its head has a second norm, of the same name but for the prefix."""
    config = references._beit(vocab_size=9, use_mask_token=True, use_mean_pooling=False)
    reference = references.randomise(hf.BeitForMaskedImageModeling(config))
    reference.save_pretrained(tmp_path)
    if kind == "data2vec":
        path = tmp_path / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        tensors = {k.replace("beit.", "data2vec_vision."): t for k, t in tensors.items()}
        safetensors.torch.save_file(tensors, path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(
            json.dumps({**config, "model_type": "data2vec-vision"})
        )
    model = vitlib.load(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        theirs = reference.beit(images).last_hidden_state
        assert references.distance(model.forward_features(images), theirs) < TINY


# --- a config.json that contradicts the tensors ---------------------------------------------------

CONTRADICTIONS = [
    ("beit", "use_mean_pooling", False, "beit.pooler.layernorm.weight"),
    ("beit base", "use_mean_pooling", False, "pooler.layernorm.weight"),
    ("beit class token", "use_mean_pooling", True, "layernorm.weight"),
    ("data2vec", "use_mean_pooling", False, "data2vec_vision.pooler.layernorm.weight"),
    ("vit base", "pooler_output_size", 33, "48"),
    ("clip projection", "projection_dim", 33, "20"),
    ("clip both towers", "projection_dim", 33, "20"),
    ("chinese_clip", "projection_dim", 33, "20"),
    ("altclip", "projection_dim", 33, "20"),
    ("metaclip_2", "projection_dim", 33, "20"),
    ("owlv2 both towers", "projection_dim", 33, "20"),
    ("vision-text-dual-encoder", "projection_dim", 33, "20"),
    ("siglip base", "vision_use_head", False, "a pooling head"),
    ("siglip no pool", "vision_use_head", True, "no pooling head"),
    ("siglip2", "vision_use_head", False, "a pooling head"),
    ("siglip both towers", "vision_use_head", False, "a pooling head"),
]


def change(folder: Path, key: str, value: object) -> object:
    """Change a key of the ViT's own config or else of the whole; return its value before."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    part = config if key in config else config.get("vision_config", config)
    before = part.get(key)
    path.write_text(json.dumps(config | {key: value}))
    if part is not config:
        path.write_text(json.dumps({**config, "vision_config": {**part, key: value}}))
    return before


@pytest.mark.parametrize(("name", "key", "value", "held"), CONTRADICTIONS)
def test_a_part_that_contradicts_the_tensors(
    name: str, key: str, value: object, held: str, tmp_path: Path
) -> None:
    """transformers takes such a folder, and draws the part at random or drops its tensors."""
    kind = type(
        references.saved(name, tmp_path) if name in references.MODELS else saved(name, tmp_path)
    )
    vitlib.load(tmp_path)
    before = change(tmp_path, key, value)
    _, info = kind.from_pretrained(tmp_path, output_loading_info=True, ignore_mismatched_sizes=True)
    assert any(info.values())
    told = f"config.json contradicts the tensors: {key} {value} (the tensors have {held})"
    with pytest.raises(vitlib.VitlibError, match=re.escape(told)):
        vitlib.load(tmp_path)
    change(tmp_path, key, before)
    vitlib.load(tmp_path)


def test_a_tower_of_another_model_may_be_without_a_head(tmp_path: Path) -> None:
    """Such a model takes the tower's tokens; SigLIP itself would draw a head at random."""
    saved("llava_onevision", tmp_path)
    expected = vitlib.load(tmp_path).config
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["vision_config"].pop("vision_use_head") is False
    path.write_text(json.dumps(config))
    assert vitlib.load(tmp_path).config == expected
    change(tmp_path, "vision_use_head", True)
    with pytest.raises(vitlib.VitlibError, match="vision_use_head True"):
        vitlib.load(tmp_path)


FLIPS: dict[str, object] = {
    "use_mask_token": None,  # None: the other of true and false
    "qkv_bias": None,
    "query_bias": None,
    "key_bias": None,
    "use_relative_position_bias": None,
    "use_shared_relative_position_bias": None,
    "use_absolute_position_embeddings": None,
    "use_mean_pooling": None,
    "use_swiglu_ffn": None,
    "use_gated_mlp": None,
    "vision_use_head": None,
    "layer_scale_init_value": 0.0,
    "num_register_tokens": 7,
    "num_hidden_layers": 1,
}
SWEPT = ["vit", "deit", "dinov2", "registers", "dinov3", "beit", "beit shared", "beit no gains"]


@pytest.mark.parametrize("name", [*SWEPT, "beit class token", "siglip", "siglip base"])
def test_any_changed_key_is_refused_or_as_in_transformers(name: str, tmp_path: Path) -> None:
    reference = references.saved(name, tmp_path)
    images = references.pixels(reference)
    text = (tmp_path / "config.json").read_text()
    known = [key for key in FLIPS if f'"{key}"' in text]
    assert known
    for key in known:
        (tmp_path / "config.json").write_text(text)
        before = change(tmp_path, key, 0)
        change(tmp_path, key, FLIPS[key] if FLIPS[key] is not None else not before)
        try:
            model = vitlib.load(tmp_path)
        except vitlib.VitlibError:
            continue
        answer = references.ask(type(reference).from_pretrained(tmp_path).eval(), images)
        theirs = answer.pooled if answer.logits is None else answer.logits
        assert theirs is not None, key
        with torch.inference_mode():
            assert references.distance(model(images), theirs) < TINY, key
            assert references.distance(model.forward_features(images), answer.tokens) < TINY, key


def test_a_classifier_of_beit_without_its_norm(tmp_path: Path) -> None:
    """transformers would draw the norm; its base model alone can be without one."""
    references.saved("beit", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    kept = {name: t.clone() for name, t in tensors.items() if "pooler." not in name}
    assert len(kept) == len(tensors) - 2
    safetensors.torch.save_file(kept, path)
    with pytest.raises(vitlib.VitlibError, match=r"missing: beit\.pooler\.layernorm\.\{?"):
        vitlib.load(tmp_path)


# --- files without their config.json --------------------------------------------------------------


def bare(source: Path, folder: Path) -> Path:
    folder.mkdir()
    (source / "model.safetensors").rename(folder / "model.safetensors")
    return folder / "model.safetensors"


WIDE = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}


def test_a_bare_file_of_one_published_model_is_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = hf.ViTConfig(**WIDE, num_hidden_layers=1, patch_size=8, image_size=32)
    reference = references.randomise(hf.ViTModel(config, add_pooling_layer=False))  # DINO
    reference.save_pretrained(tmp_path / "theirs")
    model = vitlib.load(bare(tmp_path / "theirs", tmp_path / "bare"))
    assert (model.config.num_heads, model.config.norm_eps) == (6, 1e-12)
    assert not caplog.text


def test_a_bare_file_of_two_published_models_is_asked_for(tmp_path: Path) -> None:
    """DINO's and MSN's ViT-S/16 have the same tensors, and another eps."""
    config = hf.ViTMSNConfig(**WIDE, num_hidden_layers=1, patch_size=16, image_size=32)
    references.randomise(hf.ViTMSNModel(config)).save_pretrained(tmp_path / "theirs")
    file = bare(tmp_path / "theirs", tmp_path / "bare")
    with pytest.raises(vitlib.VitlibError, match=r"norm_eps=1e-12.*norm_eps=1e-06") as error:
        vitlib.load(file)
    remedy = re.search(r"architecture='([^']+)'", str(error.value))
    assert remedy is not None
    assert vitlib.load(file, architecture=remedy[1]).config.norm_eps == 1e-12
    for name in ("vit_msn", "facebook/vit-msn-small"):
        model = vitlib.load(file, architecture=name)
        assert (model.config.norm_eps, model.config.num_heads) == (1e-6, 6)
    with pytest.raises(vitlib.VitlibError, match="knows vit, vit_mae, vit_msn"):
        vitlib.load(file, architecture="dinov2")


def test_a_bare_clip_is_asked_for_its_gelu(tmp_path: Path) -> None:
    wide = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    config = hf.CLIPVisionConfig(**wide, num_hidden_layers=1, image_size=64, patch_size=32)
    references.randomise(hf.CLIPVisionModel(config)).save_pretrained(tmp_path / "theirs")
    file = bare(tmp_path / "theirs", tmp_path / "bare")
    with pytest.raises(vitlib.VitlibError, match="activation='quick_gelu' or architecture="):
        vitlib.load(file)
    for name in ("quick_gelu", "gelu"):
        assert vitlib.load(file, activation=name).config.activation == name


@pytest.mark.parametrize(
    ("name", "asked", "facts"),
    [
        ("vit", "num_heads=", {"num_heads": 4}),
        ("msn base", "architecture='vit' or", {"num_heads": 4, "architecture": "vit_msn"}),
        ("clip base", "activation=", {"num_heads": 4, "activation": "quick_gelu"}),
        ("dinov3", "num_heads=", {"num_heads": 4}),
        ("beit base", "architecture='beit' or", {"architecture": "beit"}),
        ("beit absolute", "num_heads=", {"num_heads": 4, "architecture": "beit"}),
    ],
)
def test_a_bare_file_of_no_published_shape_is_asked_for(
    name: str, asked: str, facts: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = references.saved(name, tmp_path / "theirs")
    file = bare(tmp_path / "theirs", tmp_path / "bare")
    with pytest.raises(vitlib.VitlibError, match=re.escape(asked)) as error:
        vitlib.load(file)
    assert "no published model is of width 48" in str(error.value)
    model = vitlib.load(file, **facts)
    assert "norm_eps=" in caplog.text
    images = references.pixels(reference)
    with torch.inference_mode():
        theirs = references.ask(reference, images).tokens
        assert references.distance(model.forward_features(images), theirs) < TINY


def test_a_config_without_model_type_is_named(tmp_path: Path) -> None:
    references.saved("vit", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "model_type"}))
    with pytest.raises(
        vitlib.VitlibError, match="beside this file has no model_type, and"
    ) as error:
        vitlib.load(tmp_path)
    assert "48, MLP 96 and patches of 8x8: write it there, or state num_heads=" in str(error.value)
    assert vitlib.load(tmp_path, num_heads=4).config.num_heads == 4
    path.write_text(json.dumps(config))
    assert vitlib.load(tmp_path).config.num_heads == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", 12), ("layer_norm_eps", 1e-6), ("hidden_act", "gelu_new")],
)
def test_a_config_without_model_type_is_not_ignored(key: str, value: Any, tmp_path: Path) -> None:
    """Its shape is that of published models, whose numbers would be taken."""
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
    own = hf.ViTConfig(**sizes, num_hidden_layers=1, image_size=32, patch_size=16)
    references.randomise(hf.ViTModel(own)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    kind = config.pop("model_type")
    path.write_text(json.dumps(config))
    before = vitlib.load(tmp_path).config
    path.write_text(json.dumps(config | {key: value}))
    said = f"config.json has no model_type, and {key} {value!r} .* write the model_type there"
    with pytest.raises(vitlib.VitlibError, match=said):
        vitlib.load(tmp_path)
    path.write_text(json.dumps({**config, key: value, "model_type": kind}))
    assert vitlib.load(tmp_path).config != before


def test_a_bare_beit_without_positions_is_no_dinov3(tmp_path: Path) -> None:
    reference = references.randomise(
        hf.BeitModel(references._beit(use_relative_position_bias=False))
    )
    reference.save_pretrained(tmp_path / "theirs")
    file = bare(tmp_path / "theirs", tmp_path / "bare")
    model = vitlib.load(file, num_heads=4, architecture="beit")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        theirs = reference(images).pooler_output
        assert model.config.rope_theta is None
        assert references.distance(model(images), theirs) < TINY


def test_an_architecture_that_contradicts_config_json(tmp_path: Path) -> None:
    references.saved("vit", tmp_path)
    with pytest.raises(vitlib.VitlibError, match=r"config\.json says 'vit'"):
        vitlib.load(tmp_path, architecture="deit")
    vitlib.load(tmp_path, architecture="ViTForImageClassification")


# --- timm's models in transformers' wrapper -------------------------------------------------------


@pytest.mark.parametrize("name", ["named", "plain", "base"])
def test_timm_wrapper(name: str) -> None:
    folder = FIXTURES / "timm_wrapper"
    expected = safetensors.torch.load_file(folder / f"{name}.outputs.safetensors")
    model = vitlib.load(folder / name)
    with torch.inference_mode():
        assert references.distance(model(expected["pixels"]), expected["answer"]) < TINY
    assert model.config.labels == (("cat", "dog", "3") if name == "named" else ())
    task = "multi_label_classification" if name == "named" else None
    assert model.config.problem_type == task
    assert "crop 16x16" in vitlib.ImageProcessor.load(folder / name).describe()


# --- preprocessing --------------------------------------------------------------------------------

PROCESSORS = ["CLIP", "ChineseCLIP", "Llava", "Blip", "OwlViT", "Flava", "DPT", "Gemma3", "Siglip"]


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", ["default", "small"])
def test_processors_of_larger_models(name: str, size: str, tmp_path: Path) -> None:
    """To the bit, with the class's own defaults and with sizes that a file says."""
    kind = getattr(hf, f"{name}ImageProcessorPil")
    crops = name in ("CLIP", "ChineseCLIP", "Llava", "Flava")
    given: dict[str, Any] = {"size": {"height": 30, "width": 30}}
    if crops:
        given = {"size": {"shortest_edge": 33}, "crop_size": {"height": 29, "width": 29}}
    if name == "Flava":
        given["size"] = {"height": 33, "width": 33}
    theirs = kind(**({} if size == "default" else given))
    if size == "default":  # of the class, which no file says
        rule = {"image_processor_type": f"{name}ImageProcessor"}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(rule))
    else:
        theirs.save_pretrained(tmp_path)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8))
    ours = vitlib.ImageProcessor.load(tmp_path)(photo)
    assert torch.equal(ours, theirs(photo, return_tensors="pt").pixel_values)


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"image_processor_type": "LlavaNextImageProcessor"}, "cuts each photo into tiles"),
        ({"image_processor_type": "Owlv2ImageProcessorFast"}, "pads each photo to a square"),
        (
            {"image_processor_type": "Gemma3ImageProcessor", "do_pan_and_scan": True},
            "pan_and_scan is true",
        ),
        ({"image_processor_type": "DPTImageProcessor", "keep_aspect_ratio": True}, "aspect_ratio"),
        ({"image_processor_type": "DPTImageProcessor", "ensure_multiple_of": 32}, "multiple_of"),
    ],
)
def test_processors_that_are_refused(rule: dict[str, Any], told: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(rule))
    with pytest.raises(vitlib.VitlibError, match=told):
        vitlib.ImageProcessor.load(tmp_path)


def test_a_stated_pool_of_a_bare_file(tmp_path: Path) -> None:
    references.saved("dinov3", tmp_path / "theirs")
    file = bare(tmp_path / "theirs", tmp_path / "bare")
    model = vitlib.load(file, num_heads=4, pool="mean")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        tokens = model.forward_features(images)
        assert torch.equal(model(images), tokens[:, model.num_prefix_tokens :].mean(dim=1))


def test_blip_projects_what_is_normed_twice_and_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved("blip", tmp_path)
    model = vitlib.load(tmp_path)
    assert "visual_projection (1 tensor)" in caplog.text
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        tokens = model.forward_features(images)[:, 0]
        assert references.distance(model(images), tokens) < TINY
