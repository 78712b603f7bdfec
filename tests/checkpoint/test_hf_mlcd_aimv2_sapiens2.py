"""MLCD, AIMv2 and Sapiens2 in transformers: what vitlib's block lacks is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

import vitlib
from fixtures import references
from fixtures.parity import TINY
from vitlib.checkpoint.layouts.hf import read_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}, "rope_type 'default'"),
        ({"rope_parameters": {"rope_theta": 0.0}}, "rope_theta 0.0"),
        ({"num_key_value_groups": 2}, "num_key_value_groups 2"),
    ],
)
def test_mlcd_with_other_attention_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(vitlib.VitlibError, match=message):
        read_config({"model_type": "mlcd_vision_model", **change}, {})


@pytest.mark.parametrize("change", [{"qkv_bias": True}, {"mlp_bias": True}])
def test_aimv2_with_biases_of_one_branch_is_refused(change: dict[str, bool]) -> None:
    with pytest.raises(vitlib.VitlibError, match="vitlib's block has both or neither"):
        read_config({"model_type": "aimv2_vision_model", **change}, {})


@pytest.mark.parametrize("key", ["use_head", "is_native"])
def test_aimv2_config_against_its_tensors_is_refused(key: str, tmp_path: Path) -> None:
    references.save_model("aimv2", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, key: not config[key]}))
    with pytest.raises(vitlib.VitlibError, match=f"contradicts the tensors: {key} "):
        vitlib.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_gated_mlp": False, "hidden_act": "gelu"}, "use_gated_mlp False"),
        ({"use_gated_mlp": False}, "hidden_act 'silu'"),
        ({"value_bias": False}, "value_bias False"),
        ({"mlp_bias": False}, "mlp_bias False"),
        ({"query_bias": False, "value_bias": False}, "key_bias True with query_bias False"),
    ],
)
def test_sapiens2_of_other_blocks_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(vitlib.VitlibError, match=message):
        read_config({"model_type": "sapiens2", **change}, {})


def test_sapiens2_keys_of_another_number_of_heads_are_refused(tmp_path: Path) -> None:
    references.save_model("sapiens2", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_key_value_heads_per_layer": [4, 1, 4]}))
    message = r"num_key_value_heads_per_layer \[4, 1, 4\] \(the tensors have \[4, 2, 4\]\)"
    with pytest.raises(vitlib.VitlibError, match=message):
        vitlib.load(tmp_path)


def test_sapiens2_inside_a_dense_model_equals_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = {"upsample_out_channels": [8], "conv_out_channels": [8]}
    config = references.sapiens2_config(head_config=head)
    reference = references.randomise(hf.Sapiens2ForSemanticSegmentation(config))
    reference.save_pretrained(tmp_path)
    model = vitlib.load(tmp_path)
    assert "decode_head" in caplog.text
    images = torch.randn(2, 3, 32, 24)
    with torch.inference_mode():
        expected = reference.model(images).last_hidden_state
        assert references.distance(model.forward_features(images), expected) < TINY
