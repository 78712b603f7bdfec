"""Tar files -> items: members that an image's name has, as WebDataset shards hold them.

A plain tar is read where a member lies, by whoever decodes it; a compressed one from its start.
"""

from __future__ import annotations

import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from itertools import count

from vitlib.batch.inputs.items import MAX_BYTES, Encoded, Item, Place, Span, Wrong, stamp_of
from vitlib.batch.inputs.lists import Needed
from vitlib.batch.inputs.walk import Ignored, is_image
from vitlib.errors import SourceError

PLAIN, COMPRESSED = (".tar",), (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def tar_items(path: str, ignored: Ignored, needed: Needed) -> Iterator[Item]:
    """The images of a tar in its order, named TAR/MEMBER. The other files are told.

    Raises SourceError for what is no tar, or ends amid a member.
    """
    of = stamp_of(path)
    rows = count()
    try:
        with tarfile.open(path, "r:" if path.lower().endswith(PLAIN) else "r|*") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps millions
                shown = f"{path}/{member.name}"
                if member.isdir():
                    continue
                if not is_image(os.path.basename(member.name)):  # noqa: PTH119
                    ignored(shown)
                    continue
                row = next(rows)
                yield Item(row, shown, 0, _place(tar, member, path, of, needed(row)))
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise SourceError(f"{path} is no tar, or damaged ({error})") from error


def _place(
    tar: tarfile.TarFile, member: tarfile.TarInfo, path: str, of: str, needed: bool
) -> Place:
    if not member.isreg() or member.sparse is not None:
        return Wrong("is a link or device in a tar: expected a file")
    if path.lower().endswith(PLAIN):
        return Span(path, member.offset_data, member.size, of)
    stamp = f"{of}:{member.name}"
    if member.size > MAX_BYTES:
        return Wrong(f"{member.size} bytes: expected at most {MAX_BYTES}")
    held = tar.extractfile(member) if needed else None
    return Encoded(held.read() if held else b"", stamp)
