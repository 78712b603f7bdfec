"""Model types of transformers of which a ViT is one part: its numbers, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers as hf

import vitlib
from fixtures import reference_towers, references
from fixtures.reference_towers import save_tower
from vitlib.checkpoint.layouts.hf import read_config
from vitlib.checkpoint.layouts.hf_config import ACTIVATIONS, parse_activation
from vitlib.checkpoint.layouts.hf_types import (
    find_tower_config,
    list_containers,
    list_reasons,
    list_types,
)
from vitlib.encoder import MLP

TINY = 2e-6


@pytest.mark.parametrize("name", reference_towers.TOWERS)
def test_tower_equals_transformers(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part, reference = reference_towers.TOWERS[name], save_tower(name, tmp_path)
    model = vitlib.load(tmp_path)
    assert ("not loaded: " in caplog.text) == ("classifier" not in name)
    for size in ((32, 32), (43, 24)):
        images = torch.randn(2, 3, *size)
        tokens, pooled = reference_towers.run_tower(part, reference, images)
        with torch.inference_mode():
            actual = model.forward_features(images)
            assert references.distance(actual, tokens) < TINY
            if pooled is not None and part.is_pooled:
                other = model.pool(actual) if model.pooler is None else model.forward_pooler(images)
                assert references.distance(other, pooled) < TINY


@pytest.mark.parametrize("name", ["metaclip_2 classifier", "siglip2 classifier"])
def test_tower_classifier_equals_transformers(name: str, tmp_path: Path) -> None:
    reference = save_tower(name, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    options = (
        reference_towers.pack_patches(images, 8) if "siglip2" in name else {"pixel_values": images}
    )
    with torch.inference_mode():
        logits = reference(**options).logits
        model = vitlib.load(tmp_path)
        assert references.distance(model(images), logits) < TINY
    assert model.config.labels == tuple(references.LABELS["id2label"].values())


@pytest.mark.parametrize(
    "name", ["owlv2 both towers", "aimv2 both towers", "vision-text-dual-encoder"]
)
def test_dual_encoder_projection_equals_transformers(name: str, tmp_path: Path) -> None:
    reference = save_tower(name, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        projected = reference.get_image_features(pixel_values=images).pooler_output
        assert references.distance(vitlib.load(tmp_path)(images), projected) < TINY


def test_load_logs_parts_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tower("llava", tmp_path)
    vitlib.load(tmp_path)
    for part in ("language_model (12 tensors)", "multi_modal_projector (4 tensors)"):
        assert part in caplog.text


@pytest.mark.parametrize("name", ["siglip2", "idefics3", "git", "dpt", "blip-2"])
def test_saved_tower_opens_in_transformers(name: str, tmp_path: Path) -> None:
    """Written as the type that computes the same on the learned grid."""
    save_tower(name, tmp_path / "whole")
    model = vitlib.load(tmp_path / "whole")
    lost = vitlib.save(model, tmp_path / "vit")
    assert lost.keys() <= {"position_resize", "final_norm"}
    opened = hf.AutoModel.from_pretrained(tmp_path / "vit").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        out = opened(**reference_towers.model_inputs(opened, images))
        wanted = model(images)
        actual = out.pooler_output if name in ("siglip2", "git") else out.last_hidden_state[:, 0]
        if name == "idefics3":
            actual = out.last_hidden_state.mean(dim=1)
        assert references.distance(wanted, actual) < TINY


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", list_types())
def test_type_defaults_equal_transformers(model_type: str) -> None:
    """A key that a config lacks has the default of its class in transformers."""
    references.skip_unless_known(model_type)
    _, family = list_types()[model_type]
    config = hf.AutoConfig.for_model(model_type)
    for field, (key, default) in family.numbers.items():
        if hasattr(config, key) and (field != "image_size" or model_type != "siglip2_vision_model"):
            assert getattr(config, key) == default, key
    assert config.hidden_act == family.activation


@pytest.mark.parametrize("model_type", list_containers())
def test_container_defaults_equal_transformers(model_type: str) -> None:
    references.skip_unless_known(model_type)
    container = list_containers()[model_type]
    if not container.model_type:  # a dual encoder has no default
        return
    config = getattr(hf.AutoConfig.for_model(model_type), container.key)
    assert config.model_type == container.model_type
    while config.model_type in list_containers():
        config = getattr(config, list_containers()[config.model_type].key)
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
    "head_config", "flip_pairs", "normalize_backbone_outputs",  # of what reads Sapiens2
    "depth", "num_image_tokens",  # of Janus's aligner
    "deepstack_visual_indexes", "scale_factor", "out_hidden_size",
    "use_fine_route",  # of Granite Docling's connector
    "hidden_stride", "num_visual_indicator_tokens", "tokenize_function",  # of what reads Ovis2's
    "image_size",  # of the classes of NaFlex and RADIO, where another key says it
    "patch_dim", "video_patch_dim", "video_temporal_patch_size",  # of RADIO's patches of videos
}  # fmt: skip
SPECIAL = {
    "hidden_act", "mlp_ratio", "use_swiglu_ffn", "use_gated_mlp", "use_qk_norm", "attention_bias",
    "value_bias", "proj_bias", "mlp_bias", "use_relative_position_bias", "num_patches",
    "use_shared_relative_position_bias", "use_mean_pooling", "pooler_act", "is_hybrid",
    "rope_theta", "backbone_config", "vision_use_head", "pooler_output_size", "projection_dim",
    "rope_parameters", "num_key_value_groups",
    "norm_type", "n_cls_tokens", "num_key_value_heads", "head_dim", "num_position_embeddings",
    "num_cls_tokens", "num_registers", "summary_idxs", "norm_mean", "norm_std",
    "hidden_dropout_prob",
    "num_key_value_heads_per_layer", "num_key_value_attention_heads",
    "num_first_full_attention_layers", "num_last_full_attention_layers", "use_head", "is_native",
}  # fmt: skip


@pytest.mark.parametrize("model_type", list_types())
def test_every_config_key_is_read_or_harmless(model_type: str) -> None:
    references.skip_unless_known(model_type)
    _, family = list_types()[model_type]
    base = hf.PreTrainedConfig().to_dict().keys()
    keys = hf.AutoConfig.for_model(model_type).to_dict().keys() - base
    read = {key for key, _ in family.numbers.values()}
    assert keys - read - SPECIAL - HARMLESS - {"model_type"} == set()


def test_vision_config_dict_overrides_vision_config(tmp_path: Path) -> None:
    references.save_model("clip both towers", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["vision_config_dict"] = {**config["vision_config"], "hidden_act": "gelu"}
    path.write_text(json.dumps(config))
    reference = hf.CLIPModel.from_pretrained(tmp_path).eval()
    assert reference.config.vision_config.hidden_act == "gelu"
    model = vitlib.load(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = reference.get_image_features(pixel_values=images).pooler_output
        assert model.config.activation == "gelu"
        assert references.distance(model(images), expected) < TINY


def test_nested_config_ignores_outer_numbers(tmp_path: Path) -> None:
    """PaliGemma's own hidden_size and projection_dim are its language model's."""
    save_tower("paligemma", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["vision_config"]["hidden_act"], config["vision_config"]["layer_norm_eps"]
    config |= {"hidden_act": "relu", "layer_norm_eps": 0.5, "num_attention_heads": 3}
    path.write_text(json.dumps(config))
    assert vitlib.load(tmp_path).config.activation == "gelu_tanh"
    assert vitlib.load(tmp_path).config.norm_eps == 1e-6


@pytest.mark.parametrize("name", ["gelu_python", "gelu_python_tanh", "gelu_new", "gelu_fast",
                                  "gelu_accurate", "gelu_pytorch_tanh", "quick_gelu"])  # fmt: skip
def test_gelu_names_equal_transformers(name: str) -> None:
    x = torch.linspace(-30, 30, 20001)
    actual = activate(ACTIVATIONS[name], x)
    assert references.distance(actual, hf.activations.ACT2FN[name](x)) < TINY


def test_gelu_10_is_refused() -> None:
    x = torch.linspace(-30, 30, 20001)
    assert references.distance(activate("gelu", x), hf.activations.ACT2FN["gelu_10"](x)) > 1
    with pytest.raises(vitlib.VitlibError, match="hidden_act 'gelu_10'"):
        parse_activation({"hidden_act": "gelu_10"}, list_types()["vit"][1])


def activate(name: str, x: torch.Tensor) -> torch.Tensor:
    mlp = MLP(vitlib.ViTConfig(activation=name, embed_dim=4, num_heads=1, depth=1))  # type: ignore[arg-type]
    mlp.fc1 = mlp.fc2 = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        return mlp(x)


@pytest.mark.parametrize("model_type", [*list_reasons(), "vivitt", "my_vit"])
def test_unsupported_model_type_is_refused_by_name(model_type: str) -> None:
    with pytest.raises(vitlib.VitlibError, match=f"model_type '{model_type}'") as error:
        find_tower_config({"model_type": model_type})
    assert list_reasons().get(model_type, "") in str(error.value)
    assert "'vit'" in str(error.value)
    with pytest.raises(vitlib.VitlibError, match=f"vision_config of type '{model_type}'"):
        find_tower_config({"model_type": "llava", "vision_config": {"model_type": model_type}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": 3}, "expected vision_config to be an object"),
        ({"vision_config": {"model_type": "clip_vision_model", "num_attention_heads": 4}}, "width"),
    ],
)
def test_nested_config_of_wrong_type_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    save_tower("llava", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(vitlib.VitlibError) as error:
        vitlib.load(tmp_path)
    assert message in str(error.value) or "contradicts the tensors" in str(error.value)


def test_hybrid_dpt_is_refused() -> None:
    with pytest.raises(vitlib.VitlibError, match="is_hybrid"):
        find_tower_config({"model_type": "dpt", "is_hybrid": True})
    with pytest.raises(vitlib.VitlibError, match="backbone_config of type 'bit'"):
        find_tower_config({"model_type": "dpt", "backbone_config": {"model_type": "bit"}})


def test_janus_qk_norm_is_refused() -> None:
    config = {"model_type": "janus_vision_model", "use_qk_norm": True}
    with pytest.raises(vitlib.VitlibError, match="use_qk_norm True"):
        read_config(config, {})


def test_idefics_rounded_positions_are_refused() -> None:
    config = {"model_type": "idefics3_vision", "image_size": 19 * 14, "patch_size": 14}
    with pytest.raises(vitlib.VitlibError, match="19x19 patches"):
        read_config(config, {})


def test_dinov3_missing_biases_are_refused() -> None:
    for key, message in (("value_bias", "value_bias False"), ("mlp_bias", "mlp_bias False")):
        with pytest.raises(vitlib.VitlibError, match=message):
            read_config({"model_type": "dinov3_vit", key: False}, {})
    config = {"model_type": "dinov3_vit", "query_bias": False, "value_bias": False}
    with pytest.raises(vitlib.VitlibError, match="key_bias True with query_bias False"):
        read_config({**config, "key_bias": True}, {})


@pytest.mark.parametrize("name", ["vit", "dinov2", "beit", "clip", "siglip", "dinov3"])
@pytest.mark.parametrize("head_dim", [12, 24, None])
def test_head_dim_of_another_width_is_refused(
    head_dim: int | None, name: str, tmp_path: Path
) -> None:
    """Transformers refuses it where its attention reads the key, and passes it over elsewhere."""
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


def test_registers_patch_size_defaults_to_16(tmp_path: Path) -> None:
    config = references.registers_config(patch_size=16, image_size=64)
    references.randomise(hf.Dinov2WithRegistersModel(config)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    del written["patch_size"]
    path.write_text(json.dumps(written))
    assert vitlib.load(tmp_path).config.patch_size == (16, 16)


@pytest.mark.parametrize("kind", ["beit", "data2vec"])
def test_beit_masked_model_equals_transformers(kind: str, tmp_path: Path) -> None:
    """Its head has a second norm, of the same name but for the prefix."""
    config = references.beit_config(vocab_size=9, use_mask_token=True, use_mean_pooling=False)
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
        expected = reference.beit(images).last_hidden_state
        assert references.distance(model.forward_features(images), expected) < TINY


def test_blip_projection_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tower("blip", tmp_path)
    model = vitlib.load(tmp_path)
    assert "visual_projection (1 tensor)" in caplog.text
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        tokens = model.forward_features(images)[:, 0]
        assert references.distance(model(images), tokens) < TINY
