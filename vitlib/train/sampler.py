"""Photos of each step, as a pure function of (seed, step): a checkpoint stores no sampler state.

How data flows: an epoch's permutation of all photos is cut into steps. A step is cut into
micro-batches, and each of those into the parts of the processes. So two processes with half a batch
each see, step by step, the photos that one process sees with the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from vitlib.train.augment import Augment
from vitlib.train.config import TrainConfig
from vitlib.train.mix import draw_pairs

_STREAM = 1  # stands beside the seed, so that no other draw of a run uses the same numbers


@dataclass(frozen=True)
class BatchPlan:
    """Photos of one micro-batch, and the photos that are mixed into them.

    Attributes:
        epoch: Epoch, from 0.
        step: Step, from 0.
        samples: Indices of photos in the training set, B of them.
        partners: Index of the photo mixed into each; empty if nothing is mixed.
        weights: Weight of each photo in its mixture, 0 to 1.
        boxes: Pixels (top, left, bottom, right) that CutMix takes from the partner; None for MixUp.
    """

    epoch: int
    step: int
    samples: tuple[int, ...]
    partners: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    boxes: tuple[tuple[int, int, int, int] | None, ...] = ()

    def select(self, positions: range) -> BatchPlan:
        """Return the plan of a part of the batch.

        Args:
            positions: Consecutive positions in the batch.

        Returns:
            The plan of these photos.
        """
        part = slice(positions.start, positions.stop)
        return BatchPlan(
            self.epoch, self.step, self.samples[part], self.partners[part], self.weights[part],
            self.boxes[part],
        )  # fmt: skip


@lru_cache(maxsize=2)
def epoch_permutation(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order of all photos in an epoch.

    Args:
        count: Photos of the training set.
        seed: Seed of the run.
        epoch: Epoch, from 0.

    Returns:
        A permutation of range(count), shared by all callers.
    """
    return np.random.default_rng([seed, _STREAM, epoch]).permutation(count)


@dataclass(frozen=True)
class BatchSampler:
    """The batches of all steps of a run.

    Attributes:
        count: Photos of the training set.
        batch_size: Photos of a process in a micro-batch.
        accumulation_steps: Micro-batches of a step.
        world_size: Number of processes.
        seed: Seed of the run.
        epochs: Epochs of the run.
        max_steps: Steps of the run, instead of epochs; -1 for epochs.
        size: (height, width) of the pixels, for CutMix.
        augment: Settings of MixUp and CutMix.
    """

    count: int
    batch_size: int
    accumulation_steps: int
    world_size: int
    seed: int
    epochs: int
    max_steps: int = -1
    size: tuple[int, int] = (0, 0)
    augment: Augment = field(default_factory=Augment)

    @classmethod
    def from_config(
        cls, config: TrainConfig, count: int, world_size: int, size: tuple[int, int]
    ) -> BatchSampler:
        """Create the sampler of a run.

        Args:
            config: Settings of the run.
            count: Photos of the training set.
            world_size: Number of processes.
            size: (height, width) of the pixels.

        Returns:
            The sampler.
        """
        run = config.run
        return cls(
            count, run.per_device_train_batch_size, run.gradient_accumulation_steps, world_size,
            run.seed, run.num_train_epochs, run.max_steps, size, config.augment,
        )  # fmt: skip

    @property
    def step_size(self) -> int:
        """Photos of a step over all processes; the last step of an epoch may have fewer."""
        return self.batch_size * self.accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, which leave no photo out."""
        return math.ceil(self.count / self.step_size)

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        return self.max_steps if self.max_steps > 0 else self.epochs * self.steps_per_epoch

    def plan_step(self, step: int) -> BatchPlan:
        """Return the photos of a step over all processes, with their partners.

        Args:
            step: Step, from 0.

        Returns:
            The plan of the whole step.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        order = epoch_permutation(self.count, self.seed, epoch)
        samples = tuple(order[index * self.step_size : (index + 1) * self.step_size].tolist())
        if not self.augment.mixes or len(samples) < 2:
            return BatchPlan(epoch, step, samples)
        pairs = draw_pairs(self.augment, self.seed, step, len(samples), self.size)
        partners = tuple(samples[position] for position in pairs.partners)
        return BatchPlan(epoch, step, samples, partners, pairs.weights, pairs.boxes)

    def split_step(self, plan: BatchPlan, rank: int) -> list[BatchPlan]:
        """Split a step into the micro-batches of a process.

        Args:
            plan: The plan of the whole step.
            rank: The process.

        Returns:
            One plan a micro-batch, as many in every process; the last may be empty.
        """
        parts, group_size = [], self.batch_size * self.world_size
        for start in range(0, len(plan.samples), group_size):
            count = min(group_size, len(plan.samples) - start)
            first, last = (start + count * r // self.world_size for r in (rank, rank + 1))
            parts.append(plan.select(range(first, last)))
        return parts

    def iter_micro_batches(self, first_step: int, rank: int) -> Iterator[BatchPlan]:
        """Yield every micro-batch of a process from a step on.

        Args:
            first_step: Step to start from.
            rank: The process.

        Yields:
            Plans in the order of training.
        """
        for step in range(first_step, self.total_steps):
            yield from self.split_step(self.plan_step(step), rank)
