"""Where a run is, on the disk: whole or not there, so that a kill loses only the steps since.

How data flows: the weights that move, their averages and the optimizer's numbers become one
safetensors file under plain names, everything else state.json beside it, in a folder that gets its
name once both are on the disk. The weights that do not move come from the model again; a sum over
them tells whether it is the same.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitlib.errors import TrainError
from vitlib.system.atomic import open_atomic
from vitlib.train import fsdp

FOLDER = "checkpoints"
TENSORS, STATE = "tensors.safetensors", "state.json"
FORMAT_VERSION = 2  # of state.json and of the tensors' names; 1: before parameters had timm's
_NAME = re.compile(r"^step-(\d{8,})$")
MOST_STATE = 64 * 2**20  # bytes of a state.json that is believed


def write_checkpoint(
    out: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: set[int]
) -> None:
    """A checkpoint after `step` steps; those of other steps than `keep` and this go."""
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".part-{step:08d}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    with open_atomic(beside / TENSORS) as file:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file.name)
    (beside / STATE).write_text(
        json.dumps({"format_version": FORMAT_VERSION, **state}), encoding="utf-8"
    )
    for path in (beside / TENSORS, beside / STATE, beside):
        fsync_path(path)
    target = folder / f"step-{step:08d}"
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    fsync_path(folder)
    for other, path in list_checkpoints(out).items():
        if other not in keep and other != step:
            shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(out: Path) -> dict[int, Path]:
    """The whole checkpoints of a run, oldest first."""
    folder = out / FOLDER
    paths = folder.iterdir() if folder.is_dir() else []
    found = {int(m[1]): path for path in paths if (m := _NAME.match(path.name))}
    return dict(sorted(found.items()))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint's tensors and state. Raises TrainError for one that is damaged."""
    try:
        if (path / STATE).stat().st_size > MOST_STATE:
            raise ValueError("state.json is too large")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("state.json holds no object")
        tensors = load_file(path / TENSORS)
    except Exception as error:  # safetensors raises its own kind
        raise TrainError(f"{path} is no whole checkpoint ({error}): remove it") from error
    version = state.get("format_version", 1)
    if version != FORMAT_VERSION:
        raise TrainError(
            f"{path} has format version {version!r:.20}: expected {FORMAT_VERSION}: finish the run "
            "with the version of vitlib that started it, or start a new run"
        )
    return tensors, state


def collect_tensors(
    model: nn.Module, average: Mapping[str, Tensor], opt: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Everything of a run that is a tensor, by name; with fsdp in parts."""
    found: dict[str, Tensor] = {
        f"model/{n}": p for n, p in model.named_parameters() if p.requires_grad
    }
    found |= {f"average/{name}": tensor for name, tensor in average.items()}
    for group in opt.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in opt.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"optim/{name}/{key}"] = value
    return found


def restore_tensors(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    average: dict[str, Tensor],
    opt: torch.optim.Optimizer,
) -> None:
    """Put them back. Raises TrainError where they are of another model."""
    moved = {n: p for n, p in model.named_parameters() if p.requires_grad}
    theirs = {n.removeprefix("model/") for n in tensors if n.startswith("model/")}
    if theirs != moved.keys() or any(
        p.shape != tensors[f"model/{n}"].shape for n, p in moved.items()
    ):
        raise TrainError("the checkpoint's weights are not this model's: the run had another one")
    with torch.no_grad():
        for name, parameter in moved.items():
            parameter.copy_(fsdp.like(tensors[f"model/{name}"], parameter))
        for name, held in average.items():
            held.copy_(fsdp.like(tensors[f"average/{name}"], held))
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optim":
            which, _, key = rest.rpartition("/")
            place = "cpu" if key == "step" and not moved[which].is_cuda else moved[which].device
            opt.state[moved[which]][key] = (
                tensor.to(place, copy=True) if key == "step" else fsdp.like(tensor, moved[which])
            )


def checksum_frozen(model: nn.Module) -> int:
    """A sum over the weights that do not move."""
    moved, total = {n for n, p in model.named_parameters() if p.requires_grad}, 0
    for name, tensor in model.state_dict().items():
        if name not in moved:
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            total = zlib.crc32(data, zlib.crc32(name.encode(), total))
    return total


def fsync_path(path: Path) -> None:
    """Have the system write what it holds of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
