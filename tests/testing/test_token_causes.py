"""Causes in the sequence of tokens: count, order, positions and blocks are told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitlib
from fixtures import references
from fixtures.own_vits import OWN_POINTS, OwnViT, build_own, build_timm
from vitlib.testing import ParityError, assert_same
from vitlib.testing.case import match_rows

BY_COLUMNS = torch.arange(16).view(4, 4).T.flatten()
SHUFFLED = torch.randperm(16, generator=torch.Generator().manual_seed(0))


class Wrong(OwnViT):
    """An OwnViT with a mistake in its sequence of tokens."""

    kind = ""

    def tokens(self, x: Tensor) -> Tensor:
        kind, where, stages = self.kind, self.where, list(self.stages)
        patches = self.cut(x).flatten(2).mT
        if kind == "patches by columns":
            patches = patches[:, BY_COLUMNS]
        if kind == "bias of patches":
            patches = patches + 1
        if kind == "positions shuffled":
            where = torch.cat([where[:, :1], where[:, 1:][:, SHUFFLED]], dim=1)
        if kind == "position of a patch":
            where = torch.cat([where[:, :5], 0 * where[:, 5:6], where[:, 6:]], dim=1)
        if kind == "class token":
            where = torch.cat([where[:, :1] + 1, where[:, 1:]], dim=1)
        x = torch.cat([self.first.expand(len(x), -1, -1), patches], dim=1) + where
        if kind == "tokens by columns":
            x = torch.cat([x[:, :1], x[:, 1:][:, BY_COLUMNS]], dim=1)
        if kind == "scaled":
            x = 2 * x
        if kind == "fewer tokens":
            x = x[:, :-3]
        if kind == "no class token":
            x = x[:, 1:]
        if kind == "no first block":
            stages = stages[1:]
        if kind == "blocks exchanged":
            stages[1], stages[2] = stages[2], stages[1]
        if kind == "a block twice":
            stages.insert(0, stages[0])
        for index, stage in enumerate(stages):
            x = stage(x)
            if kind == "fewer tokens inside" and not index:
                x = x[:, :-3]
            if kind == "order inside" and not index:
                x = torch.cat([x[:, :1], x[:, 1:][:, BY_COLUMNS]], dim=1)
            if kind == "a norm between" and not index:
                x = self.last(x)
        return self.last(x)


NAMED = {
    "patches by columns": (
        "embed",
        "order of patches, not of their positions: tokens 2, 3, 4, 5, 7, ... of the reference are "
        "5, 9, 13, 2, 10, ... of the model",
    ),
    "tokens by columns": ("embed", "order of tokens: tokens 2, 3, 4, 5, 7, ... of the reference"),
    "positions shuffled": ("embed", "order of positions, not of patches: tokens 1, 2, 3, 4, 5,"),
    "bias of patches": ("embed", "a vector added to tokens 1, 2, 3, 4, 5, ..., by the same for"),
    "position of a patch": ("embed", "position rows: tokens 5 of 17 differ, by the same for two"),
    "class token": ("embed", "class token or its position: only tokens 0 differ, by the same for"),
    "fewer tokens": ("embed", "tokens: the model has 14, without tokens 14, 15, 16 of the 17 of"),
    "no class token": ("embed", "tokens: the model has 16, without tokens 0 of the 17 of the"),
    "fewer tokens inside": ("blocks.1.resid_pre", "tokens: the model has 14, without tokens 14,"),
    "order inside": ("blocks.1.resid_pre", "order of tokens: tokens 2, 3, 4, 5, 7, ... of the"),
    "no first block": (None, "blocks: the model does not call block 0 (stages.0)"),
    "blocks exchanged": (
        "blocks.1.resid_pre",
        "blocks: the tokens of the reference after 1 block are those of the model after 2: a block "
        "is left out, runs twice or is in another place, or `points` names its neighbour",
    ),
    "a block twice": (
        "blocks.1.resid_pre",
        "blocks: block 0 runs once more in the model, after 1 block",
    ),
}


@pytest.fixture
def vit(tmp_path: Path) -> tuple[vitlib.ViT, Tensor]:
    reference = references.save_model("vit", tmp_path)
    return vitlib.load(tmp_path), references.make_pixels(reference)


def wrong(model: vitlib.ViT, kind: str) -> nn.Module:
    own = build_own(model)
    own.__class__, own.kind = Wrong, kind
    return own


def failure(model: nn.Module, reference: nn.Module, images: Tensor, *points: Any) -> ParityError:
    with pytest.raises(ParityError) as caught:
        assert_same(model, reference, images, *points, atol=1e-5)
    return caught.value


# Without the patches, and with the blocks alone.
MAPS = {
    "all points": OWN_POINTS,
    "no patches": {k: v for k, v in OWN_POINTS.items() if k != "patch_embed.proj"},
    "blocks alone": {"blocks.*.resid_pre": "stages.*:in", "blocks.*.resid": "stages.*"},
}


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("points", MAPS)
def test_mistake_in_the_tokens_is_named(
    kind: str, points: str, vit: tuple[vitlib.ViT, Tensor]
) -> None:
    model, images = vit
    point, words = NAMED[kind]
    # One image is enough: another is made of it.
    for batch in (images, images[:1]):
        error = failure(wrong(model, kind), model, batch, MAPS[points])
        assert (error.point, error.is_certain) == (point, True), str(error)
        assert error.cause.startswith(words), str(error)
    reverse = failure(model, wrong(model, kind), images, MAPS[points])
    assert reverse.cause.split(":")[0] == error.cause.split(":")[0]


def test_what_no_trial_shows_is_a_possibility(vit: tuple[vitlib.ViT, Tensor]) -> None:
    model, images = vit
    error = failure(wrong(model, "a norm between"), model, images, MAPS["blocks alone"])
    assert (error.point, error.is_certain) == ("blocks.1.resid_pre", False)
    assert error.cause == (
        "what runs between two blocks: a norm, prompts, or tokens that one drops or merges"
    )
    error = failure(wrong(model, "patches by columns"), model, images)
    assert error.cause.startswith("a part where no point is compared, or head, pooling")
    assert not error.is_certain


@pytest.mark.parametrize(
    ("points", "point", "words"),
    [
        ({"blocks.*.resid_pre": "stages.*"}, "embed", "after 0 blocks are those of the"),
        ({"blocks.*.resid": "stages.*:in"}, "blocks.0.resid", "after 1 block are those of the"),
    ],
)
def test_map_that_is_one_block_off_is_named(
    points: Any, point: str, words: str, vit: tuple[vitlib.ViT, Tensor]
) -> None:
    """Outputs are equal, and so are positions."""
    model, images = vit
    error = failure(build_own(model), model, images, points)
    assert error.point == point
    assert words in error.cause
    assert "`points` names its neighbour" in error.cause


@pytest.mark.parametrize("side", ["", ":in"])
@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("eps", "eps 0.001 of norm1 of blocks, in block 0"),
        ("gelu", "activation gelu_tanh (here gelu), in block 0"),
        ("no scale", "no scale of the scores, in block 0"),
        ("BGR", "preprocessing range: the model gives the reference's tokens for pixels with"),
        ("causal", "a part after blocks.0.resid_pre where no point is compared, or"),
        ("no residual", "a part after blocks.0.resid_pre where no point is compared, or"),
    ],
)
def test_mistake_in_a_block_that_shows_its_tokens_alone(
    mistake: str, words: str, side: str, vit: tuple[vitlib.ViT, Tensor]
) -> None:
    model, images = vit
    kind = "resid_pre" if side else "resid"
    points = {f"blocks.*.{kind}": f"stages.*{side}"}
    error = failure(build_own(model, mistake), model, images, points)
    assert error.cause.startswith(words), str(error)
    assert error.is_certain == ("where no point" not in words)


def test_blocks_in_another_order_are_named_by_their_weights(vit: tuple[vitlib.ViT, Tensor]) -> None:
    model, images = vit
    built = build_timm(model)
    built.blocks = nn.Sequential(built.blocks[0], built.blocks[2], built.blocks[1])
    error = failure(built, model, images)
    assert error.cause == (
        "blocks: block 1 of the model has the bias of block 2 of the reference: blocks in another "
        "order"
    )
    # Fresh norms are all the same, and a layer of queries, keys and values is not theirs alone.
    with torch.no_grad():
        for block in (*model.blocks, *built.blocks):
            for norm in (block.norm1, block.norm2):
                norm.weight.fill_(1)
                norm.bias.zero_()
    error = failure(built, model, images)
    assert error.point == "blocks.1.attn.q"
    assert error.cause == (
        "blocks: block 1 of the model is block 2 of the reference: blocks in another order"
    )


def test_tokens_that_a_function_merges_or_drops_are_named(vit: tuple[vitlib.ViT, Tensor]) -> None:
    model, images = vit
    merged = model.with_tokens(vitlib.tokens.merge(4))
    error = failure(merged, model, images)
    assert error.point == "blocks.0.resid_mid"
    assert error.cause == (
        "tokens: the model has 13 of width 48, the reference 17 of width 48: tokens that one "
        "drops, merges or pads"
    )
    assert "blocks.0.resid_mid: another shape, or values that are not finite" in str(error)
    dropped = model.with_tokens(vitlib.tokens.drop(0.5))
    error = failure(model, dropped, images)
    assert error.cause.startswith("tokens: the reference has 9, without tokens")


def test_tokens_that_are_scaled_are_named(vit: tuple[vitlib.ViT, Tensor]) -> None:
    model, images = vit
    error = failure(wrong(model, "scaled"), model, images, OWN_POINTS)
    assert error.cause == "scale: tokens of the reference are 0.5 times those of the model"


def test_positions_before_a_norm_are_possible(tmp_path: Path) -> None:
    """A norm after them mixes what an image changes with what it does not."""
    reference = references.save_model("clip base", tmp_path)
    images, model = references.make_pixels(reference), vitlib.load(tmp_path)
    with torch.no_grad():
        model.patch_embed.pos_embed[:, 3] *= 2
    error = failure(model, reference, images)
    assert (error.point, error.is_certain) == ("embed", False)
    assert error.cause.startswith("position rows: tokens 3 of 17 alone differ, or")


def test_match_rows_finds_an_order_that_is_one() -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    assert match_rows(x, x[[2, 0, 1, 4, 3]]) == [2, 0, 1, 4, 3]
    assert match_rows(x, x) is None
    assert match_rows(x, x[[0, 0, 1, 2, 3]]) is None
    assert match_rows(x, x[:4]) is None
    assert match_rows(x, x + 1) is None
