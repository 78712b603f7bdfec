"""Check a program of torch.export before torch opens it: nothing in it may run code at that time.

torch.export.load unpickles sample inputs and some constants, loads compiled libraries, and
evaluates the text of symbolic sizes as Python. A program of tensors alone needs none of these.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vitlib.source.readers.zips import read_members

MAX_JSON_BYTES = 2**27  # the graph of ViT-g takes 10 MB
_SYMBOL = re.compile(r"Symbol\('[A-Za-z]\w*'(, [a-z]+=(True|False))*\)")
_SIZES = re.compile(r"[\w\s+\-*/%(),<>=!&|~]*")
_FOLDERS = ("models", "data/weights", "data/constants", "data/sample_inputs", "extra", ".data")
_FILES = ("archive_format", "archive_version", "byteorder", "version")


def check_archive(path: Path) -> None:
    """Check that opening a program runs no code of its author.

    Args:
        path: The file.

    Raises:
        ValueError: It is not an archive of torch.export, or has a part that runs code.
        OSError: It cannot be read.
        zipfile.BadZipFile: It is damaged.
    """
    names = [member.name for member in read_members(path)]
    # zipfile and torch may read different members of the same name.
    roots = {name.partition("/")[0] for name in names}
    if len(roots) != 1 or len(set(names)) != len(names):
        raise ValueError("expected an archive with one folder, and each name once")
    with zipfile.ZipFile(path) as archive:
        for name in names:
            _check_member(archive, name, name.partition("/")[2])


def _check_member(archive: zipfile.ZipFile, name: str, inner: str) -> None:
    """Check one member; `inner` is its name below the archive's folder."""
    folder = inner.rpartition("/")[0]
    # Compiled libraries lie in data/aotinductor: to load one is to run it.
    if folder not in _FOLDERS and inner not in _FILES:
        raise ValueError(f"{inner[:80]}: not a part of a program of tensors")
    if folder == "data/sample_inputs":
        with archive.open(name) as file:
            data = file.read(MAX_JSON_BYTES)
        # A program without sample inputs, as vitlib writes it.
        if not data:
            return
        # torch falls back to a full unpickler where this one refuses.
        try:
            torch.load(io.BytesIO(data), weights_only=True)
        except Exception as error:  # the unpickler raises many kinds
            raise ValueError(f"{inner[:80]}: its pickle is not of tensors alone") from error
    elif folder in ("data/weights", "data/constants"):
        if inner.endswith(".pt"):
            raise ValueError(f"{inner[:80]}: a pickle of torch's older format")
        if inner.endswith(".json"):
            _check_payloads(_read_json(archive, name), inner)
    elif folder == "models":
        # sympy evaluates these as Python.
        for text in _iter_expressions(_read_json(archive, name)):
            rest = _SYMBOL.sub("", text)
            if "__" in rest or not _SIZES.fullmatch(rest):
                raise ValueError(f"{inner[:80]}: the size {text[:40]!r} is not a formula")


def _read_json(archive: zipfile.ZipFile, name: str) -> Any:
    """Read a JSON member, bounded."""
    with archive.open(name) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{name[:80]}: expected at most {MAX_JSON_BYTES} bytes")
    return json.loads(data)


def _check_payloads(value: Any, inner: str) -> None:
    """Raise ValueError where a tensor is stored as a pickle, or is no tensor."""
    for entry in dict(value["config"]).values():
        name = str(entry["path_name"])
        if entry.get("use_pickle") or not re.fullmatch(r"(weight|tensor)_\d+", name):
            raise ValueError(f"{inner[:80]}: {name[:40]!r} is not stored as the bytes of a tensor")


def _iter_expressions(value: Any) -> Iterator[str]:
    """Yield the text of each symbolic size in a graph."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if "expr_str" in item:
                yield str(item["expr_str"])
            stack += item.values()
        elif isinstance(item, list):
            stack += item
