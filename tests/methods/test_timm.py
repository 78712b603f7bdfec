"""Methods under timm's names: what they give. tests/ecosystem/ compares with timm itself."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import vitlib
from fixtures.families import FAMILIES, pixels, tiny
from vitlib.errors import ConfigError
from vitlib.image.processor import ImageProcessor


def layers_of(matcher: dict[str, Any], names: list[str]) -> dict[str, tuple[float, ...]]:
    """Order names as timm does: the first pattern that matches, its groups, its mark."""
    patterns = [(re.compile(matcher["stem"]), 0, None)]
    patterns += [(re.compile(pattern), 1, mark) for pattern, mark in matcher["blocks"]]
    orders = {}
    for name in names:
        orders[name] = (float("inf"),)
        for pattern, kind, mark in patterns:
            if match := pattern.match(name):
                orders[name] = (kind, *map(float, match.groups()), *(mark or ()))
                break
    return orders


def test_forward_intermediates_takes_timm_arguments() -> None:
    model, images = tiny("dinov2_registers", depth=3), pixels(2, 32, 48)
    tokens = model.forward_intermediates(images, [0, 2])
    maps = model.forward_intermediates(images, [0, 2], reshape=True)
    for arguments, expected in (
        ({"intermediates_only": True}, maps),
        ({"intermediates_only": True, "output_fmt": "NLC", "stop_early": True}, tokens),
        ({"output_fmt": "NCHW", "stop_early": False}, maps),
        ({"output_fmt": "NLC"}, tokens),
    ):
        result = model.forward_intermediates(images, [0, 2], **arguments)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True)), arguments
    assert maps[0].shape == (2, 32, 4, 6)
    assert model.forward_intermediates(images[:0], 1, reshape=True)[0].shape == (0, 32, 4, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"intermediates_only": False}, "intermediates_only=False.*forward_features"),
        ({"output_fmt": "NHWC"}, "output_fmt='NHWC': expected 'NCHW' or 'NLC'"),
        ({"indices": [7]}, "indices=.*0 to 1"),
    ],
)
def test_forward_intermediates_refuses_other_outputs(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny("vit", depth=2).forward_intermediates(pixels(1), **arguments)


def test_intermediate_layers_as_in_dino() -> None:
    model, images = tiny("dinov2_registers", depth=3), pixels(2)
    features = model.forward_features(images)
    (last,) = model.get_intermediate_layers(images, norm=True)
    assert torch.equal(last, features[:, 5:])
    pairs = model.get_intermediate_layers(images, [0, 2], norm=True, return_class_token=True)
    assert torch.equal(pairs[1][0], last)
    assert torch.equal(pairs[1][1], features[:, 0])
    prefixed = model.get_intermediate_layers(images, 1, True, True, True)
    assert prefixed[0][0].shape == (2, 32, 4, 4)
    assert torch.equal(prefixed[0][1], features[:, :5])
    raw = model.get_intermediate_layers(images, n=2)
    assert all(
        torch.equal(a, b) for a, b in zip(raw, model.forward_intermediates(images, 2), strict=True)
    )
    with pytest.raises(ConfigError, match="choose one"):
        model.get_intermediate_layers(images, 1, False, True, return_class_token=True)
    with pytest.raises(ConfigError, match="no class token"):
        tiny("ijepa").get_intermediate_layers(images, return_class_token=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_pre_logits_are_what_the_head_reads(family: str) -> None:
    model, images = tiny(family), pixels(2)
    vector = model.forward_head(model.forward_features(images), pre_logits=True)
    assert vector.shape == (2, model.head_hidden_size)
    assert torch.allclose(vector, model.embed(images), rtol=1e-4, atol=1e-6)
    assert model.num_features == model.head_hidden_size
    fast = vitlib.optimize(model)
    other = fast.forward_head(fast.forward_features(images), pre_logits=True)
    assert torch.allclose(other, vector, rtol=1e-4, atol=1e-5)


def test_classifier_is_the_head_or_both() -> None:
    model, distilled = tiny("vit"), tiny("deit_distilled")
    assert model.get_classifier() is model.head
    assert distilled.get_classifier() == (distilled.head, distilled.head_dist)


def test_feature_info_names_each_block() -> None:
    info = tiny("vit", depth=3).feature_info
    assert [entry["module"] for entry in info] == ["blocks.0", "blocks.1", "blocks.2"]
    assert {(entry["num_chs"], entry["reduction"]) for entry in info} == {(32, 8)}


def test_pruned_model_gives_the_same_intermediates() -> None:
    model, images = tiny("vit", depth=4), pixels(2)
    expected = model.forward_intermediates(images, [0, 2])
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    assert len(model.blocks) == 3
    assert model.num_classes == 0
    result = model.forward_intermediates(images, [0, 2])
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    model.prune_intermediate_layers(1, prune_norm=True)
    states = list(model.iter_hidden_states(images))
    assert torch.equal(model.forward_features(images), states[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_decay_names_what_the_groups_leave_out(family: str) -> None:
    model = tiny(family, depth=2)
    groups = vitlib.parameter_groups(model, weight_decay=0.1)
    named = dict(model.named_parameters())
    without = {name for group in groups if not group["weight_decay"] for name in group["names"]}
    assert {name for name in without if named[name].ndim > 1} == model.no_weight_decay()


def test_group_matcher_orders_layers_as_timm() -> None:
    model = tiny("clip", depth=2, num_classes=3)
    orders = layers_of(model.group_matcher(), [name for name, _ in model.named_parameters()])
    assert orders["patch_embed.cls_token"] == orders["norm_pre.weight"] == (0,)
    assert orders["blocks.1.attn.q.weight"] == (1, 1)
    # Its final norm is behind the pool, so that timm has it beside the head.
    assert orders["norm.weight"] == orders["head.weight"] == (float("inf"),)
    orders = layers_of(tiny("vit").group_matcher(coarse=True), ["norm.weight", "head.weight"])
    assert orders == {"norm.weight": (1, 99999), "head.weight": (float("inf"),)}


def test_group_matcher_has_tables_with_their_blocks() -> None:
    model = tiny("beit", depth=2)
    orders = layers_of(model.group_matcher(), ["attn_position.tables.1", "blocks.1.norm1.weight"])
    assert set(orders.values()) == {(1, 1)}
    shared = tiny("beit", depth=2, relative_position="shared")
    assert layers_of(shared.group_matcher(), ["attn_position.tables.0"]) == {
        "attn_position.tables.0": (0,)
    }


def test_pretrained_cfg_has_the_preprocessing() -> None:
    model = tiny("vit", image_size=(32, 48))
    assert model.pretrained_cfg["input_size"] == (3, 32, 48)
    assert "mean" not in model.default_cfg
    model.image_processor = ImageProcessor(
        shortest_edge=36, crop_size=(32, 32), image_mean=(0.1, 0.2, 0.3), image_std=(0.5,) * 3,
        resample=3, crop_rounding="even",
    )  # fmt: skip
    config = model.pretrained_cfg
    assert config["mean"] == (0.1, 0.2, 0.3)
    assert config["input_size"] == (3, 32, 32)
    assert config["interpolation"] == "bicubic"
    assert config["classifier"] == "head"
    assert ImageProcessor.from_timm(config) == model.image_processor
    assert tiny("deit_distilled").pretrained_cfg["classifier"] == ("head", "head_dist")


@pytest.mark.parametrize("family", FAMILIES)
def test_new_input_size_gives_what_forward_gives(family: str) -> None:
    """Off the learned grid, forward resizes positions by the same rule."""
    model, images = tiny(family), pixels(2, 48, 64)
    expected = model(images)
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    state = model.state_dict()
    model.set_input_size((48, 64))
    assert torch.allclose(model(images), expected, rtol=1e-5, atol=1e-6)
    assert model.config.image_size == (48, 64)
    assert model.patch_embed.grid_size == model.config.grid_size == (6, 8)
    assert grads == {name: p.requires_grad for name, p in model.named_parameters()}
    fresh = vitlib.ViT(model.config)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(images), model(images))
    assert all(parameter.is_leaf for parameter in model.parameters())
    unchanged = [name for name in state if "pos_embed" not in name and "tables" not in name]
    assert all(torch.equal(state[name], model.state_dict()[name]) for name in unchanged)


def test_new_input_size_keeps_parameters_of_the_same_grid() -> None:
    model = tiny("vit")
    before = list(model.parameters())
    model.set_input_size(img_size=(32, 39))  # as many whole patches
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    model.set_input_size()
    assert model.config.image_size == (32, 39)


def test_new_input_size_changes_the_preprocessing() -> None:
    model = tiny("vit")
    model.image_processor = ImageProcessor(size=(32, 32))
    model.set_input_size(48)
    assert model.image_processor.size == (48, 48)
    assert model.pretrained_cfg["input_size"] == (3, 48, 48)


def test_new_patch_sees_resized_patches_as_the_old_one() -> None:
    """FlexiViT's kernel for larger patches gives the same tokens of enlarged photos."""
    model, images = tiny("vit"), pixels(2)
    model.requires_grad_(False)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(-1, 1, 8, 8)
    large = torch.nn.functional.interpolate(patches, (12, 12), mode="bicubic", antialias=True)
    large = large.reshape(2, 3, 4, 4, 12, 12).transpose(3, 4).reshape(2, 3, 48, 48)
    expected = model(images)
    model.set_input_size(48, patch_size=12)
    assert model.config.patch_size == (12, 12)
    assert not model.patch_embed.proj.weight.requires_grad
    assert torch.allclose(model(large), expected, rtol=1e-3, atol=1e-4)
    assert (model(large) - model(large.flip(3))).abs().max() > 1e-2
    with pytest.raises(ConfigError, match=r"image_size=.* is smaller than patch_size"):
        model.set_input_size(8)


def test_wrong_input_size_is_refused() -> None:
    model = tiny("vit")
    with pytest.raises(ConfigError, match="img_size="):
        model.set_input_size("large")  # type: ignore[arg-type]
    model.patch_embed = torch.nn.Identity()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="patch_embed is a Identity of your own"):
        model.set_input_size(48)
