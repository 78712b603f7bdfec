"""Predictor: images in, labels and embeddings out; batches, decoding threads, progress.

How data flows: threads turn images into pixels, a bounded number of them ahead; the caller's thread
takes them in order, stacks those of one size into batches and runs the model.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby, islice
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vitlib.adapt import BandMap
from vitlib.errors import ConfigError, ImageError
from vitlib.images import ImageLike, is_one_image
from vitlib.preprocess import ImageProcessor
from vitlib.vit import ViT
from vitlib.weights import load
from vitlib.write import save

Images = ImageLike | Iterable[ImageLike]
OnError = Literal["raise", "none"] | Callable[[int, ImageError], object]


class Prediction(NamedTuple):
    """One label of one image."""

    label: str
    score: float  # 0..1
    index: int  # type: ignore[assignment]  # of the class; hides tuple.index, which none needs


class Predictor:
    """A model with its preprocessing, labels and task."""

    def __init__(self, model: ViT, image_processor: ImageProcessor) -> None:
        """Raises ConfigError where the two do not fit each other."""
        if image_processor.in_channels != model.config.in_channels:
            raise ConfigError(
                f"the preprocessing gives {image_processor.in_channels} channels, the model takes "
                f"{model.config.in_channels}: load both with in_channels="
            )
        self.model = model.eval()
        self.image_processor = image_processor

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        image_processor: ImageProcessor | None = None,
        layout: str | None = None,
        profile: str | None = None,
        num_heads: int | None = None,
        revision: str | None = None,
        num_classes: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        in_channels: int | None = None,
        band_map: BandMap | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Predictor:
        """A checkpoint with its preprocessing: the arguments and errors are those of vitlib.load.

        image_processor: instead of the checkpoint's. device: None takes CUDA where there is one.
        """
        where = {"revision": revision, "token": token, "cache_dir": cache_dir}
        model = load(
            source,
            layout=layout,
            profile=profile,
            num_heads=num_heads,
            num_classes=num_classes,
            image_size=image_size,
            in_channels=in_channels,
            band_map=band_map,
            dtype=dtype,
            device=device or ("cuda" if torch.cuda.is_available() else None),
            local_files_only=local_files_only,
            **where,  # type: ignore[arg-type]
        )
        processor = image_processor or model.image_processor
        if not isinstance(processor, ImageProcessor):  # then this says what is wrong with it
            processor = ImageProcessor.load(
                source,
                local_files_only=local_files_only,
                **where,  # type: ignore[arg-type]
            )
        return cls(model, processor)

    @property
    def labels(self) -> tuple[str, ...]:
        """One name a class; LABEL_0 and so on where the checkpoint has none."""
        cfg = self.model.config
        return cfg.labels or tuple(f"LABEL_{i}" for i in range(cfg.num_classes))

    @property
    def multi_label(self) -> bool:
        """Whether each class is scored by itself (sigmoid), rather than against the others."""
        cfg = self.model.config
        return cfg.problem_type == "multi_label_classification" or cfg.num_classes == 1

    def classify(
        self,
        images: Images,
        *,
        top_k: int = 5,
        threshold: float | None = None,
        batch_size: int = 16,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> list[list[Prediction] | None]:
        """The best `top_k` labels of each image, best first; of those, the ones at `threshold` or
        over.

        A single image gives a list of one. A bad image raises ImageError, which names it and its
        index; with on_error="none", or a function that is told (index, error), it leaves None in
        its place. Raises ConfigError where the model has no head.
        """
        if top_k < 1:
            raise ConfigError(f"top_k={top_k}: expected at least 1")
        labels = self.labels
        found: list[list[Prediction] | None] = []
        for scores in self._run(self._scores, images, batch_size, on_error, progress):
            if scores is None:
                found.append(None)
                continue
            best = torch.topk(scores, min(top_k, len(scores)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            found.append(
                [
                    Prediction(labels[index], score, index)
                    for index, score in pairs
                    if threshold is None or score >= threshold
                ]
            )
        return found

    def probabilities(
        self,
        images: Images,
        *,
        batch_size: int = 16,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> npt.NDArray[np.float32]:
        """The score of every class, (N, num_classes) float32 in 0..1: softmax, or sigmoid if
        multi_label.

        Errors as in classify; the row of a bad image that does not raise is NaN.
        """
        rows = self._run(self._scores, images, batch_size, on_error, progress)
        return _stack(rows, self.model.num_classes)

    def embed(
        self,
        images: Images,
        *,
        batch_size: int = 16,
        on_error: OnError = "raise",
        progress: bool = False,
    ) -> npt.NDArray[np.float32]:
        """The vector that the head reads, not normalised, (N, D) float32.

        D is model.num_features: 2D for cls+mean, the projection for CLIP.

        Errors as in classify; the row of a bad image that does not raise is NaN.
        """
        rows = self._run(self.model.embed, images, batch_size, on_error, progress)
        return _stack(rows, self.model.num_features)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write weights, labels, task and preprocessing: see vitlib.save."""
        save(self.model, folder, image_processor=self.image_processor)

    def _scores(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes) float32."""
        logits: Tensor = self.model(pixels).float()
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)

    def _run(
        self,
        forward: Callable[[Tensor], Tensor],
        images: Images,
        batch_size: int,
        on_error: OnError,
        progress: bool,
    ) -> Iterator[Tensor | None]:
        """What `forward` makes of each image, on the CPU, in order; None for one that is bad."""
        if forward == self._scores and not self.model.num_classes:
            raise ConfigError(
                "this model has no head to classify with: use embed(), or num_classes="
            )
        if on_error not in ("raise", "none") and not callable(on_error):
            raise ConfigError(f"on_error={on_error!r}: expected 'raise', 'none' or a function")
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1")
        several: Iterable[ImageLike] = [images] if is_one_image(images) else images  # type: ignore[list-item, assignment]
        pixels = self._decode(several, batch_size, on_error, single=is_one_image(images))
        total = len(several) if isinstance(several, Sized) else None
        device = self.model.norm.weight.device
        with _bar(total, progress) as advance:
            for batch in _batches(pixels, batch_size):
                for shape, group in groupby(batch, key=lambda p: None if p is None else p.shape):
                    members = list(group)
                    rows: Iterable[Tensor | None] = [None] * len(members)
                    if shape is not None:
                        stacked = torch.stack([p for p in members if p is not None])
                        with torch.inference_mode():
                            rows = forward(stacked.to(device)).float().cpu()
                    yield from rows
                advance(len(batch))

    def _decode(
        self, images: Iterable[ImageLike], batch_size: int, on_error: OnError, *, single: bool
    ) -> Iterator[Tensor | None]:
        """The pixels of each image in order, decoded by threads up to two batches ahead."""
        waiting: deque[tuple[int, Future[Tensor]]] = deque()

        def result(index: int, future: Future[Tensor]) -> Tensor | None:
            try:
                return future.result()
            except ImageError as error:
                if on_error == "raise":
                    raise error if single else ImageError(f"image {index}: {error}") from error
                if callable(on_error):
                    on_error(index, error)
                return None

        threads = min(8, os.cpu_count() or 1)
        with ThreadPoolExecutor(threads, thread_name_prefix="vitlib-decode") as pool:
            try:
                for index, image in enumerate(images):
                    waiting.append((index, pool.submit(self.image_processor.pixels, image)))
                    if len(waiting) >= 2 * batch_size:
                        yield result(*waiting.popleft())
                while waiting:
                    yield result(*waiting.popleft())
            finally:
                for _, future in waiting:
                    future.cancel()


def _batches(items: Iterator[Tensor | None], size: int) -> Iterator[list[Tensor | None]]:
    while batch := list(islice(items, size)):
        yield batch


def _stack(rows: Iterable[Tensor | None], width: int) -> npt.NDArray[np.float32]:
    """Rows, or NaN for those that are None -> (N, width) float32."""
    nan = np.full(width, np.nan, np.float32)
    arrays = [nan if row is None else row.numpy() for row in rows]
    return np.stack(arrays) if arrays else np.empty((0, width), np.float32)


@contextmanager
def _bar(total: int | None, progress: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr where one is asked for; yields what to call with each count done."""
    if not progress:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="image", leave=False) as bar:
        yield bar.update
