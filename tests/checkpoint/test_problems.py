"""Checkpoints that load refuses, every problem in one message."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import vitlib
from fixtures.checkpoints import edit_config, edit_tensors
from vitlib.errors import CheckpointError


def test_load_lists_every_problem(vit: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        layer = "vit.encoder.layer."
        for block in range(3):
            del tensors[f"{layer}{block}.output.dense.bias"]
        tensors["vit.layernorm.weight"] = torch.ones(47)
        tensors["vit.surprise"] = torch.ones(1)
        tensors[f"{layer}1.intermediate.dense.bias"][3] = torch.nan
        tensors[f"{layer}2.intermediate.dense.bias"][0] = torch.inf
        tensors["classifier.bias"] = torch.ones(5, dtype=torch.int32)

    edit_tensors(vit, damage)
    with pytest.raises(CheckpointError) as error:
        vitlib.load(vit)
    for part in (
        "missing: vit.encoder.layer.0-2.output.dense.bias",
        "unexpected: vit.surprise",
        "wrong shape: vit.layernorm.weight is 47, expected 48",
        "NaN or infinite values in: vit.encoder.layer.1-2.intermediate.dense.bias",
        "not floating point: classifier.bias (torch.int32)",
    ):
        assert part in str(error.value)


def test_large_finite_values_are_accepted(vit: Path) -> None:
    """A sum may overflow where no value does."""
    edit_tensors(vit, lambda tensors: tensors["vit.layernorm.bias"].fill_(3e38))
    assert vitlib.load(vit).norm.bias.max() > 2e38


def test_repeated_tensor_is_refused(vit: Path) -> None:
    edit_tensors(vit, lambda t: t.update({"layernorm.weight": t["vit.layernorm.weight"].clone()}))
    with pytest.raises(CheckpointError, match=r"repeated: .*layernorm\.weight"):
        vitlib.load(vit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, "num_hidden_layers 4 (the tensors have 3)"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers 1000000000000 (the tensors have 3)"),
        ({"hidden_size": 64}, "hidden_size 64 (the tensors have 48)"),
        ({"intermediate_size": 95}, "intermediate_size 95 (the tensors have 96)"),
        ({"patch_size": 16}, "patch_size (16, 16) (the tensors have (8, 8))"),
        ({"num_channels": 1}, "num_channels 1 (the tensors have 3)"),
        ({"image_size": 64}, "image_size 64x64, 65 positions (the tensors have 17 positions)"),
        ({"id2label": {"0": "a", "1": "b"}}, "2 labels, a head of 5 classes"),
        ({"id2label": {"0": "a", "7": "b"}}, "expected id2label to number 2 labels from 0"),
        ({"id2label": ["a"]}, "expected id2label to map numbers to names"),
        ({"num_attention_heads": 5}, "embed_dim=48 is not a multiple of num_heads=5"),
        ({"num_attention_heads": "4"}, "num_heads='4': expected a whole number"),
        ({"layer_norm_eps": "small"}, "norm_eps='small'"),
        ({"hidden_act": "relu"}, "hidden_act 'relu': vitlib computes gelu"),
        ({"model_type": "swin"}, "model_type 'swin' (its attention is within windows)"),
        ({"model_type": 7}, "model_type 7"),
        ({"image_size": [32]}, "image_size"),
        ({"patch_size": "8"}, "patch_size"),
        ({"image_size": {"height": 32}}, "image_size"),
        ({"problem_type": "guess"}, "problem_type='guess'"),
    ],
)
def test_config_contradicting_tensors_is_refused(
    change: dict[str, object], message: str, vit: Path
) -> None:
    edit_config(vit, **change)
    with pytest.raises(vitlib.VitlibError) as error:
        vitlib.load(vit)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_block_is_named(vit: Path) -> None:
    edit_tensors(vit, lambda t: [t.pop(key) for key in list(t) if ".layer.1." in key])
    with pytest.raises(CheckpointError, match=r"num_hidden_layers 3 \(the tensors have blocks 0,2"):
        vitlib.load(vit)
