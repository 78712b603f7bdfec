"""End of a run: manifest, lists of errors and duplicates, _SUCCESS, and the Outcome."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitlib.batch.duplicates import write_duplicates
from vitlib.batch.locks import remove_run
from vitlib.batch.manifest import (
    MANIFEST,
    RUN,
    SUCCESS,
    Settings,
    checksum,
    write_manifest,
)
from vitlib.batch.plan import InputPlan
from vitlib.batch.shards import ShardStore
from vitlib.system.atomic import open_atomic

ERRORS, DUPLICATES, IGNORED = "errors.jsonl", "duplicates.jsonl", "ignored.txt"
AZURE_FILE = "predictions.csv"  # the file name of Azure's model catalog
MAX_ERRORS = 10  # in an Outcome


@dataclass(frozen=True)
class Outcome:
    """Outcome of a run; inputs = ok + failed once it is complete.

    Attributes:
        out: folder of the run.
        complete: False while other processes have shards to compute.
        inputs: number of inputs.
        ok: number of inputs with results.
        failed: number of inputs with an error.
        duplicates: number of inputs with the bytes of an earlier one.
        ignored: number of files in folders and tars that are not images.
        errors: (row, file, error) of the first failed inputs.
        files: names of the files with rows.
        computed: rows that this call computed.
        seconds: time of this call.
    """

    out: Path
    complete: bool
    inputs: int
    ok: int
    failed: int
    duplicates: int
    ignored: int
    errors: tuple[tuple[int, str, str], ...]
    files: tuple[str, ...]
    computed: int
    seconds: float

    @property
    def rate(self) -> float:
        """Images per second of this call, with the time to load the model and list the source."""
        return self.computed / self.seconds


def finish(out: Path, store: ShardStore, settings: Settings, plan: InputPlan) -> None:
    """Finish a run whose shards are all complete; can be repeated after a kill.

    Args:
        out: folder of the run.
        store: its shards.
        settings: its settings.
        plan: its inputs.
    """
    if (out / SUCCESS).exists():
        remove_run(out)
        return
    parts: list[dict[str, Any]] = []
    failed = 0
    for shard in range(store.shards.count):
        record = store.record(shard)
        if record is None:
            return
        failed += record["failed"]
        parts.append({k: record[k] for k in ("name", "first", "rows", "failed", "files")})
    _write_errors(out, store, failed)
    # Temporary files of killed processes.
    for path in out.glob(".*.part"):
        path.unlink(missing_ok=True)
    keys = (store.keys(shard) for shard in range(store.shards.count))
    duplicates = write_duplicates(keys, plan.inputs, out / RUN, out / DUPLICATES)
    if plan.ignored:
        (out / RUN / IGNORED).replace(out / IGNORED)
    extra: dict[str, Any] = {
        "complete": True,
        "counts": {
            "inputs": plan.inputs, "ok": plan.inputs - failed, "failed": failed,
            "duplicates": duplicates, "ignored": plan.ignored,
        },
        "inputs_digest": plan.digest,
        "parts": parts,
    }  # fmt: skip
    if settings.format == "azure-csv":
        extra["files"] = {AZURE_FILE: _join_parts(out, parts)}
        extra["parts"] = [{k: v for k, v in part.items() if k != "files"} for part in parts]
    write_manifest(out, settings, extra)
    with open_atomic(out / SUCCESS):
        pass
    if settings.format == "azure-csv":
        for part in parts:
            for name in part["files"]:
                (out / name).unlink(missing_ok=True)
    remove_run(out)


def _write_errors(out: Path, store: ShardStore, failed: int) -> None:
    """Write errors.jsonl, by row, where inputs failed."""
    if not failed:
        (out / ERRORS).unlink(missing_ok=True)
        return
    with open_atomic(out / ERRORS) as file:
        for shard in range(store.shards.count):
            record = store.record(shard)
            assert record is not None
            for row, name, error in record["errors"]:
                line = json.dumps({"row": row, "file": name, "error": error}, ensure_ascii=False)
                file.write(line.encode("utf-8", "backslashreplace") + b"\n")


def _join_parts(out: Path, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the parts to the single file of Azure's model catalog."""
    with open_atomic(out / AZURE_FILE) as file:
        for part in parts:
            for name in part["files"]:
                with (out / name).open("rb") as part_file:
                    while chunk := part_file.read(2**20):
                        file.write(chunk)
    return checksum(out / AZURE_FILE)


def make_outcome(
    out: Path, store: ShardStore, plan: InputPlan, computed: int, seconds: float
) -> Outcome:
    """Make the outcome of a run, complete or not.

    Args:
        out: folder of the run.
        store: its shards.
        plan: its inputs.
        computed: rows that this call computed.
        seconds: time of this call.

    Returns:
        The outcome.
    """
    manifest = json.loads((out / MANIFEST).read_bytes())
    counts = manifest.get("counts")
    if counts is None:
        records = [r for s in range(store.shards.count) if (r := store.record(s)) is not None]
        failed = sum(record["failed"] for record in records)
        ok = sum(record["rows"] for record in records) - failed
        counts = {
            "inputs": plan.inputs, "ok": ok, "failed": failed, "duplicates": 0,
            "ignored": plan.ignored,
        }  # fmt: skip
    files = tuple(manifest.get("files") or _part_files(manifest.get("parts", [])))
    errors = tuple(_first_errors(out)) if manifest["complete"] else ()
    return Outcome(
        out=out, complete=manifest["complete"], errors=errors, files=files, computed=computed,
        seconds=seconds, **counts,
    )  # fmt: skip


def _part_files(parts: list[dict[str, Any]]) -> list[str]:
    """List the files of all parts."""
    return [name for part in parts for name in part["files"]]


def _first_errors(out: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (row, file, error) of the first failed inputs."""
    path = out / ERRORS
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number == MAX_ERRORS:
                return
            entry = json.loads(line)
            yield entry["row"], entry["file"], entry["error"]
