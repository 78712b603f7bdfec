"""Embeddings of `vitlib embed`: a .npy file, and beside it a .json file with the names.

The .json file has the SHA-256 of the .npy file, and is written last. So a pair of files that do not
belong together, as a kill between them leaves it, is refused and not read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vitlib.batch.manifest import checksum
from vitlib.errors import BatchError, SourceError
from vitlib.predict.model_digest import compute_model_digest, model_precision
from vitlib.predict.predictor import Predictor
from vitlib.source.locate import read_json
from vitlib.system.atomic import check_writable, open_atomic, write_npy

FORMAT, VERSION = "vitlib-embeddings", 1


class EmbeddingFile(NamedTuple):
    """Embeddings and the photos that they are of.

    Attributes:
        vectors: (N, D) float32, memory-mapped; NaN for a photo that could not be read.
        images: path of each photo; absolute, unless they were written in the current folder.
        model: model that made them, as the command line named it.
        model_digest: hash of its weights, config and preprocessing.
        precision: arithmetic of the model; "" in a file of an earlier version, which has none.
    """

    vectors: npt.NDArray[np.float32]
    images: list[str]
    model: str
    model_digest: str
    precision: str


def names_path(path: Path) -> Path:
    """Return the path of the names beside embeddings.

    Args:
        path: the .npy file.
    """
    return path.with_suffix(".json")


def check_target(path: Path) -> None:
    """Check that embeddings can be written to a path, before the work that makes them.

    Args:
        path: the .npy file, existing or not.

    Raises:
        SourceError: a file cannot be written, or a .json file there is of something else.
    """
    names = names_path(path)
    check_writable(path)
    check_writable(names)
    if names.exists() and read_json(names).get("format") != FORMAT:
        raise SourceError(
            f"{names} exists and is not of vitlib embed, which writes the names there: name "
            "another --out"
        )


def write_embeddings(
    path: Path, vectors: npt.NDArray[np.float32], images: Sequence[str], predictor: Predictor
) -> None:
    """Write embeddings and names.

    Args:
        path: the .npy file.
        vectors: (N, D).
        images: path of each photo.
        predictor: the Predictor that made them.

    Raises:
        SourceError: a file cannot be written.
    """
    # The vectors first: names without their vectors could be read with older ones.
    write_npy(path, vectors)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": predictor.source,
        "model_digest": compute_model_digest(predictor),
        "precision": model_precision(predictor),
        "sha256": checksum(path)["sha256"],
        "folder": str(Path.cwd()),
        "images": list(images),
    }
    with open_atomic(names_path(path)) as file:
        file.write(json.dumps(content, indent=1).encode())


def read_embeddings(path: Path) -> EmbeddingFile:
    """Read embeddings and names.

    Args:
        path: the .npy file.

    Returns:
        The content.

    Raises:
        BatchError: there are no such files, or they do not belong together.
        SourceError: the names cannot be read.
    """
    names = names_path(path)
    if not path.is_file():
        raise BatchError(f"{path} is not there: expected a file of vitlib embed")
    if not names.is_file():
        raise BatchError(f"{path} has no {names.name} beside it: write both with vitlib embed")
    content = read_json(names)
    if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise BatchError(f"{names} is not of this vitlib embed: write both files again")
    listed = content.get("images")
    images = [str(image) for image in listed] if isinstance(listed, list) else []
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
        is_pair = checksum(path)["sha256"] == content.get("sha256")
    except (OSError, ValueError) as error:
        raise BatchError(f"{path} cannot be read: {error}: write it with vitlib embed") from error
    if not is_pair or vectors.ndim != 2 or len(vectors) != len(images):
        raise BatchError(f"{path} and {names.name} do not belong together: run vitlib embed again")
    folder = str(content.get("folder"))
    if folder != str(Path.cwd()):
        # normpath keeps links, which a resolved name would replace by what they lead to.
        images = [os.path.normpath(Path(folder, image)) for image in images]
    model, digest = str(content.get("model")), str(content.get("model_digest"))
    return EmbeddingFile(vectors, images, model, digest, str(content.get("precision") or ""))
