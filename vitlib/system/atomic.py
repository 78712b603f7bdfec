"""Atomic files and folders: write to a temporary name, fsync, then rename.

A process that is killed leaves the old file or the new one, never a part that looks whole. Three
forms serve the package: open_atomic() for one file, replace_files() for the files of a folder that
may hold others too, and publish_folder() for a folder that appears as a whole.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from vitlib.errors import SourceError

if TYPE_CHECKING:
    import numpy.typing as npt

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Replace ~ or ~USER at the start of a path by the home of that user.

    Args:
        path: A path, or a name that is none, such as a hub id.

    Returns:
        The path; as it is where no such home is known, where Path.expanduser() would raise
        RuntimeError.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111


def resolve_target(path: Path) -> Path:
    """Return the file that a write to `path` replaces.

    Args:
        path: A file, existing or not, or a link to one.

    Returns:
        The path itself, or what it links to.

    Raises:
        SourceError: That is a folder, a device, a pipe or a socket, which a rename would remove.
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
    """Check that a file can be written to a path, before the work that makes its content.

    Folders above it may be missing: open_atomic() makes them.

    Args:
        path: A file, existing or not.

    Returns:
        The same path.

    Raises:
        SourceError: Its folder is read-only or a file, or as resolve_target().
    """
    target = resolve_target(path)
    folder = next(above for above in target.parents if os.path.lexists(above))
    if not folder.is_dir():
        raise SourceError(f"{path} cannot be written: {folder} is no folder; name another file")
    if not os.access(folder, os.W_OK):
        raise SourceError(f"{path} cannot be written: {folder} is read-only for you")
    return path


def refuse_input(
    out: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]], *, inside: bool = False
) -> None:
    """Refuse an output that is one of the inputs, under any name, before any work is done.

    Args:
        out: A file or folder to write, existing or not.
        inputs: Files and folders that are read. Other names, such as hub ids, pass.
        inside: True also refuses an `out` in an input folder: its files would be read as inputs.

    Raises:
        SourceError: `out` is an input: the same path, a symbolic or hard link, or another spelling
            on a disk that ignores case.
    """
    target = Path(os.path.realpath(out))
    identity = _identity(target)
    for name in inputs:
        path = expand_home(name)
        if identity is None:
            same = path.name == target.name and path.resolve() == target
        else:
            same = _identity(path) == identity
        if same:
            kind = "folder" if target.is_dir() else "file"
            raise SourceError(f"{out} is what is read, {name}: name another {kind} to write")
        if inside and path.is_dir() and any(_is_same(above, path) for above in target.parents):
            raise SourceError(f"{out} lies in {name}, which is read: name a folder outside of it")


def _identity(path: Path) -> tuple[int, int] | None:
    """Return (device, inode) of what a path leads to, equal for all its names; None if nothing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_same(path: Path, other: Path) -> bool:
    identity = _identity(path)
    return identity is not None and identity == _identity(other)


def fsync_path(path: Path) -> None:
    """Write a file or folder from the system's cache to the disk.

    Args:
        path: An existing file or folder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def open_atomic(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file to write, which gets its name once all of it is on the disk.

    Missing folders above it are made. A link stays, and the file that it leads to is replaced. An
    exception leaves the old file.

    Args:
        path: The file, existing or not.

    Yields:
        The open file, under a temporary name beside the target.

    Raises:
        SourceError: It cannot be written, or exists and is no regular file.
    """
    target = resolve_target(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            mode = os.fstat(file.fileno()).st_mode  # as the umask says
            yield file
        # By name and not by the open file: safetensors' save_file puts a file of its own there,
        # which only its owner may read.
        fsync_path(temporary)
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode)
        temporary.replace(target)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staging_folder(folder: Path, prefix: str = ".vitlib-") -> Iterator[Path]:
    """Make an empty folder in another one, where a rename is atomic; delete it in the end.

    Args:
        folder: The folder that will hold the files, made if it does not exist.
        prefix: Start of the temporary name.

    Yields:
        The temporary folder, for replace_files().

    Raises:
        SourceError: A file or folder cannot be written, here or in the block.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise SourceError(f"{folder} cannot be written: {error.strerror or error}") from error


def replace_files(
    staging: Path, folder: Path, *, last: str, stale: Iterable[str] = (), stub: bytes | None = None
) -> None:
    """Move all files of a staging folder into a folder, one of them last.

    A reader takes the folder for complete only with the last file. So a kill at any moment leaves
    the old files, the new ones, or a folder that no reader opens. It never mixes two versions.

    Args:
        staging: A folder of files, on the disk of `folder`.
        folder: An existing folder; files of the same names are replaced, others stay.
        last: Name of the file that completes the folder.
        stale: Names of old files to delete first.
        stub: Content that stands under the name `last` meanwhile; None for no stub.

    Raises:
        SourceError: A target exists and is no regular file. Nothing has changed then.
        OSError: A file cannot be written.
    """
    paths = sorted(staging.iterdir(), key=lambda path: (path.name == last, path.name))
    for path in paths:
        resolve_target(folder / path.name)
        # Content before the name: a crash of the machine must not part them.
        fsync_path(path)
    if stub is not None:
        placeholder = staging / ".stub"
        placeholder.write_bytes(stub)
        placeholder.replace(folder / last)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    for path in paths:
        path.replace(folder / path.name)


def publish_folder(staging: Path, target: Path) -> None:
    """Give a folder its final name once all its files are on the disk.

    Args:
        staging: A folder of files and folders beside the target.
        target: The final path; an older folder there is deleted.

    Raises:
        OSError: It cannot be written or renamed.
    """
    for path in (*sorted(staging.rglob("*"), reverse=True), staging):
        fsync_path(path)
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    fsync_path(target.parent)  # which holds the name


def write_npy(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array as a .npy file, atomically.

    Args:
        path: The file, existing or not.
        array: An array of numbers.

    Raises:
        SourceError: As open_atomic().
    """
    with open_atomic(path) as file:
        np.save(file, array, allow_pickle=False)
