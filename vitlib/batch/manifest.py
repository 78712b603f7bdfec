"""Folder of a run: settings before the first row, counts and checksums after the last.

OUT/manifest.json      settings; at the end also counts, and rows and checksums of each part
OUT/part-00000.jsonl   rows of a shard
OUT/errors.jsonl, duplicates.jsonl, ignored.txt   where there are any
OUT/_SUCCESS           empty, written last
OUT/stdin.txt          list of paths that `vitlib batch -` read from stdin, with a name a line
OUT/.run/              plan, journals, records of finished shards; deleted at the end
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from vitlib.batch.formats import Columns, Format
from vitlib.batch.worker import Task
from vitlib.errors import BatchError
from vitlib.fast import FastViT
from vitlib.fast.cpu import kernel_plan, this_machine
from vitlib.predict.optimized_model import count_programs
from vitlib.predict.predictor import Predictor
from vitlib.scores import Task as ScoreTask
from vitlib.source.locate import MAX_JSON_BYTES
from vitlib.system.atomic import open_atomic
from vitlib.vit import ViT

MANIFEST, SUCCESS, RUN, STDIN_LIST = "manifest.json", "_SUCCESS", ".run", "stdin.txt"
_KEYS = {"requested_precision": "precision_asked"}  # keys of manifest.json that differ


@dataclass(frozen=True)
class Settings:
    """Settings that rows depend on, and the division into shards.

    Attributes:
        source: names of the source.
        column: column of lists that contains the images.
        root: folder that paths of lists are relative to.
        model: name of the model.
        model_digest: hash of weights, config and preprocessing.
        task: scores, embeddings or both.
        top_k: labels per image; None for all.
        format: format of the part files.
        precision: arithmetic of the model.
        requested_precision: option of the caller; None for the checkpoint's own.
        batch_size: images per forward pass.
        shard_size: inputs of a part file.
        threads: threads that compute a batch together.
        operations: library, device and operations, by name.
        labels: classes of the model.
        width: D of the embedding; 0 without embeddings.
        problem_type: task of the model, which decides how scores are computed.
        calibration: summary of the calibration; None for the model's own scores.
    """

    source: tuple[str, ...]
    column: str | None
    root: str | None
    model: str
    model_digest: str
    task: Task
    top_k: int | None
    format: Format
    precision: str
    requested_precision: str | None
    batch_size: int
    shard_size: int
    threads: int
    operations: dict[str, str]
    labels: tuple[str, ...]
    width: int
    problem_type: ScoreTask = "single_label_classification"
    calibration: dict[str, Any] | None = None

    def columns(self, base_folder: str) -> Columns:
        """Make the columns of the rows.

        Args:
            base_folder: folder that azure-csv names files from.

        Returns:
            The columns.
        """
        top_k = 0 if self.task == "embed" else self.top_k
        regression = self.problem_type == "regression"
        return Columns(self.labels, top_k, self.width, base_folder, regression)

    def as_json(self) -> dict[str, Any]:
        """Convert to the fields of the manifest."""
        # The name of this key in manifests is older than the field's.
        return {_KEYS.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, manifest: dict[str, Any]) -> Settings:
        """Read the fields of a manifest.

        Args:
            manifest: as `as_json` gives them.

        Returns:
            The settings.
        """
        # Absent from runs of older versions.
        optional = ("problem_type", "calibration")
        values = {}
        for field in fields(cls):
            key = _KEYS.get(field.name, field.name)
            if key in manifest or field.name not in optional:
                values[field.name] = manifest[key]
        values["source"], values["labels"] = tuple(values["source"]), tuple(values["labels"])
        return cls(**values)


def read_settings(path: Path) -> Settings:
    """Read the settings of a manifest.

    Args:
        path: the manifest.

    Returns:
        The settings.

    Raises:
        ValueError: for a file that is not the manifest of a run.
        OSError: for a file that cannot be read.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has more than {MAX_JSON_BYTES} bytes")
    try:
        return Settings.from_json(json.loads(path.read_bytes())["settings"])
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not of vitlib batch") from error


def read_earlier_run(out: Path) -> Settings | None:
    """Read the settings of the run in a folder.

    Args:
        out: the folder, which may be absent.

    Returns:
        The settings; None for an absent or empty folder.

    Raises:
        BatchError: for a folder with other content.
    """
    path = out / MANIFEST
    try:
        if path.exists():
            return read_settings(path)
        others = sorted(
            entry.name for entry in out.iterdir() if entry.name not in (RUN, STDIN_LIST)
        )
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise BatchError(f"{out} is a file: expected a folder, or a new name") from error
    except ValueError as error:
        raise BatchError(f"{path} is not of vitlib batch: name another --out") from error
    except OSError as error:
        raise BatchError(f"{out} cannot be read: {error.strerror or error}") from error
    if others:
        raise BatchError(
            f"{out} is not empty ({others[0]}) and has no run of vitlib batch: name a new folder"
        )
    return None


def write_manifest(out: Path, settings: Settings, extra: dict[str, Any]) -> None:
    """Write the manifest.

    Args:
        out: folder of the run.
        settings: the settings.
        extra: further fields.
    """
    manifest = {"complete": False, **extra, "settings": settings.as_json()}
    with open_atomic(out / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")


def check_complete(out: Path, inputs: str) -> None:
    """Check the inputs and files of a complete run.

    Args:
        out: folder of the run.
        inputs: digest of the inputs.

    Raises:
        BatchError: for other inputs, and for a missing file or one of another length.
    """
    manifest = json.loads((out / MANIFEST).read_bytes())
    if manifest.get("inputs_digest") != inputs:
        raise BatchError(
            f"{out} has a complete run of other inputs (a file was added, removed or written to "
            "since, or the source is spelled otherwise): name another --out"
        )
    check_files(out, manifest)


def check_files(out: Path, manifest: dict[str, Any]) -> None:
    """Check the files of a complete run.

    Args:
        out: folder of the run.
        manifest: its manifest.

    Raises:
        BatchError: for a missing file or one of another length.
    """
    files = dict(manifest.get("files", {}))
    for part in manifest["parts"]:
        files |= part.get("files", {})
    for name, file in files.items():
        path = out / name
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            raise BatchError(
                f"{path} is missing, or not as the run wrote it: name another --out, or remove "
                f"{out} and run the command again"
            )


def describe_operations(predictor: Predictor) -> dict[str, str]:
    """Describe library, device and operations, on which the last bits of results depend.

    Args:
        predictor: the optimized model.

    Returns:
        Descriptions by name.
    """
    fast = predictor.fast()
    device = predictor.engine().device
    operations = {"torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        return operations | {"gpu": torch.cuda.get_device_name(device)}
    machine = this_machine()
    if not isinstance(fast, ViT | FastViT):
        operations["runtime"] = fast.runtime.version
    plan = kernel_plan(fast.precision) if isinstance(fast, FastViT) else None
    operations |= {"cpu": f"{machine.architecture} {machine.vendor}, {machine.features}"}
    if count_programs(fast) is not None:
        operations["compiler"] = "inductor"
    if plan is not None:
        operations["linears"] = f"{plan.arithmetic}{', packed' * plan.packed}"
        operations["attention"] = (
            f"{plan.attention}, {str(plan.attention_dtype).removeprefix('torch.')}"
        )
    return operations


def checksum(path: Path) -> dict[str, Any]:
    """Compute size and SHA-256 of a file.

    Args:
        path: the file.

    Returns:
        {"bytes", "sha256"}.
    """
    hasher = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            hasher.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": hasher.hexdigest()}
