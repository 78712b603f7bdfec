"""Fewer tokens: merging equal to its authors' code, dropping, and functions of one's own.

The fixtures of `tome/` are tiny models of timm, patched by the authors' code: make_tome.py. Bounds:
2e-6 of the largest logit, as between two kernels of attention.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vitlib
from fixtures import families
from fixtures.families import FAMILIES, RARE, pixels
from fixtures.make_timm import make_pixels
from vitlib.errors import ConfigError
from vitlib.tokens import BlockTokens, ReducedViT

TOME = Path(__file__).parent.parent / "fixtures" / "tome"
everyone = pytest.mark.parametrize("family", FAMILIES | RARE)


def tiny(name: str, **changes: Any) -> vitlib.ViT:
    return families.tiny(name, **{"depth": 3, **changes})


def largest(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


# --- the authors' code ----------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "r"), [("r4", 4), ("r13", 13), ("r40", 40), ("list", [0, 6, 1])])
@pytest.mark.parametrize("name", ["cls", "mean", "distilled"])
def test_merging_equals_the_authors_code(name: str, key: str, r: Any) -> None:
    model = vitlib.load(TOME / name)
    expected = load_file(TOME / f"{name}.merged.safetensors")
    images = make_pixels(3, 3, 32, 32)
    reduced = model.with_tokens(vitlib.tokens.merge(r))
    assert largest(model(images), expected["plain"]) <= 2e-6
    assert largest(reduced(images), expected[key]) <= 2e-6
    assert largest(expected[key], expected["plain"]) > 1e-3  # so that the test can fail
    other = model.with_tokens(vitlib.tokens.merge(5))
    assert largest(other(images), expected[key]) > 1e-4
    fast = vitlib.optimize(reduced)
    assert fast.unoptimized_modules == ()
    assert largest(fast(images), expected[key]) <= 5e-6


# --- every family -------------------------------------------------------------------------------


@everyone
def test_merging_no_tokens_changes_nothing(family: str) -> None:
    model, images = tiny(family), pixels(2)
    reduced = model.with_tokens(vitlib.tokens.merge(r=0))
    assert largest(reduced(images), model(images)) <= 2e-6
    assert largest(reduced.forward_features(images), model.forward_features(images)) <= 2e-6


@everyone
def test_merged_tokens_are_fewer_and_return_to_the_grid(family: str) -> None:
    model, images = tiny(family), pixels(2)
    reduced = model.with_tokens(vitlib.tokens.merge(r=3))
    out = reduced.forward_tokens(images)
    p, (h, w) = model.num_prefix_tokens, model.patch_grid(images)
    assert out.tokens.shape == (2, p + h * w - 3 - 3 - 3, model.embed_dim)
    assert torch.equal(out.tokens, reduced.forward_features(images))
    assert out.unmerge().shape == (2, h, w, model.embed_dim)
    assert torch.equal(out.sizes.sum(dim=1), torch.full((2,), p + h * w))
    for image in range(2):
        for token, new in enumerate(out.map[image].tolist()):
            assert (new == token) if token < p else (new >= p)
            assert torch.equal(out.all_tokens()[image, token], out.tokens[image, new])
    assert largest(reduced(images), model(images)) > 1e-5


@everyone
@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_optimized_model_equals_it(family: str, size: tuple[int, int]) -> None:
    model, images = tiny(family), pixels(2, *size)
    if size != (32, 32) and model.config.rope is None and not model.config.positions.resize:
        pytest.skip("the family has no rule for other sizes")
    for function in (vitlib.tokens.merge(r=3), vitlib.tokens.drop(keep=0.6, blocks=[0, 1])):
        reduced = model.with_tokens(function)
        fast = vitlib.optimize(reduced)
        assert fast.unoptimized_modules == ()
        assert largest(fast(images), reduced(images)) <= 5e-6
        assert largest(fast.forward_features(images), reduced.forward_features(images)) <= 5e-6


@everyone
def test_images_do_not_depend_on_their_batch(family: str) -> None:
    reduced = tiny(family).with_tokens(vitlib.tokens.merge(r=3))
    images = pixels(3)
    together = reduced(images)
    for image, logits in zip(images.split(1), together.split(1), strict=True):
        assert largest(reduced(image), logits) <= 1e-5


@pytest.mark.parametrize("family", ["vit", "beit", "rope_mixed", "dinov3"])
def test_merged_token_counts_as_two(family: str) -> None:
    """It is as if the second patch had the value, key and position of the first."""
    model, images = tiny(family, depth=2), pixels(2)

    def join(x: Tensor, block: BlockTokens) -> tuple[Tensor, Tensor]:
        index = torch.arange(x.shape[1]).expand(x.shape[:2])
        last = x.shape[1] - 1
        new = torch.where(index == last, last - 1, index)
        return (x[:, :-1], new) if block.index == 0 else (x, index)

    def repeat(x: Tensor) -> Tensor:
        return torch.cat([x[:, :-1], x[:, -2:-1]], dim=1)

    def repeat_scores(scores: Tensor) -> Tensor:
        columns = torch.cat([scores[..., :-1], scores[..., -2:-1]], dim=3)
        return torch.cat([columns[:, :, :-1], columns[:, :, -2:-1]], dim=2)

    point, edit = "blocks.1.resid", {"blocks.0.resid_mid": repeat}
    _, reduced = model.with_tokens(join).trace(images, [point])
    _, once = model.trace(images, [point], edit)
    _, twice = model.trace(images, [point], edit | {"blocks.1.attn.scores": repeat_scores})
    assert largest(reduced[point], twice[point][:, :-1]) <= 2e-6
    if model.config.rope is not None or model.config.positions.relative:
        assert largest(once[point], twice[point]) > 1e-5  # the positions of the two differ


# --- dropping -------------------------------------------------------------------------------------


@everyone
def test_dropped_patches_are_those_of_least_attention(family: str) -> None:
    model, images = tiny(family), pixels(2)
    p, (h, w) = model.num_prefix_tokens, model.patch_grid(images)
    reduced = model.with_tokens(vitlib.tokens.drop(keep=0.5, blocks=[1]))
    out = reduced.forward_tokens(images)
    assert out.tokens.shape[1] == p + h * w // 2
    if model.config.positions.relative:
        return  # dropping looks at the scores without the bias of positions
    _, at = model.trace(images, ["blocks.1.attn.probs"])
    rows = at["blocks.1.attn.probs"][:, :, : 1 if p else None, p:]
    attention = rows.mean(dim=(1, 2))
    for image in range(2):
        kept = {i - p for i, new in enumerate(out.map[image].tolist()) if new >= 0 and i >= p}
        assert kept == set(attention[image].topk(h * w // 2).indices.tolist())
    grid = out.unmerge().flatten(1, 2)
    assert (grid.abs().sum(dim=2) == 0).sum(dim=1).tolist() == [h * w - h * w // 2] * 2


def test_dropping_chooses_blocks_by_depth() -> None:
    model, images = tiny("vit", depth=12), pixels(1)
    reduced = model.with_tokens(vitlib.tokens.drop(keep=0.5))
    _, at = reduced.trace(images, ["blocks.*.resid"])
    lengths = [x.shape[1] for x in at.values()]
    assert lengths == [17] * 3 + [9] * 3 + [5] * 3 + [3] * 3


@pytest.mark.parametrize(
    ("of_drop", "of_model", "expected"),
    [
        ([2], None, [17, 17, 9, 9]),
        (None, [2], [17, 17, 9, 9]),
        ([-1], None, [17, 17, 17, 9]),
        (range(1, 2), [0, 1], [17, 9, 9, 9]),
        (2, None, [17, 17, 9, 5]),  # the last two, as `indices` of forward_intermediates
    ],
)
def test_dropping_in_chosen_blocks(of_drop: Any, of_model: Any, expected: list[int]) -> None:
    model = tiny("vit", depth=4)
    reduced = model.with_tokens(vitlib.tokens.drop(0.5, of_drop), of_model)
    _, at = reduced.trace(pixels(1), ["blocks.*.resid"])
    assert [x.shape[1] for x in at.values()] == expected


def test_counts_of_numpy_and_empty_batches() -> None:
    model = tiny("vit")
    reduced = model.with_tokens(vitlib.tokens.merge(np.int64(3)))
    assert torch.equal(reduced(pixels(1)), model.with_tokens(vitlib.tokens.merge(3))(pixels(1)))
    out = reduced.forward_tokens(pixels(1)[:0])
    assert (out.tokens.shape, out.unmerge().shape) == ((0, 8, 32), (0, 4, 4, 32))


def test_dropped_tokens_equal_masked_ones() -> None:
    """After the block that drops them, patches are as if no query could see them."""
    model, images = tiny("vit"), pixels(1)
    reduced = model.with_tokens(vitlib.tokens.drop(keep=0.5, blocks=[0]))
    gone = (reduced.forward_tokens(images).map[0] < 0).nonzero()[:, 0]

    def hide(scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[..., gone] = float("-inf")
        return scores

    edit = {f"blocks.{i}.attn.scores": hide for i in (1, 2)}
    assert largest(reduced(images), model.trace(images, edit=edit)[0]) <= 2e-6
    assert largest(reduced(images), model(images)) > 1e-5


# --- functions of one's own ---------------------------------------------------------------------


def halve(x: Tensor, block: BlockTokens) -> tuple[Tensor, Tensor]:
    """Average neighbouring patches."""
    p, t = block.num_prefix_tokens, x.shape[1]
    patches = x[:, p:].unflatten(1, (-1, 2)).mean(dim=2)
    index = torch.arange(t).expand(len(x), t)
    return torch.cat([x[:, :p], patches], 1), torch.where(index < p, index, p + (index - p) // 2)


@everyone
def test_function_of_ones_own(family: str) -> None:
    model, images = tiny(family), pixels(2)
    reduced = model.with_tokens(halve, blocks=[0, 1])
    p, (h, w) = model.num_prefix_tokens, model.patch_grid(images)
    out = reduced.forward_tokens(images)
    assert out.tokens.shape[1] == p + h * w // 4
    assert out.map[0, p:].tolist() == [p + i // 4 for i in range(h * w)]
    assert out.sizes[0].tolist() == [1] * p + [4] * (h * w // 4)
    assert largest(vitlib.optimize(reduced)(images), reduced(images)) <= 5e-6


def test_functions_of_one_block_follow_each_other() -> None:
    model, images = tiny("vit"), pixels(2)
    both = model.with_tokens(halve, [0]).with_tokens(vitlib.tokens.merge(2), [0])
    assert both.forward_features(images).shape[1] == 1 + 8 - 2
    again = model.with_tokens(vitlib.tokens.merge(2), [0]).with_tokens(vitlib.tokens.merge(3), [1])
    assert again.forward_features(images).shape[1] == 1 + 16 - 5


# --- what a model is used for -------------------------------------------------------------------


def test_weights_are_shared_and_the_model_is_untouched() -> None:
    model, images = tiny("vit"), pixels(2)
    exact = model(images)
    reduced = model.with_tokens(vitlib.tokens.merge(3))
    assert type(model) is vitlib.ViT
    assert all(a is b for a, b in zip(model.parameters(), reduced.parameters(), strict=True))
    assert reduced.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(model(images), exact)
    assert "Merge(r=3)" in repr(reduced)


def test_reduced_model_is_copied_pickled_and_compiled() -> None:
    model, images = tiny("dinov3").with_tokens(vitlib.tokens.merge(3)), pixels(2)
    exact = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is ReducedViT
        assert torch.equal(other(images), exact)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert largest(compiled(images), exact) <= 2e-6


def test_gradients_reach_every_parameter() -> None:
    model, images = tiny("vit").train(), pixels(2)
    model.with_tokens(vitlib.tokens.merge(3))(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_intermediates_are_on_the_grid() -> None:
    model, images = tiny("vit"), pixels(2)
    reduced = model.with_tokens(vitlib.tokens.merge(3))
    for reshape, shape in ((False, (2, 16, 32)), (True, (2, 32, 4, 4))):
        maps = reduced.forward_intermediates(images, reshape=reshape)
        assert [x.shape for x in maps] == [shape] * 3
    last, prefix = reduced.forward_intermediates(images, 1, norm=True, return_prefix_tokens=True)[0]
    out = reduced.forward_tokens(images)
    assert largest(last, out.unmerge().flatten(1, 2)) <= 2e-6
    assert largest(prefix, out.tokens[:, :1]) <= 2e-6


def test_trace_reads_the_fewer_tokens() -> None:
    reduced, images = tiny("vit").with_tokens(vitlib.tokens.merge(3)), pixels(2)
    logits, at = reduced.trace(images, ["*"])
    assert largest(logits, reduced(images)) <= 2e-6
    assert [at[f"blocks.{i}.attn.probs"].shape[-1] for i in range(3)] == [17, 14, 11]
    assert at["norm"].shape[1] == 8


def test_embeddings_and_predictor_take_it() -> None:
    vit = vitlib.Predictor.load("demo")
    reduced = vit.model.with_tokens(vitlib.tokens.merge(2))
    images = vit.image_processor(["vitlib/assets/demo/samples/bag.png"])
    assert largest(reduced.embed(images), vit.model.embed(images)) < 0.5
    assert reduced(images).argmax() == vit.model(images).argmax()


# --- what cannot be -----------------------------------------------------------------------------


def test_wrong_arguments() -> None:
    model = tiny("vit")
    for r in (-1, 2.5, "8", [1, -1]):
        with pytest.raises(ConfigError, match="r="):
            vitlib.tokens.merge(r)
    for keep in (0, 1.5, "half", True):
        with pytest.raises(ConfigError, match=r"keep=.*expected a share"):
            vitlib.tokens.drop(keep)
    with pytest.raises(ConfigError, match=r"expected fn\(tokens, block\)"):
        model.with_tokens(8)
    with pytest.raises(ConfigError, match=r"merge\(r=8\), got merge"):
        model.with_tokens(vitlib.tokens.merge)
    with pytest.raises(ConfigError, match=r"fn\(tokens, block\).*, got <lambda>\(x\)"):
        model.with_tokens(lambda x: x)
    assert torch.equal(model.with_tokens(vitlib.tokens.merge([]))(pixels(1)), model(pixels(1)))
    with pytest.raises(ConfigError, match=r"blocks=\[5\]: expected numbers of blocks"):
        model.with_tokens(halve, [5])
    with pytest.raises(
        ConfigError, match=r"drop: blocks=\(1, 3\): expected numbers of blocks, 0 to 2"
    ):
        model.with_tokens(vitlib.tokens.drop(0.5, blocks=[1, 3]))
    with pytest.raises(ConfigError, match="drop: block 1 is not among the blocks of with_tokens"):
        model.with_tokens(vitlib.tokens.drop(0.5, blocks=[1]), blocks=[2])
    with pytest.raises(ConfigError, match="r has 4 numbers: expected at most 3"):
        model.with_tokens(vitlib.tokens.merge([1, 1, 1, 1]))
    model.blocks[1].attn = torch.nn.Identity()
    with pytest.raises(ConfigError, match=r"blocks\.1 or its attn is not vitlib's own"):
        model.with_tokens(halve)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: x, r"returned Tensor: expected \(tokens, map\)"),
        (lambda x: (x, None), "expected tensors"),
        (lambda x: (x[:, :, :5], index(x)), r"tokens \(2, 17, 5\).*expected \(2, 1 to 17, 32\)"),
        (lambda x: (x.double(), index(x)), "float64: expected"),
        (lambda x: (x, index(x)[:, :3]), r"a map \(2, 3\) torch.int64: expected \(2, 17\)"),
        (lambda x: (x, index(x).int()), r"torch.int32: expected"),
        (lambda x: (x[:, :5], index(x)), "numbers from -1 to 4"),
        (lambda x: (x, index(x).flip(1)), "1 prefix tokens to stay the first"),
        (lambda x: (x, index(x).clamp(max=9)), "an old token in the map for each new one"),
    ],
)
def test_function_that_returns_what_cannot_be(result: Any, message: str) -> None:
    reduced = tiny("vit").with_tokens(lambda x, _: result(x))
    with pytest.raises(ConfigError, match=f"token function of block 0.*{message}"):
        reduced(pixels(2))


def index(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1]).expand(len(x), -1)


def test_what_a_reduced_model_refuses(tmp_path: Path) -> None:
    reduced, images = tiny("vit").with_tokens(vitlib.tokens.merge(3)), pixels(2)
    with pytest.raises(ConfigError, match="call attention\\(\\) of the model that it was made"):
        reduced.attention(images)
    with pytest.raises(ConfigError, match="call facets\\(\\) of the model that it was made"):
        reduced.facets(images, 1, grid=True)
    with pytest.raises(vitlib.VitlibError, match="ReducedViT"):
        vitlib.save(reduced, tmp_path / "out")
    with pytest.raises(ConfigError, match="save the model that it was made from"):
        vitlib.optimize(reduced).save(tmp_path / "fast")
    assert not list(tmp_path.iterdir())
    reduced.train().set_grad_checkpointing()
    with pytest.raises(ConfigError, match="set_grad_checkpointing"):
        reduced(images)
