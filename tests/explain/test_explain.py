"""Explanations: the mathematics against its definition, and maps of models with a known answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vitlib
from fixtures import cat_images, references
from test_features import images_for, tiny
from vitlib import ViT, explain
from vitlib.errors import ConfigError, ImageError
from vitlib.explain import maps
from vitlib.explain.attention_with_grads import forward_explicit
from vitlib.explain.faithfulness import blur


def rows_of(*shape: int) -> Tensor:
    return torch.randn(*shape).softmax(dim=-1)


# --- rollout, relevance ---------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", ["mean", "max", "min"])
def test_rollout_equals_matrix_product(fuse: str) -> None:
    layers = [rows_of(2, 3, 6, 6) for _ in range(4)]
    expected = torch.eye(6).expand(2, 6, 6)
    for layer in layers:
        fused = {"mean": layer.mean(1), "max": layer.amax(1), "min": layer.amin(1)}[fuse]
        fused = fused / fused.sum(-1, keepdim=True)
        expected = (0.5 * torch.eye(6) + 0.5 * fused) @ expected
    result = maps.rollout(layers, fuse=fuse)  # type: ignore[arg-type]
    assert result.dtype == np.float32
    assert np.abs(result - expected.numpy()).max() < 1e-6
    assert np.abs(result.sum(-1) - 1).max() < 1e-6
    some = maps.rollout(layers, fuse=fuse, rows=2)  # type: ignore[arg-type]
    assert np.abs(some - result[:, :2]).max() < 1e-6


def test_rollout_discards_weakest_entries() -> None:
    layer = torch.tensor([[[[0.1, 0.2, 0.3, 0.4]] * 4]])
    result = maps.rollout([layer], residual=0.0, discard=0.5)
    assert np.allclose(result[0], [[0, 0, 3 / 7, 4 / 7]] * 4)


def test_relevance_equals_recursion_of_paper() -> None:
    layers = [rows_of(2, 3, 6, 6) for _ in range(4)]
    slopes = [torch.randn(2, 3, 6, 6) for _ in layers]
    expected = torch.eye(6).expand(2, 6, 6)
    for layer, slope in zip(layers, slopes, strict=True):
        expected = expected + (layer * slope).clamp(min=0).mean(1) @ expected
    result = maps.relevance(layers, slopes)
    assert np.abs(result - expected.numpy()).max() < 1e-5
    assert np.abs(maps.relevance(layers, slopes, rows=1) - result[:, :1]).max() < 1e-5


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([], "no layers"),
        ([torch.ones(2, 3, 4, 5)], r"expected \(B, H, T, T\)"),
        ([torch.ones(1, 1, 4, 4), torch.ones(1, 1, 5, 5)], "same for every layer"),
        ([torch.ones(4, 4)], "expected 4 axes"),
    ],
)
def test_rollout_rejects_wrong_shapes(layers: list[Tensor], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        maps.rollout(layers)


@pytest.mark.parametrize("name", [n for n in references.MODELS if "base" not in n])
def test_explicit_forward_equals_forward(name: str, tmp_path: Path) -> None:
    references.save_model(name, tmp_path)
    model = vitlib.load(tmp_path)
    images = images_for(model)
    if not model.num_classes:
        with pytest.raises(ConfigError, match="no head"):
            forward_explicit(model, images)
        return
    with torch.no_grad():
        result = forward_explicit(model, images)
        assert references.distance(result.logits, model(images)) < 2e-6
        attention = model.attention(images)
    for a, b in zip(result.attention, attention, strict=True):
        assert (a - b).abs().max() < 2e-6


VARIANTS: dict[str, dict[str, Any]] = {
    "post-norm": {"norms": {"post": True}},
    "norms inside": {"norms": {"attn": True, "mlp": True}, "activation": "swiglu"},
    "normed heads": {"norms": {"kind": "rms", "qk": "head", "patch": True}, "proj_bias": False},
    "learned rotation": {
        "norms": {"qk": "width"},
        "rope": {"coords": "index", "learned": True},
        "pos_embed": False,
    },
    "pool of patches": {
        "attention_pool": {"num_heads": 1, "mlp_dim": 12, "prefix_tokens": False},
        "pool": "map",
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_explicit_forward_equals_forward_of_rare_parts(name: str) -> None:
    torch.manual_seed(0)
    config = vitlib.ViTConfig(
        image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3,
        **VARIANTS[name],
    )  # fmt: skip
    model = vitlib.ViT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        result = forward_explicit(model, images)
        assert references.distance(result.logits, model(images)) < 2e-6
        attention = model.attention(images)
    for a, b in zip(result.attention, attention, strict=True):
        assert (a - b).abs().max() < 2e-6
    assert explain.relevance(model, images, 0).shape == (2, 4, 6)


@pytest.mark.parametrize("name", ["vit", "deit two heads", "dinov2", "siglip", "beit", "ijepa"])
def test_relevance_of_every_pool(name: str, tmp_path: Path) -> None:
    references.save_model(name, tmp_path)
    model = vitlib.load(tmp_path)
    images = images_for(model)
    before = [p.grad for p in model.parameters()]
    item, other = (explain.relevance(model, images, target) for target in (0, 1))
    assert item.shape == (2, *model.patch_grid(images))
    assert (item >= 0).all()
    assert np.abs(item - other).max() > 0  # it is of a class
    best = model(images).argmax(dim=1)
    assert np.array_equal(explain.relevance(model, images), explain.relevance(model, images, best))
    assert [p.grad for p in model.parameters()] == before
    assert all(p.requires_grad for p in model.blocks.parameters())


# --- a model whose answer is known ----------------------------------------------------------------


class SinglePatchModel(ViT):
    """Its logit is the mean pixel of one patch, so every map must show that patch."""

    position = (1, 2)

    def forward(self, images: Tensor) -> Tensor:
        (p, q), (row, column) = self.config.patch_size, self.position
        patch = images[:, :, row * p : (row + 1) * p, column * q : (column + 1) * q]
        return torch.stack([patch.mean(dim=(1, 2, 3)) * 5, torch.zeros(len(images))], dim=1)


@pytest.fixture
def single_patch() -> SinglePatchModel:
    return SinglePatchModel(tiny(num_classes=2).config)


def test_gradient_and_occlusion_find_the_patch(single_patch: SinglePatchModel) -> None:
    images = torch.rand(2, 3, 32, 32) + 0.5
    slope = explain.gradient(single_patch, images, 0, samples=4)
    assert slope.shape == (2, 32, 32)
    inside = slope[:, 8:16, 16:24]
    assert (inside > 0).all()
    assert np.isclose(inside.sum(), slope.sum())
    falls = explain.occlusion(single_patch, images, 0, window=1)
    assert falls.shape == (2, 4, 4)
    assert (falls.reshape(2, -1).argmax(1) == 1 * 4 + 2).all()
    assert np.count_nonzero(falls) == 2
    again = explain.gradient(single_patch, images, 0, samples=4)
    assert np.array_equal(slope, again)


def test_maps_of_images_with_partial_patches(single_patch: SinglePatchModel) -> None:
    """Check that maps and curves ignore pixels after the last whole patch, as the model does."""
    model = single_patch.eval()
    images = torch.rand(2, 3, 35, 38)
    whole = images[:, :, :32, :32]
    for method in (explain.occlusion, explain.attention_rollout):
        assert np.array_equal(method(model, images), method(model, whole))
    stock = tiny()
    assert np.array_equal(explain.relevance(stock, images), explain.relevance(stock, whole))
    with pytest.raises(ConfigError, match="has a forward of its own"):
        explain.relevance(model, images)
    slope = explain.gradient(model, images, 0, samples=1, noise=0)
    assert slope.shape == (2, 35, 38)
    assert not slope[:, 32:].any()
    assert not slope[:, :, 32:].any()
    curve = explain.faithfulness(model, images, slope, 0, steps=4)
    assert np.array_equal(
        curve.deletion_curve,
        explain.faithfulness(model, whole, slope[:, :32, :32], 0, steps=4).deletion_curve,
    )


def test_faithfulness_prefers_right_map(single_patch: SinglePatchModel) -> None:
    images = torch.rand(2, 3, 32, 32) + 0.5
    right = np.zeros((2, 4, 4), np.float32)
    right[:, 1, 2] = 1
    good = explain.faithfulness(single_patch, images, right, 0, steps=16)
    bad = explain.faithfulness(single_patch, images, -right, 0, steps=16)
    assert good.deletion_curve.shape == (2, 17)
    assert np.allclose(good.deletion_curve[:, 1:], 0.5)  # all is gone after the first step
    assert (good.deletion < bad.deletion).all()
    assert (good.insertion_curve[:, 1] > bad.insertion_curve[:, 1] - 0.1).all()
    assert np.isclose(good.shares[-1], 1)
    fine = np.kron(right, np.ones((8, 8), np.float32))
    assert np.array_equal(
        explain.faithfulness(single_patch, images, fine, 0, steps=16).deletion, good.deletion
    )


def test_blur_preserves_constant_image() -> None:
    flat = torch.full((3, 40, 24), 0.7)
    assert torch.allclose(blur(flat), flat, atol=1e-5)
    assert blur(torch.randn(3, 64, 64)).std() < 0.1


@pytest.mark.parametrize("target", [5, -1, [0, 1, 2], 0.5])
def test_explanations_reject_class_out_of_range(target: object) -> None:
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


def test_foreground_covers_two_cats(dinov2_small: Path, two_cats: Path) -> None:
    """Against polygons drawn by hand, at the checkpoint's own size and in the photo's own shape."""
    model = vitlib.load(dinov2_small)
    rule = vitlib.ImageProcessor.load(dinov2_small)
    for each in (rule, rule.with_image_size("keep", (14, 14)), rule.with_image_size((518, 518))):
        selected = explain.foreground(model, each(two_cats))[0]
        assert cat_images.mask_iou(selected, each.visible_box(480, 640)) >= 0.7
        assert cat_images.mask_iou(~selected, each.visible_box(480, 640)) < 0.4


def test_split_groups_grows_from_first_guess() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 8)) * 0.1
    x[:15, 0] += 1
    guess = np.zeros(40, bool)
    guess[[0, 1, 30]] = True
    assert maps.split_groups(x, guess).tolist() == [True] * 15 + [False] * 25
    assert not maps.split_groups(x, np.zeros(40, bool)).any()


def test_orient_groups_selects_side_with_more_attention() -> None:
    group = np.array([True, True, False, False])
    assert maps.orient_groups(group, [3, 3, 1, 1]) is group
    assert maps.orient_groups(group, [1, 1, 3, 3]).tolist() == [False, False, True, True]
    assert maps.orient_groups(group, [1, 1, 1, 1]) is group
    for constant in (np.ones(4, bool), np.zeros(4, bool)):
        assert maps.orient_groups(constant, [1, 2, 3, 4]) is constant


def test_foreground_has_more_attention_of_class_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule holds even where the features end with the other side."""
    model = tiny(num_registers=2)
    images = images_for(model, 2, (32, 40))
    monkeypatch.setattr(maps, "split_groups", lambda _, first: ~first)
    selected = explain.foreground(model, images)
    rows = model.attention(images, rows="prefix")[0][:, :, 0, model.num_prefix_tokens :]
    attention = np.median(rows.detach().numpy(), axis=1).reshape(selected.shape)
    for members, values in zip(selected, attention, strict=True):
        assert values[members].mean() > values[~members].mean()


