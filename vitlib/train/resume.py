"""Training checkpoints: all that a run needs to continue to the same bits.

How data flows: trainable weights, their averages (EMA) and the optimizer's state become one
safetensors file; everything else becomes state.json beside it. Both lie in a temporary folder,
which gets its final name once they are on disk. So a kill loses only the steps since the last
checkpoint. Frozen weights are loaded with the model again; a checksum shows whether they are the
same.

Names of tensors: model/NAME, ema/NAME and optimizer/NAME/KEY, NAME as in model.named_parameters().
"""

from __future__ import annotations

import json
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
from vitlib.system.atomic import open_atomic, publish_folder
from vitlib.train import fsdp

# Increase it whenever a name of a parameter, of a tensor or of the state changes. Version 1 had
# other names of parameters than timm's.
FORMAT_VERSION = 2
FOLDER = "checkpoints"
TENSORS, STATE = "tensors.safetensors", "state.json"
MAX_STATE_SIZE = 64 * 2**20  # bytes of a state.json that is read: the folder may be hostile
_NAME = re.compile(r"^step-(\d{8,})$")


def write_checkpoint(
    out: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: set[int]
) -> None:
    """Write a checkpoint, then delete older ones.

    Args:
        out: Folder of the run.
        step: Steps taken so far.
        tensors: Full tensors, from collect_tensors.
        state: Everything else, as JSON.
        keep: Steps whose checkpoints stay, besides this one.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".part-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    # Through open_atomic only for its mode: save_file makes a file that its owner alone may read.
    with open_atomic(temporary / TENSORS) as file:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file.name)
    text = json.dumps({"format_version": FORMAT_VERSION, **state})
    (temporary / STATE).write_text(text, encoding="utf-8")
    publish_folder(temporary, folder / f"step-{step:08d}")
    # Only now, so that there is a whole checkpoint at every moment.
    for other, path in list_checkpoints(out).items():
        if other not in keep and other != step:
            shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(out: Path) -> dict[int, Path]:
    """List the complete checkpoints of a run.

    Args:
        out: Folder of the run.

    Returns:
        {step: folder}, oldest first.
    """
    folder = out / FOLDER
    paths = folder.iterdir() if folder.is_dir() else []
    checkpoints = {int(m[1]): path for path in paths if (m := _NAME.match(path.name))}
    return dict(sorted(checkpoints.items()))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a checkpoint.

    Args:
        path: Folder of the checkpoint.

    Returns:
        Its tensors and its state.

    Raises:
        TrainError: It is damaged, or of another version.
    """
    try:
        if (path / STATE).stat().st_size > MAX_STATE_SIZE:
            raise ValueError("state.json is too large")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("state.json holds no object")
        check_format(path, state)
        return load_file(path / TENSORS), state
    except TrainError:
        raise
    except Exception as error:  # safetensors raises an exception class of its own
        raise TrainError(f"{path} is no whole checkpoint ({error}): remove it") from error


def check_format(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that another version of vitlib has written.

    Args:
        path: Folder of the checkpoint, for the message.
        state: Content of its state.json.

    Raises:
        TrainError: Its version is not FORMAT_VERSION. Version 1 had no number in its file.
    """
    version = state.get("format_version", 1)
    if version != FORMAT_VERSION:
        raise TrainError(
            f"{path} has format version {version!r:.20}: expected {FORMAT_VERSION}: finish the run "
            "with the version of vitlib that started it, or start a new run in another folder"
        )


def collect_tensors(
    model: nn.Module, ema: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Collect every tensor that a checkpoint holds.

    Args:
        model: The model in training.
        ema: Averages of its weights by name; empty without EMA.
        optimizer: Its groups have the parameters' `names`.

    Returns:
        Tensors by their names in the file; with FSDP each process has its shards.
    """
    tensors: dict[str, Tensor] = {
        f"model/{n}": p for n, p in model.named_parameters() if p.requires_grad
    }
    tensors |= {f"ema/{name}": tensor for name, tensor in ema.items()}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{key}"] = value
    return tensors


def restore_tensors(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put the tensors of a checkpoint back.

    Args:
        tensors: From load_checkpoint.
        model: Its trainable weights are overwritten.
        ema: Its averages are overwritten.
        optimizer: Its state is replaced.

    Raises:
        TrainError: The checkpoint is of another model.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = {n.removeprefix("model/") for n in tensors if n.startswith("model/")}
    if names != trainable.keys() or any(
        p.shape != tensors[f"model/{n}"].shape for n, p in trainable.items()
    ):
        raise TrainError("the checkpoint's weights are not this model's: the run had another one")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(fsdp.shard_like(tensors[f"model/{name}"], parameter))
        for name, average in ema.items():
            average.copy_(fsdp.shard_like(tensors[f"ema/{name}"], average))
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            parameter_name, _, key = rest.rpartition("/")
            parameter = trainable[parameter_name]
            # The count of steps is a scalar that is never sharded. Fused AdamW wants it on the
            # device of the parameter.
            optimizer.state[parameter][key] = (
                tensor.to(parameter.device if parameter.is_cuda else "cpu", copy=True)
                if key == "step"
                else fsdp.shard_like(tensor, parameter)
            )


def checksum_frozen(model: nn.Module) -> int:
    """Compute a CRC-32 over all weights and buffers that do not train.

    Args:
        model: The model.

    Returns:
        The checksum, 0 if everything trains.
    """
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    checksum = 0
    for name, tensor in model.state_dict().items():
        if name not in trainable:
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            checksum = zlib.crc32(data, zlib.crc32(name.encode(), checksum))
    return checksum
