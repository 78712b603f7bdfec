"""Research code stays whole: what a user put into a model does what it did, under optimize() too.

Each model here has something of its user's own; the fast one must give that model's numbers (to
5e-6, as in test_optimize.py), say which parts are not vitlib's, and speed up all the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import vitlib
from fast.test_optimize import (  # noqa: F401
    SAME,
    answers,
    apart,
    fast_blocks,
    has_int8,
    one_thread,
    pixels,
    tiny,
)
from vitlib import ViT
from vitlib.encoder import Attention, Block
from vitlib.fast import FastViT
from vitlib.fast.embeddings import PatchLinear
from vitlib.fast.linears import FastLinear


class OwnMLP(nn.Module):
    """Not a GELU in sight."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 48))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class LoRA(nn.Module):
    """As peft wraps a linear (2106.09685)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_a = nn.Linear(base.in_features, 4, bias=False)
        self.lora_b = nn.Linear(4, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2 * self.lora_b(self.lora_a(x))


class ParallelBlock(Block):
    """Attention and MLP side by side (2302.05442)."""

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        y = self.norm1(x)
        return (
            x[:, :num_queries] + self.attn(y, num_queries, attn_pos) + self.mlp(y[:, :num_queries])
        )


class GatedAttention(Attention):
    """A subclass with a part of its own, which calls the others' parts."""

    def forward(
        self, x: Tensor, num_queries: int | None = None, attn_pos: Tensor | None = None
    ) -> Tensor:
        return super().forward(x, num_queries, attn_pos) * torch.sigmoid(
            self.gate(x[:, :num_queries])
        )


class OwnViT(ViT):
    """Another head, and a part beside."""

    def forward_head(self, tokens: Tensor) -> Tensor:
        return self.head(tokens.amax(dim=1)) + self.beside(tokens[:, 0])

    def _num_pooled(self) -> None:
        return None


class OwnEmbed(nn.Module):
    """Pixels to tokens, another way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.stem(images).flatten(2).transpose(1, 2)


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class RMSNorm(nn.Module):
    """Not a LayerNorm (1910.07467)."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(48) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain * x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()


def _own_mlp(model: ViT) -> None:
    model.blocks[1].mlp = OwnMLP()


def _lora(model: ViT) -> None:
    for block in model.blocks:
        block.attn.q = LoRA(block.attn.q)


def _own_block(model: ViT) -> None:
    block = ParallelBlock(model.config, 1)
    block.load_state_dict(model.blocks[1].state_dict())
    model.blocks[1] = block


def _own_last_block(model: ViT) -> None:
    block = ParallelBlock(model.config, 2)
    block.load_state_dict(model.blocks[2].state_dict())
    model.blocks[2] = block


def _own_attention(model: ViT) -> None:
    attention = GatedAttention(model.config)
    attention.load_state_dict(model.blocks[0].attn.state_dict())
    attention.gate = nn.Linear(48, 48)
    model.blocks[0].attn = attention


def _hook_on_a_block(model: ViT) -> None:
    model.blocks[0].register_forward_hook(lambda _, __, out: out * 0.5)


def _pre_hook_on_a_linear(model: ViT) -> None:
    model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _, given: (given[0].relu(),))


def _hook_with_keywords(model: ViT) -> None:
    model.blocks[2].attn.register_forward_hook(
        lambda _, __, ___, out: out + 0.1, with_kwargs=True, always_call=True
    )


def _hook_on_the_model(model: ViT) -> None:
    model.register_forward_hook(lambda _, __, out: out * 3)


def _parametrised(model: ViT) -> None:
    parametrize.register_parametrization(model.blocks[1].mlp.fc1, "weight", Doubled())
    parametrizations.weight_norm(model.blocks[2].attn.proj)


def _patched_block(model: ViT) -> None:
    block = model.blocks[1]
    plain = block.forward
    block.forward = lambda *given: plain(*given) + 0.1


def _patched_linear(model: ViT) -> None:
    linear = model.blocks[1].attn.v
    linear.forward = lambda x: nn.functional.linear(x, linear.weight.abs())


