from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import vitlib
from vitlib import ViT, ViTConfig
from vitlib.errors import ConfigError

SMALL = ViTConfig(
    image_size=32,
    patch_size=8,
    embed_dim=32,
    depth=3,
    num_heads=4,
    num_classes=5,
    labels=tuple("abcde"),
)


def test_forward_is_features_then_head() -> None:
    images = torch.randn(2, 3, 32, 32)
    for changes in (
        {},
        {"pool": "mean"},
        {"pool": "cls+mean"},
        {"num_registers": 2, "pool": "cls+mean"},
        {"num_registers": 2, "pool": "prefix"},
        {"dist_token": True},
        {"dist_token": True, "dist_head": True},
        {"num_classes": 0, "labels": ()},
        {"class_token": False, "pool": "mean"},
        {"activation": "swiglu", "layer_scale": 1.0},
    ):
        model = ViT(replace(SMALL, **changes)).eval()
        tokens = model.forward_features(images)
        assert tokens.shape == (2, model.num_prefix_tokens + 16, 32)
        assert torch.allclose(model(images), model.forward_head(tokens), atol=1e-6), changes
        assert torch.allclose(model.embed(images), model.pool(tokens), atol=1e-6)
        width = 64 if model.config.pool == "cls+mean" else 32
        assert model.embed(images).shape == (2, width)


def test_mean_pool_excludes_prefix_tokens() -> None:
    model = ViT(replace(SMALL, num_registers=2, pool="cls+mean"))
    tokens = torch.randn(2, 3 + 16, 32)
    expected = torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], dim=1)
    assert torch.equal(model.pool(tokens), expected)


def test_prefix_pool_is_mean_of_prefix_tokens() -> None:
    model = ViT(replace(SMALL, num_registers=2, pool="prefix")).eval()
    tokens = torch.randn(2, 3 + 16, 32)
    assert torch.equal(model.pool(tokens), tokens[:, :3].mean(1))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(vitlib.optimize(model)(images), model(images), atol=1e-5)


def test_distilled_logits_are_mean_of_two_heads() -> None:
    model = ViT(replace(SMALL, dist_token=True, dist_head=True))
    tokens = torch.randn(2, 18, 32)
    expected = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2
    assert torch.equal(model.forward_head(tokens), expected)


def test_last_block_computes_only_pooled_tokens() -> None:
    model = ViT(SMALL).eval()
    rows = []
    model.blocks[-1].mlp.fc1.register_forward_hook(lambda _, x, __: rows.append(x[0].shape[1]))
    model(torch.randn(1, 3, 32, 32))
    model.forward_features(torch.randn(1, 3, 32, 32))
    assert rows == [1, 17]


def test_hook_on_last_block_sees_all_tokens_with_switch() -> None:
    images = torch.randn(2, 3, 32, 32)
    for changes in ({}, {"num_registers": 2}, {"dist_token": True, "dist_head": True},
                    {"pool": "pooler", "pooler_dim": 8}):  # fmt: skip
        model = ViT(replace(SMALL, **changes)).eval()
        shapes = []
        model.blocks[-1].register_forward_hook(lambda _, __, x, s=shapes: s.append(x.shape))  # type: ignore[misc]
        without, embedding = model(images), model.embed(images)
        model.compute_all_tokens = True
        assert torch.allclose(model(images), without, atol=1e-6)
        assert torch.allclose(model.embed(images), embedding, atol=1e-6)
        if model.pooler is not None:
            model.forward_pooler(images)
        count = model.num_prefix_tokens + 16
        assert set(shapes[:2]) == {torch.Size((2, 2 if model.head_dist is not None else 1, 32))}
        assert set(shapes[2:]) == {torch.Size((2, count, 32))}
        assert copy.deepcopy(model).compute_all_tokens
        assert not ViT(SMALL).compute_all_tokens


