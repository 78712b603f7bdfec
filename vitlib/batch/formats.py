"""Answers -> the files of a shard: JSONL, CSV, Parquet, NumPy, and the model card's CSV.

Every input has a row in every format, in the order of the source: `file`, `row` (its position in
the source), then what was asked for, then `error`, which is null or says why the rest is missing.

    labels, probs, classes   the k best, best first; `classes` are their indices; with thresholds in
                             the model's calibration, those that reach theirs
    probs                    of every class in the manifest's order, where k is "all"
    values                   of a regression: of every output, the number itself
    embedding                what the model's head reads, not normalised

Numbers are float32, written with the nine digits that give the same float32 again. Names that are
no Unicode keep their bytes as the escapes \\udc80 to \\udcff, which in JSON are those characters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np

from vitlib.batch.results import Answer, Floats
from vitlib.errors import ConfigError
from vitlib.system.atomic import open_atomic
from vitlib.system.terminal import escape_surrogates

Format = Literal["jsonl", "csv", "parquet", "npy", "azure-csv"]
FORMATS: tuple[Format, ...] = get_args(Format)
_GROUP = 4096  # rows of a Parquet row group


@dataclass(frozen=True)
class Columns:
    """What rows hold."""

    labels: tuple[str, ...]  # of the model
    top_k: int | None  # None: every class; 0: no classes
    width: int  # of the embedding; 0: none
    below: str = ""  # the folder that azure-csv names files from
    numbers: bool = False  # scores are a regression's

    @property
    def classified(self) -> bool:
        """Whether there are probabilities."""
        return self.top_k != 0

    @property
    def scores(self) -> str:
        """What the column of scores is called."""
        return "values" if self.numbers else "probs"

    def names(self) -> list[str]:
        """Of the columns, in order."""
        found = ["file", "row"]
        if self.classified:
            found += [self.scores] if self.top_k is None else ["labels", "probs", "classes"]
        return [*found, *(["embedding"] if self.width else []), "error"]


def check_format(form: str, task: str, top_k: int | None, *, numbers: bool = False) -> None:
    """Raises ConfigError where a format does not go with the task, or its library is missing.

    numbers: the model is a regression.
    """
    if form not in FORMATS:
        raise ConfigError(f"format={form!r}: expected one of {', '.join(FORMATS)}")
    if form == "azure-csv" and numbers:
        raise ConfigError("azure-csv holds probabilities, and this model gives numbers: use csv")
    if form == "azure-csv" and task != "classify":
        raise ConfigError(f"azure-csv holds labels alone: it has no place for task {task!r}")
    if form == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ConfigError("parquet needs pyarrow: pip install 'vitlib[parquet]'") from error
    if form in ("npy", "azure-csv") and top_k is not None and task != "embed":
        raise ConfigError(f"{form} holds the probabilities of every class: --top-k all")


def write_part(
    form: Format, folder: Path, name: str, answers: Iterable[Answer], rows: int, columns: Columns
) -> list[str]:
    """Write a shard's files, each whole or not at all -> their names.

    rows: how many answers have together. Raises SourceError where they cannot be written.
    """
    if form == "npy":
        return _npy(folder, name, answers, rows, columns)
    suffix = {"azure-csv": "azure.csv"}.get(form, form)
    writers: dict[str, Callable[[IO[bytes], Iterable[Answer], Columns], None]] = {
        "jsonl": _jsonl, "csv": _csv, "azure-csv": _azure, "parquet": _parquet,
    }  # fmt: skip
    with open_atomic(folder / f"{name}.{suffix}") as file:
        writers[form](file, answers, columns)
    return [f"{name}.{suffix}"]


def _jsonl(file: IO[bytes], answers: Iterable[Answer], columns: Columns) -> None:
    said = [json.dumps(label, ensure_ascii=False) for label in columns.labels]
    for answer in answers:
        lines = []
        for i, error in enumerate(answer.errors):
            parts = [f'"file": {_text(answer.files[i])}', f'"row": {answer.first + i}']
            for name in columns.names()[2:-1]:
                parts.append(f'"{name}": {"null" if error else _value(answer, name, i, said)}')
            parts.append(f'"error": {_text(error) if error else "null"}')
            lines.append("{" + ", ".join(parts) + "}\n")
        file.write("".join(lines).encode("utf-8", "backslashreplace"))


def _value(answer: Answer, name: str, i: int, labels: list[str]) -> str:
    """A column of a row in JSON."""
    if name == "embedding":
        assert answer.vectors is not None
        return _numbers(answer.vectors[i])
    if name in ("probs", "values"):
        return _numbers(answer.scores_of(i))
    found = answer.classes_of(i).tolist()
    return "[" + ", ".join(labels[c] if name == "labels" else str(c) for c in found) + "]"


def _numbers(values: Floats) -> str:
    return "[" + ", ".join(map(_number, values.tolist())) + "]"


def _number(value: float) -> str:
    """Nine digits tell a float32 from every other."""
    return f"{value:.9g}"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _csv(file: IO[bytes], answers: Iterable[Answer], columns: Columns) -> None:
    k = columns.top_k
    numbers = range(len(columns.labels)) if k is None else range(1, k + 1)
    names = (columns.scores[:-1],) if k is None else ("label", "prob", "class")
    head = [f"{name}_{n}" for n in numbers for name in names] if columns.classified else []
    head += [f"embedding_{n}" for n in range(columns.width)]
    file.write(_line(["file", "row", *head, "error"]))
    for answer in answers:
        for i, error in enumerate(answer.errors):
            cells = [""] * len(head) if error else _cells(answer, i, columns)
            file.write(_line([answer.files[i], str(answer.first + i), *cells, error or ""]))


def _line(cells: list[str]) -> bytes:
    """A line of CSV (RFC 4180, but for its end); csv would leave a carriage return unquoted."""
    return (",".join(map(_quoted, cells)) + "\n").encode("utf-8", "backslashreplace")


def _quoted(cell: str) -> str:
    if any(c in cell for c in ',"\r\n'):
        return '"' + cell.replace('"', '""') + '"'
    return cell


def _cells(answer: Answer, i: int, columns: Columns) -> list[str]:
    cells: list[str] = []
    if answer.scores is not None:
        probs = [_number(value) for value in answer.scores_of(i).tolist()]
        if answer.classes is None:
            cells = probs
        else:
            found = answer.classes_of(i).tolist()
            triples = ((columns.labels[c], p, str(c)) for c, p in zip(found, probs, strict=True))
            cells = list(chain.from_iterable(triples))
            cells += [""] * (3 * len(answer.classes[i]) - len(cells))
    if answer.vectors is not None:
        cells += map(_number, answer.vectors[i].tolist())
    return cells


def _azure(file: IO[bytes], answers: Iterable[Answer], columns: Columns) -> None:
    """The card's: no header; row in its file, probabilities and labels as Python writes lists."""
    labels = str(list(columns.labels))
    for answer in answers:
        assert answer.scores is not None
        for i, error in enumerate(answer.errors):
            name = answer.files[i]
            if columns.below and name.startswith(columns.below):
                name = name[len(columns.below) :].lstrip("/")
            scores = "[]" if error else _numbers(answer.scores[i])
            number = str(answer.numbers[i])
            file.write(_line([number, scores, "[]" if error else labels, name]))


