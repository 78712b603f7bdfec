"""Where a checkpoint is: a hub id, a folder or one file -> local files, bounded and checked.

Nothing here knows what a ViT is: it finds JSON and tensors, and trusts neither. JSON is bounded in
size, safetensors are memory-mapped after their header was checked, pickles are opened as tensors
only.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import re
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitlib.errors import CheckpointError, SourceError

MAX_JSON_BYTES = 32 * 2**20  # ImageNet-21k's labels take 2 MiB
MAX_SHARDS = 10_000
_CHUNK_BYTES = 2 * 2**20  # stays in a core's cache between reading and summing
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# In the order transformers looks for them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


class Source:
    """One checkpoint: its JSON files and its tensors, fetched from the hub only as they are asked
    for.

    `source` is a folder, one weights file (its JSON files lie beside it), or a hub id. `revision`,
    `token`, `cache_dir` and `local_files_only` are huggingface_hub's and matter to a hub id only.
    Raises SourceError where a path is not there or a hub id cannot be one.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> None:
        self.name = os.fspath(source)
        self._hub = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        self._downloaded: dict[str, Path | None] = {}
        path = Path(self.name).expanduser()
        self.is_hub = not path.exists()
        self._weights_file = path if path.is_file() else None
        self._folder = path.parent if path.is_file() else path
        looks_like_path = isinstance(source, os.PathLike) or not _HUB_ID.fullmatch(self.name)
        if self.is_hub and looks_like_path:
            raise SourceError(
                f"{self.name!r} is not there: expected a folder, a weights file or a hub id "
                "such as google/vit-base-patch16-224"
            )

    def file(self, name: str) -> Path | None:
        """The local path of one of the checkpoint's files, or None where it has no such file."""
        if self.is_hub:
            if name not in self._downloaded:
                self._downloaded[name] = self._download(name)
            return self._downloaded[name]
        path = self._folder / name
        return path if path.is_file() else None

    def json(self, name: str) -> dict[str, Any] | None:
        """One of the checkpoint's JSON files as a dict, or None where it has no such file."""
        path = self.file(name)
        return None if path is None else read_json(path)

    def weights(self) -> list[Path]:
        """The files that hold the tensors. Raises SourceError where there are none."""
        if self._weights_file is not None:
            single = self._weights_file
            return self._shards(single) if single.name.endswith(".index.json") else [single]
        for name in WEIGHTS:
            path = self.file(name)
            if path is not None:
                return self._shards(path) if name.endswith(".index.json") else [path]
        raise SourceError(f"no weights in {self.name!r}: expected one of {', '.join(WEIGHTS)}")

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the checkpoint under its own name, memory-mapped wherever the file
        allows.

        Raises CheckpointError for a file that is truncated or is not one of tensors.
        """
        tensors: dict[str, Tensor] = {}
        for path in self.weights():
            part = read_tensors(path)
            twice = sorted(tensors.keys() & part.keys())
            if twice:
                raise CheckpointError(f"{path}: {', '.join(twice)} stand in an earlier shard too")
            tensors.update(part)
        return tensors

    def _shards(self, index: Path) -> list[Path]:
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise CheckpointError(f"{index}: expected a 'weight_map' of tensor names to file names")
        names = sorted(set(files.values()))
        # A name with a folder in it would let an index read any file of this machine.
        outside = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
        if outside or len(names) > MAX_SHARDS:
            raise CheckpointError(f"{index}: expected plain file names, found {outside[:1] or '…'}")
        paths = {name: self.file(name) for name in names}
        missing = [name for name, path in paths.items() if path is None]
        if missing:
            raise SourceError(f"{self.name!r} lacks {', '.join(missing)}, which {index.name} names")
        return [path for path in paths.values() if path is not None]

    def _download(self, name: str) -> Path | None:
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(hf_hub_download(self.name, name, **self._hub))  # type: ignore[arg-type]
        except errors.LocalEntryNotFoundError as error:
            if name != "config.json" and self.file("config.json") is not None:
                return None  # offline, with this checkpoint in the cache: it has no such file
            raise SourceError(
                f"{self.name!r} is no folder or file here, is not in the cache, and the hub cannot "
                "be reached: check the name and the network, or give a folder"
            ) from error
        except errors.RemoteEntryNotFoundError:
            return None
        except errors.GatedRepoError as error:
            raise SourceError(
                f"{self.name!r} is gated: ask for access on its hub page, then pass token= or run "
                "`hf auth login`"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise SourceError(
                f"{self.name!r} is no folder or file here and not on the hub: check the name, or "
                "pass token= for a private one"
            ) from error
        except errors.RevisionNotFoundError as error:
            revision = self._hub["revision"]
            raise SourceError(f"{self.name!r} has no revision {revision!r} on the hub") from error
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise SourceError(f"{self.name!r} cannot be had from the hub: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises SourceError where it is too large or is not one."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise SourceError(f"{path} has {size} bytes: expected at most {MAX_JSON_BYTES}")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds a JSON {type(value).__name__}: expected an object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one .safetensors or PyTorch file, memory-mapped where its format allows."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull`")
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return _read_pickle(path, is_zip=start.startswith(b"PK"))
    return _read_safetensors(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The library checks the header and the file's length; then one mapping is cut into tensors.

    That takes a quarter of the time of asking the library for each. A tensor's storage is its own
    part of the mapping, so that saving or copying one does not take the others along.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as checked, path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            mapping = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
            for name, entry in json.loads(header).items():
                dtype = _DTYPES.get(entry.get("dtype"))
                if dtype is None or len(header) % dtype.itemsize:  # rare, or not aligned
                    if name != "__metadata__":
                        tensors[name] = checked.get_tensor(name)
                    continue
                start, end = (8 + len(header) + at for at in entry["data_offsets"])
                tensor = torch.empty(0, dtype=dtype)
                tensors[name] = tensor.set_(mapping[start:end], 0, entry["shape"])  # type: ignore[call-overload]
        return tensors
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({reason}): download it again"
        ) from error


def file_is_finite(path: Path, dtype: torch.dtype) -> bool | None:
    """Whether a safetensors file, all of this dtype, holds no NaN and no infinity; None: not known.

    It is read through two small buffers, one half by a thread beside, and not through the mapping:
    so the file's pages stay untouched, and belong to no process, until the first forward.
    """
    if path.suffix != ".safetensors" or dtype not in _DTYPES.values():
        return None
    width, size = dtype.itemsize, path.stat().st_size
    # As an integer, infinity is the smallest value of its sign that is not finite.
    infinities = torch.tensor([torch.inf, -torch.inf], dtype=dtype).view(torch.uint8).numpy()
    plus, minus = infinities.view(f"<i{width}")[0], infinities.view(f"<u{width}")[1]
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")  # the header's length, the header
    middle = start + (size - start) // 2 // width * width

    def finite_between(at: int, end: int) -> bool:
        pages = mmap.mmap(-1, _CHUNK_BYTES)  # aligned: some processors copy faster there
        signed, unsigned = np.frombuffer(pages, f"<i{width}"), np.frombuffer(pages, f"<u{width}")
        with path.open("rb", buffering=0) as part:
            while at < end:
                part.seek(at)
                count = min(part.readinto(pages) or 0, end - at) // width
                if not count or signed[:count].max() >= plus or unsigned[:count].max() >= minus:
                    return False
                at += count * width
        return True

    with ThreadPoolExecutor(1) as beside:
        other_half = beside.submit(finite_between, middle, size)
        return finite_between(start, middle) and other_half.result()


def _read_pickle(path: Path, *, is_zip: bool) -> dict[str, Tensor]:
    damaged = f"{path} is truncated or not a PyTorch file: download it again"
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                # torch stores its members as they are; a compressed one could grow without bound.
                if any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist()):
                    raise CheckpointError(f"{path} is compressed, as no PyTorch file is")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what it then refuses
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, which could run code: only weights are read; "
            "save its state_dict() as safetensors"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # damaged pickles raise whatever they lead to
        raise CheckpointError(damaged) from error
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise CheckpointError(f"{path} holds a {type(state).__name__}: expected names and tensors")
    others = sorted(k for k, v in state.items() if not isinstance(v, torch.Tensor))
    if others:
        raise CheckpointError(
            f"{path}: {', '.join(others[:5])} {'is' if len(others) == 1 else 'are'} no tensor: "
            "expected the state dict of a Hugging Face model"
        )
    return dict(state)