def test_optimized_model_keeps_switch_and_hook() -> None:
    model, images = ViT(SMALL).eval(), torch.randn(2, 3, 32, 32)
    shapes = []
    model.blocks[-1].register_forward_hook(lambda _, __, x: shapes.append(x.shape))
    with torch.no_grad():
        expected = model(images)
    model.compute_all_tokens = True
    fast = vitlib.optimize(model)
    assert torch.allclose(fast(images), expected, atol=1e-5)
    assert shapes == [torch.Size((2, 1, 32)), torch.Size((2, 17, 32))]


def test_gradients_reach_all_parameters_in_forward() -> None:
    for changes in ({}, {"dist_token": True, "dist_head": True}, {"num_registers": 2},
                    {"layer_scale": 0.1, "mask_token": True}):  # fmt: skip
        model = ViT(replace(SMALL, **changes))
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        zero = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # Keys' biases move every score alike, which softmax takes out again.
        assert [n for n in zero if not n.endswith("attn.k.bias")] == []


def test_gradient_checkpointing_preserves_gradients() -> None:
    model = ViT(SMALL)
    images = torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_gradient_checkpointing_saves_memory() -> None:
    """Count what autograd saves: inputs of the blocks, and no scores or hidden layers."""
    model = ViT(replace(SMALL, depth=6))
    selected = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            model(torch.randn(2, 3, 32, 32))
        selected.append(sum(sizes))
    assert selected[1] < selected[0] / 4


def test_initial_weights() -> None:
    model = ViT(ViTConfig.named("Ti/16", num_classes=10))
    for name, parameter in model.state_dict().items():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert bool((parameter == 1).all()), name
        else:
            assert 0.015 < parameter.std() < 0.025, name
            assert abs(float(parameter.mean())) < 0.005, name
    torch.manual_seed(3)
    first = ViT(SMALL).state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(v, first[k]) for k, v in ViT(SMALL).state_dict().items())


def test_reset_classifier() -> None:
    model = ViT(SMALL).double().eval()
    model.reset_classifier(7)
    assert model.head.weight.shape == (7, 32)
    assert model.head.weight.dtype == torch.float64
    assert not model.head.training
    assert model.config.labels == ()
    assert model.num_classes == 7
    images = torch.randn(1, 3, 32, 32)
    assert model(images).shape == (1, 7)
    model.reset_classifier(4, "cls+mean")
    assert model(images).shape == (1, 4)
    model.reset_classifier(0, "cls")
    assert model(images).shape == (1, 32)
    with pytest.raises(ConfigError, match="num_classes=-1"):
        model.reset_classifier(-1)
    distilled = ViT(replace(SMALL, dist_token=True, dist_head=True))
    distilled.reset_classifier(3)
    assert distilled.head_dist.weight.shape == (3, 32)


def test_training_reduces_loss() -> None:
    torch.manual_seed(1)
    model = ViT(replace(SMALL, num_classes=2, labels=(), drop_path=0.1, dropout=0.1))
    images = torch.randn(16, 3, 32, 32)
    target = torch.arange(16) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_logits_do_not_depend_on_batch_mates() -> None:
    model = ViT(SMALL).eval()
    images = torch.randn(8, 3, 32, 32)
    with torch.inference_mode():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        assert torch.allclose(together, alone, atol=1e-5)
        assert torch.equal(together, model(images))
        assert model(images[:0]).shape == (0, 5)


def test_deepcopy_and_state_dict() -> None:
    model = ViT(replace(SMALL, mask_token=True, pooler_dim=32)).eval()
    twin = copy.deepcopy(model)
    fresh = ViT(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(twin(images), model(images))
    assert torch.equal(fresh(images), model(images))
    assert "patch_embed.mask_token" in model.state_dict()


def test_compile_without_a_graph_break() -> None:
    model = ViT(SMALL).eval()
    explained = torch._dynamo.explain(model)(torch.randn(2, 3, 32, 32))
    assert explained.graph_break_count == 0


def test_torch_export() -> None:
    model = ViT(SMALL).eval()
    images = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(model, (images,)).module()
    assert torch.allclose(exported(images), model(images), atol=1e-6)


def test_public_types() -> None:
    assert vitlib.ViT is ViT
    assert issubclass(vitlib.VitlibError, Exception)
