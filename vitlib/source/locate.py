"""Where a checkpoint is: a hub id, a folder or one file -> local files, bounded and checked.

Nothing here knows what a ViT is: it finds JSON and tensors, and trusts neither. JSON is bounded in
size; source/readers/ open the files of tensors.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from torch import Tensor

from vitlib.errors import CheckpointError, SourceError, first_line
from vitlib.source.readers.contents import Part, parts_are_finite
from vitlib.source.readers.state_dict import select_prefix, strip_wrappers
from vitlib.source.readers.tensor_file import LORA_ERROR, READABLE, read_tensor_file

logger = logging.getLogger("vitlib")
# Log extra of a line that every verb shows, also those whose answer holds all other log lines.
ALWAYS_SHOW = {"always_show": True}

MAX_JSON_BYTES = 32 * 2**20  # ImageNet-21k's labels take 2 MiB
MAX_SHARDS = 10_000
PAUSE, PATIENCE = 1.0, 5.0  # seconds between two tries to reach the hub, and for each
# In the order transformers looks for them; then open_clip's.
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
DEMO = Path(__file__).parents[1] / "assets" / "demo"  # "demo" is this folder, wherever vitlib is
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


def resolve_source(source: str | os.PathLike[str]) -> str:
    """The path or hub id that a name stands for: "demo" is the folder of weights of that name here,
    and without one the small model inside the package."""
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


class _Read(NamedTuple):
    """What is remembered of a file once its tensors are handed out."""

    path: Path
    parts: dict[str, Part] | None
    finite: bool | None


class Source:
    """One checkpoint: its JSON files and its tensors, fetched from the hub only as they are asked
    for.

    `source` is a folder, one weights file (its JSON files lie beside it), a hub id, or "demo", the
    small model inside the package where no folder of weights here has that name. `revision`,
    `token`, `cache_dir` and `local_files_only` are huggingface_hub's and matter to a hub id only.
    After tensors(), `taken` says under which keys and prefixes the network lay where the file holds
    more than one, and `ignored` what was left out, such as "optimizer" or "student (150 tensors)".
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
        self.name = resolve_source(source)
        self._hub = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
        }
        self.wrapper_keys: tuple[str, ...] = ()
        self.ignored: tuple[str, ...] = ()
        self.arch: str | None = None  # the model's name beside the tensors, after tensors()
        self._read: list[_Read] | None = None
        self._names: dict[str, str] = {}  # of tensors() -> of the file
        self._unreachable: bool | None = None  # the hub, once a file is not in the cache
        self._downloaded: dict[str, Path | None] = {}
        self._json: dict[str, dict[str, Any] | None] = {}
        path = Path(self.name).expanduser()
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
        """The local path of one of the checkpoint's files, or None where it has no such file."""
        if self.is_hub:
            if name not in self._downloaded:
                self._downloaded[name] = self._download(name)
            return self._downloaded[name]
        path = self._folder / name
        return path if path.is_file() else None

    def json(self, name: str) -> dict[str, Any] | None:
        """One of the checkpoint's JSON files as a dict, or None where it has no such file."""
        if name not in self._json:
            path = self.file(name)
            self._json[name] = None if path is None else read_json(path)
        return self._json[name]

    def weights(self) -> list[Path]:
        """The files that hold the tensors: by the names that libraries give them, or the only one.

        Raises SourceError where there is none or no telling which, CheckpointError for an adapter.
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
        """Every tensor of the checkpoint by the file's names, memory-mapped wherever it allows;
        without what a training run keeps beside its networks and the marks inside names.

        prefix: of the names to take, which are then without it, where the file holds several
        networks.

        Raises CheckpointError for a file that is truncated or is not one of tensors, and where no
        name begins with the prefix.
        """
        tensors: dict[str, Tensor] = {}
        files: list[_Read] = []
        taken: list[str] = []
        ignored: list[str] = []
        for path in self.weights():
            contents = read_tensor_file(path, prefix)
            twice = sorted(tensors.keys() & contents.tensors.keys())
            if twice:
                raise CheckpointError(f"{path}: {', '.join(twice)} stand in an earlier shard too")
            tensors.update(contents.tensors)
            files.append(_Read(path, contents.parts, contents.finite))
            taken += contents.wrapper_keys
            ignored += contents.ignored
            self.arch = contents.arch
        self.wrapper_keys, self.ignored = tuple(dict.fromkeys(taken)), tuple(ignored)
        self._read, self._names = files, strip_wrappers(tensors)
        if prefix is not None:
            inner = select_prefix(self._names, prefix)
            others = len(self._names) - len(inner)
            self.select(inner, prefix, (f"other prefixes ({others} tensors)",) if others else ())
        return {new: tensors[old] for new, old in self._names.items()}

    def select(self, names: Mapping[str, str], prefix: str, left: tuple[str, ...]) -> None:
        """Leave out all tensors but these of what tensors() gave.

        names: another name of each -> the one that tensors() gave, or the file's.
        prefix: what the names are without; told in `taken` where anything is left out.
        left: what is left out, for `ignored`.
        """
        self._names = {new: self._names.get(old, old) for new, old in names.items()}
        self.ignored += left
        self.wrapper_keys += (prefix,) if prefix and left else ()
        kept = set(self._names.values())
        for file in self._read or []:  # what is left out need not be read
            for name in (file.parts or {}).keys() - kept:
                del (file.parts or {})[name]

    def is_finite(self) -> bool | None:
        """Whether tensors() gave no NaN and no infinity; None: not known, test each.

        False can come from numbers beside a tensor too: test each then as well. The files are read
        past the tensors, once, in small buffers: the tensors' pages stay untouched.
        """
        if self._read is None:
            self.tensors()
        for path, parts, finite in self._read or []:
            known = parts_are_finite(path, parts.values()) if parts is not None else finite
            if not known:
                return known
        return True

    def _refuse_fast(self, path: Path) -> None:
        if path.name == FAST_FILE:
            raise SourceError(
                f"{self.name!r} holds an optimized model, not a checkpoint: open it with "
                "vitlib.fast.load or vitlib.Predictor.load"
            )

    def _only_file(self) -> Path:
        """The one weights file of a local folder, whatever its name."""
        if not self.is_hub and self._folder.is_dir():
            try:
                there = sorted(self._folder.iterdir())
            except OSError as error:
                raise SourceError(f"{self.name!r} cannot be read: {error.strerror}") from error
            found = [
                path
                for path in there
                if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()
            ]
            if len(found) == 1:
                self._refuse_fast(found[0])
                return found[0]
            if found:
                names = ", ".join(path.name for path in found[:8])
                raise SourceError(
                    f"{self.name!r} holds {names}{', …' if len(found) > 8 else ''}: name the one "
                    f"to load, such as {found[0]}"
                )
        raise SourceError(
            f"no weights in {self.name!r}: expected one of {', '.join(WEIGHTS)}, or one file of "
            f"{READABLE}"
        )

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

    def _is_cached(self, name: str) -> bool:
        from huggingface_hub import errors, hf_hub_download

        where: dict[str, Any] = {**self._hub, "local_files_only": True}
        try:
            return Path(hf_hub_download(self.name, name, **where)).is_file()
        except errors.LocalEntryNotFoundError:
            return False

    def _download(self, name: str) -> Path | None:
        from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

        try:
            if self._unreachable is None and not self._hub["local_files_only"]:
                where = {key: self._hub[key] for key in ("revision", "cache_dir")}
                if try_to_load_from_cache(self.name, name, **where) is None:  # type: ignore[arg-type]
                    self._unreachable = is_hub_unreachable()
            asked = {
                **self._hub,
                "local_files_only": self._unreachable or self._hub["local_files_only"],
            }
            return Path(hf_hub_download(self.name, name, **asked))  # type: ignore[arg-type]
        except errors.LocalEntryNotFoundError as error:
            if name != "config.json" and self._is_cached("config.json"):
                return None  # offline, with this checkpoint in the cache: it has no such file
            raise SourceError(
                f"{self.name!r} is no folder or file here, is not in the cache, and the hub cannot "
                "be reached: check the name and the network, or give a local folder or weights "
                "file, or demo, the small model inside the package"
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
            reason = first_line(error)
            raise SourceError(f"{self.name!r} cannot be had from the hub: {reason}") from error


def is_hub_unreachable() -> bool:
    """Return whether this machine has no way to the hub at all.

    huggingface_hub tries again for half a minute. A network that is only slow, or a proxy, is left
    to it; a name that cannot be looked up is looked up twice, as a network may be coming up.
    """
    from huggingface_hub import constants

    url = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies().get(url.scheme) or getproxies().get("all"):
        return False
    port = url.port or (80 if url.scheme == "http" else 443)
    for wait in (PAUSE, 0.0):
        try:
            with socket.create_connection((url.hostname or "", port), timeout=PATIENCE):
                return False
        except TimeoutError:
            return False
        except OSError:
            time.sleep(wait)
    return True


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
