"""Images of tar files, such as WebDataset shards.

A member of an uncompressed tar is read by the thread that decodes it, at its offset; a compressed
tar is read from its start.
"""

from __future__ import annotations

import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from itertools import count

from vitlib.batch.inputs.items import (
    MAX_BYTES,
    ByteRange,
    Encoded,
    ImageRef,
    InvalidRow,
    Item,
    file_fingerprint,
)
from vitlib.batch.inputs.lists import IsNeeded
from vitlib.batch.inputs.walk import OnIgnored, is_image
from vitlib.errors import SourceError

UNCOMPRESSED, COMPRESSED = (".tar",), (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def iter_tar_items(path: str, on_ignored: OnIgnored, is_needed: IsNeeded) -> Iterator[Item]:
    """Yield the images of a tar in its order, named TAR/MEMBER.

    Args:
        path: the tar.
        on_ignored: receives each other member.
        is_needed: function of a row, True if its bytes will be read.

    Yields:
        The items; their rows count from 0.

    Raises:
        SourceError: for a file that is not a tar, or ends within a member.
    """
    origin = file_fingerprint(path)
    rows = count()
    try:
        with tarfile.open(path, "r:" if path.lower().endswith(UNCOMPRESSED) else "r|*") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep millions of them
                name = f"{path}/{member.name}"
                if member.isdir():
                    continue
                if not is_image(os.path.basename(member.name)):  # noqa: PTH119
                    on_ignored(name)
                    continue
                row = next(rows)
                yield Item(row, name, 0, _make_ref(tar, member, path, origin, is_needed(row)))
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise SourceError(f"{path} is not a tar, or damaged ({error})") from error


def _make_ref(
    tar: tarfile.TarFile, member: tarfile.TarInfo, path: str, origin: str, needed: bool
) -> ImageRef:
    """Make the reference of a member, with its bytes where the tar is compressed."""
    if not member.isreg() or member.sparse is not None:
        return InvalidRow("is a link or device in a tar: expected a file")
    if path.lower().endswith(UNCOMPRESSED):
        return ByteRange(path, member.offset_data, member.size, origin)
    fingerprint = f"{origin}:{member.name}"
    if member.size > MAX_BYTES:
        return InvalidRow(f"{member.size} bytes: expected at most {MAX_BYTES}")
    content = tar.extractfile(member) if needed else None
    return Encoded(content.read() if content else b"", fingerprint)
