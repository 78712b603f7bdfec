"""What a run is: its settings, written before the first row and kept by every later command, and
its counts and checksums, written when all rows are there.

    OUT/manifest.json      settings; in the end also counts, and each part's rows and checksums
    OUT/part-00000.jsonl   rows of a shard
    OUT/errors.jsonl, duplicates.jsonl, ignored.txt   where there are any
    OUT/_SUCCESS           empty, last
    OUT/.run/              the plan, journals, records of finished shards; gone in the end
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitlib.batch.formats import Columns, Format
from vitlib.batch.worker import Task
from vitlib.errors import BatchError, SourceError
from vitlib.fast import FastViT
from vitlib.fast.cpu import kernel_plan, this_machine
from vitlib.fast.serialize import named_tensors
from vitlib.predict.predictor import Predictor
from vitlib.scores import Task as ScoreTask
from vitlib.source.locate import MAX_JSON_BYTES
from vitlib.system.atomic import open_atomic

MANIFEST, SUCCESS, RUN = "manifest.json", "_SUCCESS", ".run"


@dataclass(frozen=True)
class Settings:
    """All that a row depends on, and how rows are divided."""

    source: tuple[str, ...]
    column: str | None
    root: str | None
    model: str
    model_digest: str
    task: Task
    top_k: int | None
    format: Format
    precision: str
    precision_asked: str | None
    batch_size: int
    shard_size: int
    threads: int  # that compute a batch together
    operations: dict[str, str]
    labels: tuple[str, ...]
    width: int  # of the embedding; 0: none
    problem_type: ScoreTask = "single_label_classification"  # how scores are made; see scores.py
    calibration: dict[str, Any] | None = None  # Calibration.summary(); None: scores are the model's

    def columns(self, below: str) -> Columns:
        """What rows hold."""
        top_k = 0 if self.task == "embed" else self.top_k
        return Columns(self.labels, top_k, self.width, below, self.problem_type == "regression")

    def as_json(self) -> dict[str, Any]:
        """As the manifest has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Settings:
        """What as_json() gave, after JSON."""
        later = ("problem_type", "calibration")  # which runs of older versions lack
        known = {
            field.name: said[field.name]
            for field in fields(cls)
            if field.name in said or field.name not in later
        }
        known["source"], known["labels"] = tuple(known["source"]), tuple(known["labels"])
        return cls(**known)


