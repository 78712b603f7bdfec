"""Write a FastViT: its tensors by name in one file, and in the header what they are.

How data flows: every fast module gives the numbers that it was made of (weights()), which are
written as they are: in 8 bits with scales, in bfloat16 or in float32. They are unpacked, so that
another machine can pack them for its own kernels (deserialize.py). They are one file, so that one
rename makes it whole. The packed weights are a second file that may be missing (packed_file.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitlib.checkpoint.layouts.problems import check_finite
from vitlib.config import config_to_json
from vitlib.errors import ConfigError, SourceError
from vitlib.fast.block import BlockWeights, FastBlock, LastBlock
from vitlib.fast.embeddings import FastAttentionPosition, PatchLinear
from vitlib.fast.linears import FastLinear
from vitlib.fast.packed_file import FILE as PACKED_FILE
from vitlib.fast.packed_file import write_packed
from vitlib.image.processor import ImageProcessor
from vitlib.source.locate import FAST_FILE as FILE
from vitlib.system.atomic import open_atomic
from vitlib.system.torch_state import isolate_torch_settings
from vitlib.vit import ViT

HEADER = "vitlib_fast"
FORMAT_VERSION = 2  # 1: before tensors had the names of timm's modules


@isolate_torch_settings()
def write_model(
    trunk: ViT,
    folder: str | os.PathLike[str],
    processor: ImageProcessor | None,
    settings: dict[str, Any],
    packed: bool,
) -> None:
    """Write a model of fast modules into a folder.

    Args:
        trunk: The model.
        folder: The folder, which is made where it is missing.
        processor: The preprocessing to write, if any.
        settings: What else the header says: precision, dtype and batch_size.
        packed: Also write the weights as this machine has packed them.

    Raises:
        CheckpointError: Weights are not finite.
        SourceError: The folder cannot be written.
    """
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in named_tensors(trunk, "")}
    check_finite(tensors.items())
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SourceError(f"{target} cannot be written: {error.strerror or error}") from error
    # The packed weights first: their file serves only the plain weights whose header names it.
    identity = write_packed(trunk, target) if packed else None
    header = {
        "format": FORMAT_VERSION,
        **settings,
        "config": config_to_json(trunk.config),
        "image_processor": None if processor is None else _stored_fields(processor),
        "packed": identity,
    }
    with open_atomic(target / FILE) as file:
        # One entry of metadata: safetensors writes several in a random order, so that two saves of
        # one model would differ.
        save_file(tensors, file.name, {HEADER: json.dumps(header)})
    if identity is None:
        (target / PACKED_FILE).unlink(missing_ok=True)  # of an earlier save


def check_saveable(trunk: ViT, unoptimized_modules: Sequence[str]) -> None:
    """Check that a file can hold all of a model.

    Args:
        trunk: The model of fast modules.
        unoptimized_modules: Paths of the modules that run as the user made them.

    Raises:
        ConfigError: It has adapters, or modules or methods that are not vitlib's own.
    """
    if trunk.adaptation is not None:
        raise ConfigError(
            f"the model has {', '.join(trunk.adaptation.to_json())}, which this file has "
            "no place for: write the model it was made from with vitlib.save_delta"
        )
    if unoptimized_modules:
        raise ConfigError(
            f"{', '.join(unoptimized_modules[:3])}: not vitlib's own, so no file can say "
            "what it does: write the weights of the model it was made from with "
            "torch.save(model.state_dict(), ...)"
        )
    if type(trunk) is not ViT:
        raise ConfigError(
            f"a {type(trunk).__name__} has methods that no file can hold: save the model "
            "that it was made from"
        )


def named_tensors(module: nn.Module, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a module of fast modules.

    Args:
        module: The module.
        path: Its path in the model; "" is the model itself.

    Yields:
        The name, by the paths of the stock modules, and the tensor.
    """
    if isinstance(module, LastBlock):
        module = module.full_block
    if isinstance(module, FastAttentionPosition):
        module = module.source
    if isinstance(module, FastBlock):
        yield from block_tensors(module.weights(), path)
        return
    if isinstance(module, PatchLinear | FastLinear):
        layer = (module.linear if isinstance(module, PatchLinear) else module).weights()
        shape = module.kernel if isinstance(module, PatchLinear) else layer.weight.shape
        yield f"{path}.weight", layer.weight.reshape(shape)
        if layer.bias is not None:
            yield f"{path}.bias", layer.bias
        return
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield f"{path}.{name}" if path else name, tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from named_tensors(child, f"{path}.{name}" if path else name)


def block_tensors(weights: BlockWeights, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a block.

    Args:
        weights: The numbers of the block.
        path: Its path in the model.

    Yields:
        The name and the tensor. `input` of a layer is its x_scale and x_zero_point.
    """
    norms = {"norm1": weights.norms[0], "norm2": weights.norms[1]}
    norms |= {f"{name}_norm": norm for name, norm in weights.sub_norms.items()}
    for name, norm in norms.items():
        yield f"{path}.{name}.weight", norm.weight
        if norm.bias is not None:
            yield f"{path}.{name}.bias", norm.bias
    for name, layer in weights.linears.items():
        yield f"{path}.{name}.weight", layer.weight
        if layer.bias is not None:
            yield f"{path}.{name}.bias", layer.bias
        if layer.scale is not None:
            yield f"{path}.{name}.scale", layer.scale
        if layer.scale is not None and layer.x_scale is not None:
            both = [layer.x_scale, float(layer.x_zero_point)]
            yield f"{path}.{name}.input", torch.tensor(both, dtype=torch.float64, device="cpu")


def _stored_fields(processor: ImageProcessor) -> dict[str, Any]:
    """Return the fields of a preprocessing without the draft, which is a choice of one program."""
    return {name: value for name, value in asdict(processor).items() if name != "draft"}
