"""The files of an exported model: the main one, and those beside it that hold its weights."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from vitlib.errors import SourceError
from vitlib.predict.runtimes import Runtime

_COMPANIONS = {"onnx": (".onnx.data", ".onnx_data"), "openvino": (".bin",)}
_CHUNK = 2**20  # bytes that are hashed at a time


def list_files(runtime: Runtime) -> list[Path]:
    """List the files of an exported model.

    Args:
        runtime: The open file.

    Returns:
        The main file first.
    """
    path = runtime.path
    beside = [path.with_suffix(end) for end in _COMPANIONS.get(runtime.format, ())]
    return [path, *(other for other in beside if other.is_file())]


def hash_files(runtime: Runtime) -> bytes:
    """Hash the files of an exported model.

    Args:
        runtime: The open file.

    Returns:
        SHA-256 of their bytes.

    Raises:
        SourceError: A file cannot be read.
    """
    digest = hashlib.sha256()
    for path in list_files(runtime):
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    return digest.digest()


def copy_files(runtime: Runtime, folder: Path) -> Path:
    """Copy an exported model into a folder, which other processes read.

    Args:
        runtime: The open file.
        folder: The folder, which is made where there is none.

    Returns:
        The main file there.

    Raises:
        SourceError: A file cannot be read or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in list_files(runtime):
            shutil.copyfile(path, folder / path.name)
    except OSError as error:
        raise SourceError(f"{folder}: the model cannot be copied: {error.strerror}") from error
    return folder / runtime.path.name