def _patched_inside(model: ViT) -> None:
    """Not forward, but what forward calls."""
    attention = model.blocks[1].attn
    split_heads = attention.split_heads
    attention.split_heads = lambda x: split_heads(2 * x)


def _patched_residual(model: ViT) -> None:
    block = model.blocks[2]
    block.residual = lambda x, layer_scale, site: 0.3 * x  # noqa: ARG005


def _own_norm(model: ViT) -> None:
    model.blocks[1].norm2 = RMSNorm()


def _own_embed(model: ViT) -> None:
    model.patch_embed = OwnEmbed()


def _own_head(model: ViT) -> None:
    model.head = nn.Sequential(nn.Linear(48, 24), nn.GELU(), nn.Linear(24, 5))


def _hook_on_the_norm(model: ViT) -> None:
    model.norm.register_forward_hook(lambda _, __, out: out.abs())


OWN: dict[Callable[[ViT], None], tuple[list[str], list[bool]]] = {
    # what is named, and which blocks are fast
    _own_mlp: (["blocks.1.mlp"], [True, False, True]),
    _lora: ([f"blocks.{i}.attn.q" for i in range(3)], [False] * 3),
    _own_block: (["blocks.1"], [True, False, True]),
    _own_last_block: (["blocks.2"], [True, True, False]),
    _own_attention: (["blocks.0.attn"], [False, True, True]),
    _hook_on_a_block: (["blocks.0"], [False, True, True]),
    _pre_hook_on_a_linear: (["blocks.1.mlp.fc2"], [True, False, True]),
    _hook_with_keywords: (["blocks.2.attn"], [True, True, False]),
    _hook_on_the_model: (["the model itself"], [True] * 3),
    _parametrised: (["blocks.1.mlp.fc1", "blocks.2.attn.proj"], [True, False, False]),
    _patched_block: (["blocks.1"], [True, False, True]),
    _patched_linear: (["blocks.1.attn.v"], [True, False, True]),
    _patched_inside: (["blocks.1.attn"], [True, False, True]),
    _patched_residual: (["blocks.2"], [True, True, False]),
    _own_norm: (["blocks.1.norm2"], [True, False, True]),
    _own_embed: (["patch_embed"], [True] * 3),
    _own_head: (["head"], [True] * 3),
    _hook_on_the_norm: (["norm"], [True] * 3),
}


@pytest.mark.parametrize(
    "change",
    list(OWN),
)
def test_it_does_what_it_did(change: Callable[[ViT], None]) -> None:
    model = tiny()
    images = pixels(model)
    is_stock = answers(model, images)
    change(model)
    model.eval()
    fast = vitlib.optimize(model)
    named, blocks = OWN[change]
    changed = answers(model, images)
    assert any(not torch.equal(changed[k], is_stock[k]) for k in changed)  # it does something
    assert apart(fast, model, images) <= SAME
    assert apart(fast, model, pixels(model, 2, (16, 40))) <= SAME
    assert list(fast.unoptimized_modules) == named
    assert fast_blocks(fast) == blocks


@pytest.mark.parametrize("change", OWN)
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_in_other_precisions_too(precision: Any, change: Callable[[ViT], None]) -> None:
    """Near the changed model, and nearer than to the one before: 5e-2 as in test_optimize.py."""
    if precision == "int8" and not (
        vitlib.fast.cpu.this_machine().avx512_vnni and vitlib.fast.onednn_ops.has_int8_linear()
    ):
        pytest.skip("no int8 here")
    model = tiny()
    images = pixels(model, 4)
    change(model)
    model.eval()
    exact = answers(model, images)
    found = answers(vitlib.optimize(model, precision), images)
    for key in exact:
        error = (found[key] - exact[key]).square().mean() / exact[key].square().mean()
        assert error.sqrt() < 5e-2, key


# --- what is left beside is fast ------------------------------------------------------------------


def test_all_around_is_fast() -> None:
    model = tiny()
    _own_mlp(model)
    _lora(model)
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


