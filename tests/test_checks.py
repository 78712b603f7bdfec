from __future__ import annotations

import json
from pathlib import Path

import oracle
from safetensors.torch import load_file, save_file

from vitlib.checks import info


def test_what_a_checkpoint_is(dinov2_small: Path) -> None:
    found = info(dinov2_small)
    assert found.config.family == "dinov2"
    assert found.kept == ("embeddings.mask_token",)
    assert found.tensors == 223
    assert found.parameters == 22_056_192  # the mask token's 384 are not among them
    assert found.problems == ()
    assert found.image_processor is not None
    assert json.loads(json.dumps(found.as_dict()))["config"]["grid_size"] == [37, 37]


def test_what_would_not_load_is_told(tmp_path: Path) -> None:
    oracle.saved("vit masked", tmp_path)
    found = info(tmp_path)
    assert found.ignored == ("decoder.0.bias", "decoder.0.weight")
    assert found.problems == ()
    assert "preprocessor_config.json" in found.no_image_processor
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["vit.layernorm.weight"]
    save_file(
        {**tensors, "odd": tensors["vit.layernorm.bias"].clone()}, tmp_path / "model.safetensors"
    )
    assert info(tmp_path).problems == ("missing: layernorm.weight", "unexpected: odd")
