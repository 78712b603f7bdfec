"""Newer model types of transformers of which a ViT is one part, and types refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import vitlib
from fixtures import language_towers, reference_towers, references
from vitlib.checkpoint.layouts.hf import read_config
from vitlib.checkpoint.layouts.hf_refused import REFUSED
from vitlib.checkpoint.layouts.hf_types import list_containers, list_types

TINY = 2e-6
# Their classes take images of one size alone.
FIXED_SIZE = ("granite_docling_vision", "ovis2", "ovis2 biases", "molmo2")
WHOLE_PATCHES = ("nemotron_h_omni",)  # its class takes images of whole patches alone


@pytest.mark.parametrize("name", language_towers.TOWERS)
def test_tower_equals_transformers(name: str, tmp_path: Path) -> None:
    if name == "granite_docling_vision":
        references.skip_unless_known(name)
    part = language_towers.TOWERS[name]
    reference = reference_towers.build(part)
    reference.save_pretrained(tmp_path)
    model = vitlib.load(tmp_path)
    other = (40, 24) if name in WHOLE_PATCHES else (43, 24)
    for size in ((32, 32), other)[: 1 if name in FIXED_SIZE else 2]:
        images = torch.randn(2, 3, *size)
        tokens, pooled = reference_towers.run_tower(part, reference, images)
        with torch.inference_mode():
            actual = model.forward_features(images)
            assert references.distance(actual, tokens) < TINY
            assert references.distance(actual[:1], actual[1:]) > 0.1
            if pooled is not None and part.is_pooled:
                assert references.distance(model.pool(actual), pooled) < TINY


@pytest.mark.parametrize("name", ["internvl", "qianfan_ocr", "idefics", "chmv2", "ovis2"])
def test_saved_tower_opens_in_transformers(name: str, tmp_path: Path) -> None:
    part = language_towers.TOWERS[name]
    reference_towers.build(part).save_pretrained(tmp_path / "whole")
    model = vitlib.load(tmp_path / "whole")
    lost = vitlib.save(model, tmp_path / "vit")
    assert lost.keys() <= {"position_resize", "drop_path"}
    opened = hf.AutoModel.from_pretrained(tmp_path / "vit").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        tokens = opened(images).last_hidden_state
        assert references.distance(model.forward_features(images), tokens) < TINY


def test_molmo2_alone_equals_transformers(tmp_path: Path) -> None:
    """Its own files have other names than those of the model of which it is a part."""
    reference = reference_towers.build(language_towers.TOWERS["molmo2"]).model.vision_tower
    reference.save_pretrained(tmp_path)
    model, images = vitlib.load(tmp_path), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = reference(**reference_towers.model_inputs(reference, images))
        assert references.distance(model(images), expected.pooler_output) < TINY
        assert references.distance(model(images[:1]), model(images[1:])) > 0.1


def test_molmo2_published_states_more_blocks_than_it_holds(tmp_path: Path) -> None:
    """The adapter reads blocks -2 and -3 of three: the third has no weights."""
    part = language_towers.TOWERS["molmo2"]
    reference = reference_towers.build(part)
    reference.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    older = config.pop("vision_config") | {"num_hidden_layers": 3}
    older["image_default_input_size"] = older.pop("image_size")
    older["image_patch_size"] = older.pop("patch_size")
    older["image_num_pos"] = older.pop("num_position_embeddings")
    config["adapter_config"]["vit_layers"] = [-2, -3]
    del config["adapter_config"]["vision_feature_layer"]
    path.write_text(json.dumps({**config, "vit_config": older}))
    opened = hf.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert len(opened.model.vision_tower.layers) == 2
    model, images = vitlib.load(tmp_path), torch.randn(2, 3, 32, 32)
    tokens, _ = reference_towers.run_tower(part, opened, images)
    with torch.inference_mode():
        assert references.distance(model.forward_features(images), tokens) < TINY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 8}, "num_key_value_heads 8, head_dim 72, .*: expected 16, 72 and"),
        ({"head_dim": 64}, "head_dim 64, .*: expected 16, 72 and true"),
        ({"attention_bias": False}, "attention_bias False: expected 16, 72 and true"),
    ],
)
def test_molmo2_attention_of_another_form_is_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(vitlib.VitlibError, match=message):
        read_config({"model_type": "molmo2_vision", **changes}, {})


def test_ovis2_biases_of_a_single_branch_are_refused() -> None:
    config = {"model_type": "ovis2_vision", "qkv_bias": True}
    with pytest.raises(vitlib.VitlibError, match="mlp_bias False with qkv_bias True"):
        read_config(config, {})


@pytest.mark.parametrize("name", ["internvl", "internvl rms", "internvl class token", "pixio"])
def test_file_without_config_equals_transformers(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    model = vitlib.load(tmp_path / "model.safetensors", num_heads=4)
    (tmp_path / "config.json").unlink()
    again = vitlib.load(tmp_path / "model.safetensors", num_heads=4)
    images = references.make_pixels(reference)
    with torch.inference_mode():
        tokens = reference(images).last_hidden_state
        assert references.distance(again.forward_features(images), tokens) < TINY
        assert torch.equal(again(images), model(images))


def test_intern300m_of_timm_is_written_as_internvl(tmp_path: Path) -> None:
    published = vitlib.ViTConfig.named("vit_intern300m_patch14_448", image_size=56)
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_dim": 96}
    model = vitlib.ViT(replace(published, **sizes)).eval()
    lost = vitlib.save(model, tmp_path)
    assert lost.keys() <= {"pool", "position_resize", "family"}
    opened = hf.AutoModel.from_pretrained(tmp_path).eval()
    assert type(opened).__name__ == "InternVLVisionModel"
    images = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        tokens = opened(images).last_hidden_state
        assert references.distance(model.forward_features(images), tokens) < TINY


INTERNVL = {"model_type": "internvl_vision", "norm_type": "rms_norm"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "batch_norm"}, "norm_type 'batch_norm': expected layer_norm or rms_norm"),
        ({"norm_type": "layer_norm", "use_qk_norm": True}, "norms of one kind"),
        ({"use_qk_norm": True, "layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05"),
        ({"use_mean_pooling": False}, "whose final norm is a LayerNorm"),
    ],
)
def test_internvl_norms_of_two_kinds_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(vitlib.VitlibError, match=message):
        read_config({**INTERNVL, **changes}, {})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("internvl", {"use_mean_pooling": False}),
        ("internvl class token", {"use_mean_pooling": True}),
    ],
)
def test_internvl_pooling_of_other_tensors_is_refused(
    name: str, changes: dict[str, object], tmp_path: Path
) -> None:
    reference = references.build(name)
    reference.config.update(changes)
    reference.save_pretrained(tmp_path)
    with pytest.raises(vitlib.VitlibError, match="use_mean_pooling"):
        vitlib.load(tmp_path)


def test_pixio_count_of_class_tokens_is_checked(tmp_path: Path) -> None:
    reference = references.build("pixio")
    reference.config.n_cls_tokens = 2
    reference.save_pretrained(tmp_path)
    with pytest.raises(vitlib.VitlibError, match="contradicts the tensors"):
        vitlib.load(tmp_path)
    with pytest.raises(vitlib.VitlibError, match="n_cls_tokens 0: expected 1 or more"):
        read_config({"model_type": "pixio", "n_cls_tokens": 0}, {})


def test_pixio_pools_its_class_tokens(tmp_path: Path) -> None:
    reference = references.save_model("pixio", tmp_path)
    model = vitlib.load(tmp_path)
    images = references.make_pixels(reference)
    with torch.inference_mode():
        expected = reference(images).pooler_output
        assert references.distance(model(images), expected) < TINY
        assert references.distance(model.forward_features(images)[:, 0], expected) > 0.1


def test_refused_types_are_those_of_transformers() -> None:
    """A name that transformers does not have, or that vitlib reads, would be a mistake here."""
    assert not references.IS_NEWEST or REFUSED.keys() <= CONFIG_MAPPING_NAMES.keys()
    assert not REFUSED.keys() & (list_types().keys() | list_containers().keys())
