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
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from vitlib.errors import ConfigError, SourceError
from vitlib.features.parts import (
    FORMAT,
    VERSION,
    Digests,
    FeatureKey,
    Floats,
    StoredVectors,
    compute_checksum,
    delete_part,
    read_part,
    to_array,
)
from vitlib.source.locate import ALWAYS_SHOW, read_json
from vitlib.system.atomic import check_writable, expand_home, open_atomic

logger = logging.getLogger("vitlib")

MARKER = "store.json"
MAX_BYTES = 4 * 2**30
MANY_PARTS, SMALL_PART = 32, 1024  # parts of fewer photos are merged where there are many


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
        self.folder, self.max_bytes = expand_home(folder), max_bytes
        self.is_writable = True  # until a write fails
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
        return self.open_group(key, width).find(digests)

    def open_group(self, key: FeatureKey, width: int) -> StoredVectors:
        """List the photos of a group, as it is now.

        Args:
            key: What made the vectors.
            width: D.

        Returns:
            Their vectors, which are read when they are looked up.
        """
        paths = self._list_parts(key.folder)
        return StoredVectors([read_part(path, key, width) for path in paths], width)

    def write(self, key: FeatureKey, digests: Digests, vectors: Floats) -> None:
        """Store the vectors of photos.

        A full disk, or a folder that may only be read, costs no caller the vectors that it has
        computed: the first failure is logged, and nothing more is written.

        Args:
            key: What made them.
            digests: Hash of each photo; photos without one are left out.
            vectors: (N, D); rows that are not finite are left out.
        """
        if self.is_writable:
            try:
                self._write(key, digests, vectors)
            except SourceError as error:
                self.is_writable = False
                logger.warning("%s: new vectors are not stored", error, extra=ALWAYS_SHOW)

    def _write(self, key: FeatureKey, digests: Digests, vectors: Floats) -> None:
        """Write a part, merge small ones, and delete the oldest."""
        finite = np.logical_and.reduce(np.isfinite(vectors), axis=1)
        kept = [i for i, digest in enumerate(digests) if digest and bool(finite[i])]
        if not kept:
            return
        if not (self.folder / MARKER).exists():
            with open_atomic(self.folder / MARKER) as file:
                file.write(json.dumps({"format": FORMAT, "version": VERSION}).encode())
        self._write_part(key, to_array([digests[i] for i in kept]), vectors[kept])
        self._merge_small_parts(key, vectors.shape[1])
        self._delete_oldest()

    def size(self) -> int:
        """Count the bytes of all parts.

        Returns:
            The bytes on the disk.
        """
        return sum(size for _, size, _ in self._stat_parts())

    def _write_part(self, key: FeatureKey, names: npt.NDArray[np.bytes_], vectors: Floats) -> None:
        """Write one part."""
        # The name is unlike that of any other process, now or later.
        name = f"part-{time.time_ns():x}-{os.getpid():x}-{os.urandom(4).hex()}.safetensors"
        raw = np.frombuffer(names.tobytes(), np.uint8).reshape(-1, 16)
        content: dict[str, npt.NDArray[Any]] = {"digests": raw, "vectors": vectors}
        metadata = key.metadata | {"checksum": str(compute_checksum(names, vectors))}
        with open_atomic(self.folder / key.folder / name) as file:
            file.write(save(content, metadata=metadata))

    def _merge_small_parts(self, key: FeatureKey, width: int) -> None:
        """Merge the small parts of a group into one, where there are many.

        Two processes that merge at once write the same photos twice, which does no harm.
        """
        # By their sizes first: each write comes here, and opens no part of a large group.
        limit = SMALL_PART * (4 * width + 16)
        paths = [path for path in self._list_parts(key.folder) if _size(path) < limit]
        if len(paths) < MANY_PARTS:
            return
        parts = [read_part(path, key, width) for path in paths]
        small = [part for part in parts if len(part.digests) and part.check()]
        if len(small) < MANY_PARTS // 2:
            return
        names, first = np.unique(
            np.concatenate([part.digests for part in small]), return_index=True
        )
        vectors = np.concatenate([part.vectors for part in small])[first]
        self._write_part(key, names, vectors)
        for part in small:
            delete_part(part.path)

    def _delete_oldest(self) -> None:
        """Delete the parts that were not used for the longest time, down to the limit."""
        parts = sorted(self._stat_parts())
        total = sum(size for _, size, _ in parts)
        for _, size, path in parts[:-1]:  # the newest stays: it was written now
            if total <= self.max_bytes:
                break
            delete_part(path)
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


def _size(path: Path) -> int:
    """Return the bytes of a part; 0 for one that another process deleted."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


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
