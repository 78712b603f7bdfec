"""A FastViT as one file: its tensors by name, and in the header what they are.

How data flows: every fast part says what it was made of (weights()), and is written in that: in 8
bits with its scales, in bfloat16 or in float32, unpacked, so that another machine can pack it its
own way (read.py). One file, so that one rename makes it whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitlib.checkpoint.layouts.problems import check_finite
from vitlib.config import ViTConfig
from vitlib.errors import SourceError
from vitlib.fast.block import BlockWeights, FastBlock, LastBlock
from vitlib.fast.linears import FastLinear
from vitlib.fast.swap import FastPositions, Projection
from vitlib.image.processor import ImageProcessor
from vitlib.source.locate import FAST_FILE as FILE
from vitlib.system.atomic import open_atomic
from vitlib.system.torch_state import isolate_torch_settings
from vitlib.vit import ViT

HEADER = "vitlib_fast"
FORMAT = 2  # 1: before tensors had the names of timm's modules


@isolate_torch_settings()
def write(
    trunk: ViT,
    folder: str | os.PathLike[str],
    processor: ImageProcessor | None,
    said: dict[str, Any],
) -> None:
    """Write a trunk of fast parts, and `said` with its config, as FILE of a folder.

    Raises CheckpointError where weights are not finite, SourceError where the folder cannot be
    written.
    """
    from safetensors.torch import save_file

    about = {
        "format": FORMAT,
        **said,
        "config": {f.name: getattr(trunk.config, f.name) for f in fields(ViTConfig) if f.init},
        "image_processor": None if processor is None else asdict(processor),
    }
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in named(trunk, "")}
    check_finite(tensors.items())
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"{target} cannot be written: {error.strerror or error}") from error
    with open_atomic(target / FILE) as file:
        # One entry: several come in an order of their own each time.
        save_file(tensors, file.name, {HEADER: json.dumps(about)})


def named(module: nn.Module, path: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a fast part, under the path that the stock part has."""
    if isinstance(module, LastBlock):
        module = module.every
    if isinstance(module, FastPositions):
        module = module.of
    if isinstance(module, FastBlock):
        yield from of_block(module.weights(), path)
        return
    if isinstance(module, Projection | FastLinear):
        held = (module.linear if isinstance(module, Projection) else module).weights()
        shape = module.kernel if isinstance(module, Projection) else held.weight.shape
        yield f"{path}.weight", held.weight.reshape(shape)
        if held.bias is not None:
            yield f"{path}.bias", held.bias
        return
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield f"{path}.{name}" if path else name, tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from named(child, f"{path}.{name}" if path else name)


def of_block(weights: BlockWeights, path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a block; `input`: what a level of a linear's input is worth, and its zero."""
    for index, norm in enumerate(weights.norms, 1):
        yield f"{path}.norm{index}.weight", norm.weight
        yield f"{path}.norm{index}.bias", norm.bias
    for name, held in weights.linears.items():
        yield f"{path}.{name}.weight", held.weight
        if held.bias is not None:
            yield f"{path}.{name}.bias", held.bias
        if held.scale is not None:
            yield f"{path}.{name}.scale", held.scale
        if held.scale is not None and held.x_scale is not None:
            both = [held.x_scale, float(held.x_zero)]
            yield f"{path}.{name}.input", torch.tensor(both, dtype=torch.float64, device="cpu")
