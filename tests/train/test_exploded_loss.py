"""A run whose loss explodes is an error, and a run that learns nothing is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures.command_line import Run, make_workplace
from vitlib.train.losses import Criterion, constant_loss, to_soft_targets


def test_exploded_loss_ends_with_an_error(
    run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_workplace(tmp_path))
    command = ("finetune", "photos", "-m", "demo", "--epochs", 3, "--augment", "none")
    status, _, err = run_cli(*command, "--head-only", "--lr", 300, "-o", "bad")
    assert status == 1
    assert "the loss exploded: " in err
    assert "try a lower learning_rate than 300" in err
    assert not Path("bad/model.safetensors").exists()
    assert list(Path("bad/checkpoints").iterdir())
    # With a rate of almost nothing the model is no better than one answer for all photos.
    assert run_cli(*command, "--lr", 1e-9, "-o", "slow")[0] == 0


@pytest.mark.parametrize(
    ("task", "targets", "expected"),
    [
        ("single_label_classification", np.array([0, 0, 0, 1]), 0.5623),
        ("multi_label_classification", np.array([[1.0, 0], [0, np.nan]]), 0.4622),
        ("regression", np.array([[1.0], [3.0]]), 1.0),
    ],
)
def test_loss_of_one_answer(task: str, targets: np.ndarray, expected: float) -> None:
    soft = to_soft_targets(targets, 2)
    criterion = Criterion(task)  # type: ignore[arg-type]
    loss = constant_loss(criterion, soft)
    assert loss == pytest.approx(expected, abs=1e-3)
    # No other constant answer is better.
    for _ in range(20):
        logits = torch.randn(soft.shape[1]).expand_as(soft)
        assert criterion.sum(logits, soft).item() / criterion.weight(soft) >= loss - 1e-4
