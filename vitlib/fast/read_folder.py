"""load: a folder that FastViT.save wrote -> the FastViT, packed anew for this machine.

Nothing in the file is trusted: the config checks itself, and every tensor is checked for its name,
shape, dtype and for NaN before a model is made of them; all that is wrong is one message.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlib.config import ViTConfig
from vitlib.errors import CheckpointError, ConfigError, SourceError, VitlibError
from vitlib.fast.block import BlockWeights, Norm
from vitlib.fast.cpu import PRECISIONS
from vitlib.fast.fast_vit import FastViT
from vitlib.fast.linears import Weights
from vitlib.fast.optimization import assembled, cpu_route
from vitlib.fast.write_folder import FORMAT, HEADER
from vitlib.image.processor import ImageProcessor
from vitlib.source.locate import FAST_FILE as FILE
from vitlib.source.readers.contents import parts_are_finite
from vitlib.source.readers.safetensors import read_safetensors
from vitlib.system.torch_state import isolate_torch_settings, outside_inference_mode
from vitlib.vit import ViT

_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16)}
_FLOATS = (torch.float32, torch.bfloat16)


def holds_one(source: str | os.PathLike[str]) -> bool:
    """Whether a folder holds what FastViT.save wrote, or a file is that."""
    path = Path(source).expanduser()
    return path.name == FILE or (path / FILE).is_file()


@isolate_torch_settings()
@outside_inference_mode()
def load(source: str | os.PathLike[str]) -> FastViT:
    """What FastViT.save wrote: the folder, or the file in it. For CPUs.

    Its outputs are those of the model that was saved, to the bit on the same kind of machine.

    Raises SourceError where there is no such file, CheckpointError for one that is damaged or
    changed, ConfigError for a precision that this machine cannot do.
    """
    path = Path(source).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise SourceError(
            f"{os.fspath(source)!r} holds no {FILE}: expected a folder that FastViT.save wrote; "
            "a checkpoint goes through vitlib.load, then vitlib.optimize"
        )
    contents = read_safetensors(path)
    about, cfg, processor = read_header(path)
    with torch.device("meta"):
        model = ViT(cfg).eval()
    tensors = contents.tensors
    problems: list[str] = []
    blocks = {
        f"blocks.{i}": taken_block(tensors, f"blocks.{i}", cfg, problems) for i in range(cfg.depth)
    }
    rest = {n: t for n, t in model.state_dict().items() if not n.startswith("blocks.")}
    state = {name: taken(tensors, name, tuple(t.shape), problems) for name, t in rest.items()}
    problems += [f"{name} is not known" for name in sorted(tensors)]
    if not problems and not parts_are_finite(path, (contents.parts or {}).values()):
        problems.append("a tensor holds NaN or infinity")
    if problems:
        listed = "; ".join(problems[:20]) + ("; …" if len(problems) > 20 else "")
        raise CheckpointError(f"{path}: {listed}: save it again")
    model.load_state_dict(model.state_dict() | state, assign=True)  # blocks stay without memory
    model.image_processor = processor
    way = cpu_route(about["precision"])
    fast = assembled(model, blocks, way, about["precision"], about["batch_size"])
    fast.dtype = _DTYPES[about["dtype"]]
    return fast


def read_header(path: Path) -> tuple[dict[str, Any], ViTConfig, ImageProcessor | None]:
    """What the header says, checked."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if HEADER not in metadata:
        raise CheckpointError(
            f"{path} was not written by FastViT.save: a checkpoint goes through vitlib.load"
        )
    try:
        about = json.loads(metadata[HEADER])
        if about["format"] != FORMAT:
            raise ConfigError(
                f"format {about['format']!r:.20}: expected {FORMAT}: load the checkpoint it was "
                "made from, optimize it and save it again"
            )
        cfg = ViTConfig(**with_tuples(about["config"]))
        rule = about["image_processor"]
        processor = None if rule is None else ImageProcessor(**with_tuples(rule))
        if about["precision"] not in PRECISIONS or about["dtype"] not in _DTYPES:
            raise ConfigError(f"precision {about['precision']!r} in {about['dtype']!r}")
        size = about["batch_size"]
        if size is not None and (type(size) is not int or size < 1):
            raise ConfigError(f"batch_size {size!r}")
    except (KeyError, TypeError, ValueError, AttributeError, VitlibError) as error:
        raise CheckpointError(f"{path} has a header that cannot be followed: {error}") from error
    return about, cfg, processor


def with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples they were."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}


def taken_block(
    tensors: dict[str, Tensor], path: str, cfg: ViTConfig, problems: list[str]
) -> BlockWeights:
    """A block's tensors, taken out of those of the file."""
    d, m = cfg.embed_dim, cfg.mlp_dim
    shapes = {"qkv": (3 * d, d), "out": (d, d), "up": (m, d), "down": (d, m)}
    activation = {"quick_gelu": "silu", "swiglu": "silu"}.get(cfg.activation, cfg.activation)
    if cfg.activation == "swiglu":
        shapes["gate"] = (m, d)
    first, second = (
        Norm(
            taken(tensors, f"{path}.norm{i}.weight", (d,), problems),
            taken(tensors, f"{path}.norm{i}.bias", (d,), problems),
            cfg.norm_eps,
        )
        for i in (1, 2)
    )
    linears = {
        name: taken_linear(tensors, f"{path}.{name}", shape, problems)
        for name, shape in shapes.items()
    }
    rotary = cfg.rope_theta is not None
    return BlockWeights((first, second), linears, cfg.num_heads, activation, rotary)


def taken_linear(
    tensors: dict[str, Tensor], path: str, shape: tuple[int, int], problems: list[str]
) -> Weights:
    """A linear's tensors: in 8 bits where they have a scale."""
    has = {name for name in ("bias", "scale", "input") if f"{path}.{name}" in tensors}
    dtypes = (torch.int8,) if "scale" in has else _FLOATS
    held = Weights(taken(tensors, f"{path}.weight", shape, problems, dtypes))
    if "bias" in has:
        held.bias = taken(tensors, f"{path}.bias", shape[:1], problems)
    if "scale" in has:
        held.scale = taken(tensors, f"{path}.scale", shape[:1], problems)
    if "input" in has:
        step, zero = taken(tensors, f"{path}.input", (2,), problems, (torch.float64,)).tolist()
        if "scale" not in has or not (0 < step < 1e30 and 0 <= zero <= 255):
            problems.append(f"{path}.input is {step}, {zero}: no scale and zero of bytes")
        else:
            held.x_scale, held.x_zero = step, int(zero)
    return held


def taken(
    tensors: dict[str, Tensor],
    name: str,
    shape: tuple[int, ...],
    problems: list[str],
    dtypes: tuple[torch.dtype, ...] = _FLOATS,
) -> Tensor:
    """One tensor, taken out; where it is not what it should be, a line more in `problems`."""
    tensor = tensors.pop(name, None)
    if tensor is not None and tuple(tensor.shape) == shape and tensor.dtype in dtypes:
        return tensor
    came = "missing" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
    wanted = " or ".join(str(dtype) for dtype in dtypes)
    problems.append(f"{name} is {came}: expected {shape} of {wanted}")
    return torch.zeros(shape, dtype=dtypes[0])
