"""Facts of each photo that one decode tells: sizes, colours, hashes, a small grey copy.

The facts are a file of records of one size, which the disk holds and not the memory, and which a
later audit reads instead of the photos whose bytes are the same.

Shapes: N photos.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitlib.audit.alignment import SIDE
from vitlib.audit.hashing import SIDE as HASH_SIDE
from vitlib.audit.hashing import hash_grey
from vitlib.errors import ImageError
from vitlib.image.decode import open_header, read_orientation
from vitlib.image.prefetch import prefetch_map
from vitlib.plots.draw import decode_upright
from vitlib.system.progress import progress_bar

VERSION = 1  # of FACTS and of how they are computed: other files are not read
FACTS = np.dtype(
    [
        ("digest", "<u8", (2,)),  # of the file's bytes; 0 where it cannot be read
        ("pixels", "<u8", (2,)),  # digest of the upright RGB pixels and their shape
        ("width", "<i4"),  # upright
        ("height", "<i4"),
        ("orientation", "u1"),  # EXIF's, 1..8; 1 is upright
        ("spread", "<f4"),  # largest standard deviation of a channel, 0..255
        ("chroma", "<f4"),  # 99 % of pixels have a smaller difference of two channels, 0..255
        ("hash", "<u8"),
        ("mirror_hash", "<u8"),
    ]
)
# Records of the file: a million of them are 4 GiB, which are read by pages and not as a whole.
RECORDS = np.dtype([("version", "<u4"), ("facts", FACTS), ("grey", "u1", (SIDE, SIDE))])
Facts = npt.NDArray[Any]


class Inspection(NamedTuple):
    """Facts of photos.

    Attributes:
        facts: (N,) FACTS, in memory; the digest of a photo that cannot be decoded is 0.
        grey: (N, 64, 64) uint8, grey copies, in the file.
        errors: why a photo cannot be decoded, by its index.
    """

    facts: Facts
    grey: npt.NDArray[np.uint8]
    errors: dict[int, str]


class GreyCopies:
    """Grey copies of some photos, read from the file when they are compared.

    Args:
        grey: (N, 64, 64) of all photos.
        rows: (n,) the photos.
    """

    def __init__(self, grey: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]) -> None:
        self._grey, self._rows = grey, rows

    def __getitem__(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Read the copies of some of the photos, (k, 64, 64)."""
        return np.asarray(self._grey[self._rows[index]])


def inspect_photos(
    photos: Sequence[Path],
    digests: Sequence[str],
    path: Path,
    *,
    earlier: Path | None = None,
    progress: bool = False,
) -> Inspection:
    """Compute the facts of photos, in threads.

    Args:
        photos: files.
        digests: 32 hexadecimal digits of each file's bytes; "" where it cannot be read.
        path: the .npy file to write them to.
        earlier: a file of an earlier call: photos with a digest in it are not decoded.
        progress: show a progress bar on stderr.

    Returns:
        The facts.
    """
    keys = digest_keys(digests)
    records = _create(path, len(photos))
    facts = np.zeros(len(photos), FACTS)
    stored = _read_earlier(earlier)
    missing: npt.NDArray[np.int64] = np.arange(len(photos))
    if stored is not None:
        missing = _copy_stored(records, facts, keys, stored)
    missing = missing[keys[missing].any(axis=1)]
    errors: dict[int, str] = {}

    def report(position: int, error: ImageError) -> None:
        errors[int(missing[position])] = str(error)

    rows = prefetch_map([photos[i] for i in missing.tolist()], inspect_photo, report, batch_size=32)
    with progress_bar(len(missing), progress, "photo") as advance:
        for index, row in zip(missing.tolist(), rows, strict=True):
            if row is not None:
                records[index] = row
                records["facts"]["digest"][index] = keys[index]
                facts[index] = records["facts"][index]
            advance(1)
    return Inspection(facts, records["grey"], errors)


def inspect_photo(photo: Path) -> Facts:
    """Compute the record of a photo, but for the digest of its bytes.

    Args:
        photo: the file.

    Returns:
        RECORDS, of no axis.

    Raises:
        ImageError: it cannot be decoded.
    """
    record = np.zeros((), RECORDS)
    record["version"], facts = VERSION, record["facts"]
    with open_header(photo) as header:
        facts["orientation"] = read_orientation(header)
    image = decode_upright(photo)
    facts["width"], facts["height"] = image.size
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
    digest.update(image.tobytes())
    facts["pixels"] = np.frombuffer(digest.digest(), "<u8")
    # Bicubic, and antialiased by Pillow: small photos are enlarged smoothly, as they were made.
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    facts["spread"] = small.std(axis=(0, 1)).max()
    facts["chroma"] = np.quantile(small.max(axis=2) - small.min(axis=2), 0.99)
    grey = small @ np.array([0.299, 0.587, 0.114], np.float32)
    record["grey"] = np.rint(grey).clip(0, 255)
    step = SIDE // HASH_SIDE
    halves = grey.reshape(HASH_SIDE, step, HASH_SIDE, step).mean(axis=(1, 3))
    facts["hash"], facts["mirror_hash"] = hash_grey(halves)
    return record


def digest_keys(digests: Sequence[str]) -> npt.NDArray[np.uint64]:
    """Convert digests to numbers.

    Args:
        digests: 32 hexadecimal digits each, or "".

    Returns:
        (N, 2); 0 for "".
    """
    data = b"".join(bytes.fromhex(digest) if digest else bytes(16) for digest in digests)
    return np.frombuffer(data, "<u8").reshape(-1, 2)


def is_flat(facts: Facts) -> npt.NDArray[np.bool_]:
    """Return True for photos of one colour, which have nothing to compare.

    Args:
        facts: (N,) FACTS.

    Returns:
        (N,) mask.
    """
    return np.asarray(facts["spread"] < 2.0)


def _create(path: Path, count: int) -> Facts:
    """Create the file, mapped into memory."""
    open_memmap: Any = np.lib.format.open_memmap  # which numpy leaves without types
    records: Facts = open_memmap(path, "w+", RECORDS, (count,))
    return records


def _read_earlier(path: Path | None) -> Facts | None:
    """Map the records of an earlier call; None without a file of this form."""
    if path is None or not path.is_file():
        return None
    try:
        stored: Facts = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # damaged: made again
        return None
    return stored if stored.dtype == RECORDS and stored.ndim == 1 else None


def _copy_stored(
    records: Facts, facts: Facts, keys: npt.NDArray[np.uint64], stored: Facts
) -> npt.NDArray[np.int64]:
    """Copy the records of photos whose bytes they are of, and return the other photos."""
    # Photos that could not be decoded have records of version 0.
    current = np.flatnonzero(stored["version"] == VERSION).tolist()
    digests = stored["facts"]["digest"][current].tolist()
    rows = {tuple(key): row for row, key in zip(current, digests, strict=True)}
    missing = []
    for index, key in enumerate(keys.tolist()):
        row = rows.get(tuple(key))
        if row is None or not any(key):
            missing.append(index)
        else:
            records[index] = stored[row]
            facts[index] = stored["facts"][row]
    return np.array(missing, np.int64)
