"""Compare two models: hidden states by name, and the bounds of exported files.

Shapes: B images, C channels, H W pixels, T tokens, D embed_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlib.config import ViTConfig
from vitlib.testing.distance import relative_distance
from vitlib.vit import ViT

# An exported file beside its model.
MARGIN = 0.05  # between the first two probabilities of a photo whose label is not in doubt
# Largest max |a - b| / max |b| in float32. Sums in another order differ by 5e-6 at ViT-B size, and
# by more with each block. OpenVINO's and XNNPACK's kernels approximate erf and exp.
BOUNDS = {"onnx": 5e-6, "pt2": 5e-6, "openvino": 1e-5, "executorch": 1e-5}
# Lower precisions: share of photos that must keep their label, and least cosine of any output. In
# int8 one label may always differ: among ten photos that is no sign of a wrong file.
LABELS = {"fp16": 1.0, "int8": 0.96}
COSINES = {"fp16": 0.9999, "int8": 0.98}
_BOUND_DEPTH = 12  # deeper models get a bound in proportion to their depth
# A file for any size resizes its positions, which are then rounded otherwise than the model's.
_DYNAMIC_SLACK = 2.0
# Two results in float32 are each as far from the exact one as rounding takes them.
ROUNDING_SHARE = 2.0
NamedStates = Iterator[tuple[str, Tensor]]


def error_bound(file_format: str, depth: int, is_dynamic: bool) -> float:
    """Return the largest error of an exported float32 file that counts as equal.

    Args:
        file_format: Format of the file, a key of BOUNDS.
        depth: Blocks of the model.
        is_dynamic: The file takes images of any size.

    Returns:
        max |a - b| / max |b|.
    """
    slack = _DYNAMIC_SLACK if is_dynamic else 1.0
    return slack * BOUNDS[file_format] * max(1.0, depth / _BOUND_DEPTH)


@torch.inference_mode()
def measure_rounding(
    exact: ViT, compute: Callable[[ViT, Tensor], Tensor], images: Tensor, output: Tensor
) -> float:
    """Measure how far a model's output in float32 is from its own in float64.

    Some outputs are worse conditioned than others: patch tokens of DeiT-tiny, which no loss has
    trained, are 1e-4 from those in float64. No file can be nearer to the model than that.

    Args:
        exact: The model in float64.
        compute: The output of a model for images.
        images: Normalised pixels, (B, C, H, W).
        output: The output of the model for these images.

    Returns:
        max |a - b| / max |b|.
    """
    return relative_distance(output.double(), compute(exact, images.double()))


def iter_named_states(model: ViT, images: Tensor) -> NamedStates:
    """Yield the hidden states of a model and its output, each with its name.

    Args:
        model: The model, in eval mode.
        images: (B, C, H, W).

    Yields:
        "embedding", "block 0", "block 1", ..., "norm" where every token is normalised: (B, T, D);
        then the model's output by its name.
    """
    x = images
    for index, x in enumerate(model.iter_hidden_states(images, len(model.blocks))):
        yield f"block {index - 1}" if index else "embedding", x
    if model.config.final_norm == "tokens":
        x = model.norm(x)
        yield "norm", x
    yield output_name(model.config), model.forward_head(x)


def output_name(cfg: ViTConfig) -> str:
    """Return the name of a model's output.

    Args:
        cfg: The model's config.

    Returns:
        "logits", or "output" for a model without a head.
    """
    return "logits" if cfg.num_classes else "output"


def list_demo_photos() -> list[Path]:
    """List the photos that are in the package."""
    folder = files("vitlib").joinpath("assets", "demo", "samples")
    return sorted(Path(str(path)) for path in folder.iterdir() if path.name.endswith(".png"))


def to_json(value: Any) -> Any:
    """Convert a value to JSON's types.

    Args:
        value: Dicts, tuples, lists and scalars.

    Returns:
        The value with tuples as lists, and None in place of floats that are not finite.
    """
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
