"""Shards on the disk: journals of incomplete ones, files and records of complete ones.

A shard begins as a journal. With its last row, first its files are written, then its record, then
the journal is deleted. A kill leaves one of these states, from which the run continues.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vitlib.batch.formats import Columns, Format, write_part
from vitlib.batch.journal import append, read_records, truncate_incomplete
from vitlib.batch.manifest import RUN, checksum
from vitlib.batch.plan import Shards
from vitlib.batch.results import Results
from vitlib.system.atomic import open_atomic


class ShardStore:
    """Shards of a run in a folder.

    Args:
        out: folder of the run.
        shards: division of the inputs.
        form: format of the part files.
        columns: columns of the rows.
    """

    def __init__(self, out: Path, shards: Shards, form: Format, columns: Columns) -> None:
        self.out, self.shards, self.form, self.columns = out, shards, form, columns
        self.run = out / RUN

    def journal(self, shard: int) -> Path:
        """Return the path of the journal of an incomplete shard.

        Args:
            shard: number of the shard.
        """
        return self.run / f"{self.shards.name(shard)}.rows"

    def keys(self, shard: int) -> Path:
        """Return the path of the file of (row, key) of a complete shard.

        Args:
            shard: number of the shard.
        """
        return self.run / f"{self.shards.name(shard)}.keys.npy"

    def record(self, shard: int) -> dict[str, Any] | None:
        """Read the record of a shard.

        Args:
            shard: number of the shard.

        Returns:
            The record; None for an incomplete shard, or where a file of it is missing.
        """
        try:
            record: dict[str, Any] = json.loads(self._record_path(shard).read_bytes())
            for name, file in record["files"].items():
                if (self.out / name).stat().st_size != file["bytes"]:
                    return None
        except (OSError, ValueError, KeyError):
            return None
        return record

    def recover(self, shard: int) -> int:
        """Cut off an incomplete record of a shard's journal.

        Args:
            shard: number of the shard.

        Returns:
            Number of rows in the journal.
        """
        return truncate_incomplete(self.journal(shard))

    def count_failed(self, shard: int) -> int:
        """Count the failed inputs in a shard's journal.

        Args:
            shard: number of the shard.
        """
        return sum(_count_failed(results) for results in read_records(self.journal(shard)))

    def store(self, batches: Iterable[Results]) -> Generator[Results, None, None]:
        """Append results to journals, and finish each shard with its last row.

        Args:
            batches: results in the order of the rows.

        Yields:
            The results, once they are stored.
        """
        for results in batches:
            shard = results.first // self.shards.size
            append(self.journal(shard), results)
            if results.first + len(results) == self.shards.bounds(shard)[1]:
                self.finish(shard)
            yield results

    def finish(self, shard: int) -> None:
        """Write the files of a shard whose rows are all in its journal.

        Args:
            shard: number of the shard.
        """
        start, stop = self.shards.bounds(shard)
        name, journal = self.shards.name(shard), self.journal(shard)
        rows = stop - start
        files = write_part(self.form, self.out, name, read_records(journal), rows, self.columns)
        errors: list[list[Any]] = []
        keys: list[list[int]] = []
        for results in read_records(journal):
            for i, error in enumerate(results.errors):
                row = results.first + i
                if error is not None:
                    errors.append([row, results.files[i], error])
                if results.keys[i]:
                    keys.append([row, int(results.keys[i])])
        with open_atomic(self.keys(shard)) as file:
            np.save(file, np.array(keys, np.uint64).reshape(-1, 2), allow_pickle=False)
        record = {
            "name": name, "first": start, "rows": rows, "failed": len(errors),
            "files": {file: checksum(self.out / file) for file in files}, "errors": errors,
        }  # fmt: skip
        with open_atomic(self._record_path(shard)) as file:
            file.write(json.dumps(record).encode())
        journal.unlink()

    def _record_path(self, shard: int) -> Path:
        return self.run / f"{self.shards.name(shard)}.json"


def _count_failed(results: Results) -> int:
    """Count the failed inputs."""
    return sum(error is not None for error in results.errors)
