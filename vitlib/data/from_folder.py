"""A folder -> rows: the folders in it are the classes, the photos in and below each are its own.

Names that begin with a dot, and folders that systems leave (__MACOSX), are not read. Every file
that has an image's name is a row, whether or not vitlib can open it: a photo that it cannot is
named, not passed over. Links to folders are followed, each folder once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from vitlib.data.photos import listed
from vitlib.data.rows import MAX_CLASSES, Row
from vitlib.errors import DataError

logger = logging.getLogger("vitlib")

# What images are called: of what vitlib opens, and of what it does not open, and says so.
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "gif", "bmp", "ppm", "pgm", "pbm", "webp"),
        *("tif", "tiff", "avif", "jp2", "j2k"),
        *("heic", "heif", "jxl", "svg", "psd", "ico", "raw", "dng", "cr2", "cr3", "nef", "arw"),
        *("orf", "rw2", "raf", "exr", "hdr"),
    )
)
_LEFT_BY_SYSTEMS = ("__MACOSX", "__pycache__", "Thumbs.db", "desktop.ini")


class FolderRows:
    """The photos of a folder a class, by class and then by path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.classes: tuple[str, ...] = ()
        self._others: Counter[str] = Counter()  # files that no image is called, by suffix
        self._hidden: Counter[str] = Counter()  # hidden files and folders, by name

    def __iter__(self) -> Iterator[Row]:
        """Raises DataError where a folder cannot be read."""
        there = self._visible(self.folder)
        classes = [path for path in there if path.is_dir()]
        if len(classes) > MAX_CLASSES:
            raise DataError(
                f"{self.folder} has {len(classes)} folders: expected at most {MAX_CLASSES} classes"
            )
        self.classes = tuple(sorted(path.name for path in classes))
        for path in there:
            if path.is_file() and self._is_photo(path):
                yield Row(0, str(path.absolute()), (), "stray")
        for folder in sorted(classes, key=lambda path: path.name):
            for path in sorted(self._below(folder)):
                yield Row(0, str(path.absolute()), (folder.name,), "folder")
        if self._hidden:
            logger.info(
                "%s: %d hidden files and folders are not read (%s)",
                self.folder,
                self._hidden.total(),
                listed(sorted(self._hidden)),
            )
        if self._others:
            logger.info(
                "%s: %d files that no image is called are not read (%s)",
                self.folder,
                self._others.total(),
                listed(sorted(self._others)),
            )

    def _below(self, folder: Path) -> Iterator[Path]:
        """The photos in a folder and below it."""
        left, seen = [folder], set()
        while left:
            here = left.pop()
            there = here.stat()
            if (there.st_dev, there.st_ino) in seen:  # a link that leads up
                continue
            seen.add((there.st_dev, there.st_ino))
            for path in self._visible(here):
                if path.is_dir():
                    left.append(path)
                elif self._is_photo(path):
                    yield path

    def _visible(self, folder: Path) -> list[Path]:
        """What a folder holds and is not hidden; what is hidden is counted."""
        found = visible(folder)
        self._hidden.update(path.name for path in folder.iterdir() if is_hidden(path.name))
        return found

    def _is_photo(self, path: Path) -> bool:
        if is_photo(path):
            return True
        self._others[path.suffix.lower() or "no suffix"] += 1
        return False


def is_photo(path: Path) -> bool:
    """Whether it has an image's name."""
    return path.suffix.lower() in SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a name is hidden, or a folder's that systems leave."""
    return name.startswith(".") or name in _LEFT_BY_SYSTEMS


def visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted by name; without what is hidden or left there by systems."""
    try:
        return sorted(path for path in folder.iterdir() if not is_hidden(path.name))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error
