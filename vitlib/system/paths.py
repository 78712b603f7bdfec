"""Paths as people type them."""

from __future__ import annotations

import os
from pathlib import Path


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Replace ~ or ~USER at the start of a path by the home of that user.

    Args:
        path: A path, or a name that is none, such as a hub id.

    Returns:
        The path; as it is where no such home is known, where Path.expanduser() would raise
        RuntimeError.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111
