"""Results of single features on disk, so that a run that was killed does not compute them again.

A result is a JSON file whose name is a hash of all that decides it: photos, labels, division,
model, layer, pool and settings. Another run reads it only if all of these are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitlib.errors import VitlibError
from vitlib.features import Feature
from vitlib.probe.measure import FewShotResult, MethodResult, Task
from vitlib.source.locate import read_json
from vitlib.system.atomic import open_atomic

VERSION = 1


class Journal:
    """Stored results of one set of photos, labels and settings.

    Args:
        folder: Folder of the files, made when the first is written.
        task: Labels, division and settings.
        digests: Hash of the bytes of each photo.
    """

    def __init__(self, folder: Path, task: Task, digests: Sequence[str]) -> None:
        self.folder = folder
        hasher = hashlib.blake2b(digest_size=16)
        settings = (
            VERSION, task.labels, task.methods, task.k, task.few_shot, task.seed, task.multi_label,
            task.division.kind, task.division.rounds, task.division.final, tuple(digests),
        )  # fmt: skip
        # Everything that a result depends on but the model: a change of any makes other names.
        hasher.update(repr(_sorted_sets(settings)).encode())
        hasher.update(task.targets.tobytes())
        hasher.update(task.division.parts.tobytes())
        self._settings = hasher.hexdigest()

    def _path(self, model_digest: str, feature: Feature) -> Path:
        """Return the file of a result."""
        text = f"{self._settings} {model_digest} {feature.layer} {feature.pool}"
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return self.folder / f"{name}.json"

    def read(self, model_digest: str, feature: Feature) -> dict[str, Any] | None:
        """Read a result.

        Args:
            model_digest: Hash of the model.
            feature: Layer and pool.

        Returns:
            As measure_feature(), with "milliseconds"; None where there is none, or a damaged one.
        """
        try:
            stored = read_json(self._path(model_digest, feature))
            return {
                "methods": [MethodResult(**entry) for entry in stored["methods"]],
                "few_shot": [FewShotResult(**entry) for entry in stored["few_shot"]],
                "milliseconds": stored["milliseconds"],
            }
        except (VitlibError, OSError, KeyError, TypeError):
            return None

    def write(self, model_digest: str, feature: Feature, result: dict[str, Any]) -> None:
        """Store a result.

        Args:
            model_digest: Hash of the model.
            feature: Layer and pool.
            result: As measure_feature(), with "milliseconds".

        Raises:
            SourceError: The folder cannot be written.
        """
        value = result | {
            "methods": [entry._asdict() for entry in result["methods"]],
            "few_shot": [entry._asdict() for entry in result["few_shot"]],
        }
        with open_atomic(self._path(model_digest, feature)) as file:
            file.write(json.dumps(value, allow_nan=False).encode())


def _sorted_sets(value: Any) -> Any:
    """Replace sets by sorted lists: the order of a set is not that of another process."""
    if isinstance(value, frozenset):
        return sorted(value)
    return [_sorted_sets(entry) for entry in value] if isinstance(value, tuple) else value
