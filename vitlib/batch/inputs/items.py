"""Inputs of a batch, one by one: where an image's bytes are, and how they are read.

An Item is small and plain, so that it can be sent to another process; only those of lists that hold
the images themselves (base64, Parquet) carry them along. Everything is hostile: sizes are asked for
before memory is taken.
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


class Place(Protocol):
    """Where an image's bytes are."""

    def read(self) -> bytes:
        """The encoded image. Raises ImageError."""

    def stamp(self) -> str:
        """What changes when the image does."""


class Item(NamedTuple):
    """One input."""

    row: int  # position in the source, from 0
    file: str  # as the output names it
    number: int  # position in that file: 0 for an image file, else the row of a list
    place: Place


class File(NamedTuple):
    """An image file."""

    path: str

    def read(self) -> bytes:
        """See Place."""
        return _span(self.path, 0, None)

    def stamp(self) -> str:
        """See Place."""
        return stamp_of(self.path)


class Span(NamedTuple):
    """A part of a file: a member of a tar."""

    path: str
    offset: int
    size: int
    of: str  # stamp of the file

    def read(self) -> bytes:
        """See Place."""
        return _span(self.path, self.offset, self.size)

    def stamp(self) -> str:
        """See Place."""
        return f"{self.of}:{self.offset}+{self.size}"


class Encoded(NamedTuple):
    """The image itself."""

    data: bytes
    of: str  # stamp of the file it came with

    def read(self) -> bytes:
        """See Place."""
        _check_size(len(self.data))
        return self.data

    def stamp(self) -> str:
        """See Place."""
        return self.of


class Base64(NamedTuple):
    """The image itself, as text that from_base64() reads."""

    text: str

    def read(self) -> bytes:
        """See Place."""
        _check_size(len(self.text) * 3 // 4)
        try:
            return parse_base64(self.text)
        except ValueError as error:
            raise ImageError(f"neither base64 nor a file's name with a suffix ({error})") from error

    def stamp(self) -> str:
        """See Place."""
        return digest(self.text.encode("utf-8", "surrogatepass"))


class Wrong(NamedTuple):
    """A row of a list that names no image."""

    why: str

    def read(self) -> bytes:
        """Raises ImageError, always."""
        raise ImageError(self.why)

    def stamp(self) -> str:
        """See Place."""
        return self.why


class Stamped(NamedTuple):
    """A cell of a file whose cells are not looked at to see whether they changed."""

    place: Place
    of: str  # stamp of the file, and which cell

    def read(self) -> bytes:
        """See Place."""
        return self.place.read()

    def stamp(self) -> str:
        """See Place."""
        return self.of


def digest(data: bytes) -> str:
    """64 bits, as 16 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def stamp_of(path: str | os.PathLike[str]) -> str:
    """Size and time of a file; "-" where none is there."""
    try:
        said = os.stat(_native(path))  # noqa: PTH116 (once for each of millions)
    except (OSError, ValueError):
        return "-"
    return f"{said.st_size}@{said.st_mtime_ns}"


def _native(path: str | os.PathLike[str]) -> str:
    """The path as this process names it: where the locale holds less than Unicode, a name in a
    list stands for its bytes in UTF-8."""
    name = os.fspath(path)
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return os.fsdecode(name.encode("utf-8", "surrogateescape"))
    return name


def _span(path: str, offset: int, size: int | None) -> bytes:
    """Bytes of a file; size None: to its end."""
    try:
        with open(_native(path), "rb", opener=_without_waiting) as file:
            said = os.fstat(file.fileno())
            if not stat.S_ISREG(said.st_mode):
                raise ImageError("a folder, pipe or device: expected an image file")
            _check_size(said.st_size if size is None else size)
            if offset:
                file.seek(offset)
            data = file.read(said.st_size if size is None else size)
    except FileNotFoundError as error:
        raise ImageError("is not there") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if size is not None and len(data) < size:
        raise ImageError(f"{Path(path).name} ends before it")
    return data


def _without_waiting(path: str, flags: int) -> int:
    """A pipe would wait for who writes into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise ImageError(f"{size} bytes: expected at most {MAX_BYTES}")
