"""Location of a checkpoint: a hub id, a folder or one file -> local files, bounded and checked.

Nothing here knows what a ViT is. It finds JSON and tensors, and trusts neither: the size of JSON is
bounded, and source/readers/ check files of tensors.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from vitlib.errors import CheckpointError, SourceError
from vitlib.source.readers.contents import Part, parts_are_finite
from vitlib.source.readers.state_dict import select_prefix, strip_wrappers
from vitlib.source.readers.tensor_file import LORA_ERROR, READABLE, read_tensor_file
from vitlib.system.atomic import expand_home

if TYPE_CHECKING:
    from vitlib.source.hub import HubRepo

logger = logging.getLogger("vitlib")
# Extra of a log record that every command shows. Some commands put all other log lines into their
# output and hide them here.
ALWAYS_SHOW = {"always_show": True}

MAX_JSON_BYTES = 32 * 2**20  # ImageNet-21k's labels take 2 MiB
MAX_SHARDS = 10_000
# In transformers' order of preference; then open_clip's.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
FAST_FILE = (
    "fast.safetensors"  # what fast/serialize.py writes: packed for running, not a checkpoint
)
SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")
DEMO = Path(__file__).parents[1] / "assets" / "demo"  # the folder that "demo" stands for
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


def resolve_source(source: str | os.PathLike[str]) -> str:
    """Return the path or hub id that a name stands for.

    Args:
        source: A path, a hub id, or "demo": a folder of weights of that name in the working
            directory, else the small model inside the package.

    Returns:
        A path or hub id.
    """
    if source != "demo":
        return os.fspath(source)
    try:
        names = [path.name for path in Path(source).iterdir() if path.is_file()]
    except OSError:  # no such folder
        return str(DEMO)
    if not any(name in (*WEIGHTS, FAST_FILE) or name.lower().endswith(SUFFIXES) for name in names):
        return str(DEMO)
    logger.warning(
        "demo is the folder here, not the model inside the package, which is %s",
        DEMO,
        extra=ALWAYS_SHOW,
    )
    return os.fspath(source)


class _ReadFile(NamedTuple):
    """Facts of a file whose tensors were read, for Source.is_finite()."""

    path: Path
    parts: dict[str, Part] | None
    finite: bool | None


class Source:
    """JSON files and tensors of one checkpoint; files of the hub are downloaded on first use.

    Attributes:
        name: Path or hub id.
        is_hub: True if it is a hub id.
        is_file: True if it is one weights file.
        wrapper_keys: After tensors(): keys and prefixes under which the network was, if the file
            holds more than one network.
        ignored: After tensors(): descriptions of the content that was left out, such as "optimizer"
            or "student (150 tensors)".
        arch: After tensors(): name of the model that the training code stored, or None.
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
        """Find the checkpoint; nothing is read or downloaded yet.

        Args:
            source: A folder, one weights file (its JSON files lie beside it), a hub id, or "demo";
                see resolve_source().
            revision: Branch, tag or commit on the hub; None for the default branch.
            token: Access token of the hub; None or True for the stored one, False for none.
            cache_dir: Folder of downloads; None for huggingface_hub's.
            local_files_only: True never connects to the hub.

        Raises:
            SourceError: A path does not exist, or the name cannot be a hub id.
        """
        if not isinstance(source, str | os.PathLike):
            raise SourceError(
                f"source: expected a hub id, a folder or a weights file, got a "
                f"{type(source).__name__}"
            )
        self.name = resolve_source(source)
        self._hub_options = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        self._repo: HubRepo | None = None
        self.wrapper_keys: tuple[str, ...] = ()
        self.ignored: tuple[str, ...] = ()
        self.arch: str | None = None
        self._read: list[_ReadFile] | None = None
        # Name of tensors() -> name in the file.
        self._names: dict[str, str] = {}
        self._downloaded: dict[str, Path | None] = {}
        self._json: dict[str, dict[str, Any] | None] = {}
        path = expand_home(self.name)
        self.is_hub = not path.exists()
        self._weights_file = path if path.is_file() else None
        self.is_file = path.is_file()
        self._folder = path.parent if path.is_file() else path
        looks_like_path = isinstance(source, os.PathLike) or not _HUB_ID.fullmatch(self.name)
        if self.is_hub and looks_like_path:
            raise SourceError(
                f"{self.name!r} is not there: expected a folder, a weights file or a hub id "
                "such as google/vit-base-patch16-224"
            )

    def file(self, name: str) -> Path | None:
        """Return the local path of one of the checkpoint's files.

        Args:
            name: Name of the file, without a folder.

        Returns:
            Its path, downloaded if need be; None if the checkpoint has no such file.

        Raises:
            SourceError: The hub has no such checkpoint, or cannot be reached.
        """
        if self.is_hub:
            if name not in self._downloaded:
                self._downloaded[name] = self._hub_repo().download(name)
            return self._downloaded[name]
        local = self._folder / name
        return local if local.is_file() else None

    def json(self, name: str) -> dict[str, Any] | None:
        """Read one of the checkpoint's JSON files.

        Args:
            name: Name of the file, without a folder.

        Returns:
            Its object; None if the checkpoint has no such file.

        Raises:
            SourceError: As file() and read_json().
        """
        if name not in self._json:
            path = self.file(name)
            self._json[name] = None if path is None else read_json(path)
        return self._json[name]

    def weights(self) -> list[Path]:
        """List the files that hold the tensors: by the names of libraries, or the only one.

        Returns:
            One path, or those of all shards.

        Raises:
            SourceError: There is no weights file, or several and no index.
            CheckpointError: The checkpoint is a LoRA adapter.
        """
        if self._weights_file is not None:
            single = self._weights_file
            self._refuse_fast(single)
            return self._shards(single) if single.name.endswith(".index.json") else [single]
        for name in WEIGHTS:
            path = self.file(name)
            if path is not None:
                return self._shards(path) if name.endswith(".index.json") else [path]
        if any(self.file(name) for name in ("adapter_config.json", "adapter_model.safetensors")):
            raise CheckpointError(f"{self.name!r} {LORA_ERROR}")
        return [self._only_file()]

    def tensors(self, prefix: str | None = None) -> dict[str, Tensor]:
        """Read every tensor of the network, memory-mapped where the format allows.

        Optimizer state and other content of a training run are left out.

        Args:
            prefix: Prefix of the names to read, if the file holds several networks; None for all.

        Returns:
            Tensors by the file's names, without the prefix and the marks of torch.compile and FSDP.

        Raises:
            CheckpointError: A file is damaged or of another kind, or no name has the prefix.
        """
        tensors: dict[str, Tensor] = {}
        files: list[_ReadFile] = []
        wrapper_keys: list[str] = []
        ignored: list[str] = []
        for path in self.weights():
            contents = read_tensor_file(path, prefix)
            twice = sorted(tensors.keys() & contents.tensors.keys())
            if twice:
                raise CheckpointError(f"{path}: {', '.join(twice)} stand in an earlier shard too")
            tensors.update(contents.tensors)
            files.append(_ReadFile(path, contents.parts, contents.finite))
            wrapper_keys += contents.wrapper_keys
            ignored += contents.ignored
            self.arch = contents.arch
        self.wrapper_keys, self.ignored = tuple(dict.fromkeys(wrapper_keys)), tuple(ignored)
        self._read = files
        return self._rename(tensors, prefix)

    def _rename(self, tensors: dict[str, Tensor], prefix: str | None) -> dict[str, Tensor]:
        """Remove the marks of wrappers and the prefix from names; select by the prefix."""
        self._names = strip_wrappers(tensors)
        if prefix is not None:
            inner = select_prefix(self._names, prefix)
            others = len(self._names) - len(inner)
            self.select(inner, prefix, (f"other prefixes ({others} tensors)",) if others else ())
        return {new: tensors[old] for new, old in self._names.items()}

    def select(self, names: Mapping[str, str], prefix: str, left: tuple[str, ...]) -> None:
        """Restrict the checkpoint to some of the tensors that tensors() returned.

        Args:
            names: {new name: name that tensors() returned, or the file's}.
            prefix: Prefix that the new names lack; recorded in `wrapper_keys` if others are left.
            left: Descriptions of the tensors that are left out, for `ignored`.
        """
        self._names = {new: self._names.get(old, old) for new, old in names.items()}
        self.ignored += left
        self.wrapper_keys += (prefix,) if prefix and left else ()
        selected = set(self._names.values())
        # is_finite() need not read tensors that are left out.
        for file in self._read or []:
            for name in (file.parts or {}).keys() - selected:
                del (file.parts or {})[name]

    def is_finite(self) -> bool | None:
        """Return True if no tensor has a NaN or an infinity.

        The files are read once, in small buffers and not through the mappings, so that the tensors
        take no memory yet.

        Returns:
            None if it is not known. False may come from bytes between the numbers of a tensor. In
            both cases test each tensor.
        """
        if self._read is None:
            self.tensors()
        for path, parts, finite in self._read or []:
            is_finite = parts_are_finite(path, parts.values()) if parts is not None else finite
            if not is_finite:
                return is_finite
        return True

    def _hub_repo(self) -> HubRepo:
        # Imported here: local checkpoints need no network code.
        from vitlib.source.hub import HubRepo

        if self._repo is None:
            self._repo = HubRepo(self.name, self._hub_options)
        return self._repo

    def _refuse_fast(self, path: Path) -> None:
        if path.name == FAST_FILE:
            raise SourceError(
                f"{self.name!r} holds an optimized model, not a checkpoint: open it with "
                "vitlib.fast.load or vitlib.Predictor.load"
            )

    def _only_file(self) -> Path:
        """Return the only weights file of a local folder, under any name."""
        if not self.is_hub and self._folder.is_dir():
            try:
                entries = sorted(self._folder.iterdir())
            except OSError as error:
                raise SourceError(f"{self.name!r} cannot be read: {error.strerror}") from error
            candidates = [
                path
                for path in entries
                if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()
            ]
            if len(candidates) == 1:
                self._refuse_fast(candidates[0])
                return candidates[0]
            if candidates:
                names = ", ".join(path.name for path in candidates[:8])
                raise SourceError(
                    f"{self.name!r} holds {names}{', …' if len(candidates) > 8 else ''}: name the "
                    f"one to load, such as {candidates[0]}"
                )
        raise SourceError(
            f"no weights in {self.name!r}: expected one of {', '.join(WEIGHTS)}, or one file of "
            f"{READABLE}"
        )

    def _shards(self, index: Path) -> list[Path]:
        """Return the files that an index names."""
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise CheckpointError(f"{index}: expected a 'weight_map' of tensor names to file names")
        names = sorted(set(files.values()))
        # A name with a folder in it would make this read any file of the machine.
        outside = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
        if outside or len(names) > MAX_SHARDS:
            raise CheckpointError(f"{index}: expected plain file names, got {outside[:1] or '…'}")
        paths = {name: self.file(name) for name in names}
        missing = [name for name, path in paths.items() if path is None]
        if missing:
            raise SourceError(f"{self.name!r} lacks {', '.join(missing)}, which {index.name} names")
        return [path for path in paths.values() if path is not None]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        SourceError: It cannot be read, is too large, or holds something else.
    """
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
