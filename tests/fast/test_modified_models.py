"""Test models with modules of the user's own under optimize().

Each keeps its numbers to 5e-6, its own modules are reported, and all others are replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitlib
from fixtures.fast_models import (
    TOLERANCE,
    all_outputs,
    are_blocks_fast,
    max_distance,
    pixels,
    requires_int8,
    tiny,
)
from fixtures.user_modules import (
    CHANGES,
    OwnViT,
    patch_residual,
    patch_split_heads,
    replace_head,
    replace_mlp,
    replace_patch_embed,
    wrap_in_lora,
)
from vitlib import ViT
from vitlib.encoder import Attention, Block
from vitlib.fast.embeddings import PatchLinear
from vitlib.fast.linears import FastLinear


@pytest.mark.parametrize(
    "change",
    list(CHANGES),
)
def test_modified_model_gives_its_own_numbers(change: Callable[[ViT], None]) -> None:
    model = tiny()
    images = pixels(model)
    stock_outputs = all_outputs(model, images)
    change(model)
    model.eval()
    fast = vitlib.optimize(model)
    paths, blocks = CHANGES[change]
    changed = all_outputs(model, images)
    assert any(not torch.equal(changed[k], stock_outputs[k]) for k in changed)  # it does something
    assert max_distance(fast, model, images) <= TOLERANCE
    assert max_distance(fast, model, pixels(model, 2, (16, 40))) <= TOLERANCE
    assert list(fast.unoptimized_modules) == paths
    assert are_blocks_fast(fast) == blocks


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_modified_model_in_bf16_and_int8(precision: Any, change: Callable[[ViT], None]) -> None:
    """Within 5e-2 of the modified model, as in test_precisions.py."""
    if precision == "int8" and not (
        vitlib.fast.cpu.this_machine().avx512_vnni and vitlib.fast.onednn_ops.has_int8_linear()
    ):
        pytest.skip("no int8 here")
    model = tiny()
    images = pixels(model, 4)
    change(model)
    model.eval()
    exact = all_outputs(model, images)
    actual = all_outputs(vitlib.optimize(model, precision), images)
    for key in exact:
        error = (actual[key] - exact[key]).square().mean() / exact[key].square().mean()
        assert error.sqrt() < 5e-2, key


def test_stock_modules_beside_the_users_are_replaced() -> None:
    model = tiny()
    replace_mlp(model)
    wrap_in_lora(model)
    fast = vitlib.optimize(model)
    block = fast.trunk.blocks[1]
    assert type(block) is Block
    assert block.mlp is model.blocks[1].mlp  # the very object
    assert block.attn.q is model.blocks[1].attn.q
    assert type(block.attn) is Attention
    assert all(isinstance(getattr(block.attn, name), FastLinear) for name in ("k", "v", "proj"))
    assert isinstance(fast.trunk.blocks[0].mlp.fc1, FastLinear)
    assert isinstance(fast.trunk.patch_embed.proj, PatchLinear)
    assert block.attn.k.weight.shape == (48, 48)  # stands where a linear stood
    assert torch.equal(block.attn.k.weight, model.blocks[1].attn.k.weight)
    assert (block.attn.k.in_features, block.attn.k.out_features) == (48, 48)


def test_subclass_of_vit_keeps_its_methods() -> None:
    original = tiny()
    model = OwnViT(original.config)
    model.load_state_dict(original.state_dict())
    model.extra_head = nn.Linear(48, 5)
    model.eval()
    fast = vitlib.optimize(model)
    assert isinstance(fast.trunk, OwnViT)
    assert fast.unoptimized_modules == ("the model itself",)
    assert are_blocks_fast(fast) == [True] * 3
    images = pixels(model)
    assert max_distance(fast, model, images) <= TOLERANCE
    assert not torch.allclose(model(images), original(images), atol=0.1)


def test_hook_gets_each_batch_once_and_unsplit() -> None:
    """With hooks a batch is not split, as they would see the micro-batches."""
    model = tiny()
    outputs: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda _, __, out: outputs.append(out.detach().clone()))
    images = pixels(model, 5)
    with torch.inference_mode():
        model(images)
        vitlib.optimize(model, batch_size=2)(images)
    expected, actual = outputs
    assert expected.shape == actual.shape == (5, 17, 48)
    assert (expected - actual).abs().max() <= TOLERANCE * expected.abs().max()


def test_features_that_a_hook_stores_are_not_overwritten() -> None:
    """The next block does not write into a block's output that a hook stored."""
    model = tiny()
    stored: list[tuple[Tensor, Tensor]] = []
    model.blocks[0].register_forward_hook(lambda _, __, out: stored.append((out, out.clone())))
    vitlib.optimize(model)(pixels(model))
    assert len(stored) == 1
    assert torch.equal(*stored[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("int8", marks=requires_int8)])
