"""Load a folder that FastViT.save wrote; map its packed weights, or pack the plain ones.

The file is not trusted: the config checks itself, and every tensor is checked for its name, shape,
dtype and for NaN before a model is made of them. One message lists all that is wrong.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlib.checkpoint.layouts.own import upgrade_fields
from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError, ConfigError, SourceError, VitlibError
from vitlib.fast.block import BlockWeights, hidden_norm_eps
from vitlib.fast.cpu import PRECISIONS, KernelPlan
from vitlib.fast.linears import LinearWeights
from vitlib.fast.model import FastViT
from vitlib.fast.norms import NormWeights
from vitlib.fast.optimization import assemble, cpu_plan
from vitlib.fast.packed_file import attach_packed
from vitlib.fast.serialize import FORMAT_VERSION, HEADER
from vitlib.image.processor import ImageProcessor
from vitlib.source.locate import FAST_FILE as FILE
from vitlib.source.readers.contents import parts_are_finite
from vitlib.source.readers.safetensors import read_safetensors
from vitlib.system.atomic import expand_home
from vitlib.system.torch_state import isolate_torch_settings, outside_inference_mode
from vitlib.vit import ViT

logger = logging.getLogger("vitlib")
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16)}
_FLOATS = (torch.float32, torch.bfloat16)


def is_optimized_model(source: str | os.PathLike[str]) -> bool:
    """Return True if a folder or file is what FastViT.save wrote.

    Args:
        source: A path, which need not exist.

    Returns:
        True by the file's name alone.
    """
    path = expand_home(source)
    return path.name == FILE or (path / FILE).is_file()


@isolate_torch_settings()
@outside_inference_mode()
def load(source: str | os.PathLike[str], *, compile: bool = False) -> FastViT:  # noqa: A002
    """Load an optimized model that FastViT.save wrote, on a CPU.

    Its outputs are those of the model that was saved, to the bit on the same kind of machine.

    Args:
        source: The folder, or the file in it.
        compile: Compile the forward for each size of batch, as optimize() does.

    Returns:
        The optimized model.

    Raises:
        SourceError: There is no such file.
        CheckpointError: The file is damaged or was changed.
        ConfigError: This machine cannot compute its precision.
    """
    path = expand_home(source)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise SourceError(
            f"{os.fspath(source)!r} holds no {FILE}: expected a folder that FastViT.save wrote; "
            "a checkpoint goes through vitlib.load, then vitlib.optimize"
        )
    contents = read_safetensors(path)
    header, cfg, processor = read_header(path)
    with torch.device("meta"):
        model = ViT(cfg).eval()
    tensors = contents.tensors
    problems: list[str] = []
    blocks = {
        f"blocks.{i}": pop_block(tensors, f"blocks.{i}", cfg, problems) for i in range(cfg.depth)
    }
    rest = {n: t for n, t in model.state_dict().items() if not n.startswith("blocks.")}
    state = {name: pop_tensor(tensors, name, tuple(t.shape), problems) for name, t in rest.items()}
    problems += [f"{name} is not known" for name in sorted(tensors)]
    plan = cpu_plan(header["precision"])
    if not problems:
        attached = attach(path, header.get("packed"), blocks, plan)
        parts = {
            name: part for name, part in (contents.parts or {}).items() if name not in attached
        }
        if not parts_are_finite(path, parts.values()):
            problems.append("a tensor holds NaN or infinity")
    if problems:
        listed = "; ".join(problems[:20]) + ("; …" if len(problems) > 20 else "")
        raise CheckpointError(f"{path}: {listed}: save it again")
    # The blocks stay on the meta device, without memory: assemble() replaces them.
    model.load_state_dict(model.state_dict() | state, assign=True)
    model.image_processor = processor
    fast = assemble(model, blocks, plan, header["precision"], header["batch_size"])
    fast.dtype = _DTYPES[header["dtype"]]
    if not compile:
        return fast
    from vitlib.fast.compiled import compile_model  # few programs compile

    return compile_model(fast)


def attach(
    path: Path, identity: object, blocks: Mapping[str, BlockWeights], plan: KernelPlan
) -> frozenset[str]:
    """Attach the packed weights beside the file, or say in the log why they are packed again.

    Args:
        path: The file.
        identity: What its header says of them; None where there are none.
        blocks: The numbers of the blocks by path.
        plan: The kernels of this machine.

    Returns:
        The names of the plain weights that are not read then.
    """
    if identity is None:
        return frozenset()
    reason = attach_packed(path.parent, identity, blocks, plan)
    if reason:
        logger.warning("%s: %s: packing the weights again", path, reason)
    # Of the last block the attention of class tokens is made from the plain weight (absorb_kv).
    return frozenset(
        f"{at}.{name}.weight"
        for at, block in list(blocks.items())[:-1]
        for name, layer in block.linears.items()
        if layer.packed is not None
    )


def read_header(path: Path) -> tuple[dict[str, Any], ViTConfig, ImageProcessor | None]:
    """Read and check the header of a file.

    Args:
        path: The file.

    Returns:
        The header, the config and the preprocessing.

    Raises:
        CheckpointError: FastViT.save did not write it, or not in this format.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if HEADER not in metadata:
        raise CheckpointError(
            f"{path} was not written by FastViT.save: a checkpoint goes through vitlib.load"
        )
    try:
        header = json.loads(metadata[HEADER])
        version = header["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a header that cannot be read: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r:.20}: expected {FORMAT_VERSION}: load the "
            "checkpoint it was made from, optimize it and save it again"
        )
    try:
        cfg = ViTConfig(**upgrade_fields(header["config"]))
        fields = header["image_processor"]
        processor = None if fields is None else ImageProcessor(**lists_to_tuples(fields))
        if header["precision"] not in PRECISIONS or header["dtype"] not in _DTYPES:
            raise ConfigError(f"precision {header['precision']!r} in {header['dtype']!r}")
        size = header["batch_size"]
        if size is not None and (type(size) is not int or size < 1):
            raise ConfigError(f"batch_size {size!r}")
    except (KeyError, TypeError, ValueError, AttributeError, VitlibError) as error:
        raise CheckpointError(f"{path} has a header that cannot be read: {error}") from error
    return header, cfg, processor


