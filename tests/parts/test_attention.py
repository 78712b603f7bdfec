"""Attention by a function of one's own.

Bounds: a function that computes what torch's attention does may sum in another order: 2e-6 of the
largest logit.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitlib
from fixtures import families
from fixtures.families import FAMILIES, RARE, pixels
from vitlib.errors import ConfigError

everyone = pytest.mark.parametrize("family", FAMILIES | RARE)


def tiny(name: str, **changes: Any) -> vitlib.ViT:
    return families.tiny(name, **{"depth": 3, **changes})


def largest(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def uniform(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None) -> Tensor:
    assert q.shape == k.shape
    return v.mean(2, keepdim=True).expand_as(q)


class Sharpened(nn.Module):
    """Attention with a learned temperature of each head."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((num_heads, 1, 1), 0.5))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q * self.log_scale.exp(), k, v, bias)


@everyone
def test_function_that_is_torchs_changes_nothing(family: str) -> None:
    model, images = tiny(family), pixels(2)
    changed = model.with_attention(explicit)
    assert largest(changed(images), model(images)) <= 2e-6
    other = model.with_attention(uniform, blocks=range(1, 3))
    assert largest(other(images), model(images)) > 1e-4
    assert model.blocks[1].attn.attend is None
    assert not model.compute_all_tokens


@everyone
def test_optimized_model_runs_the_function(family: str) -> None:
    model, images = tiny(family), pixels(2)
    changed = model.with_attention(uniform, [1])
    fast = vitlib.optimize(changed)
    assert "blocks.1.attn.attend" in fast.unoptimized_modules
    assert largest(fast(images), changed(images)) <= 5e-6
    assert not any(path.startswith("blocks.0") for path in fast.unoptimized_modules)


def test_blocks_are_chosen_as_elsewhere() -> None:
    model = tiny("vit")
    for blocks, expected in ((None, [0, 1, 2]), (1, [2]), ([-1, 0], [0, 2]), (range(2), [0, 1])):
        changed = model.with_attention(explicit, blocks)
        indices = [i for i, block in enumerate(changed.blocks) if block.attn.attend is not None]
        assert indices == expected
        assert changed.compute_all_tokens is (2 in indices)


def test_weights_are_shared_and_the_model_is_untouched() -> None:
    model, images = tiny("vit"), pixels(2)
    exact = model(images)
    changed = model.with_attention(uniform)
    shared = dict(model.named_parameters())
    assert all(p is shared[name] for name, p in changed.named_parameters())
    assert changed.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(model(images), exact)
    again = model.with_attention(explicit).with_attention(uniform, [0])
    assert largest(again(images), changed(images)) > 1e-4  # the other blocks keep the first one


def test_module_brings_its_parameters() -> None:
    model, images = tiny("vit"), pixels(2)
    changed = model.with_attention(Sharpened(2), [0])
    name = "blocks.0.attn.attend.fn.log_scale"
    assert set(changed.state_dict()) - set(model.state_dict()) == {name}
    changed(images).square().sum().backward()
    assert dict(changed.named_parameters())[name].grad.abs().sum() > 0
    assert largest(changed(images), model(images)) > 1e-4


def test_changed_model_is_copied_pickled_and_compiled() -> None:
    model, images = tiny("dinov3").with_attention(explicit, [1]), pixels(2)
    exact = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), exact)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert largest(compiled(images), exact) <= 2e-6
    with io.BytesIO() as file:
        torch.save(model.state_dict(), file)
        assert file.tell()


def test_gradients_pass_through_the_function() -> None:
    model, images = tiny("vit"), pixels(2)
    model(images).square().sum().backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.with_attention(explicit)(images).square().sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None and not name.endswith(".k.bias"):  # whose gradient is 0
            assert largest(p.grad, exact[name]) <= 2e-5, name


def test_trace_has_heads_but_no_probabilities() -> None:
    model, images = tiny("vit").with_attention(uniform, [1]), pixels(2)
    _, at = model.trace(images, ["blocks.1.attn.heads", "blocks.*.attn.probs"])
    assert largest(at["blocks.1.attn.heads"][:, :, :1], at["blocks.1.attn.heads"][:, :, 1:2]) == 0
    assert "blocks.1.attn.probs" not in at
    assert "blocks.2.attn.probs" in at
    with pytest.raises(ConfigError, match="not vitlib's own"):
        model.trace(images, ["blocks.1.attn.probs"])
    with pytest.raises(ConfigError, match="no probabilities: ask other blocks"):
        model.attention(images)
    assert len(model.attention(images, [0, 2])) == 2
    with pytest.raises(ConfigError, match="no probabilities: use the methods"):
        vitlib.explain.forward_explicit(model, images)


def test_fused_training_step_calls_the_function() -> None:
    from vitlib.train.fused_step.forward import train_forward

    model, images = tiny("vit").with_attention(uniform).train(), pixels(2)
    with torch.no_grad():
        assert largest(train_forward(model, images, precision="fp32"), model(images)) <= 2e-5


def test_save_refuses_a_function_that_no_file_holds(tmp_path: Any) -> None:
    with pytest.raises(vitlib.VitlibError, match=r"blocks\.0\.attn"):
        vitlib.save(tiny("vit").with_attention(uniform), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (
            lambda _q, _k, v, _bias: v[:, :, :3],
            r"blocks\.0\.attn: <lambda> returned \(2, 2, 3, 16\)",
        ),
        (lambda _q, _k, v, _bias: v.double(), r"float64: expected \(2, 2, 17, 16\) torch.float32"),
        (lambda _q, _k, v, _bias: (v, None), "returned tuple: expected"),
    ],
)
def test_function_that_returns_another_shape(fn: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny("vit").with_attention(fn)(pixels(2))


def test_wrong_arguments() -> None:
    model = tiny("vit")
    with pytest.raises(ConfigError, match=r"expected fn\(q, k, v, bias\), got int"):
        model.with_attention(3)
    with pytest.raises(ConfigError, match="got the class Identity: give an instance of it"):
        model.with_attention(nn.Identity)
    with pytest.raises(
        ConfigError, match=r"expected fn\(q, k, v, bias\), got <lambda>\(_q, k, _v\)"
    ):
        model.with_attention(lambda _q, k, _v: k)
    with pytest.raises(ConfigError, match=r"expected fn\(q, k, v, bias\), got Identity\(input"):
        model.with_attention(nn.Identity())
    with pytest.raises(ConfigError, match=r"blocks=.*expected numbers of blocks, 0 to 2"):
        model.with_attention(explicit, [7])
    with pytest.raises(ConfigError, match="drops attention probabilities"):
        tiny("vit", attention_dropout=0.1).with_attention(explicit)
    model.blocks[1].attn = nn.Identity()
    with pytest.raises(ConfigError, match="is a Identity: expected vitlib's Attention"):
        model.with_attention(explicit)
