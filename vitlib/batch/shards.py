"""Shards on the disk: which are whole, which are begun, and how answers become files.

A shard is begun as a journal. When its last row is there its files are written, then its record,
then the journal goes: whoever comes after a kill finds one of these states, and goes on.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vitlib.batch.formats import Columns, Format, write_part
from vitlib.batch.journal import append, mend, records
from vitlib.batch.manifest import RUN, checksum
from vitlib.batch.plan import Shards
from vitlib.batch.results import Answer
from vitlib.system.atomic import open_atomic


class Parts:
    """The shards of a run in a folder."""

    def __init__(self, out: Path, shards: Shards, form: Format, columns: Columns) -> None:
        self.out, self.shards, self.form, self.columns = out, shards, form, columns
        self.run = out / RUN

    def journal(self, shard: int) -> Path:
        """Where the answers of a shard that is not whole are."""
        return self.run / f"{self.shards.name(shard)}.rows"

    def keys(self, shard: int) -> Path:
        """(row, key) of the inputs of a whole shard that were read."""
        return self.run / f"{self.shards.name(shard)}.keys.npy"

    def record(self, shard: int) -> dict[str, Any] | None:
        """What was written of a shard; None: it is not whole, or a file of it is not there."""
        try:
            said: dict[str, Any] = json.loads(self._record_path(shard).read_bytes())
            for name, file in said["files"].items():
                if (self.out / name).stat().st_size != file["bytes"]:
                    return None
        except (OSError, ValueError, KeyError):
            return None
        return said

    def begun(self, shard: int) -> int:
        """The rows of a shard that are in its journal, which is mended."""
        return mend(self.journal(shard))

    def failed(self, shard: int) -> int:
        """Of the rows in its journal, those that failed."""
        return sum(_failed(answer) for answer in records(self.journal(shard)))

    def add(self, answers: Iterable[Answer]) -> Generator[Answer, None, None]:
        """Keep each answer, and finish each shard with its last; yields them."""
        for answer in answers:
            shard = answer.first // self.shards.size
            append(self.journal(shard), answer)
            if answer.first + len(answer) == self.shards.bounds(shard)[1]:
                self.finish(shard)
            yield answer

    def finish(self, shard: int) -> None:
        """Write the files of a shard whose rows are all in its journal."""
        start, stop = self.shards.bounds(shard)
        name, journal = self.shards.name(shard), self.journal(shard)
        files = write_part(self.form, self.out, name, records(journal), stop - start, self.columns)
        errors: list[list[Any]] = []
        keys: list[list[int]] = []
        for answer in records(journal):
            for i, error in enumerate(answer.errors):
                row = answer.first + i
                if error is not None:
                    errors.append([row, answer.files[i], error])
                if answer.keys[i]:
                    keys.append([row, int(answer.keys[i])])
        with open_atomic(self.keys(shard)) as file:
            np.save(file, np.array(keys, np.uint64).reshape(-1, 2), allow_pickle=False)
        said = {
            "name": name, "first": start, "rows": stop - start, "failed": len(errors),
            "files": {file: checksum(self.out / file) for file in files}, "errors": errors,
        }  # fmt: skip
        with open_atomic(self._record_path(shard)) as file:
            file.write(json.dumps(said).encode())
        journal.unlink()

    def _record_path(self, shard: int) -> Path:
        return self.run / f"{self.shards.name(shard)}.json"


def _failed(answer: Answer) -> int:
    return sum(error is not None for error in answer.errors)
