"""State dicts of ViT itself, and what vitlib.json adds to other layouts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import vitlib
from fixtures import references
from fixtures.layout_files import make_pixels, weights_path
from fixtures.training_files import (
    NUM_HEADS,
    add_prefix,
    save_weights,
)
from vitlib.checkpoint.read import read_checkpoint
from vitlib.errors import CheckpointError, ConfigError
from vitlib.source.locate import Source

INDEX = {"coords": "index", "theta": 10.0}
ALL_NORMS = {"kind": "rms", "patch": True, "qk": "width", "attn": True, "mlp": True}


@pytest.mark.parametrize(
    "changes",
    [
        {"norms": ALL_NORMS},
        {"rope": {**INDEX, "learned": True}, "pos_embed": False},
        {"rope": {**INDEX, "class_token": True}, "pos_embed": False},
    ],
)
def test_own_layout_has_every_tensor(changes: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"image_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    model = vitlib.ViT(vitlib.ViTConfig(**{**sizes, **changes})).eval()
    vitlib.save(model, tmp_path / "model", layout="vitlib")
    again = vitlib.load(tmp_path / "model")
    images = torch.randn(1, 3, 16, 16)
    weights = again.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    # Not to the bit: mapped weights begin at other addresses, and some CPUs then sum otherwise.
    with torch.inference_mode():
        assert references.distance(again(images), model(images)) <= 1e-6
    assert again.config == model.config


@pytest.mark.parametrize("name", ["mlcd", "aimv2", "aimv2 native", "sapiens2"])
def test_saved_model_with_rare_parts_loads(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path / "hf")
    model = vitlib.load(tmp_path / "hf")
    assert vitlib.save(model, tmp_path / "own", layout="vitlib") == {}
    again = vitlib.load(tmp_path / "own")
    images = references.make_pixels(reference)
    with torch.inference_mode():
        assert torch.equal(again(images), model(images))
    assert again.config == model.config


def test_load_reads_state_dict_of_vit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = vitlib.load(weights_path("timm/vit"))
    state = dict(model.state_dict())
    images = make_pixels(*model.config.image_size)
    files = {
        "torch.save": save_weights(tmp_path, state, "a.pth"),
        "safetensors": save_weights(tmp_path, state, "b.safetensors"),
        "Lightning": save_weights(
            tmp_path,
            {"state_dict": add_prefix("model.", state), "hyper_parameters": {"lr": 1}},
            "c.pth",
        ),
        "FSDP": save_weights(
            tmp_path, {"model": add_prefix("_fsdp_wrapped_module.", state)}, "d.pth"
        ),
        "compile": save_weights(tmp_path, add_prefix("_orig_mod.", state), "e.pth"),
    }
    for path in files.values():
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(logging.getLogger("vitlib"), "propagate", True)
            with caplog.at_level(logging.WARNING):
                again = vitlib.load(path, num_heads=NUM_HEADS)
            assert references.distance(again(images), model(images)) < 1e-6
        assert (
            "assumed, because no file states it: activation='gelu', norm_eps=1e-06, pool='cls', "
            "rope=None. If this is wrong, give activation=, pool= (--activation, --pool) or "
            "config=ViTConfig(...) for norm_eps, rope; preprocessing assumed, because no file "
            "states it: "
        ) in caplog.messages[-1]
        assert vitlib.load(path, config=model.config).config == model.config
    vitlib.save(model, tmp_path / "own", layout="vitlib")
    assert vitlib.load(tmp_path / "own").config == model.config
    assert read_checkpoint(Source(tmp_path / "own")).assumed == ()


def test_save_writes_num_heads_for_ambiguous_shapes(tmp_path: Path) -> None:
    """A model with rotary positions has the names and shapes of DeiT-III, too."""
    cfg = vitlib.ViTConfig(family="deit3", depth=1, layer_scale=1.0, pos_embed_cls=False)
    vitlib.save(vitlib.ViT(cfg), tmp_path / "meta", layout="meta")
    assert vitlib.load(tmp_path / "meta").config.num_heads == 12
    bare = save_weights(tmp_path, torch.load(tmp_path / "meta" / "model.pth"), "bare.pth")
    with pytest.raises(CheckpointError, match=r"architecture='(deit3_base_patch16_224)'"):
        vitlib.load(bare)
    assert vitlib.load(bare, architecture="deit3_base_patch16_224").config.family == "deit3"
    with pytest.raises(CheckpointError, match="give layout='timm'"):
        vitlib.load(bare, architecture="vit_base_patch16_rope_ape_224")
    rotary = vitlib.load(bare, architecture="vit_base_patch16_rope_ape_224", layout="timm")
    assert rotary.config.rope is not None
    with pytest.raises(CheckpointError, match="has other tensors than this file"):
        vitlib.load(bare, architecture="vit_base_patch16_224")


def test_load_checks_config_in_vitlib_json(tmp_path: Path) -> None:
    vitlib.save(vitlib.load(weights_path("timm/vit")), tmp_path, layout="vitlib")
    path = tmp_path / "vitlib.json"
    text = path.read_text()
    for old, new, message in (
        ('"depth": 2', '"depth": 3', r"contradicts the tensors: depth 3 \(the tensors have 2\)"),
        ('"depth"', '"deep"', "expected ViTConfig's fields"),
        ('"num_heads": 2', '"num_heads": 5', "not a multiple of num_heads=5"),
        ('"pool": "cls"', '"pool": "max"', "pool='max'"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises((CheckpointError, ConfigError), match=message):
            vitlib.load(tmp_path)
