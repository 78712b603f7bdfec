"""Causes of differences: the right block and part, and the right word, found by trying."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitlib
from fixtures import references
from fixtures.own_vits import OWN_POINTS, build_own, build_timm
from vitlib.testing import ParityError, assert_same, damage

# By kind of damage: the point that differs first, and a word of the cause.
NAMED = {
    "swapped q and k": ("blocks.1.attn.q", "q and k are swapped"),
    "exchanged heads of keys": ("blocks.1.attn.k", "k"),
    "flipped bias": ("blocks.1.mlp.fc1", "bias: the model"),
    "wrong eps": ("blocks.1.norm1", "eps of norm1: 0.01 in the model"),
    "other GELU": ("blocks.1.mlp.hidden", "GELU"),
    "moved norms": ("blocks.1.norm1", "pre-norm and post-norm"),
    "missing LayerScale": ("blocks.1.resid_mid", "LayerScale: missing in the model"),
    "dropped position row": ("embed", "position rows: tokens"),
    "shifted positions": ("embed", "positions one row"),
    "shifted rotary table": ("blocks.0.attn.heads", "rotary table one patch"),
    "other rotary base": ("blocks.0.attn.heads", "rotary"),
    "shifted relative bias": ("blocks.0.attn.heads", "relative position bias"),
    "missing final norm": ("norm", "final norm: missing in the model"),
    "other pool": ("pooled", "pooling: the model reads"),
    "transposed head": ("logits", "transposed"),
    "other norm of keys": ("blocks.1.attn.heads", "norms of queries and keys"),
    "missing norm before the blocks": ("embed", "pre-norm"),
    "other probe": ("pooler_output", "pooling"),
    "other class angles": ("blocks.0.attn.heads", "rotary"),
}
# Where a family shows a damage elsewhere, or its library in other words.
SHOWN: dict[tuple[str, str], tuple[str, str]] = {
    ("dinov2 swiglu", "flipped bias"): ("blocks.1.mlp.fc1", "bias: "),
    ("deit two heads", "transposed head"): ("logits", "head"),
    ("dinov3", "other pool"): ("pooler_output", "pooling: the reference reads the class token"),
    ("mlcd", "other pool"): ("pooler_output", "pooling: the model reads"),
    ("mlcd", "missing final norm"): ("pooler_output", "final norm"),
    ("clip projection", "missing final norm"): ("pooled", "final norm: missing in the model"),
    ("beit", "missing final norm"): ("pooled", "final norm"),
}
FAMILIES = ["vit", "deit two heads", "dinov2", "dinov2 swiglu", "registers", "dinov3"]
FAMILIES += ["siglip", "siglip base", "clip projection", "beit", "mlcd"]


def failure(model: nn.Module, reference: nn.Module, images: Tensor, *points: Any) -> ParityError:
    """Return the error of two modules that differ."""
    with pytest.raises(ParityError) as caught:
        assert_same(model, reference, images, *points, atol=1e-5)
    return caught.value


@pytest.mark.parametrize("name", FAMILIES)
def test_damage_is_named_against_transformers(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    images, model = references.make_pixels(reference), vitlib.load(tmp_path)
    assert_same(model, reference, images)
    kinds = 0
    for kind, broken in damage(model, images):
        point, word = SHOWN.get((name, kind), NAMED[kind])
        error = failure(broken, reference, images)
        assert (error.point, word in error.cause) == (point, True), (kind, str(error))
        kinds += 1
    assert kinds >= 8


@pytest.mark.parametrize("name", ["vit", "dinov3", "siglip base", "sapiens2", "clip projection"])
def test_damage_is_named_against_the_model_itself(name: str, tmp_path: Path) -> None:
    reference = references.save_model(name, tmp_path)
    images, model = references.make_pixels(reference), vitlib.load(tmp_path)
    for kind, broken in damage(model, images):
        point, word = NAMED[kind]
        point = {"other probe": "pooled"}.get(kind, point)
        if name == "clip projection" and kind == "missing final norm":
            point = "pooled"
        error = failure(broken, model, images)
        word = "bias" if kind == "flipped bias" else word
        assert (error.point, word in error.cause) == (point, True), (kind, str(error))


def test_roles_are_told_apart(tmp_path: Path) -> None:
    """A broken reference is named as such."""
    reference = references.save_model("dinov2", tmp_path)
    images, model = references.make_pixels(reference), vitlib.load(tmp_path)
    broken = dict(damage(model, images))
    error = failure(model, broken["missing LayerScale"], images)
    assert "LayerScale: missing in the reference" in error.cause
    error = failure(reference, broken["wrong eps"], images)
    assert error.cause == "eps of norm1: 1e-06 in the model, and the reference computes with 0.01"
    assert "model: dinov2.encoder.layer.1.norm1" in str(error)


MISTAKES: dict[str, tuple[str | None, str]] = {
    "eps": ("blocks.0.norm1", "eps of norm1: 0.001 in the model"),
    "gelu": ("blocks.0.mlp.hidden", "GELU, tanh form"),
    "heads first": ("blocks.0.attn.heads", "order of q, k, v by head"),
    "twice the heads": ("blocks.0.attn.heads", "the model computes 8 heads, the reference 4"),
    "no scale": ("blocks.0.attn.heads", "without a scale"),
    "causal": ("blocks.0.attn.heads", "causal mask"),
    "normalised residual": ("blocks.0.resid_mid", "pre-norm"),
    "no residual": ("blocks.0.resid_mid", "residual: the model does not add"),
    "post-norm": ("blocks.0.norm1", "post-norm"),
    "no positions": ("embed", "positions: without any"),
    "no class position": ("embed", "none of the class token"),
    "rescaled pixels": ("pixels", "preprocessing range: the model itself"),
    "BGR": ("pixels", "reverse order (BGR)"),
    "no final norm": ("pooled", "final norm: missing in the model"),
    "mean": ("pooled", "pooling: the model reads the mean of all tokens"),
    "softmax": ("logits", "head: the model ends in a softmax"),
    "batch mates": (None, "batch: one image alone"),
    "random": (None, "randomness: the model"),
}
# What is found without a map, from the outputs alone.
BLIND = {
    "eps": "eps 0.001 of the norms of blocks",
    "gelu": "activation gelu_tanh (here gelu)",
    "no scale": "no scale of the scores",
    "no positions": "positions: none",
    "rescaled pixels": "preprocessing range",
    "BGR": "reverse order (BGR)",
    "no final norm": "final norm: missing in the model",
    "mean": "pooling: the model reads the mean of all tokens",
    "softmax": "head: the model ends in a softmax",
    "batch mates": "batch: one image alone",
    "random": "randomness: the model",
}


@pytest.fixture
def vit(tmp_path: Path) -> tuple[vitlib.ViT, Tensor]:
    reference = references.save_model("vit", tmp_path)
    return vitlib.load(tmp_path), references.make_pixels(reference)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_a_file_of_ones_own_is_named(mistake: str, vit: tuple[vitlib.ViT, Any]) -> None:
    model, images = vit
    assert_same(build_own(model), model, images, OWN_POINTS, atol=1e-5)
    error = failure(build_own(model, mistake), model, images, OWN_POINTS)
    point, word = MISTAKES[mistake]
    assert (error.point, error.is_certain) == (point, True), str(error)
    assert word in error.cause


@pytest.mark.parametrize("mistake", BLIND)
def test_mistake_is_named_without_a_map(mistake: str, vit: tuple[vitlib.ViT, Any]) -> None:
    model, images = vit
    error = failure(build_own(model, mistake), model, images)
    assert error.is_certain
    assert BLIND[mistake] in error.cause
    has_hint = 'points={"blocks.*.resid"' in str(error)
    assert has_hint == (mistake not in ("batch mates", "random"))


def test_resize_rule_is_named_with_and_without_a_map(vit: tuple[vitlib.ViT, Any]) -> None:
    model, _ = vit
    images = torch.randn(2, 3, 40, 24)
    error = failure(build_own(model), model, images, OWN_POINTS)
    assert error.point == "embed"
    assert "position resize rule 'bilinear' (here 'bicubic')" in error.cause
    error = failure(build_own(model), model, images)
    assert "position resize rule 'bilinear' (here 'bicubic')" in error.cause


Change = Callable[[Any], None]


def swap_thirds(model: Any) -> None:
    weight = model.blocks[2].attn.qkv.weight
    weight.copy_(torch.cat([weight.chunk(3)[i] for i in (1, 0, 2)]))
    bias = model.blocks[2].attn.qkv.bias
    bias.copy_(torch.cat([bias.chunk(3)[i] for i in (1, 0, 2)]))


def shift_values(model: Any) -> None:
    model.blocks[1].attn.qkv.bias[-5:] += 1


def turn_kernel(model: Any) -> None:
    model.patch_embed.proj.weight.copy_(model.patch_embed.proj.weight.mT.clone())


def turn_weight(model: Any) -> None:
    weight = model.blocks[0].attn.proj.weight
    weight.copy_(weight.mT.clone())


def drop_bias(model: Any) -> None:
    model.blocks[1].mlp.fc2.bias = None


def scale_head(model: Any) -> None:
    model.head.weight.mul_(2)
    model.head.bias.mul_(2)


def spoil(model: Any) -> None:
    model.blocks[1].norm2.weight[0] = float("nan")


def skip_mlp(model: Any) -> None:
    model.blocks[1].mlp.forward = lambda x: 0 * x


def put_beside(model: Any) -> None:
    block = model.blocks[1]
    block.forward = lambda x: x + block.attn(block.norm1(x)) + block.mlp(block.norm2(x))


def root_mean_square(model: Any) -> None:
    old = model.blocks[1].norm1
    new = nn.RMSNorm(old.weight.shape, eps=old.eps)
    new.weight.copy_(old.weight)
    model.blocks[1].norm1 = new


def clear_bias(model: Any) -> None:
    model.head.bias.zero_()


def drop_block(model: Any) -> None:
    del model.blocks[2]


def attend_by_functions(attn: Any, x: Tensor) -> Tensor:
    """Compute timm's attention as its BEiT does, by a function of weights: no module is called."""
    b, t, d = x.shape
    fused = F.linear(x, attn.qkv.weight, attn.qkv.bias)
    q, k, v = fused.reshape(b, t, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    return attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


def test_swapped_q_and_k_are_named_where_no_module_shows_them(vit: tuple[vitlib.ViT, Any]) -> None:
    model, images = vit
    built = build_timm(model)
    for block in built.blocks:
        block.attn.forward = partial(attend_by_functions, block.attn)
    assert_same(built, model, images, atol=1e-5)
    broken = dict(damage(model, images))
    error = failure(built, broken["swapped q and k"], images)
    assert (error.point, error.cause) == ("blocks.1.attn.heads", "q and k are swapped")
    error = failure(built, broken["exchanged heads of keys"], images)
    assert (error.point, error.is_certain) == ("blocks.1.attn.heads", False)
    assert error.cause.startswith("a part after blocks.1.norm1 where no point is compared, or")
    assert "weights or order of q, k and v" in error.cause


@pytest.mark.parametrize(
    ("change", "point", "word"),
    [
        (swap_thirds, "blocks.2.attn.q", "q and k are swapped"),
        (shift_values, "blocks.1.attn.v", "v, bias: other numbers"),
        (turn_kernel, "patch_embed.proj", "rows and columns of its kernel"),
        (turn_weight, "blocks.0.attn.out", "weight: transposed"),
        (drop_bias, "blocks.1.mlp.out", "bias: the model has none"),
        (scale_head, "logits", "multiple"),
        (spoil, "blocks.1.norm2", "not finite in the model"),
        (skip_mlp, "blocks.1.resid", "residual: the model does not add the MLP branch"),
        (put_beside, "blocks.1.resid_mid", "the attention branch, or adds that of the MLP beside"),
        (root_mean_square, "blocks.1.norm1", "an RMSNorm in the model, a LayerNorm in the ref"),
        (clear_bias, "logits", "bias: zeros in the model"),
        (drop_block, None, "depth: the model has 2 blocks, the reference 3"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_mistake_in_weights_of_timm_names_is_named(
    change: Change, point: str | None, word: str, vit: tuple[vitlib.ViT, Any]
) -> None:
    model, images = vit
    built = build_timm(model)
    assert_same(built, model, images, atol=1e-5)
    with torch.no_grad():
        change(built)
    error = failure(built, model, images)
    assert (error.point, word in error.cause) == (point, True), str(error)


def test_files_of_two_people_are_compared_by_their_paths(vit: tuple[vitlib.ViT, Any]) -> None:
    model, images = vit
    own, other = build_own(model), build_own(model)
    assert_same(own, other, images)
    with torch.no_grad():
        other.stages[1].wide.bias.neg_()
    error = failure(own, other, images)
    assert error.point == "stages.1.wide"
    assert "bias: the model has the other sign" in error.cause


def test_rounding_is_no_mistake(vit: tuple[vitlib.ViT, Any]) -> None:
    model, images = vit
    with pytest.raises(ParityError, match="rounding: in float64 they differ by") as caught:
        assert_same(build_own(model), model, images, atol=1e-12)
    assert caught.value.point is None


def test_eps_that_float32_rounds_away_is_named(vit: tuple[vitlib.ViT, Any]) -> None:
    """1e-12 or 1e-6 moves a norm by 1e-6 of its value: no more than rounding does in float32."""
    model, images = vit
    assert model.config.norm_eps == 1e-12
    built = build_timm(model)
    for block in built.blocks:
        block.norm1.eps = block.norm2.eps = 1e-6
    with pytest.raises(ParityError) as caught:
        assert_same(built, model, images, atol=0, rtol=1e-8)
    assert caught.value.point == "blocks.0.norm1"
    assert (
        caught.value.cause
        == "eps of norm1: 1e-06 in the model, and the reference computes with 1e-12"
    )


def test_fresh_layer_scale_is_told_from_no_branch(tmp_path: Path) -> None:
    """A LayerScale of 1e-5 leaves of a branch as little as float32 rounds away."""
    reference = references.save_model("dinov2", tmp_path)
    images, model = references.make_pixels(reference), vitlib.load(tmp_path)
    with torch.no_grad():
        for block in model.blocks:
            for parameter in block.ls1.parameters():
                parameter.fill_(1e-5)
    broken = copy.deepcopy(model)
    broken.blocks[1].ls1 = None
    error = failure(broken, model, images)
    assert error.cause == "LayerScale: missing in the model (ls1)"


def reorder_channels(own: Any) -> Any:
    """Order queries and keys otherwise within each head, which changes no score."""
    order = torch.arange(12).roll(5) + 12 * torch.arange(4)[:, None]
    for stage in own.stages:
        for parameter in stage.look.three.parameters():
            queries, keys, values = parameter.detach().chunk(3)
            parameter.data = torch.cat([x[order.flatten()] for x in (queries, keys)] + [values])
    return own


@pytest.mark.parametrize("mistake", ["causal", "no scale"])
def test_order_of_channels_that_changes_nothing_is_no_cause(
    mistake: str, vit: tuple[vitlib.ViT, Any]
) -> None:
    """Rotary pairs are halves of a head in one library, and neighbours in another."""
    model, images = vit
    assert_same(reorder_channels(build_own(model)), model, images, atol=1e-5)
    error = failure(reorder_channels(build_own(model, mistake)), model, images, OWN_POINTS)
    point, word = MISTAKES[mistake]
    assert (error.point, word in error.cause) == (point, True), str(error)


def test_swapped_q_and_k_are_named_in_any_order_of_channels(vit: tuple[vitlib.ViT, Any]) -> None:
    model, images = vit
    broken = copy.deepcopy(model)
    for block in broken.blocks[0], broken.blocks[1]:
        block.attn.q, block.attn.k = block.attn.k, block.attn.q
        error = failure(reorder_channels(build_own(broken)), model, images, OWN_POINTS)
        assert (error.point, error.cause) == ("blocks.0.attn.q", "q and k are swapped")
    broken.blocks[0] = model.blocks[0]
    error = failure(reorder_channels(build_own(broken)), model, images, OWN_POINTS)
    assert (error.point, error.cause) == ("blocks.1.attn.q", "q and k are swapped")
