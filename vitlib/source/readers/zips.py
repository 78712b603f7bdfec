"""Members of a zip archive, which .npz and PyTorch files are: checked before they are read."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

MAX_DIRECTORY_BYTES = 4 * 2**20  # some 40 000 members; a ViT-g with its optimizer has 3 000


@dataclass(frozen=True)
class Member:
    """One file in an archive.

    Attributes:
        name: Its path in the archive.
        start: Offset of its data in the archive, in bytes.
        size: Bytes of its data in the archive.
        unpacked: Bytes after decompression.
        stored: True if it is not compressed.
    """

    name: str
    start: int
    size: int
    unpacked: int
    stored: bool


class _Bounded(io.FileIO):
    """File whose reads are bounded: zipfile allocates as many bytes as the archive states."""

    def read(self, size: int | None = -1, /) -> bytes:
        limit = MAX_DIRECTORY_BYTES + 1
        data = super().read(limit if size is None or size < 0 else min(size, limit)) or b""
        if len(data) == limit:
            raise zipfile.BadZipFile("its directory is too large")
        return data


def read_members(path: Path) -> list[Member]:
    """List the members of an archive.

    Args:
        path: The archive.

    Returns:
        Its members. None of them reaches beyond the file or overlaps another.

    Raises:
        zipfile.BadZipFile: The archive is damaged, or a member is encrypted.
    """
    length = path.stat().st_size
    members = []
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                file.seek(info.header_offset)
                header = file.read(30)
                if len(header) < 30 or header[:4] != b"PK\x03\x04" or info.flag_bits & 1:
                    raise zipfile.BadZipFile(f"a member at {info.header_offset} cannot be read")
                # Lengths in a local header may differ from those in the directory.
                start = info.header_offset + 30
                start += int.from_bytes(header[26:28], "little")  # its name
                start += int.from_bytes(header[28:30], "little")  # its extra field
                stored = info.compress_type == zipfile.ZIP_STORED
                size, unpacked = info.compress_size, info.file_size
                members.append(Member(info.filename, start, size, unpacked, stored))
    except zipfile.BadZipFile:
        raise
    except Exception as error:  # damaged directories raise whatever they lead to
        raise zipfile.BadZipFile(str(error)) from error
    end = 0
    for member in sorted(members, key=lambda member: member.start):
        if member.start < end or (member.stored and member.size != member.unpacked):
            raise zipfile.BadZipFile("its members overlap")
        end = member.start + member.size
    if end > length:
        raise zipfile.BadZipFile("its members reach beyond its end")
    return members
