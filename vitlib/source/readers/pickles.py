"""Reader of PyTorch's files (.pth, .pt, .bin): tensors and plain data alone, memory-mapped."""

from __future__ import annotations

import argparse
import mmap
import pathlib
import pickle
import re
import sys
import threading
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitlib.errors import CheckpointError
from vitlib.source.readers.contents import Contents, Part
from vitlib.source.readers.state_dict import read_arch, unwrap
from vitlib.source.readers.zips import Member

MAX_PICKLE_BYTES = 64 * 2**20  # of names and sizes; a ViT-g with its optimizer takes 1 MiB
# Plain data that training code saves besides networks: arguments, paths, NumPy scalars.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS = ("float64", "float32", "float16", "int64", "int32", "bool")
_ALLOWED: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    *(type(np.dtype(name)) for name in _NUMBERS),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
]
_ALLOWED_NAMES = {
    "argparse.Namespace",
    "pathlib.PosixPath",
    "numpy.dtype",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray.scalar",
    *(f"numpy.dtypes.{type(np.dtype(name)).__name__}" for name in _NUMBERS),
}
_BLOCKED = re.compile(r"GLOBAL ([\w.]{1,100}) (?:was not|whose)")
_PAGE_BYTES = 4096
_globals_lock = threading.Lock()


def read_pickle(
    path: Path, members: Sequence[Member] | None, prefix: str | None = None
) -> Contents:
    """Read the tensors of a PyTorch file.

    Args:
        path: The file.
        members: Its members, from read_members(); None for a file that is no zip, as PyTorch wrote
            before version 1.6.
        prefix: Prefix of the network to read from a file with several; see unwrap().

    Returns:
        The tensors, mapped if the file is a zip.

    Raises:
        CheckpointError: The file holds more than tensors and plain data, which the message names,
            or no state dict.
    """
    if members is not None and not all(member.stored for member in members):
        raise CheckpointError(f"{path} is compressed, as no PyTorch file is")
    storages: list[tuple[int, int]] = []  # address and bytes of each storage

    def note(storage: Any, _: str) -> Any:
        storages.append((storage.data_ptr(), storage.nbytes()))
        return storage

    try:
        _refuse_amplifier(path, members)
        state = _load(path, note, mapped=members is not None)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        blocked = _BLOCKED.search(str(error))
        wants = f"wants {blocked[1]}" if blocked else "is damaged or holds more than tensors"
        raise CheckpointError(
            f"{path} {wants}, which could run code: only tensors and plain data are read; where "
            "you trust it (a whole model, say) open it yourself and save state_dict() as "
            "safetensors"
        ) from error
    except Exception as error:  # damaged pickles raise whatever they lead to
        raise CheckpointError(
            f"{path} is truncated or not a PyTorch file: download it again"
        ) from error
    unwrapped, wrapper_keys, ignored = unwrap(path, state, prefix)
    arch = read_arch(state)
    ordered = sorted(storages)
    tensors = {name: _check_tensor(path, name, t, ordered) for name, t in unwrapped.items()}
    base = None if members is None else _base(storages, members)
    if base is None:
        return Contents(tensors, None, None, wrapper_keys, ignored, arch)
    parts = {name: _part(tensor, base) for name, tensor in unwrapped.items() if tensor.numel()}
    return Contents(tensors, parts, None, wrapper_keys, ignored, arch)


def _load(path: Path, note: Any, *, mapped: bool) -> object:
    """Unpickle with torch's allow-list, extended by _ALLOWED only where the file needs it."""

    def load() -> object:
        return torch.load(path, map_location=note, weights_only=True, mmap=mapped)

    with warnings.catch_warnings():
        # torch warns of what it then refuses.
        warnings.simplefilter("ignore")
        try:
            return load()
        except pickle.UnpicklingError as error:
            blocked = _BLOCKED.search(str(error))
            if blocked is None or blocked[1] not in _ALLOWED_NAMES:
                raise
        # torch's allow-list is global to the process: one thread extends it at a time.
        with _globals_lock, torch.serialization.safe_globals(_ALLOWED):
            return load()


def _refuse_amplifier(path: Path, members: Sequence[Member] | None) -> None:
    """Refuse bytearray(n), which torch allows: 100 bytes could allocate any memory with it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as bytes_:
        spans = [(0, len(bytes_))]
        if members is not None:
            spans = [
                (m.start, m.start + m.size) for m in members if m.name.lower().endswith("data.pkl")
            ]
            if any(end - start > MAX_PICKLE_BYTES for start, end in spans):
                raise CheckpointError(
                    f"{path} has a pickle of more than {MAX_PICKLE_BYTES} bytes: expected names "
                    "and sizes of tensors"
                )
        if any(bytes_.find(b"bytearray", *span) >= 0 for span in spans):
            raise CheckpointError(
                f"{path} wants builtins.bytearray, which can take any amount of memory: save its "
                "state dict alone, as safetensors"
            )


def _check_tensor(path: Path, name: str, tensor: Tensor, storages: list[tuple[int, int]]) -> Tensor:
    """Return a tensor detached and aligned; raise if its numbers do not lie in the file."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not dense or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {name[:80]} is sparse, empty of data or repeats it: save it as "
            "tensor.to_dense().contiguous()"
        )
    storage = tensor.untyped_storage()
    address, nbytes = storage.data_ptr(), storage.nbytes()
    start, size = (
        storages[max(bisect_right(storages, (address, sys.maxsize)) - 1, 0)] if storages else (0, 0)
    )
    if tensor.numel() and not start <= address <= address + nbytes <= start + size:
        # torch lets a pickle make tensors of any size whose numbers are not in the file.
        raise CheckpointError(f"{path}: {name[:80]} has no numbers in the file: download it again")
    tensor = tensor.detach()
    if tensor.numel() and tensor.data_ptr() % tensor.itemsize:
        return tensor.clone()
    return tensor


def _base(storages: Sequence[tuple[int, int]], members: Sequence[Member]) -> int | None:
    """Return the address at which torch mapped the file, which it does not tell; None if unknown.

    It is the only page-aligned address for which each storage coincides with a member of its size.
    """
    spans = {(member.start, member.size) for member in members}
    opened = {storage for storage in storages if storage[1]}
    if not opened:
        return None
    address, nbytes = max(opened, key=lambda storage: storage[1])
    bases = {address - start for start, size in spans if size == nbytes}
    fitting = [
        base
        for base in bases
        if base % _PAGE_BYTES == 0 and all((a - base, size) in spans for a, size in opened)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _part(tensor: Tensor, base: int) -> Part:
    """Return the range from a tensor's first number to its last, with any gaps between."""
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Part(tensor.dtype, tensor.data_ptr() - base, (reach + 1) * tensor.itemsize)
