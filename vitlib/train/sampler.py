"""Which photos make which step, a pure function of (seed, step): nothing to keep for going on.

How data flows: the epoch's order of all photos is cut into steps; a step's photos into passes, and
those into what each process reads. So two processes with half a batch each see, step by step, what
one with the whole would.
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
from vitlib.train.mix import draw

ORDER = 1  # beside the seed: so that no two things are drawn from the same numbers


@dataclass(frozen=True)
class BatchPlan:
    """What one process reads for one pass."""

    epoch: int
    step: int
    samples: tuple[int, ...]  # numbers of photos in the training set
    partners: tuple[int, ...] = ()  # of each, the photo mixed into it; empty: none is
    shares: tuple[float, ...] = ()  # of each, how much of itself is left, 0..1
    # CutMix: (top, left, bottom, right), in pixels, that the partner fills; None: MixUp.
    boxes: tuple[tuple[int, int, int, int] | None, ...] = ()

    def part(self, places: range) -> BatchPlan:
        """Of these places alone."""
        cut = slice(places.start, places.stop)
        return BatchPlan(
            self.epoch, self.step, self.samples[cut], self.partners[cut], self.shares[cut],
            self.boxes[cut],
        )  # fmt: skip


@lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """An epoch's order of all photos."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)


@dataclass(frozen=True)
class BatchSampler:
    """All steps of a run."""

    count: int  # photos
    batch: int  # photos of a process in a pass
    passes: int  # of a step
    processes: int
    seed: int
    epochs: int
    max_steps: int = -1
    size: tuple[int, int] = (0, 0)  # pixels, for CutMix
    augment: Augment = field(default_factory=Augment)

    @classmethod
    def of(
        cls, config: TrainConfig, count: int, processes: int, size: tuple[int, int]
    ) -> BatchSampler:
        """Of a run over `count` photos."""
        run = config.run
        return cls(
            count, run.per_device_train_batch_size, run.gradient_accumulation_steps, processes,
            run.seed, run.num_train_epochs, run.max_steps, size, config.augment,
        )  # fmt: skip

    @property
    def whole(self) -> int:
        """Photos of a step; the last of an epoch may have fewer."""
        return self.batch * self.passes * self.processes

    @property
    def steps_an_epoch(self) -> int:
        """No photo is left out of an epoch."""
        return math.ceil(self.count / self.whole)

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self.max_steps if self.max_steps > 0 else self.epochs * self.steps_an_epoch

    def step(self, step: int) -> BatchPlan:
        """All photos of a step, with what is mixed into each."""
        epoch, within = divmod(step, self.steps_an_epoch)
        order = shuffled(self.count, self.seed, epoch)
        samples = tuple(order[within * self.whole : (within + 1) * self.whole].tolist())
        if not self.augment.mixes or len(samples) < 2:
            return BatchPlan(epoch, step, samples)
        places, shares, boxes = draw(self.augment, self.seed, step, len(samples), self.size)
        partners = tuple(samples[place] for place in places)
        return BatchPlan(epoch, step, samples, partners, tuple(shares), tuple(boxes))

    def passes_of(self, plan: BatchPlan, process: int) -> list[BatchPlan]:
        """What a process reads of a step, pass by pass; the parts of the last may be empty."""
        found, together = [], self.batch * self.processes
        for start in range(0, len(plan.samples), together):
            some = range(start, min(start + together, len(plan.samples)))
            edges = [start + len(some) * p // self.processes for p in range(self.processes + 1)]
            found.append(plan.part(range(edges[process], edges[process + 1])))
        return found

    def from_step(self, first: int, process: int) -> Iterator[BatchPlan]:
        """Every pass of a process from a step on."""
        for step in range(first, self.total):
            yield from self.passes_of(self.step(step), process)
