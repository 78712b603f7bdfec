"""Folders and patterns -> files, in an order that does not depend on the file system.

One folder's names are in memory at a time: it may hold millions below it. Names that begin with a
dot, and folders that systems leave, are not read. Links to folders are followed, each folder once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from vitlib.data.from_folder import SUFFIXES, is_hidden
from vitlib.errors import SourceError

Ignored = Callable[[str], None]


def images_below(folder: str, ignored: Ignored, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Files that an image's name has, in a folder and those below it: by name, folders in their
    place. The others are told. Raises SourceError for a folder that cannot be read.

    seen: folders (device, inode) that were read; one that is there is not read again.
    """
    for entry in entries(folder, seen):
        if is_hidden(entry.name):
            ignored(entry.path)
        elif _is_folder(entry):
            yield from images_below(entry.path, ignored, seen)
        elif is_image(entry.name):
            yield entry.path
        else:
            ignored(entry.path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def is_image(name: str) -> bool:
    """Whether a file is called as images are."""
    return name[:1] != "." and os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122


def entries(folder: str, seen: set[tuple[int, int]]) -> list[os.DirEntry[str]]:
    """What is in a folder, by name; nothing where it was seen. Raises SourceError."""
    try:
        said = os.stat(folder)  # noqa: PTH116
        if (said.st_dev, said.st_ino) in seen:
            return []
        seen.add((said.st_dev, said.st_ino))
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise SourceError(f"{folder} cannot be read: {error.strerror or error}") from error


def is_pattern(source: str) -> bool:
    """Whether it has a wildcard, and is not a name that is there."""
    return any(c in source for c in "*?[") and not Path(source).exists()


def matches(pattern: str) -> Iterator[str]:
    """Paths that a pattern fits, by name: `*`, `?`, `[abc]`, and `**` for any folders.

    A folder that fits is not looked into. Raises SourceError for a folder that cannot be read.
    """
    parts = pattern.split("/")
    fixed = 0
    while not any(c in parts[fixed] for c in "*?["):
        fixed += 1
    base = "/".join(parts[:fixed]) + "/" if fixed else ""
    expression = _expression(parts[fixed:])
    depth = None if "**" in parts else len(parts) - fixed
    seen: set[tuple[int, int]] = set()

    def below(folder: str, names: tuple[str, ...]) -> Iterator[str]:
        for entry in entries(folder, seen):
            if entry.name.startswith("."):
                continue
            trail = (*names, entry.name)
            if expression.fullmatch("/".join(trail)):
                yield base + "/".join(trail)
            elif _is_folder(entry) and (depth is None or len(trail) < depth):
                yield from below(entry.path, trail)

    if Path(base or ".").is_dir():
        yield from below(base or ".", ())


def _expression(parts: list[str]) -> re.Pattern[str]:
    """The names of a pattern, with what is between them."""
    found = ""
    for number, part in enumerate(parts, 1):
        if part == "**":
            found += "(?:[^/]+/)*" if number < len(parts) else ".*"
        else:
            found += _name(part) + ("/" if number < len(parts) else "")
    try:
        return re.compile(found)
    except re.error as error:
        raise SourceError(f"{'/'.join(parts)!r} is no pattern: {error}") from error


def _name(part: str) -> str:
    """One name of a pattern as an expression."""
    found, at = "", 0
    while at < len(part):
        end = part.find("]", at + 2)
        if part[at] == "[" and end > 0:
            inside = part[at + 1 : end].replace("\\", "\\\\")
            found += "[" + ("^" + inside[1:] if inside[0] == "!" else inside) + "]"
            at = end
        else:
            found += {"*": "[^/]*", "?": "[^/]"}.get(part[at], re.escape(part[at]))
        at += 1
    return found
