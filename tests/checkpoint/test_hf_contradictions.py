"""Keys of config.json that contradict the tensors, or another key."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

import vitlib
from fixtures import references
from fixtures.reference_towers import save_tower

TINY = 2e-6


ABSENT = object()  # value of a key that a config does not have
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
    """Change or remove a key of the ViT's own config or else of the whole; return what it was."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    part = config if key in config else config.get("vision_config", config)
    before = part.pop(key, ABSENT)
    if value is not ABSENT:
        part[key] = value
    path.write_text(json.dumps(config))
    return before


@pytest.mark.parametrize(("name", "key", "value", "in_tensors"), CONTRADICTIONS)
def test_config_key_contradicting_tensors_is_refused(
    name: str, key: str, value: object, in_tensors: str, tmp_path: Path
) -> None:
    """Transformers takes such a folder, and draws the part at random or drops its tensors."""
    kind = type(
        references.save_model(name, tmp_path)
        if name in references.MODELS
        else save_tower(name, tmp_path)
    )
    vitlib.load(tmp_path)
    before = change(tmp_path, key, value)
    _, info = kind.from_pretrained(tmp_path, output_loading_info=True, ignore_mismatched_sizes=True)
    assert any(info.values())
    message = f"config.json contradicts the tensors: {key} {value} (the tensors have {in_tensors})"
    with pytest.raises(vitlib.VitlibError, match=re.escape(message)):
        vitlib.load(tmp_path)
    change(tmp_path, key, before)
    vitlib.load(tmp_path)


def test_llava_tower_loads_without_pooling_head(tmp_path: Path) -> None:
    """Such a model takes the tower's tokens; SigLIP itself would draw a head at random."""
    save_tower("llava_onevision", tmp_path)
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
def test_changed_config_key_is_refused_or_as_transformers(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    images = references.make_pixels(reference)
    text = (tmp_path / "config.json").read_text()
    harmless_keys = [key for key in FLIPS if f'"{key}"' in text]
    assert harmless_keys
    for key in harmless_keys:
        (tmp_path / "config.json").write_text(text)
        before = change(tmp_path, key, 0)
        change(tmp_path, key, FLIPS[key] if FLIPS[key] is not None else not before)
        try:
            model = vitlib.load(tmp_path)
        except vitlib.VitlibError:
            continue
        answer = references.run_reference(type(reference).from_pretrained(tmp_path).eval(), images)
        reference_output = answer.pooled if answer.logits is None else answer.logits
        assert reference_output is not None, key
        with torch.inference_mode():
            assert references.distance(model(images), reference_output) < TINY, key
            assert references.distance(model.forward_features(images), answer.tokens) < TINY, key


def test_beit_classifier_without_norm_is_refused(tmp_path: Path) -> None:
    """Transformers would draw the norm; its base model alone can be without one."""
    references.save_model("beit", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    remaining = {name: t.clone() for name, t in tensors.items() if "pooler." not in name}
    assert len(remaining) == len(tensors) - 2
    safetensors.torch.save_file(remaining, path)
    with pytest.raises(vitlib.VitlibError, match=r"missing: beit\.pooler\.layernorm\.\{?"):
        vitlib.load(tmp_path)
