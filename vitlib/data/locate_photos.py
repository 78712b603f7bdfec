"""Local files of the photos that rows name by a path or a URL."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vitlib.data.rows import Row


def is_url(file: str) -> bool:
    """Return True if a file is named by a URL, and not by a path.

    Args:
        file: as a row names it.
    """
    return "://" in file


def _local_names(url: str) -> list[str]:
    """List names that the file of a URL may have locally: with its folder's name, and alone."""
    with suppress(ValueError):
        parts = unquote(urlsplit(url).path).split("/")
        parts = [part for part in parts if part not in ("", ".", "..")]
        return list(dict.fromkeys(["/".join(parts[-2:]), *parts[-1:]]))
    return []


def find_photo(file: str, folders: Sequence[Path]) -> str | None:
    """Find the local file of a photo.

    Args:
        file: path or URL, as a row names it.
        folders: folders to search, in order.

    Returns:
        The absolute path, or None where there is no such file.
    """
    names = [file]
    if is_url(file):
        names = _local_names(file)
    elif "\\" in file:  # written on Windows
        names.append(file.replace("\\", "/"))
    for name in names:
        for folder in folders:
            with suppress(OSError, ValueError):  # too long, NUL, no Unicode
                path = Path(os.path.normpath(folder / name))
                if path.is_file():
                    return str(path)
    return None


def describe_absence(row: Row) -> str:
    """Describe a photo that is absent, for a message.

    Args:
        row: the row of the photo.

    Returns:
        The predicate of a sentence.
    """
    if is_url(row.file):
        return "is a URL without a local file of that name: download the photos first"
    if row.line == 1 and row.kind == "field":
        return "is not there (if the line is a header: expected filename,labels)"
    return "is not there"
