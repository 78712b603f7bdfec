from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from vitlib.config import ViTConfig
from vitlib.errors import ImageError
from vitlib.patch_embed import POSITION_RESIZE, PatchEmbed, resize_positions

SMALL = {"image_size": 8, "patch_size": 4, "embed_dim": 6, "num_heads": 2, "depth": 1}


def test_patch_embed_equals_worked_example() -> None:
    """One channel, 2x2 patches of an image of 4x4, one dimension: sums of patches, by hand."""
    cfg = ViTConfig(image_size=4, patch_size=2, in_channels=1, embed_dim=1, num_heads=1, depth=1)
    embed = PatchEmbed(cfg)
    with torch.no_grad():
        embed.proj.weight.fill_(1)
        embed.proj.bias.fill_(0.5)
        embed.cls_token.fill_(100)
        embed.pos_embed.copy_(torch.tensor([1000.0, 0.1, 0.2, 0.3, 0.4]).reshape(1, 5, 1))
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    # Patches 0+1+4+5, 2+3+6+7, 8+9+12+13, 10+11+14+15, each + bias + its position.
    expected = torch.tensor([1100.0, 10.6, 18.7, 42.8, 50.9])
    assert torch.allclose(embed(image).flatten(), expected)


def test_token_order() -> None:
    cfg = ViTConfig(**SMALL, dist_token=True, num_registers=2)
    embed = PatchEmbed(cfg)
    tokens = embed(torch.randn(3, 3, 8, 8))
    assert tokens.shape == (3, 2 + 2 + 4, 6)
    assert torch.equal(tokens[1, 0], embed.cls_token[0, 0] + embed.pos_embed[0, 0])
    assert torch.equal(tokens[1, 1], embed.dist_token[0, 0] + embed.pos_embed[0, 1])
    assert torch.equal(tokens[1, 2:4], embed.reg_token[0])  # without a position


def test_patch_embed_without_class_token() -> None:
    embed = PatchEmbed(ViTConfig(**SMALL, class_token=False, pool="mean"))
    assert embed(torch.randn(1, 3, 8, 12)).shape == (1, 6, 6)


@pytest.mark.parametrize("rule", POSITION_RESIZE)
def test_every_rule_is_the_identity_on_the_learned_grid(rule: str) -> None:
    positions = torch.randn(1, 15, 4)
    assert resize_positions(positions, (3, 5), (3, 5), rule) is positions


def test_resize_rules_equal_interpolate() -> None:
    """Each rule against the call it stands for, spelled out; and no two are the same."""
    positions = torch.randn(1, 25, 4)
    grid = positions.reshape(1, 5, 5, 4).permute(0, 3, 1, 2)
    keywords = {
        "bicubic": {"mode": "bicubic"},
        "bicubic_fp32": {"mode": "bicubic"},
        "bicubic_antialias": {"mode": "bicubic", "antialias": True},
        "bicubic_corners": {"mode": "bicubic", "align_corners": True},
        "nearest": {"mode": "nearest"},
        "bilinear": {"mode": "bilinear"},
        "bilinear_antialias": {"mode": "bilinear", "antialias": True},
        "bilinear_corners": {"mode": "bilinear", "align_corners": True},
    }
    squares = {
        "bicubic_antialias_square": "bicubic_antialias",
        "bilinear_square": "bilinear",
        "bilinear_corners_square": "bilinear_corners",
    }
    result = {}
    for rule in POSITION_RESIZE:
        if rule == "bicubic_offset":  # DINO's: a ratio with a tenth of a patch added
            reference = F.interpolate(grid, scale_factor=(3.1 / 5, 4.1 / 5), mode="bicubic")
        elif rule in squares:  # of the longer side, and cropped
            reference = F.interpolate(grid, size=(4, 4), **keywords[squares[rule]])[:, :, :3]
        else:
            reference = F.interpolate(grid, size=(3, 4), **keywords[rule])
        actual = resize_positions(positions, (5, 5), (3, 4), rule)
        assert torch.equal(actual, reference.flatten(2).transpose(1, 2)), rule
        result[rule] = actual
    assert torch.equal(
        result.pop("bicubic"), result["bicubic_fp32"]
    )  # apart in half precision only
    assert len({tuple(v.flatten().tolist()) for v in result.values()}) == len(result)
    half = positions.bfloat16()
    in_half = resize_positions(half, (5, 5), (3, 4), "bicubic")
    assert not torch.equal(in_half, resize_positions(half, (5, 5), (3, 4), "bicubic_fp32"))


@pytest.mark.parametrize("rule", POSITION_RESIZE)
def test_resize_gives_every_grid(rule: str) -> None:
    """Rounding a ratio has cost others a row of patches at some sizes: try all to 40."""
    positions = torch.randn(1, 37 * 37, 1)
    for n in range(1, 41):
        for grid in ((n, n), (n, 41 - n)):
            assert resize_positions(positions, (37, 37), grid, rule).shape[1] == grid[0] * grid[1]


def test_sincos_positions_are_computed_for_each_grid() -> None:
    from transformers.models.aimv2.modeling_aimv2 import build_2d_sinusoidal_position_embedding

    actual = resize_positions(torch.zeros(1, 6, 20), (2, 3), (4, 3), "sincos")
    down, across = build_2d_sinusoidal_position_embedding(4, 3, 20).chunk(2, dim=1)
    assert torch.equal(actual[0], torch.cat([across, down], dim=1))
    learned = torch.zeros(1, 6, 20)
    assert resize_positions(learned, (2, 3), (2, 3), "sincos") is learned


def test_resized_positions_have_gradients() -> None:
    embed = PatchEmbed(ViTConfig(**SMALL))
    embed(torch.randn(1, 3, 12, 8)).sum().backward()
    assert embed.pos_embed.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 8, 3), "8x3 pixels (height x width) hold no whole patch of 4x4: use at least 8x4"),
        ((2, 3, 1, 15), "use at least 4x15"),
        ((2, 3, 0, 8), "use at least 4x8"),
        ((2, 1, 8, 8), "(2, 1, 8, 8): expected (images, 3, height, width)"),
        ((3, 8, 8), "expected (images, 3, height, width)"),
    ],
)  # fmt: skip
def test_patch_embed_rejects_wrong_shapes(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ImageError, match=re.escape(message)):
        PatchEmbed(ViTConfig(**SMALL))(torch.zeros(shape))


def test_pixels_after_last_patch_are_ignored() -> None:
    """SigLIP so400m-patch14-384: 384 / 14 is 27, and the convolution never reads the last 6."""
    embed = PatchEmbed(ViTConfig(**{**SMALL, "image_size": (11, 9)}))
    assert embed.grid_size == (2, 2)
    images = torch.randn(2, 3, 11, 9)
    whole = embed(images)
    assert torch.equal(whole, embed(images[:, :, :8, :8]))
    noise = images.clone()
    noise[:, :, 8:], noise[:, :, :, 8:] = 100, 100
    assert torch.equal(whole, embed(noise))
    assert embed(torch.randn(1, 3, 15, 4)).shape == (1, 1 + 3, 6)


def test_patch_embed_rejects_uint8() -> None:
    with pytest.raises(ImageError, match="normalise them with an ImageProcessor"):
        PatchEmbed(ViTConfig(**SMALL))(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_pixels_are_cast_to_dtype_of_weights() -> None:
    embed = PatchEmbed(ViTConfig(**SMALL)).bfloat16()
    assert embed(torch.zeros(1, 3, 8, 8)).dtype == torch.bfloat16
