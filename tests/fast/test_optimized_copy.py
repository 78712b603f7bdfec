"""Test that optimize() only reads the model, and that its result is independent of it."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor

import vitlib
from fixtures.fast_models import (
    TOLERANCE,
    all_outputs,
    pixels,
    tiny,
)
from fixtures.references import distance
from vitlib.errors import ConfigError
from vitlib.fast import cpu
from vitlib.fast.cpu import Machine


@pytest.mark.parametrize("name", ["two heads", "dinov3 swiglu", "beit", "siglip", "clip"])
def test_optimize_only_reads_the_model(name: str) -> None:
    model = tiny(name).train()
    model.requires_grad_(True)
    model.head.requires_grad_(False)
    before = copy.deepcopy(model)
    modules, names = list(model.modules()), dict(model.named_parameters())
    images = pixels(model)
    for precision in ("fp32", "bf16"):
        fast = vitlib.optimize(model, precision)
        all_outputs(fast, images)
    assert list(model.modules()) == modules
    assert all(a is b for a, b in zip(model.parameters(), names.values(), strict=True))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in before.state_dict().items())
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert (a.requires_grad, a.dtype, a.is_leaf) == (b.requires_grad, b.dtype, b.is_leaf)
    for m in (before, model):
        m.zero_grad()
        m.eval()(images).square().sum().backward()
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


def test_model_stays_in_training_mode() -> None:
    model = tiny().train()
    fast = vitlib.optimize(model)
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in fast.modules())


def test_optimized_model_shares_no_requires_grad() -> None:
    model = tiny()
    model.requires_grad_(True)
    vitlib.optimize(model).requires_grad_(False)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("move", ["half", "double", "cpu", "to", "share_memory"])
def test_optimized_model_refuses_to_move(move: str) -> None:
    """Parameters would move, and packed weights would stay."""
    fast = vitlib.optimize(tiny())
    with pytest.raises(ConfigError, match="move or cast the model it was made from"):
        getattr(fast, move)(*["meta"][: move == "to"])


@pytest.mark.parametrize("path", ["packed", "unpacked"])
@pytest.mark.parametrize("name", ["class token", "beit", "siglip", "clip", "registers"])
def test_training_the_model_does_not_change_the_copy(
    name: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared weight would follow the model, while folded and packed ones would not."""
    if path == "unpacked":
        bare = Machine("aarch64", "", "Neoverse")
        monkeypatch.setattr(cpu, "this_machine", lambda: bare)
    model = tiny(name)
    fast = vitlib.optimize(model)
    images = pixels(model)
    before = all_outputs(fast, images)
    changed = []
    for key, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.add_(0.1)  # in place, as an optimizer's step
        after = all_outputs(fast, images)
        if not all(torch.equal(after[k], before[k]) for k in before):
            changed.append(key)
        before = after
    assert changed == []


def test_optimized_model_outlives_the_model() -> None:
    model = tiny("beit")
    fast = vitlib.optimize(model)
    images = pixels(model)
    expected = model(images).detach()
    del model
    gc.collect()
    assert distance(fast(images), expected) <= TOLERANCE
    assert distance(fast(pixels(fast, 2, (16, 40))), fast(pixels(fast, 2, (16, 40)))) > 0.01


def test_grid_caches_serve_with_and_without_inference_mode() -> None:
    """A cache that was filled in one mode serves the other."""
    for name in ("class token", "dinov3", "beit"):
        model = tiny(name)
        images = pixels(model, 2, (16, 40))
        for first_in_inference in (True, False):
            fast = vitlib.optimize(model)
            outputs = []
            for inference in (first_in_inference, not first_in_inference):
                with torch.inference_mode(inference):
                    outputs.append(fast(images))
                    assert not outputs[-1].requires_grad
            assert torch.equal(*outputs)
            assert distance(outputs[0].clone(), model(images).detach()) <= TOLERANCE


def test_forward_saves_no_tensors_for_backward() -> None:
    model = tiny()
    model.requires_grad_(True)
    fast = vitlib.optimize(model)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        assert not fast(pixels(model)).requires_grad
    assert saved == []
