"""A training step beside transformers' Trainer: the loops of benchmarks/training.py, on a GPU."""

from __future__ import annotations

import statistics
import time
from contextlib import suppress
from typing import Any

import torch
import training
from prepare import spare_torchvision

import vitlib
from benchmarks.gpu.experiment import Experiment
from benchmarks.gpu.timing import peaks, reset_peaks

WARMUP = 4
BATCHES = 4  # of which each epoch is made


class Steps:
    """Times steps, and ends the loop after the last: what the loops take for orders."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.left = experiment, WARMUP + experiment.sizes.training_steps
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def begin(self) -> None:
        """Start the clock."""
        self.experiment.synchronize()
        self.start = time.perf_counter()

    def end(self, loss: Any) -> None:
        """Stop the clock. Raises StopIteration after the last step."""
        self.experiment.synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        self.losses.append(float(loss))
        self.left -= 1
        if not self.left:
            raise StopIteration


def measure_training(experiment: Experiment, side: str) -> None:
    """Measure steps of a side in bfloat16: forward, backward, clipping, AdamW.

    Pixels lie on the device already, and no step reads a photo: on both sides it is the step alone.

    Args:
        experiment: The run.
        side: "vitlib" or "Trainer".
    """
    needs = ("transformers", "accelerate") if side == "Trainer" else ()
    if not all(experiment.has(package, f"training by {side}") for package in needs):
        return
    sizes, device = experiment.sizes, experiment.device
    torch.manual_seed(7)
    count, shape = BATCHES * sizes.training_batch, sizes.config.image_size
    pixels = torch.randn(count, 3, *shape, device=device)
    labels = torch.arange(count, device=device) % training.CLASSES
    data = {"pixels": pixels, "labels": labels}
    task = {"batch": sizes.training_batch, "precision": "bf16", "use_cpu": experiment.is_dry}
    steps = Steps(experiment)
    reset_peaks(experiment)
    with suppress(StopIteration):
        if side == "vitlib":
            model: Any = vitlib.load(experiment.work / "hf", device=device)
            model.reset_classifier(training.CLASSES)
            training.train_vitlib(model.to(device), data, task, steps)
        else:
            spare_torchvision()
            import transformers

            load = transformers.ViTForImageClassification.from_pretrained
            model = load(
                experiment.work / "hf", num_labels=training.CLASSES, ignore_mismatched_sizes=True
            )
            training.train_peer(model, data, task, steps)
    steady = statistics.median(steps.seconds[WARMUP:])
    experiment.record(
        "training",
        side=side,
        batch=sizes.training_batch,
        step_ms=round(1e3 * steady, 2),
        img_s=round(sizes.training_batch / steady, 1),
        first_s=round(steps.seconds[0], 2),
        losses=[round(loss, 3) for loss in steps.losses[:3]],
        **peaks(experiment),
    )
