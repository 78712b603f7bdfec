"""Sizes, folders and device of a run, and the recording of results."""

from __future__ import annotations

import importlib.util
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitlib import ViTConfig


class Sizes(NamedTuple):
    """Sizes of models, batches and measurements.

    Attributes:
        config: Model that is measured.
        batches: Images in a batch, ascending.
        seconds: Duration of a measurement.
        calls: Least number of calls that are timed one by one.
        training_batch: Images in a training step.
        training_steps: Timed training steps.
        photos: JPEG files to read.
        photo_batch: Photos in a batch.
        rounds: Interleaved rounds.
    """

    config: ViTConfig
    batches: tuple[int, ...]
    seconds: float
    calls: int
    training_batch: int
    training_steps: int
    photos: int
    photo_batch: int
    rounds: int


FULL = Sizes(
    config=ViTConfig.named("B/16", num_classes=1000),
    batches=(1, 8, 64, 512),
    seconds=0.8,
    calls=8,
    training_batch=256,
    training_steps=20,
    photos=2048,
    photo_batch=256,
    rounds=9,
)
SMALL = Sizes(
    config=ViTConfig(
        image_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=10
    ),
    batches=(1, 2, 3, 4),
    seconds=0.001,
    calls=2,
    training_batch=2,
    training_steps=2,
    photos=8,
    photo_batch=4,
    rounds=2,
)


@dataclass(frozen=True)
class Experiment:
    """A run on this machine.

    Attributes:
        out: Folder of results.
        work: Folder of the run's checkpoints and photos.
        is_dry: The run is small and on the CPU, to test the benchmark itself.
    """

    out: Path
    work: Path
    is_dry: bool = False

    @property
    def sizes(self) -> Sizes:
        """Sizes of models, batches and measurements."""
        return SMALL if self.is_dry else FULL

    @property
    def device(self) -> torch.device:
        """The first GPU, or the CPU in a dry run."""
        return torch.device("cpu") if self.is_dry else torch.device("cuda", 0)

    @property
    def on_gpu(self) -> bool:
        """True if the run uses a GPU."""
        return not self.is_dry

    def record(self, kind: str, **values: Any) -> None:
        """Append a result to results.jsonl and to the log.

        Args:
            kind: Table of the summary.
            **values: Columns of the table; types of JSON.
        """
        line = json.dumps({"kind": kind, **values}, default=str)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(line + "\n")  # one write, because several processes append
        print(line, flush=True)

    @contextmanager
    def attempt(self, kind: str, **values: Any) -> Iterator[None]:
        """Record an error in the block as a result, so that the run continues.

        Args:
            kind: Table of the summary.
            **values: Columns that identify the attempt.
        """
        try:
            yield
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.record(
                kind, **values, error=message, line=f"{Path(frame.filename).name}:{frame.lineno}"
            )
            traceback.print_exc()
        finally:
            with suppress(RuntimeError):  # a GPU reports an error late: the same one again
                self.synchronize()

    def has(self, package: str, purpose: str) -> bool:
        """Return True if a package is installed; otherwise record what is left out.

        Args:
            package: Name of the package.
            purpose: Measurement that needs it.
        """
        if importlib.util.find_spec(package) is not None:
            return True
        self.record("left out", what=purpose, why=f"{package} is not installed")
        return False

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
