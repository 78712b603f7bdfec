"""The members of a zip archive, which .npz and PyTorch files are: bounded before they are read."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

MAX_DIRECTORY_BYTES = 4 * 2**20  # some 40 000 members; a ViT-g with its optimizer has 3 000


@dataclass(frozen=True)
class Member:
    """One file in the archive; bytes."""

    name: str
    start: int  # of its data in the archive
    size: int  # as it lies there
    unpacked: int
    stored: bool  # as it is, not compressed


class _Bounded(io.FileIO):
    """A file that gives at most a directory's size at once, as zipfile asks for what it is told."""

    def read(self, size: int | None = -1, /) -> bytes:
        most = MAX_DIRECTORY_BYTES + 1
        found = super().read(most if size is None or size < 0 else min(size, most)) or b""
        if len(found) == most:
            raise zipfile.BadZipFile("its directory is too large")
        return found


def read_members(path: Path) -> list[Member]:
    """The members of an archive, none of which reaches out of the file or into another.

    Raises zipfile.BadZipFile for whatever is damaged, and for an encrypted member.
    """
    length = path.stat().st_size
    found = []
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                file.seek(info.header_offset)
                header = file.read(30)
                if len(header) < 30 or header[:4] != b"PK\x03\x04" or info.flag_bits & 1:
                    raise zipfile.BadZipFile(f"a member at {info.header_offset} cannot be read")
                start = info.header_offset + 30
                start += int.from_bytes(header[26:28], "little")  # its name
                start += int.from_bytes(header[28:30], "little")  # its extra field
                stored = info.compress_type == zipfile.ZIP_STORED
                size, unpacked = info.compress_size, info.file_size
                found.append(Member(info.filename, start, size, unpacked, stored))
    except zipfile.BadZipFile:
        raise
    except Exception as error:  # damaged directories raise whatever they lead to
        raise zipfile.BadZipFile(str(error)) from error
    end = 0
    for member in sorted(found, key=lambda member: member.start):
        if member.start < end or (member.stored and member.size != member.unpacked):
            raise zipfile.BadZipFile("its members overlap")
        end = member.start + member.size
    if end > length:
        raise zipfile.BadZipFile("its members reach beyond its end")
    return found
