"""Rows of a folder: its subfolders are the classes, with the photos in and below each.

Names that begin with a dot, and folders that operating systems leave (__MACOSX), are not read.
Every file with the suffix of an image is a row, so that a photo which vitlib cannot open is named
and not skipped. Links to folders are followed, each folder once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from vitlib.data.photos import join_names
from vitlib.data.rows import MAX_CLASSES, Row
from vitlib.errors import DataError

logger = logging.getLogger("vitlib")

# Suffixes of images: of formats that vitlib opens, and of others, which it refuses by name.
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "gif", "bmp", "ppm", "pgm", "pbm", "webp"),
        *("tif", "tiff", "avif", "jp2", "j2k"),
        *("heic", "heif", "jxl", "svg", "psd", "ico", "raw", "dng", "cr2", "cr3", "nef", "arw"),
        *("orf", "rw2", "raf", "exr", "hdr"),
    )
)
_SYSTEM_FILES = ("__MACOSX", "__pycache__", "Thumbs.db", "desktop.ini")


class FolderRows:
    """Rows of a folder per class, by class and then by path.

    Args:
        folder: folder of the classes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.classes: tuple[str, ...] = ()
        # Files without the suffix of an image, by suffix.
        self._others: Counter[str] = Counter()
        self._hidden: Counter[str] = Counter()  # hidden files and folders, by name

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows. Raises DataError where a folder cannot be read."""
        paths = self._list_visible(self.folder)
        classes = [path for path in paths if path.is_dir()]
        if len(classes) > MAX_CLASSES:
            raise DataError(
                f"{self.folder} has {len(classes)} folders: expected at most {MAX_CLASSES} classes"
            )
        self.classes = tuple(sorted(path.name for path in classes))
        for path in paths:
            if path.is_file() and self._is_photo(path):
                yield Row(0, str(path.absolute()), (), "stray")
        for folder in sorted(classes, key=lambda path: path.name):
            for path in sorted(self._walk(folder)):
                yield Row(0, str(path.absolute()), (folder.name,), "folder")
        if self._hidden:
            logger.info(
                "%s: %d hidden files and folders are not read (%s)",
                self.folder,
                self._hidden.total(),
                join_names(sorted(self._hidden)),
            )
        if self._others:
            logger.info(
                "%s: %d files without the suffix of an image are not read (%s)",
                self.folder,
                self._others.total(),
                join_names(sorted(self._others)),
            )

    def _walk(self, folder: Path) -> Iterator[Path]:
        """Yield the photos in and below a folder."""
        pending, visited = [folder], set()
        while pending:
            current = pending.pop()
            status = current.stat()
            # A link to a folder above would make an endless walk.
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            for path in self._list_visible(current):
                if path.is_dir():
                    pending.append(path)
                elif self._is_photo(path):
                    yield path

    def _list_visible(self, folder: Path) -> list[Path]:
        """List the entries of a folder that are not hidden, and count the hidden ones."""
        paths = list_visible(folder)
        self._hidden.update(path.name for path in folder.iterdir() if is_hidden(path.name))
        return paths

    def _is_photo(self, path: Path) -> bool:
        """Return True for the suffix of an image, and count other files."""
        if is_photo(path):
            return True
        self._others[path.suffix.lower() or "no suffix"] += 1
        return False


def is_photo(path: Path) -> bool:
    """Return True if a path has the suffix of an image.

    Args:
        path: the path.
    """
    return path.suffix.lower() in SUFFIXES


def is_hidden(name: str) -> bool:
    """Return True if a name is hidden, or that of a file which operating systems leave.

    Args:
        name: name of a file or folder.
    """
    return name.startswith(".") or name in _SYSTEM_FILES


def list_visible(folder: Path) -> list[Path]:
    """List the entries of a folder that are not hidden.

    Args:
        folder: the folder.

    Returns:
        The paths, by name.

    Raises:
        DataError: where the folder cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if not is_hidden(path.name))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
