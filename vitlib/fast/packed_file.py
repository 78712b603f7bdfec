"""The file of a FastViT's packed weights, which is mapped where they were packed alike.

It stands beside the plain weights (serialize.py) and only saves time and memory: the weights are
not packed at start, and processes share the pages of the file. It is used where torch is of the
same version and oneDNN lays the weights out alike, which is found by packing an empty weight of
each shape. Otherwise the plain weights are packed, as always.

How data flows: 8 bytes with the length of the header; the header in JSON; then the bytes of each
weight as oneDNN holds them. Nothing of the file is trusted but as numbers: shape, dtype and layout
are this process's own, and every float is tested for NaN.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlib.errors import CheckpointError
from vitlib.fast import onednn_memory
from vitlib.fast.block import LINEARS, BlockWeights, FastBlock, LastBlock
from vitlib.fast.cpu import KernelPlan
from vitlib.fast.int8_linears import linear_kind
from vitlib.fast.linears import LinearWeights, OpaqueLinear
from vitlib.fast.onednn_memory import ALIGNMENT, PackedLayout
from vitlib.system.atomic import open_atomic
from vitlib.vit import ViT

FILE = "fast.packed"
FORMAT_VERSION = 1
_MAX_HEADER = 16 * 2**20


def write_packed(trunk: ViT, folder: Path) -> str | None:
    """Write the packed weights of the blocks into a folder.

    Args:
        trunk: The model of fast modules.
        folder: The folder, which exists.

    Returns:
        The SHA-256 of the weights, which the header beside the plain weights names; None where
        there are none, or torch does not give their memory. No file is written then.
    """
    layers = packed_layers(trunk)
    dtypes = {layer.packed.dtype for layer in layers.values()}
    if not dtypes or not all(map(onednn_memory.has_packed_memory, dtypes)):
        return None
    digest, start, rows = hashlib.sha256(), 0, dict[str, dict[str, Any]]()
    for name, layer in layers.items():
        view = onednn_memory.packed_bytes(layer.packed)
        digest.update(view)
        layout = _hash_layout(onednn_memory.packed_layout(layer.packed))
        rows[name] = {"start": start, "size": len(view), "layout": layout}
        start += -(-len(view) // ALIGNMENT) * ALIGNMENT
    identity = digest.hexdigest()
    about = {"format": FORMAT_VERSION, "id": identity, "torch": torch.__version__, "layers": rows}
    header = json.dumps(about).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    with open_atomic(folder / FILE) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for layer in layers.values():
            view = onednn_memory.packed_bytes(layer.packed)
            file.write(view)
            file.write(bytes(-len(view) % ALIGNMENT))
    return identity


def packed_layers(trunk: ViT) -> dict[str, OpaqueLinear]:
    """List the layers of a model's fast blocks whose weights are packed.

    Args:
        trunk: The model of fast modules.

    Returns:
        The layers by their names beside the plain weights, such as "blocks.0.qkv".
    """
    layers: dict[str, OpaqueLinear] = {}
    for index, part in enumerate(trunk.blocks):
        block = part.full_block if isinstance(part, LastBlock) else part
        if not isinstance(block, FastBlock):
            continue
        for name in LINEARS:
            layer = getattr(block, name)
            if isinstance(layer, OpaqueLinear):
                layers[f"blocks.{index}.{name}"] = layer
    return layers


def attach_packed(
    folder: Path, identity: object, blocks: Mapping[str, BlockWeights], plan: KernelPlan
) -> str:
    """Map the packed weights of a folder, and attach them to the plain ones.

    Args:
        folder: The folder.
        identity: The SHA-256 that the header beside the plain weights names.
        blocks: The numbers of the blocks by path; `packed` of their layers is set.
        plan: The kernels of this machine.

    Returns:
        "" where every layer has its packed weight; otherwise why none has.
    """
    layers = {
        f"{at}.{name}": layer
        for at, block in blocks.items()
        for name, layer in block.linears.items()
    }
    layouts = _find_layouts(layers, plan)
    if not all(map(onednn_memory.has_packed_memory, {x.dtype for x in layouts.values()})):
        return f"torch {torch.__version__} maps no packed weights here"
    try:
        packed = _map_packed(folder / FILE, identity, layouts)
    except CheckpointError as error:
        return str(error)
    except FileNotFoundError:
        return f"{FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return f"{FILE} is damaged"
    for name, tensor in packed.items():
        layers[name].packed = tensor
    return ""


def _find_layouts(layers: Mapping[str, LinearWeights], plan: KernelPlan) -> dict[str, PackedLayout]:
    """Find the layout of each layer that is packed, by packing zeros of each shape."""
    layouts: dict[tuple[torch.dtype, torch.Size], PackedLayout | None] = {}
    by_name: dict[str, PackedLayout] = {}
    # One buffer of zeros serves every shape: fresh memory takes longer than packing it.
    most = max(layer.weight.numel() for layer in layers.values())
    zeros = torch.zeros(4 * most, dtype=torch.uint8, device="cpu")
    for name, layer in layers.items():
        kind, dtype = linear_kind(layer, plan)
        if not issubclass(kind, OpaqueLinear):
            continue
        key = torch.int8 if layer.scale is not None else dtype, layer.weight.shape
        if key not in layouts:
            weight = zeros.view(key[0])[: key[1].numel()].view(key[1])
            packed = onednn_memory.pack_as(weight)
            layouts[key] = None if packed is None else onednn_memory.packed_layout(packed)
        layout = layouts[key]
        if layout is not None:
            by_name[name] = layout
    return by_name


def _map_packed(
    path: Path, identity: object, layouts: Mapping[str, PackedLayout]
) -> dict[str, Tensor]:
    """Map the weights of a file.

    Args:
        path: The file.
        identity: The SHA-256 that its header should have.
        layouts: The layouts that its weights should have, by the names of the layers.

    Returns:
        The weights by the names of the layers.

    Raises:
        CheckpointError: The file is for another model, torch or CPU, or holds NaN.
        ValueError: It is damaged; so other errors of reading.
    """
    start, about = _read_header(path)
    rows = about["layers"]
    if about["format"] != FORMAT_VERSION or about["id"] != identity:
        raise CheckpointError(f"{FILE} is not of this model")
    if about["torch"] != torch.__version__:
        made = f"{about['torch']:.20}"
        raise CheckpointError(f"{FILE} is for torch {made} and this is {torch.__version__}")
    actual = {name: row["layout"] for name, row in rows.items()}
    if actual != {name: _hash_layout(layout) for name, layout in layouts.items()}:
        raise CheckpointError(f"{FILE} is for another kind of CPU")
    mapping = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    packed = {}
    for name, layout in layouts.items():
        first, size = start + rows[name]["start"], rows[name]["size"]
        if not 0 < start <= first <= first + size <= mapping.nbytes():
            raise ValueError("a weight is not within the file")
        memory = torch.empty(0, dtype=torch.uint8, device="cpu").set_(mapping[first : first + size])
        if not _is_finite(memory, layout.dtype):
            raise CheckpointError(f"{FILE} holds NaN or infinity")
        packed[name] = onednn_memory.packed_on(memory, layout)
    return packed


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the weights begin, and the header; raise ValueError for another file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise ValueError("no header")
        about = json.loads(file.read(length))
    if not isinstance(about, dict):
        raise ValueError("no header")
    return 8 + length, about


def _hash_layout(layout: PackedLayout) -> str:
    """Return the SHA-256 of oneDNN's description of a layout."""
    return hashlib.sha256(layout.descriptor).hexdigest()


def _is_finite(memory: Tensor, dtype: torch.dtype) -> bool:
    """Test packed floats for NaN and infinity; the padding of a layout is zeros."""
    if not dtype.is_floating_point:
        return True
    numbers = memory.view(dtype)
    # A sum takes one pass, and is finite where every number is, but for an overflow.
    return math.isfinite(float(numbers.sum())) or bool(numbers.isfinite().all())
