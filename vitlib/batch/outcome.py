"""The end of a run: manifest, lists of errors and copies, _SUCCESS; and what a caller is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitlib.batch.duplicates import write_copies
from vitlib.batch.manifest import (
    MANIFEST,
    RUN,
    SUCCESS,
    Settings,
    checksum,
    remove_run,
    write_manifest,
)
from vitlib.batch.plan import Plan
from vitlib.batch.shards import Parts
from vitlib.system.atomic import open_atomic

ERRORS, DUPLICATES, IGNORED = "errors.jsonl", "duplicates.jsonl", "ignored.txt"
CARD = "predictions.csv"  # what the model card calls it
TOLD = 10  # errors that an outcome holds


@dataclass(frozen=True)
class Outcome:
    """The account of a run: inputs = ok + failed, once it is complete."""

    out: Path
    complete: bool  # False: other processes have shards to do
    inputs: int
    ok: int
    failed: int
    duplicates: int  # inputs whose bytes are those of an earlier one
    ignored: int  # files in folders and tars that are no images
    errors: tuple[tuple[int, str, str], ...]  # (row, file, why) of the first that failed
    files: tuple[str, ...]  # that hold rows
    computed: int  # rows of this call
    seconds: float  # of this call

    @property
    def rate(self) -> float:
        """Images a second, of this call: loading the model and going through the source counted."""
        return self.computed / self.seconds


def finish(out: Path, parts: Parts, settings: Settings, plan: Plan) -> None:
    """Where every shard is whole: write the end. Again after a kill."""
    if (out / SUCCESS).exists():
        remove_run(out)
        return
    found: list[dict[str, Any]] = []
    failed = 0
    for shard in range(parts.shards.count):
        record = parts.record(shard)
        if record is None:
            return
        failed += record["failed"]
        found.append({k: record[k] for k in ("name", "first", "rows", "failed", "files")})
    _write_errors(out, parts, failed)
    for left in out.glob(".*.part"):  # of processes that were killed
        left.unlink(missing_ok=True)
    keys = (parts.keys(shard) for shard in range(parts.shards.count))
    duplicates = write_copies(keys, plan.inputs, out / RUN, out / DUPLICATES)
    if plan.ignored:
        (out / RUN / IGNORED).replace(out / IGNORED)
    more: dict[str, Any] = {
        "complete": True,
        "counts": {
            "inputs": plan.inputs, "ok": plan.inputs - failed, "failed": failed,
            "duplicates": duplicates, "ignored": plan.ignored,
        },
        "inputs_digest": plan.digest,
        "parts": found,
    }  # fmt: skip
    if settings.format == "azure-csv":
        more["files"] = {CARD: _joined(out, found)}
        more["parts"] = [{k: v for k, v in one.items() if k != "files"} for one in found]
    write_manifest(out, settings, more)
    with open_atomic(out / SUCCESS):
        pass
    if settings.format == "azure-csv":
        for part in found:
            for name in part["files"]:
                (out / name).unlink(missing_ok=True)
    remove_run(out)


def _write_errors(out: Path, parts: Parts, failed: int) -> None:
    """errors.jsonl, by row; none where nothing failed."""
    if not failed:
        (out / ERRORS).unlink(missing_ok=True)
        return
    with open_atomic(out / ERRORS) as file:
        for shard in range(parts.shards.count):
            record = parts.record(shard)
            assert record is not None
            for row, name, error in record["errors"]:
                line = json.dumps({"row": row, "file": name, "error": error}, ensure_ascii=False)
                file.write(line.encode("utf-8", "backslashreplace") + b"\n")


def _joined(out: Path, found: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts as the one file of the model card."""
    with open_atomic(out / CARD) as file:
        for part in found:
            for name in part["files"]:
                with (out / name).open("rb") as one:
                    while chunk := one.read(2**20):
                        file.write(chunk)
    return checksum(out / CARD)


def outcome_of(out: Path, parts: Parts, plan: Plan, computed: int, seconds: float) -> Outcome:
    """What a caller is told, of a run that is complete or not."""
    said = json.loads((out / MANIFEST).read_bytes())
    counts = said.get("counts")
    if counts is None:
        records = [r for s in range(parts.shards.count) if (r := parts.record(s)) is not None]
        failed = sum(record["failed"] for record in records)
        ok = sum(record["rows"] for record in records) - failed
        counts = {
            "inputs": plan.inputs, "ok": ok, "failed": failed, "duplicates": 0,
            "ignored": plan.ignored,
        }  # fmt: skip
    files = tuple(said.get("files") or _names(said.get("parts", [])))
    errors = tuple(_first_errors(out)) if said["complete"] else ()
    return Outcome(
        out=out, complete=said["complete"], errors=errors, files=files, computed=computed,
        seconds=seconds, **counts,
    )  # fmt: skip


def _names(found: list[dict[str, Any]]) -> list[str]:
    return [name for part in found for name in part["files"]]


def _first_errors(out: Path) -> Iterator[tuple[int, str, str]]:
    path = out / ERRORS
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number == TOLD:
                return
            said = json.loads(line)
            yield said["row"], said["file"], said["error"]
