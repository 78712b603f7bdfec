"""Models that the caller passes: finetune trains them, or refuses them before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations

import vitlib
from checkpoint.test_reconcile import RULE, D, Louder, OwnAttention, OwnHead, tiny
from fixtures import references
from vitlib.errors import ConfigError
from vitlib.train import TrainConfig, finetune


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of four photos of 8x8 pixels."""
    folder, drawn = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for index, name in enumerate("abc"):
        (folder / name).mkdir()
        for number in range(4):
            levels = drawn.integers(60 * index, 60 * index + 80, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(levels).save(folder / name / f"{number}.png")
    return folder


def config(**tune: Any) -> TrainConfig:
    return TrainConfig.from_dict(
        {
            "num_train_epochs": 1, "learning_rate": 0.01, "validation_split": 0,
            "training_batch_size": 6, **tune,
        }
    )  # fmt: skip


def train_model(photos: Path, model: vitlib.ViT, out: Path, **tune: Any) -> dict[str, torch.Tensor]:
    """Train a model, and return the change of each parameter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    finetune(photos, model, out, config=config(**tune))
    after = dict(model.named_parameters())
    assert after.keys() >= before.keys() - {"head.weight", "head.bias"}
    return {n: after[n].detach() - before[n] for n in before if before[n].shape == after[n].shape}


def test_custom_parts_and_frozen_parameters_stay(photos: Path, tmp_path: Path) -> None:
    model = tiny()
    own = model.blocks[1].attn = OwnAttention(model.config)
    head = model.head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 3))
    parametrizations.weight_norm(model.blocks[0].mlp.fc1)
    model.blocks[2].requires_grad_(False)
    change = train_model(photos, model, tmp_path / "out")
    assert model.blocks[1].attn is own
    assert model.head is head
    frozen = {name for name, delta in change.items() if not delta.any()}
    assert frozen == {name for name in change if name.startswith("blocks.2.")}
    assert not any(p.requires_grad for p in model.blocks[2].parameters())
    assert model.config.labels == ("a", "b", "c")
    # What the folder holds is the model's own state_dict.
    again = tiny()
    again.blocks[1].attn = OwnAttention(again.config)
    again.head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 3))
    parametrizations.weight_norm(again.blocks[0].mlp.fc1)
    again.load_state_dict(load_file(tmp_path / "out/state_dict.safetensors"))
    pixels = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(again(pixels), model.eval()(pixels))
    assert not (tmp_path / "out/model.safetensors").exists()


def test_subclass_trains_by_its_forward(photos: Path, tmp_path: Path) -> None:
    model = Louder(tiny().config)
    model.load_state_dict(tiny().state_dict())
    model.image_processor = RULE
    assert any(delta.any() for delta in train_model(photos, model, tmp_path / "out").values())
    assert (tmp_path / "out/state_dict.safetensors").exists()


def test_custom_linear_head_is_written_for_hf(photos: Path, tmp_path: Path) -> None:
    model = tiny()
    model.head = nn.Linear(D, 3)
    head, weight = model.head, model.head.weight.detach().clone()
    train_model(photos, model, tmp_path / "out")
    assert model.head is head
    assert not torch.equal(head.weight, weight)
    assert (head.weight - weight).abs().max() < 0.1  # moved, not drawn anew
    again = vitlib.Predictor.load(tmp_path / "out")
    assert again.labels == ("a", "b", "c")
    pixels = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        assert references.distance(again.model(pixels), model.eval()(pixels)) < 1e-5


def test_lora_keeps_frozen_blocks(photos: Path, tmp_path: Path) -> None:
    model = tiny()
    model.blocks.requires_grad_(False)
    change = train_model(photos, model, tmp_path / "out", lora_r=2)
    moved = {name for name, delta in change.items() if delta.any()}
    assert {"blocks.0.attn.q.weight", "head.weight"} <= moved | {"head.weight"}
    assert not any(p.requires_grad for p in model.blocks.parameters())


def test_added_parts_train_and_their_base_stays(photos: Path, tmp_path: Path) -> None:
    base = tiny()
    state = {name: t.clone() for name, t in base.state_dict().items()}
    model = vitlib.adapt(base, prompts={"count": 2, "deep": True}, adapters=4, lora=2)
    change = train_model(photos, model, tmp_path / "out")
    moved = {name for name, delta in change.items() if delta.any()}
    assert {"patch_embed.prompt_token", "blocks.0.attn.q.up", "blocks.0.ls2.up.weight"} <= moved
    assert not any(".base." in name or "norm" in name for name in moved)
    assert all(torch.equal(t, state[name]) for name, t in base.state_dict().items())
    vitlib.save_delta(model, tmp_path / "delta.safetensors")
    again, images = (
        vitlib.load_delta(tiny(), tmp_path / "delta.safetensors"),
        torch.rand(2, 3, 8, 8),
    )
    with torch.no_grad():
        assert torch.equal(again.eval()(images), model.eval()(images))
    with pytest.raises(ConfigError, match=r"lora_r: the model has prompts, adapters, lora of"):
        finetune(photos, model, tmp_path / "again", config=config(lora_r=2))


def batch_norm(model: vitlib.ViT) -> None:
    model.head = nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, 3))


def own_head(model: vitlib.ViT) -> None:
    model.head = OwnHead()


def own_block(model: vitlib.ViT) -> None:
    model.blocks[0] = nn.Identity()


@pytest.mark.parametrize(
    ("change", "tune", "expected"),
    [
        (batch_norm, {}, r"head\.0 \(BatchNorm1d\) keeps running statistics"),
        (own_head, {}, "gives 5 classes, the photos have 3 labels: give it 3, or call"),
        (own_block, {"dropout": 0.1}, r"dropout=0\.1: blocks\.0 \(Identity\) is not vitlib's"),
        (own_block, {"lora_r": 2}, "q is a NoneType in a block put in by hand"),
    ],
)
def test_untrainable_model_is_refused_first(
    change: Any, tune: dict[str, Any], expected: str, photos: Path, tmp_path: Path
) -> None:
    model = tiny()
    change(model)
    with pytest.raises(ConfigError, match=expected):
        finetune(photos, model, tmp_path / "out", config=config(**tune))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="a Linear cannot be trained: give a hub id"):
        finetune(photos, nn.Linear(2, 2), tmp_path / "out")
