"""The sides of photos.py, each in a process of its own that answers orders (turns.py).

A task says kind ("vitlib", "batch" or "pipeline"), folder, files, batch_size, precision, threads. A
turn is once over all files; its answer is seconds.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from prepare import spare_torchvision
from turns import serve

TRIED = 64  # files that the pipeline's settings are compared on


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Vitlib:
    """A Predictor: the whole path, its model alone, its decoding alone."""

    def __init__(self, task: dict[str, Any]) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's
        import torch

        import vitlib

        torch.set_num_threads(task["threads"])
        self.torch, self.files, self.batch_size = torch, task["files"], task["batch_size"]
        photos = task["files"][:32] if task["precision"] == "int8" else None
        self.predictor = vitlib.Predictor.load(
            task["folder"], precision=task["precision"], calibrate=photos
        )
        self.levels = ready_levels(torch, self.files)
        self.threads = min(8, task["threads"])  # as Predictor counts, where it has these cores

    def labels(self) -> list[int]:
        """The best class of each file."""
        found = self.predictor.classify(self.files, batch_size=self.batch_size, top_k=1)
        return [best[0].index for best in found]

    def whole(self) -> float:
        return timed(lambda: self.predictor.classify(self.files, batch_size=self.batch_size))

    def model(self) -> float:
        """The optimised model on levels that lie ready."""
        run = self.predictor.fast().forward_uint8
        return timed(lambda: [run(batch) for batch in self.levels.split(self.batch_size)])

    def decode(self) -> float:
        """The files to what the model takes, by as many threads as Predictor has; no model."""
        processor = self.predictor.image_processor
        read = processor.to_uint8_or_float
        with ThreadPoolExecutor(self.threads) as pool:
            return timed(lambda: [None for _ in pool.map(read, self.files)])


class Batch(Vitlib):
    """The same, and vitlib.batch over the same files."""

    def batch(self) -> float:
        """From the list of files to shards of JSONL."""
        import vitlib.batch

        with tempfile.TemporaryDirectory() as out:
            run = partial(vitlib.batch.run, self.files, model=self.predictor, out=out)
            return timed(run)

    def model(self) -> float:
        """Time the optimised model on decoded uint8 images.

        All cores compute one batch, or each core computes its own: the faster of the two counts.
        """
        run = self.predictor.fast().forward_uint8
        alone = partial(self.torch.set_num_threads, 1)
        with ThreadPoolExecutor(self.threads, initializer=alone) as pool:
            parts = self.levels.split(8)
            return min(super().model(), timed(lambda: [None for _ in pool.map(run, parts)]))


class Pipeline:
    """transformers' pipeline, with the best of its batch sizes and image processors."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(task["threads"])
        spare_torchvision()
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.torch, self.files = torch, task["files"]
        best = None
        for backend in ("torchvision", "pil"):
            try:
                load = transformers.AutoImageProcessor.from_pretrained
                processor = load(task["folder"], backend=backend)
            except (ImportError, ValueError):
                continue  # without torchvision there is the Pillow one only
            made = transformers.pipeline(
                "image-classification",
                model=task["folder"],
                image_processor=processor,
                device="cpu",
            )
            made(self.files[:2])
            for size in task["batch_sizes"]:
                seconds = timed(partial(made, self.files[:TRIED], batch_size=size))
                if best is None or seconds < best[0]:
                    best = seconds, made, size, backend
        assert best is not None
        _, self.pipeline, self.size, self.backend = best

    def chosen(self) -> str:
        return f"batch_size={self.size}, backend={self.backend}"

    def labels(self) -> list[int]:
        names = self.pipeline.model.config.label2id
        found = self.pipeline(self.files, batch_size=self.size, top_k=1)
        return [names[best[0]["label"]] for best in found]

    def whole(self) -> float:
        return timed(lambda: self.pipeline(self.files, batch_size=self.size))


def ready_levels(torch: Any, files: list[str]) -> Any:
    """(B, 3, 224, 224) uint8 of the files; which pixels they are matters to no timing."""
    import numpy as np
    from PIL import Image

    images = [np.asarray(Image.open(file).convert("RGB").resize((224, 224))) for file in files]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


KINDS: dict[str, type] = {"vitlib": Vitlib, "batch": Batch, "pipeline": Pipeline}

if __name__ == "__main__":
    serve(lambda task: KINDS[task["kind"]](task))
