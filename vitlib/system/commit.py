"""Commit that this code was made of: git's in a checkout, else what the build wrote."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
FILE = "commit.txt"  # in the package; setup.py writes it where it builds from a checkout
# Twelve digits of the commit; + where files differ from it. Without tags, which may be moved.
_DESCRIBE = ("describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+")
_FORM = re.compile(r"[0-9a-f]{12,}\+?")


def read_commit(root: Path = _ROOT) -> str:
    """Find the commit that the code was made of.

    Args:
        root: Folder that the package is in.

    Returns:
        The first digits of the commit, such as 3310e2e41c5f, with a + where the files of the
        checkout differ from it; "" where it is unknown.
    """
    if (root / ".git").exists():  # a file in a worktree
        return _ask_git(root)
    try:
        text = (root / "vitlib" / FILE).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
    return text if _FORM.fullmatch(text) else ""


def _ask_git(root: Path) -> str:
    """Ask git for the commit of a checkout; "" for the repository of another project."""
    try:
        # A project that has the package in its own repository has commits of its own.
        if not re.search(r'^name = "vitlib"$', (root / "pyproject.toml").read_text("utf-8"), re.M):
            return ""
        command = ["git", "--no-optional-locks", "-C", str(root), *_DESCRIBE]
        # Neither the repository of a hook that runs this, nor one that contains a broken checkout.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        environment["GIT_CEILING_DIRECTORIES"] = str(root.parent)
        done = subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", check=True, timeout=20
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    text = done.stdout.strip()
    return text if _FORM.fullmatch(text) else ""
