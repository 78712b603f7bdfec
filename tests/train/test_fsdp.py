"""FSDP over two processes: losses, files and predictions of a single process."""

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
from torch import distributed

import vitlib
from vitlib import ImageProcessor, ViT, ViTConfig
from vitlib.errors import ConfigError
from vitlib.train import finetune, resume
from vitlib.train.config import TrainConfig
from vitlib.train.log import read_events

RULE = ImageProcessor(size=(16, 16), image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
BATCH = 6  # photos a step, of one process or both
# 15 photos to train on. Of the 5 others one process has 3, two passes, and one 2, which are one.
QUICK = {
    "num_train_epochs": 3, "learning_rate": 1e-3, "validation_split": 0.25,
    "per_device_eval_batch_size": 2, "save_total_limit": 10,
}  # fmt: skip
DROPS = {"drop_path": 0.3, "dropout": 0.1, "mixup_alpha": 0.5, "cutmix_alpha": 1.0}
CASES: dict[str, dict[str, Any]] = {
    "plain": {**DROPS, "ema_decay": 0.9, "save_steps": 2},
    "short": {"max_grad_norm": 0.01, "optim": "sgd"},
    "long": {"max_grad_norm": 0, **DROPS},
    "passes": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
    "lora": {"lora_r": 3, "lora_targets": ["q", "v", "fc1"], **DROPS},
    "frozen": {"layers_to_freeze": 2},
    "head": {"head_only": True},
    "head, augmented": {"head_only": True, "mixup_alpha": 0.5, "random_erasing": 0.5},
}
# All runs share one pair of processes, because it takes long to start.
SCRIPT = """
import gc, json, sys
from torch import distributed
from vitlib.train import finetune, loop, resume
from vitlib.train.config import TrainConfig

photos, source, out, settings = sys.argv[1:]
train_step, save = loop.Trainer._train_step, loop.Trainer.save

def interrupt(self, *arguments):
    if self.state.step == 5:
        raise KeyboardInterrupt
    train_step(self, *arguments)

def count_and_save(self):
    # Numbers of weights, averages and optimizer state in this process, and in all.
    parts = resume.collect_tensors(self.model, self.ema.averages, self.optimizer)
    local = sum(t.to_local().numel() for t in parts.values() if hasattr(t, "to_local"))
    with open(f"{out}/{self.out.name} {self.world.rank}.json", "w") as file:
        json.dump([local, sum(t.numel() for t in parts.values())], file)
    save(self)

loop.Trainer.save = count_and_save

def run(name, values, **more):
    finetune(photos, source, out + "/" + name, config=TrainConfig.from_dict(values),
             device="cpu", **more)

settings = json.loads(settings)
if len(settings) > 1:
    distributed.init_process_group("gloo")
for name, values in settings.items():
    run(name, values)
if len(settings) > 1:
    values = settings["plain"]
    loop.Trainer._train_step = interrupt
    try:
        run("killed", values)
        raise SystemExit("was not interrupted")
    except KeyboardInterrupt:
        pass
    loop.Trainer._train_step = train_step
    run("killed", values, resume=True)
    gc.collect()  # as join_processes() ends: what holds the group goes before it
    distributed.barrier()
    distributed.destroy_process_group()
"""


def settings(case: str, processes: int) -> dict[str, Any]:
    """Return the settings of a case for a number of processes."""
    values = {"per_device_train_batch_size": BATCH, **QUICK, **CASES[case]}
    if "gradient_accumulation_steps" in values:
        values["per_device_train_batch_size"] *= 2
    values["per_device_train_batch_size"] //= processes
    if processes > 1 and case == "long":  # blocks that are computed again are gathered again
        values["gradient_checkpointing"] = True
    return {**values, "fsdp": processes > 1}


def run_processes(
    folder: Path, cases: dict[str, Any], processes: int = 2
) -> subprocess.CompletedProcess[str]:
    """Run the script in processes that torchrun starts."""
    (folder / "script.py").write_text(SCRIPT)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(processes), folder / "script.py", folder / "photos",
        folder / "source", folder / "two", json.dumps(cases),
    ]  # fmt: skip
    return subprocess.run(
        command, capture_output=True, text=True, timeout=500, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of two classes, and a model whose sizes are odd for two processes."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo, by which processes on CPUs talk")
    folder, random = tmp_path_factory.mktemp("fsdp"), np.random.default_rng(0)
    for label, level, count in (("dark", 60, 12), ("light", 190, 8)):
        (folder / "photos" / label).mkdir(parents=True)
        for index in range(count):
            levels = random.integers(level - 50, level + 50, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(levels).save(folder / "photos" / label / f"{index:02}.png")
    torch.manual_seed(0)
    cfg = ViTConfig(
        image_size=(16, 16), patch_size=(8, 8), embed_dim=30, mlp_dim=65, depth=2, num_heads=2,
        num_classes=3,
    )  # fmt: skip
    vitlib.save(ViT(cfg), folder / "source", image_processor=RULE)
    return folder


@pytest.fixture(scope="module")
def runs(inputs: Path) -> Path:
    """Run every case by two processes, and one case with an interruption."""
    ran = run_processes(inputs, {case: settings(case, 2) for case in CASES})
    assert ran.returncode == 0, ran.stderr
    return inputs


def losses(folder: Path) -> Any:
    return np.array([e["loss"] for e in read_events(folder / "metrics.jsonl")])


@pytest.mark.processes
@pytest.mark.parametrize("case", CASES)
def test_losses_and_files_match_a_single_process(case: str, runs: Path, tmp_path: Path) -> None:
    values = TrainConfig.from_dict(settings(case, 1))
    single = finetune(
        runs / "photos", runs / "source", tmp_path / "single", config=values, device="cpu"
    )
    expected, actual = losses(single.out), losses(runs / "two" / case)
    assert len(expected) == len(actual) == single.steps + 3
    print(case, "largest difference of a loss", np.abs(expected - actual).max())
    assert np.abs(expected - actual).max() <= 1e-5
    assert np.ptp(expected) > 1e-2  # the loss falls
    norms = [
        np.array(
            [e["grad_norm"] for e in read_events(out / "metrics.jsonl") if e["event"] == "train"]
        )
        for out in (single.out, runs / "two" / case)
    ]
    assert np.abs(norms[0] / norms[1] - 1).max() <= 1e-4

    steps = [resume.list_checkpoints(out) for out in (single.out, runs / "two" / case)]
    assert list(steps[0]) == list(steps[1])
    (tensors, _), (sharded, _) = (resume.load_checkpoint(run[single.steps]) for run in steps)
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {
        n: (t.shape, t.dtype) for n, t in sharded.items()
    }
    for name, tensor in tensors.items():
        if not name.startswith("optimizer/"):  # Adam turns rounding into whole steps
            assert (tensor - sharded[name]).abs().max() <= 2e-3, name
    files = [sorted(p.name for p in out.iterdir()) for out in (single.out, runs / "two" / case)]
    assert files[0] == files[1]
    first, second = (vitlib.Predictor.load(out) for out in (single.out, runs / "two" / case))
    photo = runs / "photos" / "dark" / "00.png"
    [first_scores], [second_scores] = first.classify(photo), second.classify(photo)
    assert first_scores[0].label == second_scores[0].label
    assert first_scores[0].score == pytest.approx(second_scores[0].score, abs=1e-3)


@pytest.mark.processes
@pytest.mark.parametrize("case", ["plain", "lora", "head"])
def test_each_process_holds_its_shard(case: str, runs: Path) -> None:
    texts = [(runs / "two" / f"{case} {rank}.json").read_text() for rank in (0, 1)]
    (first, whole), (second, _) = map(json.loads, texts)
    tensors, _ = resume.load_checkpoint(max(resume.list_checkpoints(runs / "two" / case).values()))
    print(case, "held of", whole, "numbers:", first, second)
    counts = len(tensors)  # AdamW counts its steps in each process
    assert whole - counts <= first + second <= whole
    assert max(first, second) < 0.6 * whole


@pytest.mark.processes
def test_resume_gives_the_same_bits_with_fsdp(runs: Path) -> None:
    whole, killed = runs / "two" / "plain", runs / "two" / "killed"
    assert np.array_equal(losses(whole), losses(killed))
    expected, actual = (vitlib.load(out).state_dict() for out in (whole, killed))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    last = max(resume.list_checkpoints(whole))
    (expected, _), (actual, _) = (
        resume.load_checkpoint(resume.list_checkpoints(out)[last]) for out in (whole, killed)
    )
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.processes
@pytest.mark.parametrize("processes", [1, 2])
def test_fsdp_creates_the_process_group(processes: int, inputs: Path) -> None:
    """Without a group of the caller; a single process works too."""
    name = f"bare {processes}"
    ran = run_processes(inputs, {name: {**settings("plain", 2), "max_steps": 3}}, processes)
    assert ran.returncode == 0, ran.stderr
    assert vitlib.load(inputs / "two" / name).config.labels == ("dark", "light")


def test_fsdp_without_torchrun_is_refused(inputs: Path, tmp_path: Path) -> None:
    model = vitlib.load(inputs / "source")
    with pytest.raises(ConfigError, match="start with torchrun"):
        finetune(
            inputs / "photos", model, tmp_path / "out", config=TrainConfig.from_dict({"fsdp": True})
        )
    assert not (tmp_path / "out").exists()
    assert not any(p.is_meta for p in model.parameters())
