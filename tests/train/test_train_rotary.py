"""Training of models with rotary tables and rare norms: gradients reach what is learned of them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import vitlib
from fixtures.layout_files import make_pixels
from fixtures.timm_rotary import NAMES, load_model
from vitlib import ImageProcessor
from vitlib.train import finetune
from vitlib.train.config import TrainConfig
from vitlib.train.fused_step import train_forward

RULE = ImageProcessor(size=(16, 16), image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
TINY = 2e-6  # as in test_fused_step.py
QUICK = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
# Parameters that only models of these kinds have, by the ends of their names.
LEARNED = {
    "eva02": ("mlp.sub_norm.weight", "mlp.sub_norm.bias"),
    "beit3": ("attn.sub_norm.weight", "attn.sub_norm.bias", "mlp.sub_norm.weight"),
    "rope_mixed": ("attn_position.freqs",),
    "rope_mixed_ape": ("attn_position.freqs",),
    "sapiens2": ("attn.q_norm.weight", "attn.k_norm.weight"),
    "aimv2": ("patch_embed.norm.weight",),
    "pe_core": ("attn_pool.probe", "attn_pool.mlp.fc1.weight"),
    "meta/vit5": ("attn.q_norm.weight", "patch_embed.reg_token", "ls2.gamma"),
}


def gradients(model: vitlib.ViT, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradients of a loss that weighs every logit differently."""
    weight = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view(logits.shape)
    (logits * weight).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def largest_error(actual: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Return the largest relative error of the gradients that are not zero."""
    assert actual.keys() == exact.keys()
    return max(
        float((actual[name].double() - tensor).abs().max() / tensor.abs().max())
        for name, tensor in exact.items()
        if tensor.abs().max() > 1e-9
    )


@pytest.mark.parametrize("name", [*NAMES, "meta/vit5"])
def test_gradients_of_training_equal_those_of_forward(name: str) -> None:
    model, images = load_model(name).train(), make_pixels(12, 20)
    exact_model, own_model = copy.deepcopy(model).double(), copy.deepcopy(model)
    exact = gradients(exact_model, exact_model(images.double()))
    own = gradients(own_model, own_model(images))
    actual = gradients(model, train_forward(model, images, precision="fp32"))
    assert largest_error(actual, exact) <= 3 * largest_error(own, exact) + TINY
    for end in LEARNED.get(name, ()):
        names = [key for key in dict(model.named_parameters()) if key.endswith(end)]
        assert names
        assert all(actual[key].abs().max() > 1e-6 for key in names)


@pytest.mark.parametrize("name", LEARNED)
def test_finetune_trains_and_writes_the_model(name: str, photos: Path, tmp_path: Path) -> None:
    model = load_model(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = TrainConfig.from_dict({**QUICK, "validation_split": 0.25})
    done = finetune(
        photos, model, tmp_path / "out", config=config, image_processor=RULE, device="cpu"
    )
    assert done.labels == ("dark", "light")
    again = vitlib.load(done.out)
    assert (again.config.rope, again.config.norms) == (model.config.rope, model.config.norms)
    after = again.state_dict()
    for end in LEARNED[name]:
        changed = [key for key in before if key.endswith(end)]
        assert changed
        assert all(not torch.equal(before[key], after[key]) for key in changed)
        assert all(bool(after[key].isfinite().all()) for key in changed)
