"""Inputs of a batch: references to encoded images, and reading them.

An Item is small, so that it can be sent to another process; only the references of lists that
contain encoded images (base64, Parquet) carry bytes. Inputs are hostile: sizes are checked before
memory is taken.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import NamedTuple, Protocol

from vitlib.errors import ImageError
from vitlib.image.base64_text import parse_base64

MAX_BYTES = 512 * 2**20  # of one encoded image


class ImageRef(Protocol):
    """Reference to an encoded image."""

    def read(self) -> bytes:
        """Read the encoded image. Raises ImageError."""

    def fingerprint(self) -> str:
        """Return a text that changes when the image changes."""


class Item(NamedTuple):
    """Input of a batch.

    Attributes:
        row: position in the source, from 0.
        file: name in the output.
        number: position in that file: 0 for an image file, else the row of a list.
        ref: reference to the encoded image.
    """

    row: int
    file: str
    number: int
    ref: ImageRef


class File(NamedTuple):
    """Reference to an image file.

    Attributes:
        path: the file.
    """

    path: str

    def read(self) -> bytes:
        """Implement ImageRef."""
        return _read_range(self.path, 0, None)

    def fingerprint(self) -> str:
        """Implement ImageRef."""
        return file_fingerprint(self.path)


class ByteRange(NamedTuple):
    """Reference to a part of a file: a member of a tar.

    Attributes:
        path: the file.
        offset: first byte.
        size: number of bytes.
        origin: fingerprint of the file.
    """

    path: str
    offset: int
    size: int
    origin: str

    def read(self) -> bytes:
        """Implement ImageRef."""
        return _read_range(self.path, self.offset, self.size)

    def fingerprint(self) -> str:
        """Implement ImageRef."""
        return f"{self.origin}:{self.offset}+{self.size}"


class Encoded(NamedTuple):
    """Encoded image in memory.

    Attributes:
        data: the bytes.
        origin: fingerprint of the file that contained it.
    """

    data: bytes
    origin: str

    def read(self) -> bytes:
        """Implement ImageRef."""
        _check_size(len(self.data))
        return self.data

    def fingerprint(self) -> str:
        """Implement ImageRef."""
        return self.origin


class Base64(NamedTuple):
    """Encoded image in memory, as base64 text.

    Attributes:
        text: base64, also with line breaks or as a data URL.
    """

    text: str

    def read(self) -> bytes:
        """Implement ImageRef."""
        _check_size(len(self.text) * 3 // 4)
        try:
            return parse_base64(self.text)
        except ValueError as error:
            raise ImageError(f"neither base64 nor a file's name with a suffix ({error})") from error

    def fingerprint(self) -> str:
        """Implement ImageRef."""
        return digest(self.text.encode("utf-8", "surrogatepass"))


class InvalidRow(NamedTuple):
    """Row of a list that does not name an image.

    Attributes:
        error: the error of this row.
    """

    error: str

    def read(self) -> bytes:
        """Raise ImageError."""
        raise ImageError(self.error)

    def fingerprint(self) -> str:
        """Implement ImageRef."""
        return self.error


class ListCell(NamedTuple):
    """Cell of a file whose changes are detected by the file's fingerprint.

    Attributes:
        ref: reference in the cell.
        origin: fingerprint of the file, and position of the cell.
    """

    ref: ImageRef
    origin: str

    def read(self) -> bytes:
        """Implement ImageRef."""
        return self.ref.read()

    def fingerprint(self) -> str:
        """Implement ImageRef."""
        return self.origin


def digest(data: bytes) -> str:
    """Hash bytes to 64 bits.

    Args:
        data: the bytes.

    Returns:
        16 hexadecimal digits.
    """
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """Describe the state of a file by its size and time of modification.

    Args:
        path: the file.

    Returns:
        The state as text; "-" where there is no file.
    """
    try:
        status = os.stat(_native_path(path))  # noqa: PTH116 (once for each of millions)
    except (OSError, ValueError):
        return "-"
    return f"{status.st_size}@{status.st_mtime_ns}"


def _native_path(path: str | os.PathLike[str]) -> str:
    """Convert a path to this process's file system encoding.

    Where the locale encodes less than Unicode, a name of a list means its bytes in UTF-8.
    """
    name = os.fspath(path)
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return os.fsdecode(name.encode("utf-8", "surrogateescape"))
    return name


def _read_range(path: str, offset: int, size: int | None) -> bytes:
    """Read bytes of a file; to its end where size is None."""
    try:
        with open(_native_path(path), "rb", opener=_open_nonblocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("a folder, pipe or device: expected an image file")
            _check_size(status.st_size if size is None else size)
            if offset:
                file.seek(offset)
            data = file.read(status.st_size if size is None else size)
    except FileNotFoundError as error:
        raise ImageError("is not there") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if size is not None and len(data) < size:
        raise ImageError(f"{Path(path).name} ends before it")
    return data


def _open_nonblocking(path: str, flags: int) -> int:
    """Open a file without blocking, since a pipe blocks until something writes into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_size(size: int) -> None:
    """Raise ImageError for an encoded image that is too large."""
    if size > MAX_BYTES:
        raise ImageError(f"{size} bytes: expected at most {MAX_BYTES}")
