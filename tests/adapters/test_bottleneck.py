"""Bottleneck adapters against a plain loop over the blocks (1902.00751, 2205.13535)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vitlib
from fixtures.adapted import adapted, base, largest
from fixtures.families import FAMILIES, RARE, pixels
from vitlib.errors import ConfigError
from vitlib.variants import PostNormBlock

everyone = pytest.mark.parametrize("family", FAMILIES | RARE)


@everyone
@pytest.mark.parametrize("parallel", [False, True])
def test_adapters_start_at_the_base(family: str, parallel: bool) -> None:
    """By rounding alone: torch multiplies frozen weights with rows of a view by another kernel."""
    model, images = base(family), pixels(2)
    changed = vitlib.adapt(model, adapters={"dim": 8, "parallel": parallel})
    with torch.no_grad():
        assert largest(changed(images), model(images)) <= 1e-6


def bottleneck(state: dict[str, Tensor], path: str, x: Tensor, parallel: bool) -> Tensor:
    x = F.linear(x, state[f"{path}.down.weight"], state[f"{path}.down.bias"])
    x = F.relu(x) if parallel else F.gelu(x)
    return F.linear(x, state[f"{path}.up.weight"], state[f"{path}.up.bias"])


@everyone
@pytest.mark.parametrize("on", ["attn", "mlp", "attn mlp"])
def test_serial_adapters_equal_a_plain_loop(family: str, on: str) -> None:
    model, images = base(family), pixels(2)
    changed = adapted(model, adapters={"dim": 8, "on": on, "scale": 0.5})
    state = changed.state_dict()

    def branch(index: int, number: int, y: Tensor) -> Tensor:
        block = model.blocks[index]
        scale = (block.ls1, block.ls2)[number - 1]
        y = y if scale is None else scale(y)
        if ("attn", "mlp")[number - 1] not in on:
            return y
        return y + 0.5 * bottleneck(state, f"blocks.{index}.ls{number}", y, False)

    with torch.no_grad():
        x = model.norm_pre(model.patch_embed(images))
        for index, (block, position) in enumerate(
            zip(model.blocks, model.attn_positions(images), strict=True)
        ):
            if isinstance(block, PostNormBlock):
                x = x + branch(index, 1, block.norm1(block.attn(x, None, position)))
                x = x + branch(index, 2, block.norm2(block.mlp(x)))
            else:
                x = x + branch(index, 1, block.attn(block.norm1(x), None, position))
                x = x + branch(index, 2, block.mlp(block.norm2(x)))
        expected = model.norm(x) if model.config.final_norm == "tokens" else x
        tokens = changed.forward_features(images)
        assert largest(tokens, expected) <= 2e-6
        assert largest(tokens, model.forward_features(images)) > 1e-3


@pytest.mark.parametrize("family", ["vit", "dinov2_swiglu"])
def test_parallel_adapters_equal_a_plain_loop(family: str) -> None:
    model, images = base(family), pixels(2)
    changed = adapted(model, adapters={"dim": 8, "parallel": True})
    state = changed.state_dict()
    with torch.no_grad():
        x = model.patch_embed(images)
        for index, block in enumerate(model.blocks):
            x = x + block.residual(block.attn(block.norm1(x)), block.ls1, 1)
            y = block.norm2(x)
            y = block.mlp(y) + 0.1 * bottleneck(state, f"blocks.{index}.mlp", y, True)
            x = x + block.residual(y, block.ls2, 3)
        assert largest(changed.forward_features(images), model.norm(x)) <= 2e-6


def test_points_are_before_the_adapter() -> None:
    model, images = base("dinov2"), pixels(2)
    changed = adapted(model, adapters=8)
    names = ["blocks.0.attn.out", "blocks.0.mlp.hidden", "blocks.0.resid_mid"]
    with torch.no_grad():
        _, at = changed.trace(images, names)
        _, expected = model.trace(images, names)
    assert largest(at[names[0]], expected[names[0]]) <= 1e-6
    assert largest(at[names[2]], expected[names[2]]) > 1e-3
    with pytest.raises(ConfigError, match=r"no point 'blocks.0.mlp.hidden' in this model"):
        vitlib.adapt(model, adapters={"dim": 8, "parallel": True}).trace(images, names)


def test_adapters_take_a_branch_in_bfloat16() -> None:
    """A training step in bfloat16 computes the residual outside of autocast."""
    model = base("vit")
    block = adapted(model, adapters=8).blocks[0]
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        exact, rounded = (block.residual(y, block.ls1, 1) for y in (x, x.bfloat16()))
    assert largest(rounded.float(), exact) < 2e-2
