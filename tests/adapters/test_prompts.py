"""Prompts: against registers, a plain loop, and the model without them.

Bounds: rounding, 2e-6 of the largest number: one row more changes the kernels of products.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vitlib
from fixtures.adapted import adapted, base, largest
from fixtures.families import FAMILIES, RARE, pixels
from vitlib.encoder import Block
from vitlib.errors import ConfigError
from vitlib.variants import PromptedPosition

COUNT = 3
everyone = pytest.mark.parametrize("family", FAMILIES | RARE)
# Registers of these have positions, are pooled, or are refused.
OTHER_REGISTERS = {"beit", "beit_timm", "data2vec", "mlcd", "pixio"}
# Their pool reads every token, prompts too.
POOLS_ALL = {"siglip_map", "perception_encoder", "aimv2_native"}


def with_registers(model: vitlib.ViT, prompts: Tensor) -> vitlib.ViT:
    """Give a model as many more registers, whose values are those of prompts."""
    registers = model.config.tokens.registers + COUNT
    changed = vitlib.ViT(
        vitlib.ViTConfig(**{**fields(model.config), "num_registers": registers})
    ).eval()
    state = dict(model.state_dict())
    parts = [t for t in (state.get("patch_embed.reg_token"), prompts) if t is not None]
    state["patch_embed.reg_token"] = torch.cat(parts, dim=1)
    changed.load_state_dict(state)
    return changed


def fields(cfg: vitlib.ViTConfig) -> dict[str, object]:
    return {name: getattr(cfg, name) for name in type(cfg).__dataclass_fields__}


@pytest.mark.parametrize("family", sorted((FAMILIES | RARE).keys() - OTHER_REGISTERS))
def test_shallow_prompts_are_registers(family: str) -> None:
    model, images = base(family), pixels(2)
    prompted = adapted(model, prompts=COUNT)
    prompts = prompted.patch_embed.prompt_token
    assert prompts is not None
    reference = with_registers(model, prompts.detach())
    reference.load_state_dict(
        {n: t for n, t in prompted.state_dict().items() if n.startswith("head")}
        | {n: t for n, t in reference.state_dict().items() if not n.startswith("head")}
    )
    with torch.no_grad():
        assert largest(prompted(images), reference(images)) <= 2e-6
        tokens = prompted.forward_features(images)
        assert largest(tokens, reference.forward_features(images)) <= 2e-6
        for a, b in zip(prompted.attention(images), reference.attention(images), strict=True):
            assert largest(a, b) <= 2e-6
    assert prompted.num_prefix_tokens == reference.num_prefix_tokens


@everyone
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_tokens_that_do_not_attend_to_prompts_are_those_of_the_base(
    family: str, deep: bool, size: tuple[int, int]
) -> None:
    """Positions, rotations, grids and pools of all other tokens are as they were."""
    model, images = base(family), pixels(2, *size)
    first = model.num_prefix_tokens

    def ignore_prompts(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        hidden = torch.zeros(k.shape[2]).index_fill(0, torch.arange(first, first + COUNT), -1e30)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = scores if bias is None else scores + bias
        return (scores + hidden).softmax(-1) @ v

    prompted = vitlib.adapt(model, prompts={"count": COUNT, "deep": deep})
    with torch.no_grad():
        logits, blind = prompted(images), prompted.with_attention(ignore_prompts)
        tokens = blind.forward_features(images)
        rest = torch.cat([tokens[:, :first], tokens[:, first + COUNT :]], dim=1)
        assert largest(rest, model.forward_features(images)) <= 2e-6
        assert largest(logits, model(images)) > 1e-4
        if family not in POOLS_ALL:
            assert largest(blind(images), model(images)) <= 2e-6


@everyone
def test_counts_and_maps_with_prompts(family: str) -> None:
    model, images = base(family), pixels(2, 40, 24)
    prompted = adapted(model, prompts={"count": COUNT, "deep": True})
    with torch.no_grad():
        tokens = prompted.forward_features(images)
        first = prompted.num_prefix_tokens
        assert first == model.num_prefix_tokens + COUNT
        assert tokens.shape[1] == first + 15
        maps = prompted.forward_intermediates(images, [1], reshape=True, return_prefix_tokens=True)
        assert maps[0][0].shape == (2, 32, 5, 3)
        assert maps[0][1].shape == (2, first, 32)
        assert prompted.attention(images, [2])[0].shape[2:] == (first + 15, first + 15)
        assert prompted.attention(images, [0], rows="prefix")[0].shape[2] == first
        assert prompted.facets(images, 2, "key", grid=True).shape == (2, 5, 3, 32)
        logits, at = prompted.trace(images, ["blocks.1.attn.probs", "blocks.1.attn.k"])
        assert largest(logits, prompted(images)) <= 2e-6
        probs = prompted.attention(images, [1])[0]
        assert largest(at["blocks.1.attn.probs"], probs) <= 2e-6


@pytest.mark.parametrize("family", ["vit", "eva02_post_norm"])
def test_deep_prompts_equal_a_plain_loop(family: str) -> None:
    model, images = base(family), pixels(2)
    prompted = adapted(model, prompts={"count": COUNT, "deep": True})
    state = prompted.state_dict()
    with torch.no_grad():
        x = model.patch_embed(images)
        for index, block in enumerate(model.blocks):
            name = "patch_embed" if index == 0 else f"blocks.{index}"
            prompts = state[f"{name}.prompt_token"].expand(2, -1, -1)
            rest = x if index == 0 else torch.cat([x[:, :1], x[:, 1 + COUNT :]], dim=1)
            x = block(torch.cat([rest[:, :1], prompts, rest[:, 1:]], dim=1))
        expected = model.norm(x)
        assert largest(prompted.forward_features(images), expected) <= 2e-6
        logits = torch.nn.functional.linear(
            expected[:, 0], state["head.weight"], state["head.bias"]
        )
        assert largest(prompted(images), logits) <= 2e-6


def test_facets_of_a_block_see_its_own_prompts() -> None:
    model, images = base("vit"), pixels(2)
    prompted = adapted(model, prompts={"count": COUNT, "deep": True})
    block = prompted.blocks[1]
    prompts = prompted.state_dict()["blocks.1.prompt_token"]
    with torch.no_grad():
        expected = block.attn.k(block.norm1(prompts))
        keys = prompted.facets(images, 1, "key")[:, 1 : 1 + COUNT]
    assert largest(keys, expected.expand(2, -1, -1)) <= 2e-6


def test_positions_of_prompts_are_none() -> None:
    position = adapted(base("beit"), prompts=COUNT).attn_position
    assert isinstance(position, PromptedPosition)
    cpu = torch.device("cpu")
    for wide, table in zip(
        position.per_block((4, 4), cpu, 3), position.base.per_block((4, 4), cpu, 3), strict=True
    ):
        prompts, others = [1, 2, 3], [0, *range(4, 20)]
        assert not wide[:, :, prompts].any()
        assert not wide[..., prompts].any()
        assert torch.equal(wide[:, :, others][..., others], table)
    position = adapted(base("mlcd"), prompts=COUNT).attn_position
    assert isinstance(position, PromptedPosition)
    wide = next(position.per_block((4, 4), cpu, 1))
    table = next(iter(position.base.per_block((4, 4), cpu, 1)))
    assert torch.equal(wide[:, [0, *range(4, 20)]], table)
    assert torch.equal(wide[0, 1:4], torch.ones(3, 16))
    assert not wide[1, 1:4].any()


def test_first_prompts_are_uniform_in_the_papers_bound() -> None:
    model = base("vit")
    prompts = vitlib.adapt(model, prompts=400).patch_embed.prompt_token
    assert prompts is not None
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5
    assert 0.99 * bound < prompts.abs().max() <= bound
    assert abs(prompts.std().item() / (bound / 3**0.5) - 1) < 0.02


class OwnBlock(Block):
    """A block of the user's own."""


def test_prompts_need_vitlibs_own_parts() -> None:
    model = base("vit")
    block = OwnBlock(model.config, 1)
    model.blocks[1] = block
    assert vitlib.adapt(model, prompts=2)(pixels(1)).shape == (1, 5)
    with pytest.raises(ConfigError, match=r"blocks.1 is a OwnBlock: expected vitlib's Block"):
        vitlib.adapt(model, prompts={"count": 2, "deep": True})
