"""LoRA: the arithmetic of PEFT by hand, and the merge (2106.09685)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import vitlib
from fixtures.adapted import EVERY_PART, adapted, base, largest
from fixtures.families import FAMILIES, RARE, pixels
from vitlib.adapters import merge_lora
from vitlib.adapters.lora import LoraLinear
from vitlib.errors import ConfigError

everyone = pytest.mark.parametrize("family", FAMILIES | RARE)


def with_updated_weights(model: vitlib.ViT, changed: vitlib.ViT, scale: float) -> vitlib.ViT:
    """Add scale * B A to the weights of a copy: what PEFT computes by get_delta_weight."""
    state, reference = changed.state_dict(), copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in reference.state_dict().items():
            if name.startswith("head"):
                tensor.copy_(state[name])
            path = name.removesuffix(".weight")
            if f"{path}.up" in state:
                tensor += scale * state[f"{path}.up"] @ state[f"{path}.down"]
    return reference


@everyone
@pytest.mark.parametrize(
    ("lora", "names"),
    [
        ({"rank": 4, "on": "qv", "alpha": 8}, ["attn.q", "attn.v"]),
        ({"rank": 8, "on": ["o", "fc1", "fc2"]}, ["attn.proj", "mlp.fc1", "mlp.fc2"]),
    ],
)
def test_lora_adds_the_product_of_its_matrices(
    family: str, lora: dict[str, Any], names: list[str]
) -> None:
    model, images = base(family), pixels(2)
    changed = adapted(model, lora=lora)
    paths = [name for name, m in changed.named_modules() if isinstance(m, LoraLinear)]
    assert sorted(paths) == sorted(f"blocks.{i}.{name}" for i in range(3) for name in names)
    reference = with_updated_weights(model, changed, 2.0)
    with torch.no_grad():
        logits = changed(images)
        assert largest(logits, reference(images)) <= 3e-6
        assert largest(logits, model(images)) > 1e-3
        merged = merge_lora(changed)
        assert largest(merged(images), logits) <= 3e-6
    assert merged.adaptation is None
    assert merged.state_dict().keys() == model.state_dict().keys()


def test_merge_leaves_both_models_as_they_are() -> None:
    model, images = base("vit"), pixels(2)
    changed = adapted(model, **EVERY_PART)
    with torch.no_grad():
        before, logits = model(images), changed(images)
    flags = [p.requires_grad for p in changed.parameters()]
    merged = merge_lora(changed)
    with torch.no_grad():
        assert torch.equal(model(images), before)
        assert torch.equal(changed(images), logits)
        assert largest(merged(images), logits) <= 3e-6
    assert [p.requires_grad for p in changed.parameters()] == flags
    assert merged.adaptation is not None
    assert set(merged.adaptation.to_json()) == {"prompts", "adapters"}
    assert not any(isinstance(module, LoraLinear) for module in merged.modules())
    with pytest.raises(ConfigError, match=r"merge_lora: the model has no LoRA: vitlib.adapt"):
        merge_lora(merged)


def test_first_values_are_those_of_the_papers_code() -> None:
    """Uniform, as nn.Linear's weights, in float32 whatever the dtype of the layer; B is 0."""
    linear = nn.Linear(16, 6)
    layer = LoraLinear(linear, 3, 6, torch.Generator().manual_seed(2))
    drawn = torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    assert torch.equal(layer.down, drawn * 0.25)
    assert not layer.up.any()
    rounded = LoraLinear(nn.Linear(16, 6).half(), 3, 6, torch.Generator().manual_seed(2))
    assert torch.equal(rounded.down, (drawn * 0.25).half())


def test_lora_needs_linear_layers() -> None:
    model = base("vit")
    model.blocks[1].mlp = nn.Identity()
    assert vitlib.adapt(model, lora=2)(pixels(1)).shape == (1, 5)
    with pytest.raises(ConfigError, match=r"lora: fc1 of blocks.1 is a NoneType: .* out of on="):
        vitlib.adapt(model, lora={"rank": 2, "on": "q fc1"})
