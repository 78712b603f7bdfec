"""Store of features on disk, which several processes may read and fill at once.

FOLDER/store.json                         says that the folder is a store
FOLDER/MODEL-PRECISION-LAYER-POOL/        a group: the vectors of one feature of one model
FOLDER/.../part-*.safetensors             hashes of photos (n, 16) and their vectors (n, D)

A part appears by a rename, whole, and is never changed. So readers and writers need no lock, and a
kill loses the part in progress alone. A photo is known by the hash of its bytes: a changed file is
another photo. Each part says what made it, and has a checksum. A part that says something else, or
that is damaged, is not read; the photos are computed again. The parts that were not used for the
longest time are deleted where the store is larger than its limit.

Shapes: N photos, n photos of a part, D values of a vector.
"""

from __future__ import annotations

import json
import logging
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vitlib.errors import ConfigError, SourceError
from vitlib.features.selection import Feature
from vitlib.source.locate import read_json
from vitlib.system.atomic import check_writable, open_atomic

logger = logging.getLogger("vitlib")

FORMAT, VERSION, MARKER = "vitlib-features", "1", "store.json"
MAX_BYTES = 4 * 2**30
MANY_PARTS, SMALL_PART = 32, 1024  # parts of fewer photos are merged where there are many
Digests = Sequence[str]
Floats = npt.NDArray[np.float32]


