"""Locks and cleanup of a run's folder, and errors of its file system."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vitlib.batch.manifest import MANIFEST, RUN, SUCCESS
from vitlib.errors import BatchError, SourceError


@contextmanager
def lock_folder(out: Path, rank: int, world: int) -> Iterator[None]:
    """Lock the folder of a run for this process.

    Args:
        out: folder of the run.
        rank: number of this process.
        world: number of processes.

    Yields:
        None, while the lock is active.

    Raises:
        BatchError: where another process has the lock.
    """
    folder = out / RUN
    folder.mkdir(parents=True, exist_ok=True)
    with _flock(folder / "lock", out, shared=world > 1):
        if world == 1:
            yield
            return
        with _flock(folder / f"lock-{rank}", out, shared=False):
            yield


@contextmanager
def _flock(path: Path, out: Path, *, shared: bool, blocking: bool = False) -> Iterator[None]:
    """Lock a file. Raises BatchError where another process has the lock, unless blocking."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock: processes are not kept apart
        yield
        return
    with path.open("ab") as file:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(file, kind | (0 if blocking else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BatchError(f"{out}: another process works in this folder: wait for it") from error
        yield


@contextmanager
def report_write_errors(out: Path) -> Iterator[None]:
    """Raise SourceError for errors of the file system, such as a full disk.

    Args:
        out: folder of the run.

    Yields:
        None.

    Raises:
        SourceError: in place of OSError.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space" if full else "correct that, or name another --out"
        raise SourceError(
            f"{out} cannot be written: {error.strerror or error}; finished rows are kept: {hint}, "
            "and run the same command again"
        ) from error


def exclusive(out: Path) -> Any:
    """Lock the folder while a process begins or ends the run; others wait.

    Args:
        out: folder of the run.

    Returns:
        The context manager of the lock.
    """
    return _flock(out / RUN / "turn", out, shared=False, blocking=True)


@contextmanager
def clean_up_on_error(out: Path) -> Iterator[None]:
    """Remove the files of a run that fails before its first row.

    Args:
        out: folder of the run.

    Yields:
        None.
    """
    try:
        yield
    except BaseException:
        if not (out / MANIFEST).exists() or (out / SUCCESS).exists():
            remove_run(out)
            with suppress(OSError):
                out.rmdir()
        raise


def remove_run(out: Path) -> None:
    """Remove the folder .run of a run.

    Args:
        out: folder of the run.
    """
    for path in sorted((out / RUN).rglob("*"), reverse=True):
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()
    with suppress(OSError):
        os.rmdir(out / RUN)  # noqa: PTH106
