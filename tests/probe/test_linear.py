"""Heads trained by SGD at many rates at once, against torch's own optimizer one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fixtures.clusters import clusters
from vitlib.errors import ConfigError
from vitlib.probe import linear
from vitlib.probe.linear import train_heads

RATES = (1e-4, 3e-3, 0.05)


def train_alone(x: np.ndarray, y: np.ndarray, rate: float, seed: int) -> torch.nn.Linear:
    """Train one head by torch.optim.SGD and a cosine, on the batches of the same seed."""
    count, steps = (y.shape[1] if y.ndim == 2 else int(y.max()) + 1), linear.MIN_STEPS
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(x.shape[1], count)
    with torch.no_grad():
        head.weight.copy_(torch.randn(count, x.shape[1], generator=generator) * 0.01)
        head.bias.zero_()
    batch = min(256, len(x))
    optimizer = torch.optim.SGD(head.parameters(), rate * batch / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for rows in linear._batches(len(x), batch, steps, generator):
        logits, truth = head(torch.from_numpy(x)[rows]), torch.from_numpy(y)[rows]
        if y.ndim == 1:
            loss = F.cross_entropy(logits, truth)
        else:
            each = F.binary_cross_entropy_with_logits(logits, truth.nan_to_num(), reduction="none")
            loss = each[~truth.isnan()].sum() / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head


@pytest.mark.parametrize("several", [False, True])
def test_train_heads_equals_sgd_one_by_one(several: bool) -> None:
    x, y = clusters(300, 1, 3, width=8)
    x /= 10
    if several:
        y = np.eye(3, dtype=np.float32)[y]
        y[::4, 1] = np.nan
    heads = train_heads(x, y, 3, RATES, seed=5)
    for rate, head in zip(RATES, heads, strict=True):
        peer = train_alone(x, y, rate, seed=5)
        gap = np.abs(head.weight - peer.weight.detach().numpy()).max()
        assert gap < 1e-4 * np.abs(head.weight).max()
        np.testing.assert_allclose(head.bias, peer.bias.detach().numpy(), atol=1e-4)
        assert head.multi_label == several
        assert math.isnan(head.c)
    assert np.abs(heads[0].weight - heads[2].weight).max() > 0.1


def test_train_heads_learns() -> None:
    (x, y), (queries, truth) = clusters(300, 2), clusters(300, 3)
    values = [(h.scores(queries).argmax(axis=1) == truth).mean() for h in train_heads(x, y, 5)]
    assert len(values) == 13
    assert max(values) > 0.8


def test_train_heads_refuses_rates_of_zero() -> None:
    x, y = clusters(10, 2)
    with pytest.raises(ConfigError, match="rates above 0"):
        train_heads(x, y, 5, [0.0])