def test_maps_do_not_change_model() -> None:
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


def test_patch_pca_equals_svd() -> None:
    x = torch.randn(3, 20, 12)
    result, shares = maps.patch_pca(x, 3)
    assert result.shape == (3, 20, 3)
    assert result.min() == 0
    assert result.max() == 1
    flat = x.reshape(-1, 12).double()
    u, s, _ = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    for k in range(3):
        mine, reference = result.reshape(-1, 3)[:, k], (u[:, k] * s[k]).numpy()
        assert abs(np.corrcoef(mine, reference)[0, 1]) > 1 - 1e-6
    assert np.allclose(shares, (s**2 / (s**2).sum())[:3].numpy())


def test_patch_pca_with_mask() -> None:
    x, mask = np.random.default_rng(0).normal(size=(10, 6)), np.arange(10) % 2 == 0
    result, _ = maps.patch_pca(x, 2, mask=mask)
    assert (result[~mask] == 0).all()
    assert np.allclose(result[mask], maps.patch_pca(x[mask], 2)[0])
    with pytest.raises(ConfigError, match="components=7"):
        maps.patch_pca(x, 7)


def test_similarity_of_patch_to_itself_is_1() -> None:
    model = tiny()
    images = images_for(model, 2, (16, 40))
    result = explain.similarity(model, images, (1, 3))
    assert result.shape == (2, 2, 5)
    assert np.allclose(result[:, 1, 3], 1, atol=1e-6)
    assert np.abs(result).max() <= 1
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


