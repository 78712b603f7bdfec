"""A run's sizes, folders and device, and how its parts record what they measure."""

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
    """How large everything is."""

    config: ViTConfig
    batches: tuple[int, ...]  # images, ascending
    seconds: float  # of a measurement
    calls: int  # that are timed one by one, at least
    training_batch: int
    training_steps: int  # that are timed
    photos: int  # JPEGs read from disk
    reading_batch: int  # photos computed together
    rounds: int  # in which sides take turns


FULL = Sizes(
    config=ViTConfig.named("B/16", num_classes=1000),
    batches=(1, 8, 64, 512),
    seconds=0.8,
    calls=8,
    training_batch=256,
    training_steps=20,
    photos=2048,
    reading_batch=256,
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
    reading_batch=4,
    rounds=2,
)


@dataclass(frozen=True)
class Experiment:
    """A run on this machine.

    Attributes:
        out: Where results go.
        work: Where checkpoints and photos for the run lie.
        is_dry: Whether everything is small and on the CPU, to test the run itself.
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
        """What computes: the first GPU, or the CPU of a dry run."""
        return torch.device("cpu") if self.is_dry else torch.device("cuda", 0)

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes."""
        return not self.is_dry

    def record(self, kind: str, **values: Any) -> None:
        """Append a result to results.jsonl and to the log.

        Args:
            kind: The table of the summary that it belongs to.
            **values: Its columns, as JSON takes them.
        """
        line = json.dumps({"kind": kind, **values}, default=str)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(line + "\n")  # one write: several processes append
        print(line, flush=True)

    @contextmanager
    def attempt(self, kind: str, **values: Any) -> Iterator[None]:
        """Record an error in the block as a result, so that the next measurement follows.

        Args:
            kind: As in record().
            **values: What was attempted.
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
            with suppress(RuntimeError):  # of the error above: a GPU reports late
                self.synchronize()

    def has(self, package: str, purpose: str) -> bool:
        """Return whether a package is installed; record what is left out where it is not.

        Args:
            package: Its name.
            purpose: What it is needed for.
        """
        if importlib.util.find_spec(package) is not None:
            return True
        self.record("left out", what=purpose, why=f"{package} is not installed")
        return False

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
