"""Runs that resume: the same bits, and refused checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vitlib
from vitlib.errors import TrainError
from vitlib.train import finetune
from vitlib.train.config import TrainConfig
from vitlib.train.log import read_events

QUICK = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-3}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(vitlib.load(folder).state_dict())


@pytest.mark.parametrize("extra", [{}, {"ema_decay": 0.9}, {"optim": "sgd"}, {"lora_r": 2}])
def test_resume_gives_the_same_bits(
    extra: dict[str, Any], photos: Path, source: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    drops = {"drop_path": 0.3, "dropout": 0.1, "mixup_alpha": 0.4, "save_steps": 2}
    config = TrainConfig.from_dict({**QUICK, **drops, **extra})
    finetune(photos, source, tmp_path / "whole", config=config)

    from vitlib.train import loop

    steps, train_step = 0, loop.Trainer._train_step

    def interrupt(self: loop.Trainer, *arguments: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        train_step(self, *arguments)

    monkeypatch.setattr(loop.Trainer, "_train_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetune(photos, source, tmp_path / "parts", config=config)
    monkeypatch.setattr(loop.Trainer, "_train_step", train_step)
    finetune(photos, source, tmp_path / "parts", config=config, resume=True)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    events = read_events(tmp_path / "parts" / "metrics.jsonl")
    assert [e["step"] for e in events if e["event"] == "train"] == list(range(1, 10))
    other = config.with_changes({"learning_rate": 1e-4})
    with pytest.raises(TrainError, match=r"another config, learning_rate"):
        finetune(photos, source, tmp_path / "parts", config=other, resume=True)


def test_resume_refuses_checkpoint_of_another_format_version(
    photos: Path, source: Path, tmp_path: Path
) -> None:
    """Version 1 had no number in its file."""
    config = TrainConfig.from_dict({**QUICK, "max_steps": 2})
    finetune(photos, source, tmp_path / "out", config=config)
    [folder] = (tmp_path / "out" / "checkpoints").iterdir()
    state = json.loads((folder / "state.json").read_text())
    assert state.pop("format_version") == 2
    for other in ({}, {"format_version": 3}, {"format_version": ["x" * 999]}):
        (folder / "state.json").write_text(json.dumps({**state, **other}))
        with pytest.raises(TrainError, match=r"format version .*: expected 2: finish") as raised:
            finetune(photos, source, tmp_path / "out", config=config, resume=True)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 400