def lists_to_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Turn JSON's lists back into the tuples that they were.

    Args:
        fields: Fields of a dataclass, as JSON gives them.

    Returns:
        The fields.
    """
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}


def pop_block(
    tensors: dict[str, Tensor], path: str, cfg: ViTConfig, problems: list[str]
) -> BlockWeights:
    """Take the tensors of a block out of those of the file.

    Args:
        tensors: The tensors of the file that are left, by name.
        path: The path of the block.
        cfg: The model's config.
        problems: A line is added for each tensor that is missing or wrong.

    Returns:
        The numbers of the block.
    """
    d, m = cfg.embed_dim, cfg.mlp_dim
    shapes = {"qkv": (3 * d, d), "out": (d, d), "up": (m, d), "down": (d, m)}
    activation = {"quick_gelu": "silu", "swiglu": "silu"}.get(cfg.activation, cfg.activation)
    if cfg.activation == "swiglu":
        shapes["gate"] = (m, d)
    linears = {
        name: pop_linear(tensors, f"{path}.{name}", shape, problems)
        for name, shape in shapes.items()
    }
    # A calibrated layer has its zero point in the norm before it, whatever that norm's kind is.
    first, second = (
        pop_norm(
            tensors,
            f"{path}.{name}",
            d,
            cfg,
            problems,
            is_shifted=linears[reader].x_scale is not None,
        )
        for name, reader in (("norm1", "qkv"), ("norm2", "up"))
    )
    sub_norms = {
        name: pop_norm(tensors, f"{path}.{name}_norm", width, cfg, problems)
        for name, width in sub_norm_widths(cfg).items()
    }
    if "mlp" in sub_norms:
        eps = hidden_norm_eps(cfg.norm_eps, cfg.activation)
        sub_norms["mlp"] = sub_norms["mlp"]._replace(eps=eps)
    rotary = cfg.rope is not None
    norms, post = (first, second), cfg.norms.post
    return BlockWeights(norms, linears, cfg.num_heads, activation, rotary, sub_norms, post)


def sub_norm_widths(cfg: ViTConfig) -> dict[str, int]:
    """Return the widths of the norms within the branches of a block.

    Args:
        cfg: The model's config.

    Returns:
        The number of channels of each norm that the model has, by SUB_NORMS.
    """
    norms, widths = cfg.norms, {}
    if norms.qk is not None:
        widths["q"] = widths["k"] = cfg.head_dim if norms.qk == "head" else cfg.embed_dim
    if norms.attn:
        widths["attn"] = cfg.embed_dim
    if norms.mlp:
        widths["mlp"] = cfg.mlp_dim
    return widths


def pop_norm(
    tensors: dict[str, Tensor], path: str, width: int, cfg: ViTConfig, problems: list[str],
    *, is_shifted: bool = False,
) -> NormWeights:  # fmt: skip
    """Take the tensors of a norm out of those of the file.

    Args:
        tensors: The tensors of the file that are left, by name.
        path: The path of the norm.
        width: Its number of channels.
        cfg: The model's config.
        problems: A line is added for each tensor that is missing or wrong.
        is_shifted: The norm has a bias even where it is an RMSNorm.

    Returns:
        The numbers of the norm.
    """
    weight, bias = pop_tensor(tensors, f"{path}.weight", (width,), problems), None
    if is_shifted or cfg.norms.kind == "layer":
        bias = pop_tensor(tensors, f"{path}.bias", (width,), problems)
    return NormWeights(weight, bias, cfg.norm_eps, cfg.norms.kind)


def pop_linear(
    tensors: dict[str, Tensor], path: str, shape: tuple[int, int], problems: list[str]
) -> LinearWeights:
    """Take the tensors of a linear layer out of those of the file.

    Args:
        tensors: The tensors of the file that are left, by name.
        path: The path of the layer.
        shape: Shape of its weight, (N, K).
        problems: A line is added for each tensor that is missing or wrong.

    Returns:
        The numbers of the layer, in 8 bits where it has a scale.
    """
    names = {name for name in ("bias", "scale", "input") if f"{path}.{name}" in tensors}
    dtypes = (torch.int8,) if "scale" in names else _FLOATS
    layer = LinearWeights(pop_tensor(tensors, f"{path}.weight", shape, problems, dtypes))
    if "bias" in names:
        layer.bias = pop_tensor(tensors, f"{path}.bias", shape[:1], problems)
    if "scale" in names:
        layer.scale = pop_tensor(tensors, f"{path}.scale", shape[:1], problems)
    if "input" in names:
        both = pop_tensor(tensors, f"{path}.input", (2,), problems, (torch.float64,))
        scale, zero_point = both.tolist()
        # The zero point is one of the values of a byte.
        if "scale" not in names or not (0 < scale < 1e30 and 0 <= zero_point <= 255):
            problems.append(
                f"{path}.input is {scale}, {zero_point}: expected a scale and a zero point of uint8"
            )
        else:
            layer.x_scale, layer.x_zero_point = scale, int(zero_point)
    return layer


def pop_tensor(
    tensors: dict[str, Tensor],
    name: str,
    shape: tuple[int, ...],
    problems: list[str],
    dtypes: tuple[torch.dtype, ...] = _FLOATS,
) -> Tensor:
    """Take one tensor out of those of the file.

    Args:
        tensors: The tensors of the file that are left, by name.
        name: Its name.
        shape: The shape that it should have.
        problems: A line is added where the tensor is missing or wrong.
        dtypes: The dtypes that it may have.

    Returns:
        The tensor, or zeros where it is missing or wrong.
    """
    tensor = tensors.pop(name, None)
    if tensor is not None and tuple(tensor.shape) == shape and tensor.dtype in dtypes:
        return tensor
    actual = "missing" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
    expected = " or ".join(str(dtype) for dtype in dtypes)
    problems.append(f"{name} is {actual}: expected {shape} of {expected}")
    return torch.zeros(shape, dtype=dtypes[0])
