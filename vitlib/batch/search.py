"""Search in the embeddings of a run, read part by part."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitlib.batch.manifest import MANIFEST, SUCCESS, Settings, check_files, read_settings
from vitlib.batch.results import Floats
from vitlib.errors import BatchError
from vitlib.retrieval import Neighbour, merge_neighbours, nearest

ROWS = 4096  # in memory at a time


class SimilarImage(NamedTuple):
    """Image of a run, and its similarity to a query.

    Attributes:
        row: position in the source.
        file: name in the run.
        cosine: -1..1.
    """

    row: int
    file: str
    cosine: float


def iter_embeddings(out: Path) -> Iterator[tuple[list[tuple[int, str]], Floats]]:
    """Yield the embeddings of a complete run, at most a part at a time, without failed inputs.

    Args:
        out: folder of the run.

    Yields:
        (row, file) of each image, and their embeddings (n, D).

    Raises:
        BatchError: for a folder without a complete run, or a run without embeddings.
    """
    settings, names = _open_run(out)
    read = {"jsonl": _read_jsonl, "csv": _read_csv, "npy": _read_npy, "parquet": _read_parquet}[
        settings.format
    ]
    for name in names:
        try:
            yield from read(out / name, settings.width)
        except (OSError, ValueError, LookupError, StopIteration, csv.Error) as error:
            raise BatchError(f"{out / name} is damaged or missing: make {out} again") from error


def find(out: Path, query: Floats, top_k: int) -> list[SimilarImage]:
    """Find the images nearest to a query by the cosine of embeddings, exactly.

    Args:
        out: folder of the run.
        query: (D,) embedding.
        top_k: number of images.

    Returns:
        The images, best first.

    Raises:
        BatchError: as iter_embeddings does.
        ConfigError: for a query of another width.
    """
    best: list[Neighbour] = []
    names: dict[int, tuple[int, str]] = {}
    count = 0
    for rows, vectors in iter_embeddings(out):
        part = nearest(query[None], vectors, top_k)[0]
        later = [Neighbour(count + near.index, near.cosine) for near in part]
        names |= {count + near.index: rows[near.index] for near in part}
        best = merge_neighbours(best, later, top_k)
        names = {near.index: names[near.index] for near in best}
        count += len(rows)
    return [SimilarImage(*names[near.index], near.cosine) for near in best]


def read_run_settings(out: Path) -> Settings | None:
    """Read the settings of the run in a folder.

    Args:
        out: the folder.

    Returns:
        The settings; None where the folder has no run.
    """
    try:
        return read_settings(out / MANIFEST)
    except (OSError, ValueError):
        return None


def _open_run(out: Path) -> tuple[Settings, list[str]]:
    """Check a run, and list the files of its parts."""
    settings = read_run_settings(out)
    if settings is None:
        raise BatchError(f"{out} has no run of vitlib batch: name its --out folder")
    if not settings.width:
        raise BatchError(f"{out} has labels only: make it with --task embed or both")
    if not (out / SUCCESS).exists():
        raise BatchError(f"{out} is not complete: run its vitlib batch command again first")
    manifest = json.loads((out / MANIFEST).read_bytes())
    check_files(out, manifest)
    return settings, [next(iter(part["files"])) for part in manifest["parts"]]


def _read_jsonl(path: Path, width: int) -> Iterator[tuple[list[tuple[int, str]], Floats]]:
    def rows() -> Iterator[tuple[int, str, Any]]:
        with path.open(encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                if entry["error"] is None:
                    yield entry["row"], entry["file"], entry["embedding"]

    return _stack_rows(rows(), width)


def _read_csv(path: Path, width: int) -> Iterator[tuple[list[tuple[int, str]], Floats]]:
    def rows() -> Iterator[tuple[int, str, Any]]:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            next(reader)
            for cells in reader:
                if not cells[-1]:
                    yield int(cells[1]), cells[0], cells[-1 - width : -1]

    return _stack_rows(rows(), width)


def _read_parquet(path: Path, width: int) -> Iterator[tuple[list[tuple[int, str]], Floats]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS, columns=["file", "row", "embedding", "error"]):
            good = batch.filter(batch.column("error").is_null())
            rows = list(zip(good["row"].to_pylist(), good["file"].to_pylist(), strict=True))
            yield rows, good["embedding"].flatten().to_numpy().reshape(-1, width)


def _read_npy(path: Path, width: int) -> Iterator[tuple[list[tuple[int, str]], Floats]]:
    index = path.with_name(path.name.removesuffix(".npy") + ".index.jsonl")
    # str.splitlines would also split at U+2028 within a name.
    with index.open(encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    for start in range(0, len(entries), ROWS):
        batch = entries[start : start + ROWS]
        good = [i for i, entry in enumerate(batch) if entry["error"] is None]
        rows = [(batch[i]["row"], batch[i]["file"]) for i in good]
        yield rows, np.asarray(vectors[start : start + ROWS])[good].reshape(-1, width)


def _stack_rows(
    rows: Iterator[tuple[int, str, Any]], width: int
) -> Iterator[tuple[list[tuple[int, str]], Floats]]:
    """Stack rows to batches of at most ROWS."""
    names: list[tuple[int, str]] = []
    vectors: list[Floats] = []
    for row, file, vector in rows:
        names.append((row, file))
        vectors.append(np.array(vector, np.float32))
        if len(names) == ROWS:
            yield names, np.stack(vectors)
            names, vectors = [], []
    if names:
        yield names, np.stack(vectors).reshape(-1, width)