def settings_in(path: Path) -> Settings:
    """A manifest's. Raises ValueError where it is not a run's, OSError where it cannot be read."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has more than {MAX_JSON_BYTES} bytes")
    try:
        return Settings.from_json(json.loads(path.read_bytes())["settings"])
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not of vitlib batch") from error


def begun(out: Path) -> Settings | None:
    """The settings of the run in a folder; None: there is none. Raises BatchError where the folder
    holds something else."""
    path = out / MANIFEST
    try:
        if path.exists():
            return settings_in(path)
        others = sorted(entry.name for entry in out.iterdir() if entry.name != RUN)
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise BatchError(f"{out} is a file: expected a folder, or none yet") from error
    except ValueError as error:
        raise BatchError(f"{path} is not of vitlib batch: name another --out") from error
    except OSError as error:
        raise BatchError(f"{out} cannot be read: {error.strerror or error}") from error
    if others:
        raise BatchError(
            f"{out} is not empty ({others[0]}) and holds no run of vitlib batch: name a new folder"
        )
    return None


def write_manifest(out: Path, settings: Settings, more: dict[str, Any]) -> None:
    """Settings, and what else is to be said."""
    said = {"complete": False, **more, "settings": settings.as_json()}
    with open_atomic(out / MANIFEST) as file:
        file.write(json.dumps(said, indent=1).encode() + b"\n")


def check_complete(out: Path, inputs: str) -> None:
    """Raises BatchError where a complete run was made of other inputs, or a file of it is not there
    in its length. inputs: their digest."""
    said = json.loads((out / MANIFEST).read_bytes())
    if said.get("inputs_digest") != inputs:
        raise BatchError(
            f"{out} holds a complete run of other inputs (a file came, went or was written to "
            "since, or the source is spelled otherwise): name another --out"
        )
    check_files(out, said)


def check_files(out: Path, said: dict[str, Any]) -> None:
    """Raises BatchError where a file of a complete run is not there in its length. said: its
    manifest."""
    files = dict(said.get("files", {}))
    for part in said["parts"]:
        files |= part.get("files", {})
    for name, file in files.items():
        path = out / name
        if not path.is_file() or path.stat().st_size != file["bytes"]:
            raise BatchError(
                f"{path} is not there, or not as the run wrote it: name another --out, or remove "
                f"{out} and give the command again"
            )


def operations_of(predictor: Predictor) -> dict[str, str]:
    """What computes: numbers of another machine may differ in their last bits."""
    fast = predictor.fast()
    device = predictor.engine().device
    found = {"torch": torch.__version__, "device": device.type}
    if device.type == "cuda":
        return found | {"gpu": torch.cuda.get_device_name(device)}
    machine = this_machine()
    way = kernel_plan(fast.precision) if isinstance(fast, FastViT) else None
    found |= {"cpu": f"{machine.architecture} {machine.vendor}, {machine.features}"}
    if way is not None:
        found["linears"] = f"{way.arithmetic}{', packed' * way.packed}"
        found["attention"] = f"{way.attention}, {str(way.attention_dtype).removeprefix('torch.')}"
    return found


def digest_of(predictor: Predictor) -> str:
    """Of weights, config and preprocessing: another model has another."""
    model = predictor.model
    whole = hashlib.blake2b(digest_size=16)
    whole.update(repr((model.config, predictor.image_processor)).encode())
    pairs = (
        named_tensors(model.trunk, "") if isinstance(model, FastViT) else model.state_dict().items()
    )
    with ThreadPoolExecutor() as pool:
        for digest in pool.map(_digest, pairs):
            whole.update(digest)
    return whole.hexdigest()


def _digest(pair: tuple[str, Tensor]) -> bytes:
    """Of a tensor and its name."""
    name, tensor = pair
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    whole = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    whole.update(plain.data)
    return whole.digest()


@contextmanager
def locked(out: Path, rank: int, world: int) -> Iterator[None]:
    """While this process works in a folder. Raises BatchError where another does."""
    folder = out / RUN
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / "lock", out, shared=world > 1):
        if world == 1:
            yield
            return
        with _held(folder / f"lock-{rank}", out, shared=False):
            yield


@contextmanager
def _held(path: Path, out: Path, *, shared: bool, waits: bool = False) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows: nothing is held
        yield
        return
    with path.open("ab") as file:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(file, kind | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BatchError(f"{out}: another process is at work there: wait for it") from error
        yield


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """What the system says of a folder -> SourceError: a full disk, above all."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "make room" if full else "mend that, or name another --out"
        raise SourceError(
            f"{out} cannot be written: {error.strerror or error}; what is done is kept: {hint}, "
            "and give the same command again"
        ) from error


def alone(out: Path) -> Any:
    """One process at a time: where several begin or end a run together."""
    return _held(out / RUN / "turn", out, shared=False, waits=True)


@contextmanager
def nothing_left(out: Path) -> Iterator[None]:
    """What is refused before any work leaves no trace."""
    try:
        yield
    except BaseException:
        if not (out / MANIFEST).exists() or (out / SUCCESS).exists():
            remove_run(out)
            with suppress(OSError):
                out.rmdir()
        raise


def checksum(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    whole = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            whole.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": whole.hexdigest()}


def remove_run(out: Path) -> None:
    """The run's own folder, with what is in it."""
    for path in sorted((out / RUN).rglob("*"), reverse=True):
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()
    with suppress(OSError):
        os.rmdir(out / RUN)  # noqa: PTH106
