"""Hash of a model with its preprocessing, to know again what made a vector or a score."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitlib.fast import FastViT
from vitlib.fast.serialize import named_tensors
from vitlib.image.processor import ImageProcessor
from vitlib.predict.exported_files import hash_files
from vitlib.predict.predictor import Predictor
from vitlib.vit import ViT

if TYPE_CHECKING:
    from vitlib.predict.backends import Model

HEADS, HEAD_FIELDS = ("head.", "head_dist."), ("num_classes", "labels", "problem_type")


def compute_model_digest(predictor: Predictor) -> str:
    """Hash weights, config and preprocessing.

    Args:
        predictor: The model with its preprocessing.

    Returns:
        32 hexadecimal digits.
    """
    return hash_model(predictor.model, predictor.image_processor)


def model_precision(predictor: Predictor) -> str:
    """Return the arithmetic that a predictor runs in, such as "fp32".

    Args:
        predictor: The model; it is optimized if it is not yet.
    """
    model = predictor.fast()
    return getattr(model, "precision", None) or str(model.dtype).removeprefix("torch.")


def hash_model(model: Model, image_processor: ImageProcessor, *, with_head: bool = True) -> str:
    """Hash the weights and the config of a model, and a preprocessing.

    Args:
        model: The model, as loaded or optimized.
        image_processor: The preprocessing.
        with_head: False leaves the head, its labels and its task out: models with one trunk have
            one hash. Of an exported file all counts.

    Returns:
        32 hexadecimal digits.
    """
    hasher = hashlib.blake2b(digest_size=16)
    config: object = model.config
    if not with_head:
        names = [x.name for x in fields(model.config) if x.name not in HEAD_FIELDS]
        config = [(name, getattr(model.config, name)) for name in names]
    hasher.update(repr((config, image_processor)).encode())
    if image_processor.draft is not None:  # which repr leaves out
        hasher.update(f"draft {image_processor.draft}".encode())
    if not isinstance(model, ViT | FastViT):
        hasher.update(hash_files(model.runtime))
        return hasher.hexdigest()
    pairs: Iterable[tuple[str, Tensor]] = (
        named_tensors(model.trunk, "") if isinstance(model, FastViT) else model.state_dict().items()
    )
    trunk = [pair for pair in pairs if with_head or not pair[0].startswith(HEADS)]
    with ThreadPoolExecutor() as pool:
        for digest in pool.map(_hash_tensor, trunk):
            hasher.update(digest)
    return hasher.hexdigest()


def _hash_tensor(pair: tuple[str, Tensor]) -> bytes:
    """Hash a tensor and its name."""
    name, tensor = pair
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    hasher = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    hasher.update(data.data)
    return hasher.digest()
