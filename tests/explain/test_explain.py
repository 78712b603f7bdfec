"""The mathematics of explain/ beside its definition; maps of models that must show one thing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import vitlib
from fixtures import cat_images, references
from test_features import images_for, tiny
from vitlib import ViT, explain, vit
from vitlib.errors import ConfigError, ImageError
from vitlib.explain import maps
from vitlib.explain.attention_with_grads import forward_explicit
from vitlib.explain.faithfulness import blur


def rows_of(*shape: int) -> Tensor:
    return torch.randn(*shape).softmax(dim=-1)


# --- rollout, relevance ---------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", ["mean", "max", "min"])
def test_rollout_is_the_product(fuse: str) -> None:
    layers = [rows_of(2, 3, 6, 6) for _ in range(4)]
    expected = torch.eye(6).expand(2, 6, 6)
    for layer in layers:
        fused = {"mean": layer.mean(1), "max": layer.amax(1), "min": layer.amin(1)}[fuse]
        fused = fused / fused.sum(-1, keepdim=True)
        expected = (0.5 * torch.eye(6) + 0.5 * fused) @ expected
    found = maps.rollout(layers, fuse=fuse)  # type: ignore[arg-type]
    assert found.dtype == np.float32
    assert np.abs(found - expected.numpy()).max() < 1e-6
    assert np.abs(found.sum(-1) - 1).max() < 1e-6
    some = maps.rollout(layers, fuse=fuse, rows=2)  # type: ignore[arg-type]
    assert np.abs(some - found[:, :2]).max() < 1e-6


def test_rollout_discards_the_weakest() -> None:
    layer = torch.tensor([[[[0.1, 0.2, 0.3, 0.4]] * 4]])
    found = maps.rollout([layer], residual=0.0, discard=0.5)
    assert np.allclose(found[0], [[0, 0, 3 / 7, 4 / 7]] * 4)


def test_relevance_is_the_recursion() -> None:
    layers = [rows_of(2, 3, 6, 6) for _ in range(4)]
    slopes = [torch.randn(2, 3, 6, 6) for _ in layers]
    expected = torch.eye(6).expand(2, 6, 6)
    for layer, slope in zip(layers, slopes, strict=True):
        expected = expected + (layer * slope).clamp(min=0).mean(1) @ expected
    found = maps.relevance(layers, slopes)
    assert np.abs(found - expected.numpy()).max() < 1e-5
    assert np.abs(maps.relevance(layers, slopes, rows=1) - found[:, :1]).max() < 1e-5


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([], "no layers"),
        ([torch.ones(2, 3, 4, 5)], r"expected \(B, H, T, T\)"),
        ([torch.ones(1, 1, 4, 4), torch.ones(1, 1, 5, 5)], "same for every layer"),
        ([torch.ones(4, 4)], "expected 4 axes"),
    ],
)
def test_rollout_of_what_is_no_attention(layers: list[Tensor], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        maps.rollout(layers)


@pytest.mark.parametrize("name", [n for n in references.MODELS if "base" not in n])
def test_the_explicit_forward_is_forward(name: str, tmp_path: Path) -> None:
    references.saved(name, tmp_path)
    model = vitlib.load(tmp_path)
    images = images_for(model)
    if not model.num_classes:
        with pytest.raises(ConfigError, match="no head"):
            forward_explicit(model, images)
        return
    with torch.no_grad():
        found = forward_explicit(model, images)
        assert references.distance(found.logits, model(images)) < 2e-6
        attention = model.attention(images)
    for a, b in zip(found.attention, attention, strict=True):
        assert (a - b).abs().max() < 2e-6


@pytest.mark.parametrize("name", ["vit", "deit two heads", "dinov2", "siglip", "beit", "ijepa"])
def test_relevance_of_every_way_to_pool(name: str, tmp_path: Path) -> None:
    references.saved(name, tmp_path)
    model = vitlib.load(tmp_path)
    images = images_for(model)
    before = [p.grad for p in model.parameters()]
    one, other = (explain.relevance(model, images, target) for target in (0, 1))
    assert one.shape == (2, *model.patch_grid(images))
    assert (one >= 0).all()
    assert np.abs(one - other).max() > 0  # it is of a class
    best = model(images).argmax(dim=1)
    assert np.array_equal(explain.relevance(model, images), explain.relevance(model, images, best))
    assert [p.grad for p in model.parameters()] == before
    assert all(p.requires_grad for p in model.blocks.parameters())


# --- a model whose answer is known ----------------------------------------------------------------


class OnePatch(ViT):
    """Its logit is the mean pixel of one patch, so every map must show that patch."""

    place = (1, 2)

    def forward(self, images: Tensor) -> Tensor:
        (p, q), (row, column) = self.config.patch_size, self.place
        patch = images[:, :, row * p : (row + 1) * p, column * q : (column + 1) * q]
        return torch.stack([patch.mean(dim=(1, 2, 3)) * 5, torch.zeros(len(images))], dim=1)


@pytest.fixture
def one_patch() -> OnePatch:
    return OnePatch(tiny(num_classes=2).config)


def test_gradient_and_occlusion_find_the_patch(one_patch: OnePatch) -> None:
    images = torch.rand(2, 3, 32, 32) + 0.5
    slope = explain.gradient(one_patch, images, 0, samples=4)
    assert slope.shape == (2, 32, 32)
    inside = slope[:, 8:16, 16:24]
    assert (inside > 0).all()
    assert np.isclose(inside.sum(), slope.sum())
    falls = explain.occlusion(one_patch, images, 0, window=1)
    assert falls.shape == (2, 4, 4)
    assert (falls.reshape(2, -1).argmax(1) == 1 * 4 + 2).all()
    assert np.count_nonzero(falls) == 2
    again = explain.gradient(one_patch, images, 0, samples=4)
    assert np.array_equal(slope, again)


def test_maps_of_images_that_are_no_multiple_of_the_patch(one_patch: OnePatch) -> None:
    """What lies after the last whole patch is read by no model: no map and no curve needs it."""
    model = one_patch.eval()
    images = torch.rand(2, 3, 35, 38)
    whole = images[:, :, :32, :32]
    for method in (explain.occlusion, explain.relevance, explain.attention_rollout):
        assert np.array_equal(method(model, images), method(model, whole))
    slope = explain.gradient(model, images, 0, samples=1, noise=0)
    assert slope.shape == (2, 35, 38)
    assert not slope[:, 32:].any()
    assert not slope[:, :, 32:].any()
    curve = explain.faithfulness(model, images, slope, 0, steps=4)
    assert np.array_equal(
        curve.deletion_curve,
        explain.faithfulness(model, whole, slope[:, :32, :32], 0, steps=4).deletion_curve,
    )


def test_faithfulness_tells_a_right_map_from_a_wrong_one(one_patch: OnePatch) -> None:
    images = torch.rand(2, 3, 32, 32) + 0.5
    right = np.zeros((2, 4, 4), np.float32)
    right[:, 1, 2] = 1
    good = explain.faithfulness(one_patch, images, right, 0, steps=16)
    bad = explain.faithfulness(one_patch, images, -right, 0, steps=16)
    assert good.deletion_curve.shape == (2, 17)
    assert np.allclose(good.deletion_curve[:, 1:], 0.5)  # all is gone after the first step
    assert (good.deletion < bad.deletion).all()
    assert (good.insertion_curve[:, 1] > bad.insertion_curve[:, 1] - 0.1).all()
    assert np.isclose(good.shares[-1], 1)
    fine = np.kron(right, np.ones((8, 8), np.float32))
    assert np.array_equal(
        explain.faithfulness(one_patch, images, fine, 0, steps=16).deletion, good.deletion
    )


def test_a_blur_keeps_what_is_flat() -> None:
    flat = torch.full((3, 40, 24), 0.7)
    assert torch.allclose(blur(flat), flat, atol=1e-5)
    assert blur(torch.randn(3, 64, 64)).std() < 0.1


@pytest.mark.parametrize("target", [5, -1, [0, 1, 2], 0.5])
def test_a_class_that_is_not_there(target: object) -> None:
    model = tiny()
    with pytest.raises(ConfigError, match="target="):
        explain.relevance(model, images_for(model), target)  # type: ignore[arg-type]


def test_maps_in_inference_mode() -> None:
    model = tiny()
    images = images_for(model)
    outside = explain.relevance(model, images), explain.gradient(model, images)
    with torch.inference_mode():
        inside = explain.relevance(model, images), explain.gradient(model, images)
        explain.relevance(model, images * 1)  # a tensor made in that mode
    assert all(np.array_equal(a, b) for a, b in zip(outside, inside, strict=True))


def test_the_foreground_is_two_cats(dinov2_small: Path, two_cats: Path) -> None:
    """Against polygons drawn by hand, at the checkpoint's own size and in the photo's own shape."""
    model = vitlib.load(dinov2_small)
    rule = vitlib.ImageProcessor.load(dinov2_small)
    for each in (rule, rule.with_image_size("keep", (14, 14)), rule.with_image_size((518, 518))):
        kept = explain.foreground(model, each(two_cats))[0]
        assert cat_images.overlap(kept, each.visible_box(480, 640)) >= 0.7
        assert cat_images.overlap(~kept, each.visible_box(480, 640)) < 0.4


def test_two_groups_grow_from_a_guess() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 8)) * 0.1
    x[:15, 0] += 1
    guess = np.zeros(40, bool)
    guess[[0, 1, 30]] = True
    assert maps.split_groups(x, guess).tolist() == [True] * 15 + [False] * 25
    assert not maps.split_groups(x, np.zeros(40, bool)).any()


def test_maps_leave_the_model_as_it_was() -> None:
    model = tiny(dropout=0.5)
    model.train()
    model.blocks[0].eval()
    images = images_for(model)
    modes = [m.training for m in model.modules()]
    explain.relevance(model, images)
    explain.gradient(model, images, samples=1)
    explain.occlusion(model, images)
    explain.attention_rollout(model, images)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


# --- features -------------------------------------------------------------------------------------


def test_patch_pca_is_the_svd() -> None:
    x = torch.randn(3, 20, 12)
    found, shares = maps.patch_pca(x, 3)
    assert found.shape == (3, 20, 3)
    assert found.min() == 0
    assert found.max() == 1
    flat = x.reshape(-1, 12).double()
    u, s, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    for k in range(3):
        mine, theirs = found.reshape(-1, 3)[:, k], (u[:, k] * s[k]).numpy()
        assert abs(np.corrcoef(mine, theirs)[0, 1]) > 1 - 1e-6
    assert np.allclose(shares, (s**2 / (s**2).sum())[:3].numpy())


def test_patch_pca_of_some_patches() -> None:
    x, mask = np.random.default_rng(0).normal(size=(10, 6)), np.arange(10) % 2 == 0
    found, _ = maps.patch_pca(x, 2, mask=mask)
    assert (found[~mask] == 0).all()
    assert np.allclose(found[mask], maps.patch_pca(x[mask], 2)[0])
    with pytest.raises(ConfigError, match="components=7"):
        maps.patch_pca(x, 7)


def test_similarity_to_a_patch_is_one_there() -> None:
    model = tiny()
    images = images_for(model, 2, (16, 40))
    found = explain.similarity(model, images, (1, 3))
    assert found.shape == (2, 2, 5)
    assert np.allclose(found[:, 1, 3], 1, atol=1e-6)
    assert np.abs(found).max() <= 1
    whole = explain.similarity(model, images)
    tokens = model.forward_features(images).detach()
    cosine = torch.cosine_similarity(tokens[:, :1], tokens[:, 1:], dim=-1).view(2, 2, 5)
    assert np.allclose(whole, cosine.numpy(), atol=1e-5)
    with pytest.raises(ConfigError, match=r"patch=.*row in 0\.\.1"):
        explain.similarity(model, images, (2, 0))
    other = tiny(class_token=False, pool="mean")
    with pytest.raises(ConfigError, match="no class token"):
        explain.similarity(other, images)
    with pytest.raises(ConfigError, match="no class token"):
        explain.foreground(other, images)


def test_kept_mass_is_the_fewest() -> None:
    kept = maps.top_mass(np.array([[0.5, 0.1, 0.3, 0.1], [0.25] * 4]), 0.6)
    assert kept.tolist() == [[True, False, True, False], [True, True, True, False]]
    assert maps.top_mass(np.ones((1, 4)), 1.0).all()


def test_smoothed_keeps_the_mean_of_the_inside() -> None:
    grid = np.zeros((5, 5), np.float32)
    grid[2, 2] = 16
    found = maps.smooth(grid)
    assert found[2, 2] == 4
    assert found[1, 1] == 1
    assert found.sum() == 16


def test_head_maps_are_rows_of_attention() -> None:
    model = tiny(num_registers=2)
    images = images_for(model, 2, (16, 40))
    found = explain.head_maps(model, images, [1, 3])
    whole = model.attention(images, [1, 3])
    assert found.shape == (2, 2, 4, 2, 5)
    assert np.allclose(found[:, 1], whole[1][:, :, 0, 3:].detach().view(2, 4, 2, 5), atol=1e-6)


# --- labels ---------------------------------------------------------------------------------------

LABELS = ("tabby, tabby cat", "tiger cat", "crane", "crane", "golden retriever")


@pytest.mark.parametrize(
    ("name", "index"),
    [("tabby", 0), ("Tabby, Tabby Cat", 0), ("tabby cat", 0), (" tiger CAT", 1), ("4", 4)],
)
def test_class_named(name: str, index: int) -> None:
    assert explain.class_named(LABELS, name) == index


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("taby", "did you mean 'tabby, tabby cat'"),
        ("crane", "label of 2 classes: say which, 2, 3"),
        ("golden retreiver", "golden retriever"),
        ("zzz", "no label 'zzz' among 5"),
        ("9", r"no class 9: expected a label, or a number in 0\.\.4"),
    ],
)
def test_class_that_nobody_is(name: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        explain.class_named(LABELS, name)


def test_what_maps_cannot_be_made_of() -> None:
    model = tiny()
    pixels = images_for(model, 1)
    for call, match in (
        (lambda: explain.occlusion(model, pixels, 1, window=1, stride=2), "a stride of 1 to the"),
        (lambda: explain.occlusion(model, pixels, 1, batch_size=0), "a batch of 1 or more"),
        (lambda: explain.relevance(model, pixels, "tabby"), "class_named"),
        (lambda: explain.patch_pca(model, pixels, layer=99), "layer=.*99.*expected"),
        (lambda: explain.faithfulness(model, pixels, np.ones((3, 2, 2))), "3 maps for 1 images"),
    ):
        with pytest.raises(ConfigError, match=match):
            call()
    assert explain.occlusion(model, pixels[:0], 1).shape[0] == 0


def test_relevance_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    pixels = images_for(model, 1)
    monkeypatch.setattr(vit, "available_memory", lambda _: 1024)
    with pytest.raises(ImageError, match="are free"):
        explain.relevance(model, pixels, 0)