def _npy(
    folder: Path, name: str, answers: Iterable[Answer], rows: int, columns: Columns
) -> list[str]:
    """An array for each of vectors and probabilities, and whose they are; NaN where it failed."""
    arrays: list[tuple[str, str, int]] = []
    if columns.width:
        arrays.append(("vectors", f"{name}.npy", columns.width))
    if columns.classified:
        probs = f"{name}.{columns.scores}.npy" if columns.width else f"{name}.npy"
        arrays.append(("scores", probs, len(columns.labels)))
    index = f"{name}.index.jsonl"
    with ExitStack() as stack:
        told = stack.enter_context(open_atomic(folder / index))
        opened = [stack.enter_context(open_atomic(folder / file)) for _, file, _ in arrays]
        for file, (_, _, width) in zip(opened, arrays, strict=True):
            head = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
            np.lib.format.write_array_header_1_0(file, head)
        for answer in answers:
            wrong = np.array([error is not None for error in answer.errors])
            for file, (which, _, _) in zip(opened, arrays, strict=True):
                values = np.where(wrong[:, None], np.float32(np.nan), getattr(answer, which))
                file.write(values.astype("<f4").tobytes())
            _jsonl(told, [answer], Columns((), 0, 0))
    return [*(file for _, file, _ in arrays), index]


def _parquet(file: IO[bytes], answers: Iterable[Answer], columns: Columns) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    kinds: dict[str, Any] = {
        "file": pa.string(), "row": pa.int64(), "labels": pa.list_(pa.string()),
        "probs": pa.list_(pa.float32()), "values": pa.list_(pa.float32()),
        "classes": pa.list_(pa.int32()), "embedding": pa.list_(pa.float32()), "error": pa.string(),
    }  # fmt: skip
    schema = pa.schema([(name, kinds[name]) for name in columns.names()])
    with parquet.ParquetWriter(file, schema) as writer:
        for group in _groups(answers):
            held = {
                name: [x for a in group for x in _column(a, name, columns)] for name in schema.names
            }
            writer.write_table(pa.table(held, schema=schema))


def _groups(answers: Iterable[Answer]) -> Iterator[list[Answer]]:
    held: list[Answer] = []
    rows = 0
    for answer in answers:
        held.append(answer)
        rows += len(answer)
        if rows >= _GROUP:
            yield held
            held, rows = [], 0
    if held:
        yield held


def _column(answer: Answer, name: str, columns: Columns) -> list[Any]:
    """A column's values, None where an input failed."""
    if name == "row":
        return list(range(answer.first, answer.first + len(answer)))
    if name == "file":
        return [escape_surrogates(file) for file in answer.files]
    if name == "error":
        return [error and escape_surrogates(error) for error in answer.errors]
    rows: list[Any] = [None] * len(answer)
    for i, error in enumerate(answer.errors):
        if error is not None:
            continue
        if name == "embedding":
            assert answer.vectors is not None
            rows[i] = answer.vectors[i]
        elif name in ("probs", "values"):
            rows[i] = answer.scores_of(i)
        elif name == "labels":
            rows[i] = [escape_surrogates(columns.labels[c]) for c in answer.classes_of(i).tolist()]
        else:
            rows[i] = answer.classes_of(i)
    return rows


def base_folder(names: tuple[str, ...]) -> str:
    """What azure-csv leaves off names: the folder, where the source is one."""
    return names[0].rstrip("/") + "/" if len(names) == 1 and os.path.isdir(names[0]) else ""  # noqa: PTH112