def test_block_does_not_overwrite_its_input(precision: str) -> None:
    """The MLP may overwrite the residual stream after attention, never the block's input."""
    model = tiny()
    images = pixels(model)
    calibrate = images if precision == "int8" else None
    fast = vitlib.optimize(model, precision, calibrate=calibrate)
    tokens = torch.randn(2, 17, 48)
    before = tokens.clone()
    with torch.inference_mode():
        for block in fast.trunk.blocks:
            block(tokens)
            assert torch.equal(tokens, before)


def test_global_hook_leaves_every_module_as_it_is() -> None:
    """A global hook watches every module, so that none may be replaced."""
    model = tiny()
    images = pixels(model)
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: names.append(type(module).__name__)
    )
    try:
        fast = vitlib.optimize(model)
        assert fast.unoptimized_modules[0].startswith("every module")
        model(images)
        expected = list(names)
        names.clear()
        fast(images)
        actual = [name for name in names if name != "FastViT"]
        assert actual == expected
        assert max_distance(fast, model, images) == 0
    finally:
        handle.remove()
    assert vitlib.optimize(model).unoptimized_modules == ()


def test_removed_hook_counts_as_stock() -> None:
    model = tiny()
    model.blocks[0].register_forward_hook(lambda *_: None).remove()
    assert vitlib.optimize(model).unoptimized_modules == ()


def test_hook_on_the_optimized_model_is_not_shared() -> None:
    model = tiny()
    images = pixels(model)
    fast = vitlib.optimize(model)
    original = model(images)
    fast.trunk.blocks[1].register_forward_hook(lambda _, __, out: out * 0)
    assert torch.equal(model(images), original)
    assert not torch.allclose(fast(images), original, atol=1e-3)


def test_training_mode_is_read_as_eval_mode() -> None:
    """A stock model in training is read as in eval(); modules of the user's own are refused."""
    model = tiny(dropout=0.3, drop_path=0.2).train()
    images = pixels(model)
    fast = vitlib.optimize(model)
    assert torch.equal(fast(images), fast(images))
    assert max_distance(fast, copy.deepcopy(model).eval(), images) <= TOLERANCE
    replace_mlp(model)
    with pytest.raises(vitlib.VitlibError, match=r"training mode.*eval\(\)"):
        vitlib.optimize(model)


@pytest.mark.parametrize(
    "change", [c for c in CHANGES if c not in (patch_split_heads, patch_residual)]
)
def test_users_modules_are_not_changed(change: Callable[[ViT], None]) -> None:
    model = tiny()
    change(model)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    images = pixels(model)
    original = model(images).detach()
    vitlib.optimize(model)(images)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(model(images), original)
    model(images).square().sum().backward()
    assert model.blocks[0].norm1.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_users_modules_in_other_dtypes_are_not_optimized(dtype: torch.dtype) -> None:
    """They expect inputs of the model's dtype, so that nothing is optimized."""
    model = tiny()
    replace_mlp(model)
    model.to(dtype)
    images = pixels(model)
    fast = vitlib.optimize(model)
    assert fast.unoptimized_modules == ("blocks.1.mlp",)
    with torch.inference_mode():
        assert torch.equal(fast(images), model(images))
        assert torch.equal(fast.forward_features(images), model.forward_features(images))


def test_users_head_in_bfloat16() -> None:
    model = tiny()
    replace_head(model)
    model.bfloat16()
    with torch.inference_mode():
        tokens = model.forward_features(pixels(model))
        assert torch.equal(vitlib.optimize(model).forward_head(tokens), model.forward_head(tokens))


def test_users_patch_embed_in_bfloat16() -> None:
    model = tiny()
    replace_patch_embed(model)
    model.bfloat16()
    images = pixels(model).bfloat16()
    with torch.inference_mode():
        assert torch.equal(vitlib.optimize(model)(images), model(images))
