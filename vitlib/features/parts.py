"""Parts of a store of features: files of photos' hashes and vectors.

Shapes: N photos, n photos of a part, D values of a vector.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from vitlib.features.selection import Feature

logger = logging.getLogger("vitlib")

FORMAT, VERSION = "vitlib-features", "1"
DIGEST = np.dtype("S16")  # all have 16 bytes, so that zeros at the end, which do not count, match
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


class Part(NamedTuple):
    """A file of a group.

    Attributes:
        path: The file.
        digests: Hash of each photo, (n,) of 16 bytes.
        vectors: (n, D), mapped.
        checksum: CRC-32 of both, as the file states it.
    """

    path: Path
    digests: npt.NDArray[np.bytes_]
    vectors: Floats
    checksum: str

    def check(self) -> bool:
        """Compare the content with the checksum; delete a part that differs."""
        if str(compute_checksum(self.digests, self.vectors)) != self.checksum:
            logger.warning("%s is damaged: deleted, its photos are computed again", self.path)
            delete_part(self.path)
            return False
        with suppress(OSError):  # a folder that may only be read
            os.utime(self.path)  # used now
        return True


def to_array(digests: Digests) -> npt.NDArray[np.bytes_]:
    """Convert hashes to an array (N,) of 16 bytes.

    Args:
        digests: 32 hexadecimal digits each.
    """
    return np.frombuffer(bytes.fromhex("".join(digests)), DIGEST)


class StoredVectors:
    """Vectors of a group, found by the hash of a photo; safe in threads."""

    def __init__(self, parts: Sequence[Part], width: int) -> None:
        """Index parts.

        Args:
            parts: The parts, the newest first.
            width: D.
        """
        self.parts, self.width = parts, width
        self.intact: dict[int, bool] = {}  # by the number of a part that was read
        names = [part.digests for part in parts]
        digests = np.concatenate(names) if names else np.empty(0, DIGEST)
        # Stable: of a photo that several parts have, the newest part comes first.
        self.order = np.argsort(digests, kind="stable")
        self.digests = digests[self.order]
        self.ends = np.cumsum([len(part.digests) for part in parts])

    def find(self, digests: Digests) -> Floats:
        """Look up photos.

        Args:
            digests: Hash of each photo, 32 hexadecimal digits; "" for none.

        Returns:
            (N, D); a row of NaN for each photo that the store has not.
        """
        vectors = np.full((len(digests), self.width), np.nan, np.float32)
        wanted = np.flatnonzero([bool(digest) for digest in digests])
        names = to_array([digests[int(i)] for i in wanted])
        places = np.searchsorted(self.digests, names)
        inside = places < len(self.digests)
        hits = np.flatnonzero(inside)[self.digests[places[inside]] == names[inside]]
        rows = self.order[places[hits]]
        owners = np.searchsorted(self.ends, rows, side="right")
        for owner in np.unique(owners).tolist():
            part, own = self.parts[owner], owners == owner
            if owner not in self.intact:
                self.intact[owner] = part.check()
            if self.intact[owner]:
                first = self.ends[owner] - len(part.digests)
                vectors[wanted[hits[own]]] = part.vectors[rows[own] - first]
        return vectors


def read_part(path: Path, key: FeatureKey, width: int) -> Part:
    """Read the photos of a part, and map its vectors.

    Args:
        path: The file.
        key: What made the vectors.
        width: D.

    Returns:
        The part; an empty one for a file that is gone, damaged, or of another key.
    """
    nothing = Part(path, np.empty(0, DIGEST), np.empty((0, width), np.float32), "")
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
            digests = np.frombuffer(file.get_tensor("digests").tobytes(), DIGEST)
        return Part(path, digests, _map_vectors(path, count, width), metadata.get("checksum", ""))
    except FileNotFoundError:  # another process merged or deleted it
        return nothing
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s): deleted", path, error)
        delete_part(path)
        return nothing


def _map_vectors(path: Path, count: int, width: int) -> Floats:
    """Map the vectors of a part, without reading them: (count, width)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    start = 8 + length + header["vectors"]["data_offsets"][0]
    return np.memmap(path, np.float32, "r", start, (count, width))


def compute_checksum(names: npt.NDArray[np.bytes_], vectors: Floats) -> int:
    """Compute CRC-32 of hashes and vectors.

    Args:
        names: Hashes, (n,).
        vectors: (n, D).
    """
    return zlib.crc32(np.ascontiguousarray(vectors).data.cast("B"), zlib.crc32(names.tobytes()))


def delete_part(path: Path) -> None:
    """Delete a part, unless another process did, or the system holds it open.

    Args:
        path: The file.
    """
    with suppress(OSError):
        path.unlink()
