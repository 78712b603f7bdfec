"""PyTorch's own files (.pth, .pt, .bin): tensors only, mapped, and taken out of their wrappers."""

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
# Plain data that training runs keep beside their networks: arguments, paths, single numbers.
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
_one_at_a_time = threading.Lock()


def read_pickle(
    path: Path, members: Sequence[Member] | None, prefix: str | None = None
) -> Contents:
    """The tensors of a PyTorch file; `members` is None for one from before PyTorch 1.6, no zip.

    prefix: of the network to take, where the file holds several: see unwrap.

    Raises CheckpointError for one that holds more than data, naming what it wants, and for one that
    holds no state dict.
    """
    if members is not None and not all(member.stored for member in members):
        raise CheckpointError(f"{path} is compressed, as no PyTorch file is")
    storages: list[tuple[int, int]] = []  # address and bytes of each, as they are opened

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
    found, taken, ignored = unwrap(path, state, prefix)
    arch = read_arch(state)
    known = sorted(storages)
    tensors = {name: _checked(path, name, tensor, known) for name, tensor in found.items()}
    base = None if members is None else _base(storages, members)
    if base is None:
        return Contents(tensors, None, None, taken, ignored, arch)
    parts = {name: _part(tensor, base) for name, tensor in found.items() if tensor.numel()}
    return Contents(tensors, parts, None, taken, ignored, arch)


def _load(path: Path, note: Any, *, mapped: bool) -> object:
    def load() -> object:
        return torch.load(path, map_location=note, weights_only=True, mmap=mapped)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of what it then refuses
        try:
            return load()
        except pickle.UnpicklingError as error:
            blocked = _BLOCKED.search(str(error))
            if blocked is None or blocked[1] not in _ALLOWED_NAMES:
                raise
        # What is allowed is one list for all threads, put back on the way out.
        with _one_at_a_time, torch.serialization.safe_globals(_ALLOWED):
            return load()


def _refuse_amplifier(path: Path, members: Sequence[Member] | None) -> None:
    """torch allows bytearray(n), with which a hundred bytes could take any amount of memory."""
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


def _checked(path: Path, name: str, tensor: Tensor, known: list[tuple[int, int]]) -> Tensor:
    """The tensor, plain and aligned; refused where it is not numbers that lie in the file."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not dense or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {name[:80]} is sparse, empty of data or repeats it: save it as "
            "tensor.to_dense().contiguous()"
        )
    storage = tensor.untyped_storage()
    address, nbytes = storage.data_ptr(), storage.nbytes()
    start, size = (
        known[max(bisect_right(known, (address, sys.maxsize)) - 1, 0)] if known else (0, 0)
    )
    if tensor.numel() and not start <= address <= address + nbytes <= start + size:
        # torch lets a pickle make tensors of any size whose numbers are not in the file
        raise CheckpointError(f"{path}: {name[:80]} has no numbers in the file: download it again")
    tensor = tensor.detach()
    if tensor.numel() and tensor.data_ptr() % tensor.itemsize:
        return tensor.clone()
    return tensor


def _base(storages: Sequence[tuple[int, int]], members: Sequence[Member]) -> int | None:
    """The address of the file's first byte, which torch keeps to itself; None: not to be told.

    It is the one page that puts every storage on a member of its size.
    """
    places = {(member.start, member.size) for member in members}
    opened = {storage for storage in storages if storage[1]}
    if not opened:
        return None
    address, nbytes = max(opened, key=lambda storage: storage[1])
    bases = {address - start for start, size in places if size == nbytes}
    fitting = [
        base
        for base in bases
        if base % _PAGE_BYTES == 0 and all((a - base, size) in places for a, size in opened)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _part(tensor: Tensor, base: int) -> Part:
    """All bytes from the tensor's first number to its last, gaps between them included."""
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Part(tensor.dtype, tensor.data_ptr() - base, (reach + 1) * tensor.itemsize)