def test_a_subclass_of_the_model() -> None:
    plain = tiny()
    model = OwnViT(plain.config)
    model.load_state_dict(plain.state_dict())
    model.beside = nn.Linear(48, 5)
    model.eval()
    fast = vitlib.optimize(model)
    assert isinstance(fast.trunk, OwnViT)
    assert fast.unoptimized_modules == ("the model itself",)
    assert fast_blocks(fast) == [True] * 3
    images = pixels(model)
    assert apart(fast, model, images) <= SAME
    assert not torch.allclose(model(images), plain(images), atol=0.1)


def test_a_hook_sees_each_call_once_and_whole() -> None:
    """With hooks a batch is not cut, as they would see the cuts."""
    model = tiny()
    seen: list[Tensor] = []
    model.blocks[1].register_forward_hook(lambda _, __, out: seen.append(out.detach().clone()))
    images = pixels(model, 5)
    with torch.inference_mode():
        model(images)
        vitlib.optimize(model, batch_size=2)(images)
    theirs, ours = seen
    assert theirs.shape == ours.shape == (5, 17, 48)
    assert (theirs - ours).abs().max() <= SAME * theirs.abs().max()


def test_features_are_kept_as_they_were_seen() -> None:
    """What a hook keeps of a block is not overwritten by the next one."""
    model = tiny()
    kept: list[tuple[Tensor, Tensor]] = []
    model.blocks[0].register_forward_hook(lambda _, __, out: kept.append((out, out.clone())))
    vitlib.optimize(model)(pixels(model))
    assert len(kept) == 1
    assert torch.equal(*kept[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("int8", marks=has_int8)])
def test_a_block_leaves_what_it_is_given(precision: str) -> None:
    """The second half of a block may write over the first half's, never over its input."""
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


def test_a_global_hook() -> None:
    """Every module is watched, so every module stays what it is."""
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
        theirs = list(names)
        names.clear()
        fast(images)
        ours = [name for name in names if name != "FastViT"]
        assert ours == theirs
        assert apart(fast, model, images) == 0
    finally:
        handle.remove()
    assert vitlib.optimize(model).unoptimized_modules == ()


def test_a_hook_taken_off_is_gone() -> None:
    model = tiny()
    model.blocks[0].register_forward_hook(lambda *_: None).remove()
    assert vitlib.optimize(model).unoptimized_modules == ()


def test_hooks_put_on_the_fast_one_stay_there() -> None:
    model = tiny()
    images = pixels(model)
    fast = vitlib.optimize(model)
    plain = model(images)
    fast.trunk.blocks[1].register_forward_hook(lambda _, __, out: out * 0)
    assert torch.equal(model(images), plain)
    assert not torch.allclose(fast(images), plain, atol=1e-3)


def test_training_mode() -> None:
    """A stock model in training is read as in eval(); one's own parts could not be."""
    model = tiny(dropout=0.3, drop_path=0.2).train()
    images = pixels(model)
    fast = vitlib.optimize(model)
    assert torch.equal(fast(images), fast(images))
    assert apart(fast, copy.deepcopy(model).eval(), images) <= SAME
    _own_mlp(model)
    with pytest.raises(vitlib.VitlibError, match=r"training mode.*eval\(\)"):
        vitlib.optimize(model)


@pytest.mark.parametrize(
    "change", [c for c in OWN if c not in (_patched_inside, _patched_residual)]
)
def test_the_users_parts_are_left_alone(change: Callable[[ViT], None]) -> None:
    model = tiny()
    change(model)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    images = pixels(model)
    plain = model(images).detach()
    vitlib.optimize(model)(images)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(model(images), plain)
    model(images).square().sum().backward()
    assert model.blocks[0].norm1.weight.grad is not None


# --- half weights and own parts -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_own_parts_in_other_dtypes_run_as_the_model(dtype: torch.dtype) -> None:
    """They take what the model's dtype is, and so all of it stays as it is."""
    model = tiny()
    _own_mlp(model)
    model.to(dtype)
    images = pixels(model)
    fast = vitlib.optimize(model)
    assert fast.unoptimized_modules == ("blocks.1.mlp",)
    with torch.inference_mode():
        assert torch.equal(fast(images), model(images))
        assert torch.equal(fast.forward_features(images), model.forward_features(images))


