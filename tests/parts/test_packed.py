"""Images of many shapes in one forward.

Bounds: linear layers of more rows may sum in another order: 2e-6 of the largest value; optimized
models 5e-6, as everywhere.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vitlib
from fixtures import families
from fixtures.fake_gpu import optimize_on_cpu
from fixtures.families import FAMILIES, RARE, pixels
from vitlib.encoder import Block
from vitlib.errors import ConfigError, ImageError
from vitlib.parts.packed import MAX_TOKENS, packed, run_block
from vitlib.parts.sequence import AttnPos, Group

everyone = pytest.mark.parametrize("family", FAMILIES | RARE)
# Two images have the same shape, and three the same number of tokens.
SHAPES = [(32, 32), (16, 40), (40, 16), (24, 24), (16, 40)]


def tiny(name: str, **changes: Any) -> vitlib.ViT:
    return families.tiny(name, **{"depth": 3, **changes})


def photos(shapes: list[tuple[int, int]] | None = None) -> list[Tensor]:
    return [pixels(2 + i, *shape)[0] for i, shape in enumerate(shapes or SHAPES)]


def largest(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def one_by_one(model: vitlib.ViT, images: list[Tensor]) -> Tensor:
    return torch.cat([model(image[None]) for image in images])


@everyone
def test_equals_one_by_one(family: str) -> None:
    model, images = tiny(family), photos()
    out, expected = model.packed(images), one_by_one(model, images)
    assert largest(out.logits, expected) <= 2e-6
    assert largest(out.logits.roll(1, 0), expected) > 1e-4
    assert largest(model.packed(images, tokens=False).logits, expected) <= 2e-6
    assert out.grids == tuple((h // 8, w // 8) for h, w in SHAPES)
    for image, tokens, length in zip(images, out.split(), out.lengths, strict=True):
        features = model.forward_features(image[None])[0]
        assert tokens.shape == features.shape == (length, 32)
        assert largest(tokens, features) <= 2e-6


@everyone
def test_gradients_equal_one_by_one(family: str) -> None:
    model, images = tiny(family), [image.requires_grad_() for image in photos()]
    wanted = [*images, *(p for p in model.parameters() if p.requires_grad)]
    weights = torch.linspace(-1, 1, len(images) * 5).reshape(len(images), 5)

    def gradients(logits: Tensor) -> list[Tensor]:
        loss = (logits[:, :5] * weights[:, : logits.shape[1]]).sum()
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        return [torch.zeros(()) if g is None else g for g in grads]

    expected = gradients(one_by_one(model, images))
    # Some gradients are sums that cancel: they are bounded by the largest of all.
    scale = max(g.abs().max() for g in expected)
    for checkpointing in (False, True):
        model.train().set_grad_checkpointing(checkpointing)
        for got, other in zip(gradients(model.packed(images).logits), expected, strict=True):
            assert (got - other).abs().max() / scale <= 5e-6


@everyone
def test_optimized_model_equals_one_by_one(family: str) -> None:
    model, images = tiny(family), photos()
    fast, expected = vitlib.optimize(model), one_by_one(model, images)
    out = fast.packed(images)
    assert largest(out.logits, expected) <= 5e-6
    assert largest(fast.packed(images, tokens=False).logits, expected) <= 5e-6
    assert out.tokens is not None
    assert largest(out.tokens, model.packed(images).tokens) <= 5e-6


@pytest.mark.parametrize("family", ["vit", "dinov3", "beit", "siglip_map"])
def test_modules_of_a_gpu_run_on_each_shape(family: str) -> None:
    model, images = tiny(family), photos()
    fast = optimize_on_cpu(model)
    for tokens in (True, False):
        out = fast.packed(images, tokens=tokens)
        assert largest(out.logits, one_by_one(model, images)) <= 5e-6


@pytest.mark.parametrize("family", ["vit", "dinov3", "beit"])
def test_optimized_model_runs_layers_on_the_sequence(family: str) -> None:
    fast = vitlib.optimize(tiny(family))
    rows: list[int] = []
    up: Any = fast.trunk.blocks[0].up
    up.activate, activate = (
        lambda x, *args: (rows.append(x.shape[1]), activate(x, *args))[1],
        up.activate,
    )
    images = photos()
    out = fast.packed(images)
    assert rows == [sum(out.lengths)]


def test_optimized_model_in_bfloat16() -> None:
    fast = vitlib.optimize(tiny("vit"), "bf16")
    images = photos()
    expected = torch.cat([fast(image[None]) for image in images])
    assert largest(fast.packed(images).logits, expected) <= 2e-2


def test_optimized_model_refuses_gradients_and_names_methods_for_research() -> None:
    fast = vitlib.optimize(tiny("vit"))
    with pytest.raises(ConfigError, match="has no gradients"):
        fast.packed([photos()[0].requires_grad_()])
    for name in ("trace", "facets", "with_attention", "with_tokens"):
        assert not hasattr(fast, name)
        with pytest.raises(
            ConfigError, match=rf"^an optimized model has no {name}: call {name}\(\)"
        ):
            getattr(fast, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fast.nothing


@pytest.mark.parametrize("family", ["vit", "dinov3", "beit", "siglip_map"])
def test_an_image_does_not_depend_on_the_others(family: str) -> None:
    model, images = tiny(family), photos()
    others = [images[0], *(torch.randn_like(image) for image in images[1:])]
    a, b = model.packed(images), model.packed(others)
    assert torch.equal(a.logits[0], b.logits[0])
    assert torch.equal(a.split()[0], b.split()[0])
    assert all(not torch.equal(x, y) for x, y in zip(a.logits[1:], b.logits[1:], strict=True))


def test_attention_across_images_is_caught() -> None:
    def leak(block: Any, x: Tensor, groups: list[Group], attn_pos: AttnPos) -> Tensor:
        del groups
        return run_block(block, x, [Group(0, 1, x.shape[1])], attn_pos[:1])

    model, images = tiny("vit"), photos()
    expected = one_by_one(model, images)
    assert largest(packed(model, images, run=leak).logits, expected) > 1e-4


@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_number_of_sequences_changes_nothing(max_tokens: int) -> None:
    model, images = tiny("dinov2_registers"), photos()
    out = packed(model, images, max_tokens=max_tokens)
    assert largest(out.logits, one_by_one(model, images)) <= 2e-6
    assert [len(tokens) for tokens in out.split()] == list(out.lengths)


def test_image_longer_than_a_sequence_is_computed() -> None:
    model = tiny("vit", depth=1)
    images = [pixels(1, 8 * 30, 8 * 30)[0], *photos()[:1]]
    assert MAX_TOKENS["cpu"] < 30 * 30
    assert largest(model.packed(images).logits, one_by_one(model, images)) <= 2e-6


def test_last_block_computes_what_the_head_reads() -> None:
    for family, expected in (("vit", 1), ("deit_distilled", 2), ("pixio", 4), ("mae_mean", None)):
        model, rows = tiny(family), list[int]()
        model.blocks[-1].mlp.register_forward_hook(
            lambda _, args, __, rows=rows: rows.append(args[0][..., 0].numel())
        )
        out = model.packed(photos(), tokens=False)
        assert out.tokens is None
        assert sum(rows) == sum(out.lengths if expected is None else [expected] * len(SHAPES))
        with pytest.raises(ConfigError, match="gives no tokens"):
            out.split()


def test_equal_shapes_draw_as_a_batch_does() -> None:
    rates = {"drop_path": 0.5, "dropout": 0.2, "attention_dropout": 0.2}
    model, batch = tiny("vit", depth=2, regularization=rates).train(), pixels(6)
    torch.manual_seed(3)
    expected = model.forward_features(batch)
    torch.manual_seed(3)
    out = model.packed(list(batch))
    assert out.tokens is not None
    assert largest(out.tokens, expected.flatten(0, 1)) <= 2e-6


def test_stochastic_depth_drops_the_branch_of_an_image() -> None:
    model = tiny("vit", depth=2, regularization={"drop_path": 0.5}).train()
    image, other = photos()[0], photos()[1]
    logits = model.packed([image, other] * 8).logits
    for copies in (logits[0::2], logits[1::2]):
        # Two branches of the last block may be dropped: of 16 in one sequence not all are.
        assert 2 <= len(torch.unique((copies * 1e4).round(), dim=0)) <= 4


class Halved(Block):
    """Block of a user's own."""

    def forward(self, *args: Any) -> Tensor:
        return super().forward(*args) / 2


