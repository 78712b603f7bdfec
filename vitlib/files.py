"""Files that are whole or not there: written beside, put on the disk, renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from vitlib.errors import SourceError


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write, which gets its name only once all of it is on the disk.

    Raises SourceError where it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)


def write_npy(path: Path, array: npt.NDArray[Any]) -> None:
    """An array as a .npy file, whole or not at all."""
    with whole_file(path) as file:
        np.save(file, array, allow_pickle=False)
