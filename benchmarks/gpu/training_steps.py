"""Training step of vitlib and of transformers' Trainer on a GPU, by the loops of training.py."""

from __future__ import annotations

import statistics
import time
from contextlib import suppress
from typing import Any

import torch
import training
from prepare import skip_torchvision_ops

import vitlib
from benchmarks.gpu.experiment import Experiment
from benchmarks.gpu.timing import peak_memory, reset_peaks

WARMUP = 4
NUM_BATCHES = 4  # batches of an epoch


class StepTimer:
    """Times the steps of a training loop, and ends the loop after the last one."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.remaining = experiment, WARMUP + experiment.sizes.training_steps
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def begin(self) -> None:
        """Start the clock."""
        self.experiment.synchronize()
        self.start_time = time.perf_counter()

    def end(self, loss: Any) -> None:
        """Stop the clock.

        Raises:
            StopIteration: The step was the last one.
        """
        self.experiment.synchronize()
        self.seconds.append(time.perf_counter() - self.start_time)
        self.losses.append(float(loss))
        self.remaining -= 1
        if not self.remaining:
            raise StopIteration


def measure_training(experiment: Experiment, side: str) -> None:
    """Measure a side's step in bfloat16: forward, backward, gradient clipping and AdamW.

    The pixels of both sides are on the device, so that no step reads a photo.

    Args:
        experiment: The run.
        side: "vitlib" or "Trainer".
    """
    packages = ("transformers", "accelerate") if side == "Trainer" else ()
    if not all(experiment.has(package, f"training by {side}") for package in packages):
        return
    sizes, device = experiment.sizes, experiment.device
    torch.manual_seed(7)
    num_images, shape = NUM_BATCHES * sizes.training_batch, sizes.config.image_size
    pixels = torch.randn(num_images, 3, *shape, device=device)
    labels = torch.arange(num_images, device=device) % training.NUM_CLASSES
    data = {"pixels": pixels, "labels": labels}
    task = {"batch": sizes.training_batch, "precision": "bf16", "use_cpu": experiment.is_dry}
    timer = StepTimer(experiment)
    reset_peaks(experiment)
    with suppress(StopIteration):
        if side == "vitlib":
            model: Any = vitlib.load(experiment.work / "hf", device=device)
            model.reset_classifier(training.NUM_CLASSES)
            training.train_vitlib(model.to(device), data, task, timer)
        else:
            skip_torchvision_ops()
            import transformers

            load = transformers.ViTForImageClassification.from_pretrained
            model = load(
                experiment.work / "hf",
                num_labels=training.NUM_CLASSES,
                ignore_mismatched_sizes=True,
            )
            training.train_peer(model, data, task, timer)
    step_seconds = statistics.median(timer.seconds[WARMUP:])
    experiment.record(
        "training",
        side=side,
        batch=sizes.training_batch,
        step_ms=round(1e3 * step_seconds, 2),
        img_s=round(sizes.training_batch / step_seconds, 1),
        first_s=round(timer.seconds[0], 2),
        losses=[round(loss, 3) for loss in timer.losses[:3]],
        **peak_memory(experiment),
    )
