"""Core: a model that answers, without queue or HTTP: what the server and a replica compute with.

How data flows: encoded bytes -> read() -> levels or pixels, one image -> stacked by the caller ->
answer() -> a row an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitlib.errors import ConfigError, ImageError
from vitlib.image.decode import ORIENTATION, describe_image, open_header
from vitlib.image.decode_limits import is_slow
from vitlib.image.prefetch import stack
from vitlib.predict.predictor import Predictor
from vitlib.vit import ViT

Kind = Literal["classify", "embed", "attend"]


class Core:
    """A Predictor made ready, its limits, and what it can be asked.

    max_pixels: of an image as it is in its file, counted before it is decoded.
    """

    def __init__(self, predictor: Predictor, *, max_pixels: int) -> None:
        self.predictor, self.max_pixels = predictor, max_pixels
        self.engine = predictor.engine()
        self.parallel = ParallelCompute(
            1 if self.engine.device.type != "cpu" else torch.get_num_threads()
        )
        self.labels, self.task = predictor.labels, predictor.task
        self.calibration = predictor.calibration

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What it answers: an optimized model shows no attention, one without a head no labels."""
        net = self.predictor.model
        found: list[Kind] = ["classify"] if net.num_classes else []
        found.append("embed")
        if isinstance(net, ViT) and net.config.class_token:
            found.append("attend")
        return tuple(found)

    def is_slow(self, data: bytes) -> bool:
        """Whether reading an encoded image may take long. Safe among threads. Raises ImageError."""
        with self._opened(data) as opened:
            return is_slow(opened)

    def _opened(self, data: bytes) -> Image.Image:
        opened = open_header(data)
        width, height = opened.size
        if width * height > self.max_pixels:
            opened.close()
            raise ImageError(
                f"an image of {width}x{height} pixels: expected at most {self.max_pixels}"
            )
        return opened

    def read(self, data: bytes, kind: Kind) -> Tensor:
        """One encoded image -> what answer() stacks. Safe among threads. Raises ImageError."""
        with self._opened(data) as opened:
            if kind == "attend":
                return self.predictor.image_processor.to_float(opened, self.engine.warn)
            try:
                return self.engine.preprocess(opened)
            except (
                ImageError
            ) as error:  # the client knows of bytes, not of what Pillow made of them
                raise ImageError(
                    str(error).replace(describe_image(opened), describe_image(data))
                ) from error

    def shown(self, data: bytes) -> tuple[float, float, float, float]:
        """What of an image the patches cover: top, left, bottom, right, as shares of its upright
        height and width."""
        with open_header(data) as opened:
            width, height = opened.size
            if _is_turned(opened):
                width, height = height, width
        rule, patch = self.predictor.image_processor, self.predictor.model.config.patch_size
        top, left, bottom, right = rule.visible_box(height, width, patch)
        return top / height, left / width, bottom / height, right / width

    def answer(self, kind: Kind, images: Sequence[Tensor]) -> list[Any]:
        """Images of one shape and dtype -> of each: its scores (num_classes,), its vector (D,), or
        its map (h, w) of where the class token looks, 0..1; float32 arrays.

        By one thread at a time.
        """
        if kind not in self.kinds:
            raise ConfigError(f"this model cannot {kind}: it can {', '.join(self.kinds)}")
        batch = stack(images, self.engine.device)
        if kind == "classify":
            return list(self.parallel.ask(self.engine.scores, batch).numpy())
        if kind == "embed":
            return list(self.parallel.ask(self.engine.vectors, batch).numpy())
        return list(self._maps(batch))

    def _maps(self, pixels: Tensor) -> Any:
        from vitlib import explain

        net = self.predictor.model
        assert isinstance(net, ViT)
        maps = explain.attention_rollout(net, pixels.to(next(net.parameters()).device))
        low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
        return ((maps - low) / np.maximum(high - low, 1e-12)).astype(np.float32)

    def warm_up(self, largest: int) -> None:
        """Compute every size of batch up to `largest` twice, of every kind: at the second a GPU
        captures its kernels, which would make a first request wait.

        By the thread that will compute. On a CPU nothing is captured.
        """
        if self.engine.device.type != "cuda":
            return
        from vitlib.fast.cuda_graphs import sizes_up_to

        for kind in self.kinds:
            image = self.blank(kind)
            for size in sizes_up_to(largest):
                for _ in range(2):
                    self.answer(kind, [image] * size)

    def blank(self, kind: Kind = "embed") -> Tensor:
        """Return a black image as read() gives one."""
        cfg, rule = self.predictor.model.config, self.predictor.image_processor
        side = rule.crop_size or cfg.image_size
        image = np.zeros((*side, cfg.in_channels), np.uint8)
        return rule.to_float(image) if kind == "attend" else self.engine.preprocess(image)


class ParallelCompute:
    """A batch in parts, each computed by one thread: where all share each product, all wait for the
    slowest at each of hundreds. A few images are computed by all of them together, which is sooner.

    By one thread at a time, of whose process no other computes.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._others = ThreadPoolExecutor(max(1, count - 1), "vitlib-lane", initializer=_alone)

    def ask(self, ask: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """(B, ...) -> what `ask` says of it, (B, ...)."""
        if self.count == 1 or len(batch) < 2 * self.count:
            return ask(batch)
        first, *rest = batch.tensor_split(self.count)
        others = [self._others.submit(ask, part) for part in rest]
        torch.set_num_threads(1)
        try:
            mine = ask(first)
            return torch.cat([mine, *(other.result() for other in others)])
        finally:
            wait(others)
            torch.set_num_threads(self.count)


def _alone() -> None:
    torch.set_num_threads(1)


def _is_turned(image: Image.Image) -> bool:
    """Whether EXIF says that a photo's rows are its columns."""
    try:
        return image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # damaged metadata: read() takes the photo as it lies, too
        return False