class FeatureKey(NamedTuple):
    """Origin of a vector: model, precision, layer and pool.

    Attributes:
        model_digest: Hash of weights, config and preprocessing.
        precision: Arithmetic of the model.
        feature: Layer and pool.
    """

    model_digest: str
    precision: str
    feature: Feature

    @property
    def folder(self) -> str:
        """Name of the group."""
        return f"{self.model_digest}-{self.precision}-{self.feature.layer}-{self.feature.pool}"

    @property
    def metadata(self) -> dict[str, str]:
        """Facts that a part states of itself."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model_digest": self.model_digest,
            "precision": self.precision,
            "layer": str(self.feature.layer),
            "pool": self.feature.pool,
        }


class FeatureStore:
    """Vectors of photos by the hash of their bytes."""

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> None:
        """Open a store, or a folder that will be one.

        Args:
            folder: The folder: a store, or empty or absent.
            max_bytes: Most bytes of all parts together, at least 1.

        Raises:
            ConfigError: max_bytes is below 1.
            SourceError: The folder holds something else, or cannot be written.
        """
        if max_bytes < 1:
            raise ConfigError(f"max_bytes={max_bytes}: expected 1 or more")
        self.folder, self.max_bytes = Path(folder).expanduser(), max_bytes
        _check_folder(self.folder)

    def __repr__(self) -> str:
        """Describe the store in one line."""
        return f"FeatureStore({str(self.folder)!r}, max_bytes={self.max_bytes})"

    def read(self, key: FeatureKey, digests: Digests, width: int) -> Floats:
        """Read the vectors of photos.

        Args:
            key: What made them.
            digests: Hash of each photo, 32 hexadecimal digits; "" for none.
            width: D.

        Returns:
            (N, D); a row of NaN for each photo that the store has not.
        """
        vectors = np.full((len(digests), width), np.nan, np.float32)
        wanted: dict[str, list[int]] = {}
        for index, digest in enumerate(digests):
            if digest:
                wanted.setdefault(digest, []).append(index)
        for path in self._list_parts(key.folder):
            if not wanted:
                break
            names, stored = _read_part(path, key, width)
            hits = [(row, name) for row, name in enumerate(names) if name in wanted]
            if not hits or not _is_intact(path, names, stored):
                continue
            # A part may have a photo twice, and two parts may have the same.
            pairs = [(i, row) for row, name in hits for i in wanted.pop(name, ())]
            targets, rows = zip(*pairs, strict=True)
            vectors[list(targets)] = stored[list(rows)]
            with suppress(OSError):  # a folder that may only be read
                os.utime(path)
        return vectors

    def write(self, key: FeatureKey, digests: Digests, vectors: Floats) -> None:
        """Store the vectors of photos.

        Args:
            key: What made them.
            digests: Hash of each photo; photos without one are left out.
            vectors: (N, D); rows that are not finite are left out.

        Raises:
            SourceError: The folder cannot be written.
        """
        finite = np.logical_and.reduce(np.isfinite(vectors), axis=1)
        kept = [i for i, digest in enumerate(digests) if digest and bool(finite[i])]
        if not kept:
            return
        if not (self.folder / MARKER).exists():
            with open_atomic(self.folder / MARKER) as file:
                file.write(json.dumps({"format": FORMAT, "version": VERSION}).encode())
        self._write_part(key, [digests[i] for i in kept], np.ascontiguousarray(vectors[kept]))
        self._merge_small_parts(key, vectors.shape[1])
        self._delete_oldest()

    def size(self) -> int:
        """Count the bytes of all parts."""
        return sum(size for _, size, _ in self._stat_parts())

    def _write_part(self, key: FeatureKey, digests: Digests, vectors: Floats) -> Path:
        """Write one part."""
        # The name is unlike that of any other process, now or later.
        name = f"part-{time.time_ns():x}-{os.getpid():x}-{os.urandom(4).hex()}.safetensors"
        path = self.folder / key.folder / name
        names = np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 16)
        content: dict[str, npt.NDArray[Any]] = {"digests": names, "vectors": vectors}
        checksum = {"checksum": str(_checksum(names, vectors))}
        with open_atomic(path) as file:
            file.write(save(content, metadata=key.metadata | checksum))
        return path

    def _merge_small_parts(self, key: FeatureKey, width: int) -> None:
        """Merge the small parts of a group into one, where there are many.

        Two processes that merge at once write the same photos twice, which does no harm.
        """
        parts = self._list_parts(key.folder)
        if len(parts) < MANY_PARTS:
            return
        digests: list[str] = []
        merged: list[Floats] = []
        small: list[Path] = []
        for path in parts:
            names, vectors = _read_part(path, key, width)
            if len(names) < SMALL_PART and _is_intact(path, names, vectors):
                digests += names
                merged.append(np.array(vectors))
                small.append(path)
        if len(small) < MANY_PARTS // 2:
            return
        first = {name: row for row, name in reversed(list(enumerate(digests)))}
        rows = sorted(first.values())
        self._write_part(key, [digests[i] for i in rows], np.concatenate(merged)[rows])
        for path in small:
            _delete(path)

    def _delete_oldest(self) -> None:
        """Delete the parts that were not used for the longest time, down to the limit."""
        parts = sorted(self._stat_parts())
        total = sum(size for _, size, _ in parts)
        for _, size, path in parts[:-1]:  # the newest stays: it was written now
            if total <= self.max_bytes:
                break
            _delete(path)
            total -= size

    def _stat_parts(self) -> Iterator[tuple[int, int, Path]]:
        """Yield (last use, bytes, path) of each part."""
        for path in self.folder.glob("*/part-*.safetensors"):
            with suppress(OSError):  # deleted by another process
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path

    def _list_parts(self, group: str) -> list[Path]:
        """List the parts of a group, the newest first."""
        return sorted((self.folder / group).glob("part-*.safetensors"), reverse=True)


def open_store(
    folder: str | os.PathLike[str] | None, default: Path | None = None
) -> FeatureStore | None:
    """Open the store that an option, the environment or a verb names.

    Args:
        folder: The user's choice; None takes VITLIB_FEATURES of the environment, then `default`.
        default: The verb's own folder; None for no store.

    Returns:
        The store; None where nothing names one.

    Raises:
        SourceError: As FeatureStore().
    """
    chosen = folder or os.environ.get("VITLIB_FEATURES") or default
    return None if chosen is None else FeatureStore(chosen)


def _check_folder(folder: Path) -> None:
    """Raise SourceError for a folder that is no store and cannot become one."""
    marker = folder / MARKER
    try:
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        names = []
    except OSError as error:
        reason = error.strerror or error
        raise SourceError(f"{folder} cannot be a folder of features: {reason}") from error
    if MARKER in names:
        content = read_json(marker)
        if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            raise SourceError(f"{folder} is a store of another vitlib: name a new or empty folder")
    elif names:
        raise SourceError(
            f"{folder} holds {', '.join(names[:3])}{', …' * (len(names) > 3)} and is no store of "
            "features: name a new or empty folder"
        )
    else:
        check_writable(marker)


def _read_part(path: Path, key: FeatureKey, width: int) -> tuple[list[str], Floats]:
    """Read the photos of a part, and map its vectors; empty for what is not of this key."""
    nothing: tuple[list[str], Floats] = [], np.empty((0, width), np.float32)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            names, vectors = file.get_slice("digests"), file.get_slice("vectors")
            count = names.get_shape()[0]
            is_ours = (
                key.metadata.items() <= metadata.items()
                and (names.get_dtype(), names.get_shape()) == ("U8", [count, 16])
                and (vectors.get_dtype(), vectors.get_shape()) == ("F32", [count, width])
            )
            if not is_ours or not count:
                logger.warning("%s is of another model or vitlib: not read", path)
                return nothing
            raw = file.get_tensor("digests").tobytes().hex()
    except FileNotFoundError:  # another process merged or deleted it
        return nothing
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s): deleted", path, error)
        _delete(path)
        return nothing
    return [raw[i : i + 32] for i in range(0, len(raw), 32)], _map_vectors(path, count, width)


def _map_vectors(path: Path, count: int, width: int) -> Floats:
    """Map the vectors of a part, without reading them: (count, width)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    start = 8 + length + header["vectors"]["data_offsets"][0]
    return np.memmap(path, np.float32, "r", start, (count, width))


def _is_intact(path: Path, names: list[str], vectors: Floats) -> bool:
    """Check a part against its checksum; delete one that differs."""
    try:
        with safe_open(path, framework="numpy") as file:
            expected = (file.metadata() or {}).get("checksum")
    except (OSError, SafetensorError):
        return False
    digests = np.frombuffer(bytes.fromhex("".join(names)), np.uint8)
    if str(_checksum(digests, vectors)) == expected:
        return True
    logger.warning("%s is damaged: deleted, its photos are computed again", path)
    _delete(path)
    return False


def _checksum(names: npt.NDArray[np.uint8], vectors: Floats) -> int:
    """Compute CRC-32 of hashes and vectors."""
    return zlib.crc32(np.ascontiguousarray(vectors).data.cast("B"), zlib.crc32(names.tobytes()))


def _delete(path: Path) -> None:
    """Delete a part, unless another process did, or the system holds it open."""
    with suppress(OSError):
        path.unlink()
