"""Files of folders and patterns, in an order that does not depend on the file system.

The names of one folder at a time are in memory, since there may be millions below it. Names that
begin with a dot, and folders that operating systems leave, are not read. Links to folders are
followed, each folder once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from vitlib.data.from_folder import SUFFIXES, is_hidden
from vitlib.errors import SourceError

OnIgnored = Callable[[str], None]  # receives each file that is not an input


def walk_images(folder: str, on_ignored: OnIgnored, visited: set[tuple[int, int]]) -> Iterator[str]:
    """Yield the images in and below a folder, by name, subfolders among the files.

    Args:
        folder: the folder.
        on_ignored: receives each other file.
        visited: (device, inode) of folders that were read, which are not read again.

    Yields:
        Paths of files with the suffix of an image.

    Raises:
        SourceError: for a folder that cannot be read.
    """
    for entry in list_entries(folder, visited):
        if is_hidden(entry.name):
            on_ignored(entry.path)
        elif _is_folder(entry):
            yield from walk_images(entry.path, on_ignored, visited)
        elif is_image(entry.name):
            yield entry.path
        else:
            on_ignored(entry.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def is_image(name: str) -> bool:
    """Return True if a name has the suffix of an image and is not hidden.

    Args:
        name: name of a file.
    """
    return name[:1] != "." and os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122


def list_entries(folder: str, visited: set[tuple[int, int]]) -> list[os.DirEntry[str]]:
    """List the entries of a folder.

    Args:
        folder: the folder.
        visited: (device, inode) of folders that were read; this one is added.

    Returns:
        The entries by name; none where the folder was visited.

    Raises:
        SourceError: for a folder that cannot be read.
    """
    try:
        status = os.stat(folder)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in visited:
            return []
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise SourceError(f"{folder} cannot be read: {error.strerror or error}") from error


def is_pattern(source: str) -> bool:
    """Return True if a source has a wildcard and is not the name of a file.

    Args:
        source: as the user names it.
    """
    return any(c in source for c in "*?[") and not Path(source).exists()


def expand_pattern(pattern: str) -> Iterator[str]:
    """Yield the paths that match a pattern, by name.

    Args:
        pattern: path with `*`, `?`, `[abc]`, and `**` for any number of folders.

    Yields:
        The paths; a folder that matches is not searched.

    Raises:
        SourceError: for a folder that cannot be read.
    """
    parts = pattern.split("/")
    fixed = 0
    while not any(c in parts[fixed] for c in "*?["):
        fixed += 1
    base = "/".join(parts[:fixed]) + "/" if fixed else ""
    expression = _compile_pattern(parts[fixed:])
    depth = None if "**" in parts else len(parts) - fixed
    visited: set[tuple[int, int]] = set()

    def below(folder: str, names: tuple[str, ...]) -> Iterator[str]:
        for entry in list_entries(folder, visited):
            if entry.name.startswith("."):
                continue
            trail = (*names, entry.name)
            if expression.fullmatch("/".join(trail)):
                yield base + "/".join(trail)
            elif _is_folder(entry) and (depth is None or len(trail) < depth):
                yield from below(entry.path, trail)

    if Path(base or ".").is_dir():
        yield from below(base or ".", ())


def _compile_pattern(parts: list[str]) -> re.Pattern[str]:
    """Translate the parts of a pattern to a regular expression."""
    expression = ""
    for number, part in enumerate(parts, 1):
        if part == "**":
            expression += "(?:[^/]+/)*" if number < len(parts) else ".*"
        else:
            expression += _translate_name(part) + ("/" if number < len(parts) else "")
    try:
        return re.compile(expression)
    except re.error as error:
        raise SourceError(f"{'/'.join(parts)!r} is not a pattern: {error}") from error


def _translate_name(part: str) -> str:
    """Translate the name of a file or folder in a pattern to a regular expression."""
    expression, i = "", 0
    while i < len(part):
        end = part.find("]", i + 2)
        if part[i] == "[" and end > 0:
            inside = part[i + 1 : end].replace("\\", "\\\\")
            expression += "[" + ("^" + inside[1:] if inside[0] == "!" else inside) + "]"
            i = end
        else:
            expression += {"*": "[^/]*", "?": "[^/]"}.get(part[i], re.escape(part[i]))
        i += 1
    return expression
