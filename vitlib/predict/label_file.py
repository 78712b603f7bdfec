"""Read the names of classes from a file, for an exported file that states none."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vitlib.checkpoint.layouts import hf_config
from vitlib.errors import CheckpointError, SourceError
from vitlib.system.atomic import expand_home

MAX_BYTES = 2**24


def read_labels(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read the names of classes.

    Args:
        path: One name a line; or JSON: a list of names, an object of index to name, or a
            config.json with id2label.

    Returns:
        The names, in the order of the classes.

    Raises:
        SourceError: The file cannot be read, or does not name every class.
    """
    path = expand_home(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise SourceError(f"{path} has {size} bytes: expected at most {MAX_BYTES}, labels")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text: expected a label a line, or JSON") from error
    labels = _parse(text, path)
    if not labels or not all(label.strip() for label in labels):
        raise SourceError(f"{path}: expected a label a line, or JSON, and no empty label")
    return labels


def _parse(text: str, path: Path) -> tuple[str, ...]:
    """Parse lines or JSON."""
    if text.lstrip()[:1] not in ("[", "{"):
        return tuple(line.strip() for line in text.strip().splitlines())
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path} is not JSON ({error}): expected a label a line, or JSON"
        ) from error
    if isinstance(value, list):
        value = dict(enumerate(value))
    table = value.get("id2label", value)
    try:
        return hf_config.read_labels({"id2label": {str(key): table[key] for key in table}})
    except (CheckpointError, TypeError) as error:
        raise SourceError(
            f"{path}: expected a list of labels, or an object that numbers them from 0"
        ) from error
