"""The model of a server or of a replica, without queue or HTTP.

preprocess() turns encoded bytes into one image tensor, in any thread. The caller stacks images of
one shape. answer() computes a row for each, in one thread.

Shapes: C channels, H W pixels, h w patches, D embedding.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from vitlib.errors import ConfigError, ImageError
from vitlib.fast import FastViT
from vitlib.image.decode import ORIENTATION, describe_image, open_header
from vitlib.image.decode_limits import is_slow
from vitlib.image.prefetch import stack
from vitlib.predict.predictor import Predictor
from vitlib.serve.explanation import Explanation
from vitlib.system.parallel import ParallelCompute
from vitlib.vit import ViT

Kind = Literal["classify", "embed", "attend"]  # the results that a request can have
logger = logging.getLogger("vitlib")
DEFAULT_EXPLANATION = Explanation()


class Core:
    """A predictor with its limits, ready to compute.

    Attributes:
        predictor: The model with its preprocessing.
        engine: The predictor's engine.
        max_pixels: The largest number of pixels of an encoded image.
        labels: The name of each class.
        task: The model's task.
        calibration: The calibration of scores, or None.
    """

    def __init__(self, predictor: Predictor, *, max_pixels: int) -> None:
        """Optimize the model.

        Args:
            predictor: The model with its preprocessing.
            max_pixels: The largest number of pixels of an encoded image, tested before decoding.
        """
        self.predictor, self.max_pixels = predictor, max_pixels
        self.engine = predictor.engine()
        self.parallel = ParallelCompute(self.engine.num_parts)
        self.labels, self.task = predictor.labels, predictor.task
        self.calibration = predictor.calibration

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The results that this model has.

        A model without a head has no labels. An optimized one, or one without a class token, has
        no attention map. An exported file has what it was exported with.
        """
        net = self.predictor.model
        kinds: list[Kind] = ["classify"] if net.num_classes else []
        if isinstance(net, ViT | FastViT) or net.has_embedding:
            kinds.append("embed")
        if isinstance(net, ViT) and net.config.tokens.cls:
            kinds.append("attend")
        return tuple(kinds)

    def is_slow(self, data: bytes) -> bool:
        """Return True if decoding may take long; safe in any thread.

        Args:
            data: An encoded image.

        Returns:
            True for formats and sizes that can take much processor time.

        Raises:
            ImageError: The bytes are not an image, or it has too many pixels.
        """
        with self._open(data) as image:
            return is_slow(image)

    def _open(self, data: bytes) -> Image.Image:
        """Open an image without decoding it; raise ImageError where it has too many pixels."""
        image = open_header(data)
        width, height = image.size
        if width * height > self.max_pixels:
            image.close()
            raise ImageError(
                f"an image of {width}x{height} pixels: expected at most {self.max_pixels}"
            )
        return image

    def preprocess(self, data: bytes, kind: Kind) -> Tensor:
        """Decode one image and preprocess it; safe in any thread.

        Args:
            data: An encoded image.
            kind: The result that it is for.

        Returns:
            (C, H, W) for answer().

        Raises:
            ImageError: The image cannot be read.
        """
        with self._open(data) as image:
            # By the model itself, which takes normalised pixels.
            if kind == "attend":
                return self.predictor.image_processor.to_float(image, self.engine.warn)
            try:
                return self.engine.preprocess(image)
            except ImageError as error:
                # The client has sent bytes, and has not seen the Pillow image made of them.
                raise ImageError(
                    str(error).replace(describe_image(image), describe_image(data))
                ) from error

    def visible_box(self, data: bytes) -> tuple[float, float, float, float]:
        """Return the part of an image that the patches cover.

        Args:
            data: An encoded image.

        Returns:
            Top, left, bottom and right, as shares of the upright image's height and width.
        """
        with open_header(data) as image:
            width, height = image.size
            if _is_rotated(image):
                width, height = height, width
        processor, patch = self.predictor.image_processor, self.predictor.model.config.patch_size
        top, left, bottom, right = processor.visible_box(height, width, patch)
        return top / height, left / width, bottom / height, right / width

    def answer(
        self, kind: Kind, images: Sequence[Tensor], explanation: Explanation = DEFAULT_EXPLANATION
    ) -> list[Any]:
        """Compute a batch; one thread may call this at a time.

        Args:
            kind: The result.
            images: (C, H, W) from preprocess(), all of one shape and dtype.
            explanation: The map of "attend".

        Returns:
            A float32 array for each image: scores (num_classes,), the embedding (D,), or the map
            of the patches (h, w), in 0..1.

        Raises:
            ConfigError: The model has no such result.
        """
        if kind not in self.kinds:
            raise ConfigError(f"this model cannot {kind}: it can {', '.join(self.kinds)}")
        batch = stack(images, self.engine.device)
        if kind == "classify":
            return list(self.parallel.run(self.engine.scores, batch).numpy())
        if kind == "embed":
            return list(self.parallel.run(self.engine.vectors, batch).numpy())
        net = self.predictor.model
        assert isinstance(net, ViT)
        return list(explanation.compute(net, batch.to(next(net.parameters()).device)))

    def warm_up(self, max_batch: int) -> None:
        """Compute each batch size of each kind twice on a GPU, and compile the programs of a CPU.

        At the second batch of a size a GPU captures its kernels into a graph, which would delay a
        request. On a CPU a model without compile=True needs nothing. The thread that computes must
        call this.

        Args:
            max_batch: The largest number of images of a batch.
        """
        if self.engine.device.type != "cuda":
            self._compile(max_batch)
            return
        from vitlib.fast.micro_batch import micro_batch_sizes

        for kind in self.kinds:
            image = self.blank_image(kind)
            for size in micro_batch_sizes(max_batch):
                for _ in range(2):
                    self.answer(kind, [image] * size)

    def _compile(self, max_batch: int) -> None:
        """Compile the programs of all batches, where the model has any; requests add none."""
        from vitlib.fast.compiled import CompiledViT  # few servers compile

        model, start = self.engine.model, time.perf_counter()
        if not isinstance(model, CompiledViT):
            return
        for kind in self.kinds:
            if kind == "attend":  # computed by the model as loaded
                continue
            image = self.blank_image(kind)
            for size in _sizes_to_compile(max_batch, self.parallel.num_threads):
                self.answer(kind, [image] * size)
        # A photo of another shape or depth would make all requests wait for the compiler.
        model.programs.close()
        used, total = model.programs.count()
        seconds = time.perf_counter() - start
        logger.info("compiled in %.0f s: %d of %d programs are used", seconds, used, total)

    def blank_image(self, kind: Kind = "embed") -> Tensor:
        """Return a black image.

        Args:
            kind: The result that it is for.

        Returns:
            (C, H, W), as from preprocess().
        """
        cfg, processor = self.predictor.model.config, self.predictor.image_processor
        size = processor.crop_size or cfg.image_size
        image = np.zeros((*size, cfg.in_channels), np.uint8)
        return processor.to_float(image) if kind == "attend" else self.engine.preprocess(image)


def _sizes_to_compile(max_batch: int, num_threads: int) -> list[int]:
    """Return sizes of batches from which every program of a CompiledViT is compiled.

    ParallelCompute gives a batch of less than two images a thread to all threads together, and of a
    larger one a part to each thread. Both are divided into powers of two.
    """
    powers = [1 << bit for bit in range(max_batch.bit_length())]
    together = [size for size in powers if size < 2 * num_threads]
    parts = [size * num_threads for size in powers[1:]]
    # Of parts with an odd number of images one image is left.
    sizes = {*together, *parts, 2 * num_threads + 1, max_batch}
    return sorted(size for size in sizes if size <= max_batch)


def _is_rotated(image: Image.Image) -> bool:
    """Return True if EXIF states that rows and columns of a photo are swapped."""
    try:
        return image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    except Exception:  # damaged metadata: preprocess() leaves such a photo unrotated too
        return False