class FirstToken(torch.nn.Module):
    """MLP of a user's own, which mixes the tokens of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1].expand_as(x)


@pytest.mark.parametrize("family", ["vit", "dinov3", "beit"])
def test_parts_of_ones_own_run_on_each_shape(family: str) -> None:
    model, images = tiny(family), photos()

    def negate(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return -torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)

    changed = copy.deepcopy(model)
    changed.blocks[1].__class__ = Halved
    mixed = copy.deepcopy(model)
    mixed.blocks[0].mlp = FirstToken()  # type: ignore[assignment]
    hooked = copy.deepcopy(model)
    hooked.blocks[0].register_forward_hook(lambda _, __, x: x + x.mean(dim=1, keepdim=True))
    for other in (changed, mixed, hooked, model.with_attention(negate, [1])):
        expected = one_by_one(other, images)
        assert largest(other.packed(images).logits, expected) <= 2e-6
        assert largest(one_by_one(model, images), expected) > 1e-4


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "^no images: expected one or more$"),
        ([torch.zeros(3, 32, 32), torch.zeros(32, 32)], r"^image 1: pixels of shape \(32, 32\)"),
        (torch.zeros(3, 32, 32), r"^image 0: pixels of shape \(32, 32\): expected \(3, height"),
        ([torch.zeros(3, 32, 32), torch.zeros(4, 32, 32)], "^image 1: pixels of shape"),
        ([torch.zeros(3, 4, 32)], "^image 0: images of 4x32 pixels"),
        ([torch.zeros(3, 32, 32, dtype=torch.uint8)], r"^image 0: pixels are torch\.uint8"),
        (None, "^packed: images is a NoneType: expected a list of tensors"),
        (["photo.jpg"], "^image 0: images: expected a tensor of normalised pixels, got a str"),
    ],
)
def test_bad_images_are_refused(images: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        tiny("vit").packed(images)


def test_compiles_whole() -> None:
    model, images = tiny("vit"), photos()
    compiled = torch.compile(model.packed, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images).logits, model.packed(images).logits)


def test_model_of_fewer_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^packed: a ReducedViT runs its blocks in its own"):
        tiny("vit").with_tokens(vitlib.tokens.merge(r=1)).packed(photos())


def test_photos_in_their_own_shape_are_packed() -> None:
    model = tiny("vit")
    processor = vitlib.ImageProcessor(shortest_edge=32).with_image_size("keep", (8, 8))
    generator = np.random.default_rng(0)
    files = [
        Image.fromarray(generator.integers(0, 255, (h, w, 3), np.uint8))
        for h, w in ((50, 70), (64, 33), (40, 40))
    ]
    images = [processor(photo)[0] for photo in files]
    assert len({image.shape for image in images}) == 3
    assert largest(model.packed(images).logits, one_by_one(model, images)) <= 2e-6