def test_the_head_of_own_parts_in_bfloat16() -> None:
    model = tiny()
    _own_head(model)
    model.bfloat16()
    with torch.inference_mode():
        tokens = model.forward_features(pixels(model))
        assert torch.equal(vitlib.optimize(model).forward_head(tokens), model.forward_head(tokens))


def test_an_own_projection_in_bfloat16() -> None:
    model = tiny()
    _own_embed(model)
    model.bfloat16()
    images = pixels(model).bfloat16()
    with torch.inference_mode():
        assert torch.equal(vitlib.optimize(model)(images), model(images))


# --- stock modules in places where vitlib has none of them ----------------------------------------


def _same_block_twice(model: ViT) -> None:
    model.blocks[1] = model.blocks[0]


def _no_mlp(model: ViT) -> None:
    model.blocks[1].mlp = nn.Identity()


def _linear_mlp(model: ViT) -> None:
    model.blocks[1].mlp = nn.Linear(48, 48)


def _no_norm(model: ViT) -> None:
    model.blocks[1].norm1 = nn.Identity()


def _norm_without_bias(model: ViT) -> None:
    model.blocks[1].norm1 = nn.LayerNorm(48, bias=False)


def _norm_without_weights(model: ViT) -> None:
    model.blocks[2].norm2 = nn.LayerNorm(48, elementwise_affine=False)


def _final_norm_without_weights(model: ViT) -> None:
    model.norm = nn.LayerNorm(48, elementwise_affine=False)


def _no_final_norm(model: ViT) -> None:
    model.norm = nn.Identity()


def _no_value_projection(model: ViT) -> None:
    model.blocks[0].attn.v = nn.Identity()


def _overlapping_patches(model: ViT) -> None:
    model.patch_embed.proj = nn.Conv2d(3, 48, 12, 8, padding=2)


def _patches_of_groups(model: ViT) -> None:
    model.patch_embed.proj = nn.Conv2d(3, 48, 8, 8, groups=3)


def _fewer_heads(model: ViT) -> None:
    attention = model.blocks[1].attn
    attention.num_heads = 2
    for name in "qkv":
        setattr(attention, name, nn.Linear(48, 24))
    attention.proj = nn.Linear(24, 48)


def _fewer_heads_at_the_end(model: ViT) -> None:
    model.blocks[1], model.blocks[2] = model.blocks[2], model.blocks[1]
    attention = model.blocks[2].attn
    attention.num_heads = 2
    for name in "qkv":
        setattr(attention, name, nn.Linear(48, 24))
    attention.proj = nn.Linear(24, 48)


def _fewer_blocks(model: ViT) -> None:
    model.blocks = model.blocks[:2]


def _narrower_mlp(model: ViT) -> None:
    model.blocks[1].mlp.fc1, model.blocks[1].mlp.fc2 = nn.Linear(48, 20), nn.Linear(20, 48)


def _tied_weights(model: ViT) -> None:
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight


def _frozen_embedding(model: ViT) -> None:
    model.patch_embed.requires_grad_(False)


PLACES = [
    _same_block_twice,
    _no_mlp,
    _linear_mlp,
    _no_norm,
    _norm_without_bias,
    _norm_without_weights,
    _final_norm_without_weights,
    _no_final_norm,
    _no_value_projection,
    _overlapping_patches,
    _patches_of_groups,
    _fewer_heads,
    _fewer_heads_at_the_end,
    _fewer_blocks,
    _narrower_mlp,
    _tied_weights,
    _frozen_embedding,
]


@pytest.mark.parametrize(
    "change",
    PLACES,
)
def test_stock_modules_in_other_places(change: Callable[[ViT], None]) -> None:
    """An ablation leaves nn's own classes behind; the fast one gives that model's numbers."""
    model = tiny()
    change(model)
    model.eval()
    fast: FastViT = vitlib.optimize(model)
    assert apart(fast, model, pixels(model)) <= SAME
