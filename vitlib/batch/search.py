"""The embeddings of a run, read again part by part, and the nearest of them to a query."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vitlib.batch.manifest import MANIFEST, SUCCESS, Settings, check_files, settings_in
from vitlib.batch.results import Floats
from vitlib.errors import BatchError
from vitlib.retrieval import Neighbour, merge_neighbours, nearest

ROWS = 4096  # that are in memory at a time, of text


class Near(NamedTuple):
    """An image near a query."""

    row: int
    file: str
    cosine: float


def embeddings(out: Path) -> Iterator[tuple[list[tuple[int, str]], Floats]]:
    """((row, file) of each, vectors (n, D)) of the images of a complete run, a part or less at a
    time; without those that failed.

    Raises BatchError where `out` is no complete run, or one without embeddings.
    """
    settings, names = _opened(out)
    read = {"jsonl": _jsonl, "csv": _csv, "npy": _npy, "parquet": _parquet}[settings.format]
    for name in names:
        try:
            yield from read(out / name, settings.width)
        except (OSError, ValueError, LookupError, StopIteration, csv.Error) as error:
            raise BatchError(f"{out / name} is damaged or not there: make {out} again") from error


def find(out: Path, query: Floats, top_k: int) -> list[Near]:
    """The images whose embedding is most like a query's (D,), by the cosine: exact, best first.

    Raises as embeddings(), and ConfigError for a query of another width.
    """
    best: list[Neighbour] = []
    known: dict[int, tuple[int, str]] = {}
    count = 0
    for named, vectors in embeddings(out):
        found = nearest(query[None], vectors, top_k)[0]
        later = [Neighbour(count + one.index, one.cosine) for one in found]
        known |= {count + one.index: named[one.index] for one in found}
        best = merge_neighbours(best, later, top_k)
        known = {one.index: known[one.index] for one in best}
        count += len(named)
    return [Near(*known[one.index], one.cosine) for one in best]


def run_of(out: Path) -> Settings | None:
    """The settings of the run in a folder; None: it is no run's."""
    try:
        return settings_in(out / MANIFEST)
    except (OSError, ValueError):
        return None


def _opened(out: Path) -> tuple[Settings, list[str]]:
    settings = run_of(out)
    if settings is None:
        raise BatchError(f"{out} holds no run of vitlib batch")
    if not settings.width:
        raise BatchError(f"{out} holds labels alone: make it with --task embed or both")
    if not (out / SUCCESS).exists():
        raise BatchError(f"{out} is not complete: give its vitlib batch command again first")
    said = json.loads((out / MANIFEST).read_bytes())
    check_files(out, said)
    return settings, [next(iter(part["files"])) for part in said["parts"]]


def _jsonl(path: Path, width: int) -> Iterator[tuple[list[tuple[int, str]], Floats]]:
    def rows() -> Iterator[tuple[int, str, Any]]:
        with path.open(encoding="utf-8") as file:
            for line in file:
                said = json.loads(line)
                if said["error"] is None:
                    yield said["row"], said["file"], said["embedding"]

    return _stacked(rows(), width)


def _csv(path: Path, width: int) -> Iterator[tuple[list[tuple[int, str]], Floats]]:
    def rows() -> Iterator[tuple[int, str, Any]]:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            next(reader)
            for cells in reader:
                if not cells[-1]:
                    yield int(cells[1]), cells[0], cells[-1 - width : -1]

    return _stacked(rows(), width)


def _parquet(path: Path, width: int) -> Iterator[tuple[list[tuple[int, str]], Floats]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for some in file.iter_batches(ROWS, columns=["file", "row", "embedding", "error"]):
            whole = some.filter(some.column("error").is_null())
            named = list(zip(whole["row"].to_pylist(), whole["file"].to_pylist(), strict=True))
            yield named, whole["embedding"].flatten().to_numpy().reshape(-1, width)


def _npy(path: Path, width: int) -> Iterator[tuple[list[tuple[int, str]], Floats]]:
    index = path.with_name(path.name.removesuffix(".npy") + ".index.jsonl")
    with index.open(encoding="utf-8") as file:  # a name may hold U+2028, which splitlines() cuts
        said = [json.loads(line) for line in file]
    vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    for start in range(0, len(said), ROWS):
        some = said[start : start + ROWS]
        whole = [i for i, one in enumerate(some) if one["error"] is None]
        named = [(some[i]["row"], some[i]["file"]) for i in whole]
        yield named, np.asarray(vectors[start : start + ROWS])[whole].reshape(-1, width)


def _stacked(
    rows: Iterator[tuple[int, str, Any]], width: int
) -> Iterator[tuple[list[tuple[int, str]], Floats]]:
    named: list[tuple[int, str]] = []
    vectors: list[Floats] = []
    for row, file, vector in rows:
        named.append((row, file))
        vectors.append(np.array(vector, np.float32))
        if len(named) == ROWS:
            yield named, np.stack(vectors)
            named, vectors = [], []
    if named:
        yield named, np.stack(vectors).reshape(-1, width)
