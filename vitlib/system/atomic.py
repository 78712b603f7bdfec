"""Files that are whole or not there: written beside, put on the disk, renamed."""

from __future__ import annotations

import csv
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from vitlib.errors import SourceError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

_CSV_LIMIT = threading.RLock()


def iter_csv_rows(reader: Iterator[list[str]], limit: int) -> Iterator[list[str]]:
    """The rows of a csv.reader, whose cells have at most `limit` characters.

    csv holds one limit for the whole process, which belongs to whoever uses vitlib: it is set for
    the time of a row, by one thread at a time, and put back.

    Raises csv.Error as the reader does.
    """
    while True:
        with _CSV_LIMIT:
            before = csv.field_size_limit(limit)
            try:
                row = next(reader, None)
            finally:
                csv.field_size_limit(before)
        if row is None:
            return
        yield row


def resolve_target(path: Path) -> Path:
    """The file that writing to `path` replaces: itself, or what it links to, there or not yet.

    Raises SourceError where that is a folder, a device, a pipe or a socket, which a rename would
    take away.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror or error}") from error
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise SourceError(f"{path} is {kind}: expected a file to write or replace; name another")
    return target


def check_writable(path: Path) -> Path:
    """The path, where a file could be written to it: to ask before the work is done.

    Raises SourceError where its folder is missing or read-only, or as resolve_target().
    """
    target = resolve_target(path)
    if not target.parent.is_dir():
        raise SourceError(f"{path} cannot be written: no folder {target.parent}; make it first")
    if not os.access(target.parent, os.W_OK):
        raise SourceError(f"{path} cannot be written: {target.parent} is read-only for you")
    return path


def refuse_input(
    out: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]], *, inside: bool = False
) -> None:
    """Refuse an output that is one of the inputs, by whatever name, before any work is done.

    Args:
        out: a file or folder to write, there or not yet.
        inputs: files and folders that are read; names of anything else, such as hub ids, pass.
        inside: `out` may not lie in an input folder either, as its files would be read as inputs.

    Raises:
        SourceError: `out` is an input: the same path, a link to it, another link of the same file,
            or another spelling on a disk that takes both for one.
    """
    target = Path(os.path.realpath(out))
    known = _identity(target)
    for name in inputs:
        path = Path(name).expanduser()
        if known is None:
            same = path.name == target.name and path.resolve() == target
        else:
            same = _identity(path) == known
        if same:
            kind = "folder" if target.is_dir() else "file"
            raise SourceError(f"{out} is what is read, {name}: name another {kind} to write")
        if inside and path.is_dir() and any(_is_one(above, path) for above in target.parents):
            raise SourceError(f"{out} lies in {name}, which is read: name a folder outside of it")


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and number of what a path leads to, the same for each of its names; None: nothing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_one(path: Path, other: Path) -> bool:
    known = _identity(path)
    return known is not None and known == _identity(other)


@contextmanager
def open_atomic(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write, which gets its name only once all of it is on the disk.

    A link stays, and what it leads to is replaced. Raises SourceError where it cannot be written,
    or is there and is no regular file.
    """
    target = resolve_target(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            mode = os.fstat(file.fileno()).st_mode  # as the umask has it
            yield file
        with beside.open("rb") as file:  # by its name: safetensors puts its own file there, its
            os.fsync(file.fileno())  # owner's alone
        if beside.stat().st_mode != mode:
            beside.chmod(mode)
        beside.replace(target)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def write_npy(path: Path, array: npt.NDArray[Any]) -> None:
    """An array as a .npy file, whole or not at all."""
    with open_atomic(path) as file:
        np.save(file, array, allow_pickle=False)
