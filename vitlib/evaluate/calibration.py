"""calibration.json: how a model's scores are to be read, kept beside its weights."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitlib.errors import ConfigError, SourceError
from vitlib.evaluate.fit import MOST, sharpened, temperature, thresholds
from vitlib.files import whole_file
from vitlib.metrics import quick
from vitlib.source import FAST, Source

FILE, FORMAT, VERSION = "calibration.json", "vitlib-calibration", 1
FEW = 30  # photos of a class: below, a threshold follows single photos
READ = 2**20  # bytes of weights at a time
TASKS = ("single_label_classification", "multi_label_classification")  # of ViTConfig.problem_type


@dataclass(frozen=True)
class Calibration:
    """A temperature, and with several labels a photo a threshold for each class."""

    labels: tuple[str, ...]  # of the model, in its order
    multi_label: bool
    temperature: float  # scores become those of logits / temperature
    thresholds: tuple[float, ...] | None  # one a class; None: one label a photo
    source: str  # the photos it was tuned on
    photos: int  # how many
    counts: tuple[int, ...]  # of them, those of each class
    log_loss: tuple[float, float]  # on them, before and after
    notes: tuple[str, ...] = ()
    date: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)  # file -> SHA-256; empty: not stored

    def apply(self, scores: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The model's scores (N, C), 0..1 -> calibrated ones, which rank each photo's classes the
        same."""
        return sharpened(scores, self.temperature, self.multi_label)

    def check(self, labels: Sequence[str], multi_label: bool) -> None:
        """Raise ConfigError where a model with these classes and this task is another one."""
        if tuple(labels) != self.labels or multi_label != self.multi_label:
            raise ConfigError(
                f"the calibration is for {len(self.labels)} classes ({_task(self.multi_label)}), "
                f"the model has {len(labels)} or others ({_task(multi_label)}): tune it again, or "
                "evaluate without"
            )

    def store(self, model: str | os.PathLike[str]) -> Path:
        """Write calibration.json beside the weights of a local model, a folder or a file.

        It names those weights, so that it is not taken for that of another training. Returns its
        path. Raises SourceError where there are no weights or it cannot be written.
        """
        path = Path(model).expanduser()
        kept = replace(self, weights=_weights(Source(path)))
        return kept.write(path if path.is_dir() else path.parent)

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write calibration.json into a folder, whole or not at all; returns its path.

        Raises SourceError where it cannot be written.
        """
        path = Path(folder) / FILE
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"
        with whole_file(path) as file:
            file.write(text.encode("utf-8", "backslashreplace"))
        return path

    def as_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        limits = self.thresholds or (None,) * len(self.labels)
        each = zip(self.labels, self.counts, limits, strict=True)
        return {
            "format": FORMAT,
            "version": VERSION,
            "task": _task(self.multi_label),
            "temperature": self.temperature,
            "classes": [{"label": a, "photos": b, "threshold": c} for a, b, c in each],
            "tuned_on": {"source": self.source, "photos": self.photos},
            "chosen_by": {"temperature": "log_loss", "threshold": "f1_score of the class"},
            "log_loss": dict(zip(("before", "after"), self.log_loss, strict=True)),
            "notes": list(self.notes),
            "date": self.date,
            "weights": dict(self.weights),
        }

    @classmethod
    def read(cls, source: str | os.PathLike[str] | Source) -> Calibration | None:
        """The calibration beside a model's files, or None where there is none.

        source: as for vitlib.load. Raises SourceError for a file that is too large or no
        calibration, ConfigError where the weights beside it are not those it was tuned for.
        """
        src = source if isinstance(source, Source) else Source(source)
        value = src.json(FILE)
        if value is None:
            return None
        try:
            found = _from_dict(value)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else error
            raise SourceError(
                f"{src.name}: {FILE} is no calibration of version {VERSION} ({why}): tune it again"
            ) from error
        if found.weights and dict(found.weights) != _weights(src):
            raise ConfigError(
                f"{src.name}: {FILE} was tuned for other weights than those beside it: tune it "
                "again, or evaluate without"
            )
        return found


def fit(
    targets: npt.NDArray[Any],
    scores: npt.NDArray[Any],
    labels: Sequence[str],
    multi_label: bool,
    *,
    source: str = "",
    date: str = "",
) -> Calibration:
    """The calibration of scores (N, C) on photos with these targets (as metrics take them), which
    are neither those that the model was trained on nor those it is to be judged by.

    Raises ConfigError as metrics.quick does.
    """
    before = quick(targets, scores, multi_label)["log_loss"]
    best, notes = temperature(targets, scores, multi_label), []
    if best is None:
        notes.append(
            f"the temperature stays 1: on these {len(scores)} photos the log loss has no least "
            f"value between {1 / MOST:g} and {MOST:g}"
        )
    chosen = best or 1.0
    calibrated = sharpened(scores, chosen, multi_label)
    if multi_label:
        counts = (targets == 1).sum(axis=0)
    else:
        counts = np.bincount(targets, minlength=len(labels))
    limits = tuple(map(float, thresholds(targets, calibrated))) if multi_label else None
    few = int((counts < FEW).sum())
    if multi_label and few:
        notes.append(
            f"{few} of {len(labels)} thresholds were chosen on fewer than {FEW} photos that have "
            "the class: 0.5 may do as well"
        )
    return Calibration(
        tuple(labels),
        multi_label,
        chosen,
        limits,
        source,
        len(scores),
        tuple(int(count) for count in counts),
        (before, quick(targets, calibrated, multi_label)["log_loss"]),
        tuple(notes),
        date,
    )


def _task(multi_label: bool) -> str:
    return TASKS[multi_label]


def _from_dict(value: dict[str, Any]) -> Calibration:
    """Raises KeyError, TypeError or ValueError for anything that is none."""
    if (value["format"], value["version"]) != (FORMAT, VERSION):
        raise ValueError(f"format {value['format']!r}, version {value['version']!r}")
    multi_label = bool(TASKS.index(value["task"]))
    rows = [_object(row) for row in _list(value["classes"])]
    limits = [row["threshold"] for row in rows]
    if not multi_label and any(limit is not None for limit in limits):
        raise ValueError("thresholds, with one label a photo")
    tuned, losses = _object(value["tuned_on"]), _object(value["log_loss"])
    weights = {_text(k): _text(v) for k, v in _object(value["weights"]).items()}
    return Calibration(
        labels=tuple(_text(row["label"]) for row in rows),
        multi_label=multi_label,
        temperature=_number(value["temperature"], 1 / MOST, MOST),
        thresholds=tuple(_number(limit, 0, 1) for limit in limits) if multi_label else None,
        source=_text(tuned["source"]),
        photos=int(_number(tuned["photos"], 0, 2**53)),
        counts=tuple(int(_number(row["photos"], 0, 2**53)) for row in rows),
        log_loss=(_number(losses["before"], 0, 1e9), _number(losses["after"], 0, 1e9)),
        notes=tuple(_text(note) for note in _list(value["notes"])),
        date=_text(value["date"]),
        weights=weights,
    )


def _number(value: object, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{str(value)[:40]!r}: expected a number")
    if not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{value:g}: expected {low:g} to {high:g}")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r}: expected text")
    return value


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:40]!r}: expected a list")
    return value


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{str(value)[:40]!r}: expected an object")
    return value


def _weights(source: Source) -> dict[str, str]:
    """The files that the model is loaded from -> SHA-256."""
    packed = None if source.is_hub else source.file(FAST)
    found = {}
    for path in [packed] if packed is not None else source.weights():
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while some := file.read(READ):
                    digest.update(some)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}") from error
        found[path.name] = digest.hexdigest()
    return found