def test_top_mass_selects_fewest_entries() -> None:
    selected = maps.top_mass(np.array([[0.5, 0.1, 0.3, 0.1], [0.25] * 4]), 0.6)
    assert selected.tolist() == [[True, False, True, False], [True, True, True, False]]
    assert maps.top_mass(np.ones((1, 4)), 1.0).all()


def test_smooth_preserves_mean_of_interior() -> None:
    grid = np.zeros((5, 5), np.float32)
    grid[2, 2] = 16
    result = maps.smooth(grid)
    assert result[2, 2] == 4
    assert result[1, 1] == 1
    assert result.sum() == 16


def test_head_maps_are_rows_of_attention() -> None:
    model = tiny(num_registers=2)
    images = images_for(model, 2, (16, 40))
    result = explain.head_maps(model, images, [1, 3])
    whole = model.attention(images, [1, 3])
    assert result.shape == (2, 2, 4, 2, 5)
    assert np.allclose(result[:, 1], whole[1][:, :, 0, 3:].detach().view(2, 4, 2, 5), atol=1e-6)


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
def test_class_named_rejects_unknown_names(name: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        explain.class_named(LABELS, name)


def test_maps_reject_wrong_arguments() -> None:
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


def test_relevance_states_size_that_fits_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    pixels = images_for(model, 1)
    monkeypatch.setattr("vitlib.system.memory.available_memory", lambda _: 1024)
    with pytest.raises(ImageError, match="are free"):
        explain.relevance(model, pixels, 0)
