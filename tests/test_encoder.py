from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vitlib.config import ViTConfig
from vitlib.dropout import drop_path
from vitlib.encoder import MLP, Attention, Block, SwiGLU

SMALL = {"embed_dim": 8, "num_heads": 2, "depth": 3, "mlp_dim": 12}


def test_attention_equals_explicit_softmax() -> None:
    """Two tokens, one head of one number, all weights 1: softmax of q k, worked out."""
    attention = Attention(ViTConfig(embed_dim=1, num_heads=1, depth=1))
    with torch.no_grad():
        for layer in (attention.q, attention.k, attention.v, attention.proj):
            layer.weight.fill_(1)
    result = attention(torch.tensor([[[1.0], [2.0]]])).flatten().tolist()
    e, e2, e4 = math.e, math.e**2, math.e**4
    assert result == pytest.approx([(e + 2 * e2) / (e + e2), (e2 + 2 * e4) / (e2 + e4)], rel=1e-6)


def test_scale_and_heads() -> None:
    attention = Attention(ViTConfig(**SMALL))
    x = torch.randn(2, 5, 8)
    q, k, v = (layer(x).reshape(2, 5, 2, 4).transpose(1, 2) for layer in
               (attention.q, attention.k, attention.v))  # fmt: skip
    probabilities = (q @ k.transpose(-1, -2) / 2).softmax(-1)  # sqrt of 4 numbers a head
    expected = attention.proj((probabilities @ v).transpose(1, 2).reshape(2, 5, 8))
    assert torch.allclose(attention(x), expected, atol=1e-6)


@pytest.mark.parametrize("num_queries", [1, 2, 5])
def test_num_queries_limits_queries_to_the_first_tokens(num_queries: int) -> None:
    block = Block(ViTConfig(**SMALL, layer_scale=0.5), index=2)
    x = torch.randn(2, 5, 8)
    assert block(x, num_queries).shape == (2, num_queries, 8)
    assert torch.allclose(block(x, num_queries), block(x)[:, :num_queries], atol=1e-6)


def test_gelu_forms() -> None:
    x = torch.linspace(-4, 4, 41).reshape(1, 41, 1)
    exact = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    tanh = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    quick = x * torch.sigmoid(1.702 * x)
    forms = {"gelu": exact, "gelu_tanh": tanh, "quick_gelu": quick}
    for name, expected in forms.items():
        mlp = MLP(ViTConfig(embed_dim=1, num_heads=1, depth=1, mlp_dim=1, activation=name))
        with torch.no_grad():
            mlp.fc1.weight.fill_(1)
            mlp.fc2.weight.fill_(1)
        assert torch.allclose(mlp(x), expected, atol=1e-6), name
    assert (exact - tanh).abs().max() > 1e-4
    assert (exact - quick).abs().max() > 1e-2


def test_swiglu_gates_with_the_first_half() -> None:
    mlp = SwiGLU(ViTConfig(**SMALL, activation="swiglu"))
    x = torch.randn(1, 3, 8)
    gate, up = mlp.fc1(x)[..., :12], mlp.fc1(x)[..., 12:]
    assert torch.allclose(mlp(x), mlp.fc2(F.silu(gate) * up), atol=1e-6)


def test_layer_scale_starts_at_initial_value() -> None:
    block = Block(ViTConfig(**SMALL, layer_scale=0.1), index=0)
    assert torch.equal(block.ls1.gamma, torch.full((8,), 0.1))
    assert Block(ViTConfig(**SMALL), index=0).ls1 is None


def test_stochastic_depth_keeps_the_mean() -> None:
    x = torch.ones(4000, 2, 3)
    dropped = drop_path(x, 0.25)
    selected = dropped[:, 0, 0] > 0
    assert torch.equal(dropped, torch.where(selected[:, None, None], x / 0.75, torch.zeros(())))
    assert selected.float().mean() == pytest.approx(0.75, abs=0.03)
    assert drop_path(x, 0.0) is x


def test_dropout_is_off_in_eval_mode() -> None:
    cfg = ViTConfig(**SMALL, dropout=0.5, attention_dropout=0.5, drop_path=0.5)
    block = Block(cfg, index=2)
    x = torch.randn(8, 5, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))
    assert [Block(cfg, index).drop_path for index in range(3)] == [0.0, 0.25, 0.5]


def test_keys_without_bias() -> None:
    attention = Attention(ViTConfig(**SMALL, qkv_bias=False))
    assert attention.q.bias is None
    assert attention.proj.bias is not None


@pytest.mark.cuda
def test_flash_attention_runs_on_cuda() -> None:
    """Check by name that bfloat16 at 197 tokens, the ViT-B case, runs a fused kernel."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from torch.profiler import ProfilerActivity, profile

    attention = Attention(ViTConfig.named("B/16")).cuda().bfloat16().eval()
    x = torch.randn(8, 197, 768, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        attention(x)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
            attention(x)
    names = {event.key for event in run.key_averages()}
    fused = {name for name in names if "attention" in name and "math" not in name}
    print("kernels:", sorted(fused))
    assert any("flash" in name or "cudnn" in name or "efficient" in name for name in fused)
    assert not any("_scaled_dot_product_attention_math" in name for name in names)
