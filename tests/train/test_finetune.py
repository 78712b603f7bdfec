"""Runs of finetune: the checkpoint, processes, and errors before the first step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitlib
from vitlib import ImageProcessor, ViT, ViTConfig, dropout
from vitlib.errors import ConfigError, DataError, TrainError, VitlibError
from vitlib.train import finetune, lora
from vitlib.train.config import TrainConfig
from vitlib.train.log import read_events
from vitlib.train.loop import Trainer
from vitlib.train.sampler import BatchPlan, BatchSampler
from vitlib.train.settings import Tuning

RULE = ImageProcessor(size=(16, 16), image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
QUICK = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-3}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(vitlib.load(folder).state_dict())


def test_finetune_writes_a_checkpoint(photos: Path, source: Path, tmp_path: Path) -> None:
    config = TrainConfig.from_dict({**QUICK, "num_train_epochs": 8})
    done = finetune(photos, source, tmp_path / "out", config=config)
    assert done.labels == ("dark", "light")
    assert done.metrics["accuracy"] == 1
    assert done.steps == 8 * 3
    vit = vitlib.Predictor.load(done.out)
    [best] = vit.classify(photos / "dark" / "00.png")
    assert best[0].label == "dark"
    assert vit.image_processor == RULE
    events = read_events(done.out / "metrics.jsonl")
    losses = [e["loss"] for e in events if e["event"] == "train"]
    assert len(losses) == 24
    assert losses[-1] < losses[0]
    assert (done.out / "metrics.csv").read_text().count("\n") == 24 + 8 + 1
    assert "| dark | " in (done.out / "README.md").read_text()
    assert TrainConfig.from_dict(config.to_dict()) == config
    with pytest.raises(TrainError, match="holds a run already"):
        finetune(photos, source, done.out, config=config)


@pytest.mark.processes
@pytest.mark.parametrize("drops", [False, True])
def test_two_processes_have_the_losses_of_a_single_process(
    drops: bool, photos: Path, source: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**QUICK, "validation_split": 0.25, "per_device_train_batch_size": 6}
    if drops:
        settings |= {"drop_path": 0.3, "dropout": 0.2, "attention_dropout": 0.1, "mixup_alpha": 0.5}
        settings |= {"cutmix_alpha": 1.0, "random_erasing": 0.5, "weighted_loss": 2}
    done = finetune(
        photos, source, tmp_path / "single", config=TrainConfig.from_dict(settings), device="cpu"
    )
    half = TrainConfig.from_dict({**settings, "per_device_train_batch_size": 3})
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "from vitlib.train.config import TrainConfig\n"
        "from vitlib.train import finetune\n"
        "config = TrainConfig.from_dict(json.loads(sys.argv[4]))\n"
        "finetune(*sys.argv[1:4], config=config, device='cpu')\n"
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        script, photos, source, tmp_path / "double", json.dumps(half.to_dict()),
    ]  # fmt: skip
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    single, double = (
        np.array([e["loss"] for e in read_events(tmp_path / name / "metrics.jsonl")])
        for name in ("single", "double")
    )
    assert len(single) == len(double) > done.steps
    assert np.abs(single - double).max() <= 1e-5


def test_empty_micro_batch_changes_nothing(
    photos: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last micro-batch of an epoch may be empty in some process."""
    settings = {**QUICK, "drop_path": 0.3, "dropout": 0.2, "attention_dropout": 0.1}
    config = TrainConfig.from_dict(settings)
    finetune(photos, source, tmp_path / "single", config=config, device="cpu")
    split_step = BatchSampler.split_step

    def split_with_empty(self: BatchSampler, plan: BatchPlan, rank: int) -> list[BatchPlan]:
        return [*split_step(self, plan, rank), plan.select(range(0))]

    monkeypatch.setattr(BatchSampler, "split_step", split_with_empty)
    finetune(photos, source, tmp_path / "double", config=config, device="cpu")
    single, double = (
        read_events(tmp_path / name / "metrics.jsonl") for name in ("single", "double")
    )
    assert [e["loss"] for e in single] == [e["loss"] for e in double]
    expected, actual = (weights(tmp_path / name) for name in ("single", "double"))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_run_disables_tf32(
    photos: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 has ten bits of mantissa, and a caller may allow it for the process."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    precisions: list[set[str]] = []
    trainer_run = Trainer.run

    def run(self: Trainer) -> Any:
        precisions.append({backend.fp32_precision for backend in backends})
        return trainer_run(self)

    monkeypatch.setattr(Trainer, "run", run)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        finetune(photos, source, tmp_path / "out", config=TrainConfig.from_dict(QUICK))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert precisions
    assert not {"tf32", "bf16"} & precisions[0]


@pytest.mark.parametrize("changes", [{"rope": {"theta": 100.0}, "pos_embed": False}, {}])
def test_model_unknown_to_transformers_is_saved(
    changes: dict[str, Any], photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise such a run would train to its end, and then fail to write."""
    fields: dict[str, Any] = {"image_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2}
    model = ViT(ViTConfig(**fields, num_heads=2, num_classes=2, **changes))
    config = TrainConfig.from_dict({**QUICK, "num_train_epochs": 1})
    done = finetune(photos, model, tmp_path / "out", config=config, image_processor=RULE)
    assert ("the run writes vitlib's own layout" in caplog.text) == bool(changes)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(vitlib.load(done.out)(images), model.eval()(images))
    assert vitlib.Predictor.load(done.out).image_processor == RULE


def test_lora_merge_keeps_logits() -> None:
    torch.manual_seed(0)
    model = ViT(ViTConfig(embed_dim=32, depth=2, num_heads=2, image_size=16, patch_size=8,
                          num_classes=3)).eval()  # fmt: skip
    images, state = torch.randn(2, 3, 16, 16), dict(model.state_dict())
    before = model(images)
    lora.add_updates(model, Tuning(lora_r=4, lora_targets=("q", "k", "v", "out", "fc1", "fc2")), 0)
    # Updates start at 0. The logits differ by rounding: for frozen weights torch multiplies the
    # rows of a view by another kernel.
    assert (model(images) - before).abs().max() <= 1e-6
    for name, parameter in model.named_parameters():
        moves = name.endswith((".up", ".down")) or name.startswith("head.")
        assert parameter.requires_grad == moves
        if name.endswith(".up"):
            torch.nn.init.normal_(parameter, std=0.2)
    changed = model(images)
    assert (changed - before).abs().max() > 1e-2
    lora.merge_updates(model)
    assert model.state_dict().keys() == state.keys()
    assert (model(images) - changed).abs().max() <= 1e-5


def test_infinite_loss_stops_the_run(photos: Path, source: Path, tmp_path: Path) -> None:
    config = TrainConfig.from_dict(
        {**QUICK, "learning_rate": 1e30, "max_grad_norm": 0, "warmup_ratio": 0, "optim": "sgd",
         "momentum": 0, "save_steps": 1}
    )  # fmt: skip
    with pytest.raises(TrainError, match=r"the loss is .* at step \d of 9: the checkpoint of step"):
        finetune(photos, source, tmp_path / "out", config=config)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "checkpoints").is_dir()


def test_errors_come_before_the_first_step(photos: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "other" / "gray").mkdir(parents=True)
    (tmp_path / "other" / "dark").mkdir(parents=True)
    for label in ("gray", "dark"):
        Image.new("RGB", (20, 20)).save(tmp_path / "other" / label / "a.png")
    broken: list[tuple[dict[str, Any], type[VitlibError], str]] = [
        ({"out": tmp_path / "full"}, TrainError, "is not an empty folder"),
        ({"data": tmp_path / "nothing"}, VitlibError, "nothing"),
        ({"validation": tmp_path / "other"}, DataError, "gray"),
        ({"config": {"layers_to_freeze": 9}}, ConfigError, "layers_to_freeze=9"),
        ({"config": {"class_weights": [1, 2, 3]}}, ConfigError, "expected 2"),
        ({"config": {"precision": "fp16"}}, ConfigError, "CUDA"),
        ({"config": {"init": "normal"}}, ConfigError, "is of a new model"),
        ({"config": {"split": "fifth"}, "validation": photos}, ConfigError, "for photos held out"),
        ({"model": None}, ConfigError, "one of both"),
    ]
    for changes, kind, match in broken:
        arguments: dict[str, Any] = {"data": photos, "model": source, "out": tmp_path / "out"}
        arguments |= changes
        arguments["config"] = TrainConfig.from_dict({**QUICK, **arguments.get("config", {})})
        with pytest.raises(kind, match=match):
            finetune(**arguments)
        assert not (tmp_path / "out" / "metrics.jsonl").exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_dropout_depends_on_sample_not_batch() -> None:
    keys = dropout.sample_keys(42, 3, range(64))
    assert len(set(keys.tolist())) == 64
    assert not torch.equal(keys, dropout.sample_keys(42, 4, range(64)))
    device = torch.device("cpu")
    whole = dropout.uniform(dropout.SampleKeys(keys, 8), 1, (64, 5, 7), device)
    part = dropout.uniform(dropout.SampleKeys(keys[10:20], 8), 1, (10, 5, 7), device)
    assert torch.equal(whole[10:20], part)
    assert not torch.equal(
        whole, dropout.uniform(dropout.SampleKeys(keys, 8), 2, (64, 5, 7), device)
    )
    many = dropout.uniform(
        dropout.SampleKeys(dropout.sample_keys(0, 0, range(1000)), 0), 0, (1000, 100), device
    )
    assert 0 <= float(many.min()) < float(many.max()) < 1
    assert float(many.mean()) == pytest.approx(0.5, abs=0.005)
    assert float(many.std()) == pytest.approx(12**-0.5, abs=0.005)
