"""Workers of photos.py and batch.py: classifiers of JPEG files, each in its own process (turns.py).

A task has the keys kind ("vitlib", "batch", "pipeline" or "processor"), folder, files, batch_size,
precision and threads. Each timed method processes all files once and returns the seconds.
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

from prepare import skip_torchvision_ops
from turns import serve

NUM_TUNING_FILES = 64  # files that select the pipeline's settings


def measure_seconds(call: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Vitlib:
    """A Predictor: the complete path, the model alone, decoding alone."""

    def __init__(self, task: dict[str, Any]) -> None:
        # Import vitlib from this checkout.
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        import torch

        import vitlib

        torch.set_num_threads(task["threads"])
        self.torch, self.files, self.batch_size = torch, task["files"], task["batch_size"]
        photos = task["files"][:32] if task["precision"] == "int8" else None
        self.predictor = vitlib.Predictor.load(
            task["folder"], precision=task["precision"], calibrate=photos
        )
        self.images = load_uint8_images(torch, self.files)
        self.threads = min(8, task["threads"])  # Predictor's own number on this many cores

    def labels(self) -> list[int]:
        """Return the index of the best class of each file."""
        predictions = self.predictor.classify(self.files, batch_size=self.batch_size, top_k=1)
        return [top[0].index for top in predictions]

    def time_all(self) -> float:
        """Time Predictor from files to labels."""
        return measure_seconds(
            lambda: self.predictor.classify(self.files, batch_size=self.batch_size)
        )

    def time_model(self) -> float:
        """Time the optimized model on decoded uint8 images.

        The result is the faster of two: all cores compute one batch, or each core computes its own.
        """
        model = self.predictor.fast().forward_uint8
        use_one_thread = partial(self.torch.set_num_threads, 1)
        together = measure_seconds(
            lambda: [model(batch) for batch in self.images.split(self.batch_size)]
        )
        with ThreadPoolExecutor(self.threads, initializer=use_one_thread) as pool:
            batches = self.images.split(8)
            apart = measure_seconds(lambda: [None for _ in pool.map(model, batches)])
        self.torch.set_num_threads(self.threads)
        return min(together, apart)

    def time_decoding(self) -> float:
        """Time decoding and preprocessing with Predictor's number of threads."""
        processor = self.predictor.image_processor
        preprocess = processor.to_uint8_or_float
        with ThreadPoolExecutor(self.threads) as pool:
            return measure_seconds(lambda: [None for _ in pool.map(preprocess, self.files)])


class Batch(Vitlib):
    """A Predictor, and vitlib.batch with the same files."""

    def time_batch(self) -> float:
        """Time vitlib.batch from files to JSON Lines."""
        import vitlib.batch

        with tempfile.TemporaryDirectory() as out:
            run = partial(vitlib.batch.run, self.files, model=self.predictor, out=out)
            return measure_seconds(run)


class Pipeline:
    """The pipeline of transformers with its fastest batch size and image processor."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(task["threads"])
        skip_torchvision_ops()
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
                continue  # only the Pillow processor works without torchvision
            pipeline = transformers.pipeline(
                "image-classification",
                model=task["folder"],
                image_processor=processor,
                device="cpu",
            )
            pipeline(self.files[:2])
            for batch_size in task["batch_sizes"]:
                seconds = measure_seconds(
                    partial(pipeline, self.files[:NUM_TUNING_FILES], batch_size=batch_size)
                )
                if best is None or seconds < best[0]:
                    best = seconds, pipeline, batch_size, backend
        assert best is not None
        _, self.pipeline, self.batch_size, self.backend = best

    def settings(self) -> str:
        """Describe the selected settings."""
        return f"batch_size={self.batch_size}, backend={self.backend}"

    def labels(self) -> list[int]:
        """Return the index of the best class of each file."""
        label2id = self.pipeline.model.config.label2id
        predictions = self.pipeline(self.files, batch_size=self.batch_size, top_k=1)
        return [label2id[top[0]["label"]] for top in predictions]

    def time_all(self) -> float:
        """Time the pipeline from files to labels."""
        return measure_seconds(lambda: self.pipeline(self.files, batch_size=self.batch_size))


class Processor:
    """An image processor: JPEG files to normalised pixels, an image a call.

    The key `precision` of the task names it: "vitlib", or "torchvision" or "pil" of transformers.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(task["threads"])
        self.files = task["files"]
        name, folder = task["precision"], task["folder"]
        if name == "vitlib":
            sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
            from vitlib import ImageProcessor

            self.read: Callable[[str], Any] = ImageProcessor.load(folder).to_float
            return
        skip_torchvision_ops()
        import transformers
        from PIL import Image

        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend=name)
        self.read = lambda file: processor(Image.open(file).convert("RGB"), return_tensors="pt")

    def time_all(self, threads: int = 1) -> list[float]:
        """Return the wall and processor seconds of reading all files.

        Args:
            threads: Threads that read.
        """
        cpu = time.process_time()
        if threads == 1:
            wall = measure_seconds(lambda: [self.read(file) for file in self.files])
        else:
            with ThreadPoolExecutor(threads) as pool:
                wall = measure_seconds(lambda: [None for _ in pool.map(self.read, self.files)])
        return [wall, time.process_time() - cpu]


def load_uint8_images(torch: Any, files: list[str]) -> Any:
    """Read files as (B, 3, 224, 224) uint8.

    The resizing differs from the model's preprocessing; no timing depends on the pixels.
    """
    import numpy as np
    from PIL import Image

    images = [np.asarray(Image.open(file).convert("RGB").resize((224, 224))) for file in files]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


SIDES: dict[str, type] = {
    "vitlib": Vitlib,
    "batch": Batch,
    "pipeline": Pipeline,
    "processor": Processor,
}

if __name__ == "__main__":
    serve(lambda task: SIDES[task["kind"]](task))
