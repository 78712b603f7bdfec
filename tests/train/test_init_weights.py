"""First weights of a new ViT."""

from __future__ import annotations

import math

import pytest
import torch

from vitlib import ViT
from vitlib.encoder import Block
from vitlib.train.config import TrainConfig
from vitlib.train.init_weights import build_from_scratch, sincos_positions
from vitlib.train.settings import Init


def create_model(size: str = "96x2x4/4", init: Init = "mimetic", seed: int = 0) -> ViT:
    torch.manual_seed(seed)
    return build_from_scratch(size, 28, 10, init)


def blocks(net: ViT) -> list[Block]:
    return [block for block in net.blocks if isinstance(block, Block)]


def test_mimetic_attention() -> None:
    for block in blocks(create_model()):
        attn = block.attn
        q, k = (linear.weight.detach().view(4, 24, 96) for linear in (attn.q, attn.k))
        for product in q.transpose(1, 2) @ k:  # the bilinear form of a head's scores, (D, D)
            assert torch.linalg.matrix_rank(product) == 24
            # Of 0.7 Z + 0.7 I, singular values up to about 2 * 0.7 + ..., the largest quarter.
            assert 0.2 < product.diagonal().mean() < 0.4
            off = product - product.diagonal().diag()
            assert off.mean().abs() < 0.01
        moved = (attn.proj.weight @ attn.v.weight).detach()
        assert moved.diagonal().mean() == pytest.approx(-0.4, abs=0.02)  # 0.4 / 96
        off = moved[~torch.eye(96, dtype=torch.bool)]
        assert off.std() == pytest.approx(0.4 / math.sqrt(96), rel=0.05)


def test_mimetic_scores_favor_the_same_token() -> None:
    """A token scores highest with itself; after the normal start it does not."""
    tokens = torch.nn.functional.layer_norm(torch.randn(1, 50, 96), (96,))
    alike = {}
    for init in ("mimetic", "normal"):
        shares = blocks(create_model(init=init))[0].attn.probabilities(tokens).detach()
        alike[init] = shares.diagonal(dim1=-2, dim2=-1).mean().item()
    assert alike["normal"] < 1.2 / 50 < 5 / 50 < alike["mimetic"]


def test_mimetic_mlp_and_embedding() -> None:
    net = create_model()
    for block in blocks(net):
        for linear in (block.mlp.fc1, block.mlp.fc2):
            bound = math.sqrt(6 / sum(linear.weight.shape))  # Glorot's, a uniform
            largest = linear.weight.abs().max().item()
            assert 0.98 * bound < largest <= bound
        assert not any(p.any() for name, p in block.named_parameters() if name.endswith("bias"))
    assert net.patch_embed.proj.weight.std().item() == pytest.approx(48**-0.5, rel=0.05)
    table = net.patch_embed.pos_embed
    assert table is not None
    assert not table[0, 0].any()  # the class token lies nowhere
    assert torch.equal(table[0, 1:], sincos_positions((7, 7), 96))
    assert all(p.requires_grad for p in net.parameters())


def test_normal_init_std() -> None:
    net = create_model(init="normal")
    for name, weight in net.named_parameters():
        if weight.dim() > 1 and weight.numel() > 1000:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name


def test_init_depends_on_the_seed_alone() -> None:
    first, second, other = (
        create_model().state_dict(),
        create_model().state_dict(),
        create_model(seed=1).state_dict(),
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["blocks.0.attn.q.weight"], other["blocks.0.attn.q.weight"])


def test_sincos_positions_known_values() -> None:
    actual = sincos_positions((2, 3), 18)  # two columns beyond 16
    row, column = 1, 2
    turns = [10_000 ** -(n / 3) for n in range(4)]
    expected = [f(position * turn) for position in (column, row) for f in (math.sin, math.cos)
                for turn in turns]  # fmt: skip
    assert actual[row * 3 + column].tolist() == pytest.approx([*expected, 0, 0], abs=1e-6)
    assert len(actual.unique(dim=0)) == 6
    assert sincos_positions((2, 2), 3).tolist() == [[0.0] * 3] * 4  # no quarter to fill


@pytest.mark.parametrize("size", ["5x1x1/7", "4x1x2/14", "Ti/28"])
def test_odd_sizes_compute_finite_logits(size: str) -> None:
    net = create_model(size)
    assert net(torch.zeros(1, 3, 28, 28)).isfinite().all()


def test_init_setting() -> None:
    assert TrainConfig().tune.init == "mimetic"
    assert TrainConfig.from_dict({"init": "normal"}).tune.init == "normal"
