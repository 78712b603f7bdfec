r"""Files of a shard: JSONL, CSV, Parquet, NumPy, and the CSV of Azure's model catalog.

Every input has a row in every format, in the order of the source: `file`, `row` (its position in
the source), then the columns of the task, then `error`: null, or the reason that the rest is
missing.

    labels, probs, classes   the k best, best first; `classes` are their indices; with thresholds in
                             the model's calibration, those that reach theirs
    probs                    of every class in the manifest's order, where k is "all"
    values                   of a regression: of every output, the number itself
    embedding                input of the model's head, not normalised

Numbers are float32, written with the nine digits that restore the same float32. Names that are not
Unicode keep their bytes as the escapes \udc80 to \udcff, which in JSON are those characters.
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

from vitlib.batch.results import Floats, Results
from vitlib.errors import ConfigError
from vitlib.system.atomic import open_atomic
from vitlib.system.requirements import import_extra
from vitlib.system.terminal import escape_surrogates

Format = Literal["jsonl", "csv", "parquet", "npy", "azure-csv"]
FORMATS: tuple[Format, ...] = get_args(Format)
_GROUP = 4096  # rows of a Parquet row group


@dataclass(frozen=True)
class Columns:
    """Columns of the rows.

    Attributes:
        labels: classes of the model.
        top_k: labels per image; None for every class, 0 for no classes.
        width: D of the embedding; 0 without embeddings.
        base_folder: folder that azure-csv names files from.
        regression: True if scores are the numbers of a regression.
    """

    labels: tuple[str, ...]
    top_k: int | None
    width: int
    base_folder: str = ""
    regression: bool = False

    @property
    def has_classes(self) -> bool:
        """True if there are scores of classes."""
        return self.top_k != 0

    @property
    def scores(self) -> str:
        """Name of the column of scores."""
        return "values" if self.regression else "probs"

    def names(self) -> list[str]:
        """List the names of the columns, in order."""
        names = ["file", "row"]
        if self.has_classes:
            names += [self.scores] if self.top_k is None else ["labels", "probs", "classes"]
        return [*names, *(["embedding"] if self.width else []), "error"]


def check_format(form: str, task: str, top_k: int | None, *, regression: bool = False) -> None:
    """Check that a format fits the task.

    Args:
        form: the format.
        task: classify, embed or both.
        top_k: labels per image; None for all.
        regression: True if the model is a regression.

    Raises:
        ConfigError: where it does not fit, or its library is missing.
    """
    if form not in FORMATS:
        raise ConfigError(f"format={form!r}: expected one of {', '.join(FORMATS)}")
    if form == "azure-csv" and regression:
        raise ConfigError("azure-csv has probabilities, and this model is a regression: use csv")
    if form == "azure-csv" and task != "classify":
        raise ConfigError(f"azure-csv has labels only: use another format for task {task!r}")
    if form == "parquet":
        import_extra("parquet", "pyarrow", "parquet needs pyarrow", "pyarrow.parquet")
    if form in ("npy", "azure-csv") and top_k is not None and task != "embed":
        raise ConfigError(f"{form} has the probabilities of every class: give --top-k all")


def write_part(
    form: Format, folder: Path, name: str, batches: Iterable[Results], rows: int, columns: Columns
) -> list[str]:
    """Write the files of a shard, each atomically.

    Args:
        form: the format.
        folder: folder of the files.
        name: name of the shard.
        batches: results in the order of the rows.
        rows: number of rows of all batches.
        columns: columns of the rows.

    Returns:
        Names of the files.

    Raises:
        SourceError: where they cannot be written.
    """
    if form == "npy":
        return _write_npy(folder, name, batches, rows, columns)
    suffix = {"azure-csv": "azure.csv"}.get(form, form)
    writers: dict[str, Callable[[IO[bytes], Iterable[Results], Columns], None]] = {
        "jsonl": _write_jsonl,
        "csv": _write_csv,
        "azure-csv": _write_azure,
        "parquet": _write_parquet,
    }
    with open_atomic(folder / f"{name}.{suffix}") as file:
        writers[form](file, batches, columns)
    return [f"{name}.{suffix}"]


def _write_jsonl(file: IO[bytes], batches: Iterable[Results], columns: Columns) -> None:
    """Write JSON by hand, with nine digits a number, which json cannot do."""
    labels = [json.dumps(label, ensure_ascii=False) for label in columns.labels]
    for results in batches:
        lines = []
        for i, error in enumerate(results.errors):
            parts = [f'"file": {_json_text(results.files[i])}', f'"row": {results.first + i}']
            for name in columns.names()[2:-1]:
                value = "null" if error else _json_value(results, name, i, labels)
                parts.append(f'"{name}": {value}')
            parts.append(f'"error": {_json_text(error) if error else "null"}')
            lines.append("{" + ", ".join(parts) + "}\n")
        file.write("".join(lines).encode("utf-8", "backslashreplace"))


def _json_value(results: Results, name: str, i: int, labels: list[str]) -> str:
    """A column of a row in JSON."""
    if name == "embedding":
        assert results.vectors is not None
        return _format_list(results.vectors[i])
    if name in ("probs", "values"):
        return _format_list(results.get_scores(i))
    classes = results.get_classes(i).tolist()
    return "[" + ", ".join(labels[c] if name == "labels" else str(c) for c in classes) + "]"


def _format_list(values: Floats) -> str:
    """Format numbers as a list of JSON and Python."""
    return "[" + ", ".join(map(_number, values.tolist())) + "]"


def _number(value: float) -> str:
    """Format a number with the nine digits that distinguish every float32."""
    return f"{value:.9g}"


def _json_text(text: str) -> str:
    """Quote text for JSON."""
    return json.dumps(text, ensure_ascii=False)


def _write_csv(file: IO[bytes], batches: Iterable[Results], columns: Columns) -> None:
    """Write a header and a line for each row."""
    k = columns.top_k
    numbers = range(len(columns.labels)) if k is None else range(1, k + 1)
    names = (columns.scores[:-1],) if k is None else ("label", "prob", "class")
    head = [f"{name}_{n}" for n in numbers for name in names] if columns.has_classes else []
    head += [f"embedding_{n}" for n in range(columns.width)]
    file.write(_csv_line(["file", "row", *head, "error"]))
    for results in batches:
        for i, error in enumerate(results.errors):
            cells = [""] * len(head) if error else _csv_cells(results, i, columns)
            file.write(_csv_line([results.files[i], str(results.first + i), *cells, error or ""]))


def _csv_line(cells: list[str]) -> bytes:
    """Format a line of CSV by RFC 4180, with a line feed at its end.

    The module csv would leave a carriage return unquoted.
    """
    return (",".join(map(_quote, cells)) + "\n").encode("utf-8", "backslashreplace")


def _quote(cell: str) -> str:
    """Quote a cell where CSV needs it."""
    if any(c in cell for c in ',"\r\n'):
        return '"' + cell.replace('"', '""') + '"'
    return cell


def _csv_cells(results: Results, i: int, columns: Columns) -> list[str]:
    """Format the scores, classes and embedding of a row."""
    cells: list[str] = []
    if results.scores is not None:
        probs = [_number(value) for value in results.get_scores(i).tolist()]
        if results.classes is None:
            cells = probs
        else:
            classes = results.get_classes(i).tolist()
            triples = ((columns.labels[c], p, str(c)) for c, p in zip(classes, probs, strict=True))
            cells = list(chain.from_iterable(triples))
            cells += [""] * (3 * len(results.classes[i]) - len(cells))
    if results.vectors is not None:
        cells += map(_number, results.vectors[i].tolist())
    return cells


def _write_azure(file: IO[bytes], batches: Iterable[Results], columns: Columns) -> None:
    """Write the CSV of Azure's model catalog, without a header.

    Its columns are the position in the file, probabilities and labels as Python lists, and the
    file.
    """
    labels = str(list(columns.labels))
    for results in batches:
        assert results.scores is not None
        for i, error in enumerate(results.errors):
            name = results.files[i]
            if columns.base_folder and name.startswith(columns.base_folder):
                name = name[len(columns.base_folder) :].lstrip("/")
            scores = "[]" if error else _format_list(results.scores[i])
            number = str(results.numbers[i])
            file.write(_csv_line([number, scores, "[]" if error else labels, name]))


def _write_npy(
    folder: Path, name: str, batches: Iterable[Results], rows: int, columns: Columns
) -> list[str]:
    """Write embeddings and scores as arrays, NaN for failed inputs, and an index of the files."""
    arrays: list[tuple[str, str, int]] = []
    if columns.width:
        arrays.append(("vectors", f"{name}.npy", columns.width))
    if columns.has_classes:
        probs = f"{name}.{columns.scores}.npy" if columns.width else f"{name}.npy"
        arrays.append(("scores", probs, len(columns.labels)))
    index = f"{name}.index.jsonl"
    with ExitStack() as stack:
        index_file = stack.enter_context(open_atomic(folder / index))
        array_files = [stack.enter_context(open_atomic(folder / file)) for _, file, _ in arrays]
        for file, (_, _, width) in zip(array_files, arrays, strict=True):
            head = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
            np.lib.format.write_array_header_1_0(file, head)
        for results in batches:
            failed = np.array([error is not None for error in results.errors])
            for file, (field, _, _) in zip(array_files, arrays, strict=True):
                values = np.where(failed[:, None], np.float32(np.nan), getattr(results, field))
                file.write(values.astype("<f4").tobytes())
            _write_jsonl(index_file, [results], Columns((), 0, 0))
    return [*(file for _, file, _ in arrays), index]


def _write_parquet(file: IO[bytes], batches: Iterable[Results], columns: Columns) -> None:
    """Write row groups of bounded size."""
    import pyarrow as pa
    from pyarrow import parquet

    kinds: dict[str, Any] = {
        "file": pa.string(), "row": pa.int64(), "labels": pa.list_(pa.string()),
        "probs": pa.list_(pa.float32()), "values": pa.list_(pa.float32()),
        "classes": pa.list_(pa.int32()), "embedding": pa.list_(pa.float32()), "error": pa.string(),
    }  # fmt: skip
    schema = pa.schema([(name, kinds[name]) for name in columns.names()])
    with parquet.ParquetWriter(file, schema) as writer:
        for group in _iter_groups(batches):
            cells = {
                name: [x for a in group for x in _column(a, name, columns)] for name in schema.names
            }
            writer.write_table(pa.table(cells, schema=schema))


def _iter_groups(batches: Iterable[Results]) -> Iterator[list[Results]]:
    """Group batches to at least _GROUP rows."""
    group: list[Results] = []
    rows = 0
    for results in batches:
        group.append(results)
        rows += len(results)
        if rows >= _GROUP:
            yield group
            group, rows = [], 0
    if group:
        yield group


def _column(results: Results, name: str, columns: Columns) -> list[Any]:
    """Return the values of a column, None for failed inputs."""
    if name == "row":
        return list(range(results.first, results.first + len(results)))
    if name == "file":
        return [escape_surrogates(file) for file in results.files]
    if name == "error":
        return [error and escape_surrogates(error) for error in results.errors]
    rows: list[Any] = [None] * len(results)
    for i, error in enumerate(results.errors):
        if error is not None:
            continue
        if name == "embedding":
            assert results.vectors is not None
            rows[i] = results.vectors[i]
        elif name in ("probs", "values"):
            rows[i] = results.get_scores(i)
        elif name == "labels":
            rows[i] = [
                escape_surrogates(columns.labels[c]) for c in results.get_classes(i).tolist()
            ]
        else:
            rows[i] = results.get_classes(i)
    return rows


def find_base_folder(names: tuple[str, ...]) -> str:
    """Return the folder that azure-csv names files from.

    Args:
        names: names of the source.

    Returns:
        The folder with a slash, where the source is a single folder; else "".
    """
    return names[0].rstrip("/") + "/" if len(names) == 1 and os.path.isdir(names[0]) else ""  # noqa: PTH112
