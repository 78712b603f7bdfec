"""calibration.json: how a model's scores are to be read, kept beside its weights.

`vitlib evaluate --tune` writes it (evaluate/fit.py); the Predictor, and with it classify, batch and
serve, uses it as evaluate does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitlib.errors import ConfigError, SourceError
from vitlib.scores import Task, apply_temperature
from vitlib.source.locate import FAST, Source
from vitlib.system.atomic import whole_file

logger = logging.getLogger("vitlib")
FILE, FORMAT, VERSION = "calibration.json", "vitlib-calibration", 1
MOST = 20.0  # temperatures are from 1 / MOST to MOST
READ = 2**20  # bytes of weights at a time
TASKS: tuple[Task, Task] = ("single_label_classification", "multi_label_classification")
LEAVE = (
    "tune it again (vitlib evaluate --tune), or leave it out (calibrated=False, --no-calibration)"
)
_CLASS_KEYS = ("label", "photos", "threshold")
_SHOWN = 60  # characters of a file's own text in a message


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
        return apply_temperature(scores, self.temperature, self.multi_label)

    def check(self, labels: Sequence[str], task: Task) -> None:
        """Raise ConfigError where a model with these classes and this task is another one."""
        mine = TASKS[self.multi_label]
        if task != mine:
            raise ConfigError(f"{FILE} is for a {mine}, the model's task is {task}: {LEAVE}")
        if len(labels) != len(self.labels):
            raise ConfigError(
                f"{FILE} is for {len(self.labels)} classes, the model has {len(labels)}: {LEAVE}"
            )
        for index, (own, other) in enumerate(zip(self.labels, labels, strict=True)):
            if own != other and not _differ_by_form(own, other):
                raise ConfigError(
                    f"{FILE} is for other classes: its class {index} is {own[:_SHOWN]!r}, the "
                    f"model's {other[:_SHOWN]!r}: {LEAVE}"
                )

    def describe(self) -> str:
        """One line: what it does to scores, and where it is from."""
        what = f"temperature {self.temperature:.4g}"
        what += "" if self.thresholds is None else ", a threshold for each class"
        return f"{what}, tuned on {self.photos} photos of {self.source[:_SHOWN]!r}"

    def summary(self) -> dict[str, Any]:
        """What an answer says of it: temperature, thresholds (None: one label a photo), photos."""
        limits = self.thresholds
        return {
            "temperature": self.temperature,
            "thresholds": None if limits is None else list(limits),
            "photos": self.photos,
        }

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
            "task": TASKS[self.multi_label],
            "temperature": self.temperature,
            "classes": [dict(zip(_CLASS_KEYS, row, strict=True)) for row in each],
            "tuned_on": {"source": self.source, "photos": self.photos},
            "chosen_by": {"temperature": "log_loss", "threshold": "f1_score of the class"},
            "log_loss": dict(zip(("before", "after"), self.log_loss, strict=True)),
            "notes": list(self.notes),
            "date": self.date,
            "weights": dict(self.weights),
        }

    @classmethod
    def read(cls, source: str | os.PathLike[str] | Source) -> Calibration | None:
        """The calibration beside a model's files, or None where there is none for them.

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
                f"{src.name}: {FILE} is no calibration of version {VERSION} ({why}): {LEAVE}"
            ) from error
        mine = _weights(src) if found.weights else {}
        if dict(found.weights) != mine:
            if src.is_file and not mine.keys() & found.weights.keys():
                return None  # of another file that lies in the same folder
            raise ConfigError(
                f"{src.name}: {FILE} was tuned for other weights than those beside it: {LEAVE}"
            )
        unknown = _unknown(value, found.as_dict())
        if unknown:
            told = ", ".join(_cut(key) for key in unknown[:3])
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            logger.warning("%s: %s has keys that are not used: %s%s", src.name, FILE, told, more)
        return found


def _unknown(value: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """Return the keys of a file, dotted, that none of this version has; of a list, of all its rows.

    Args:
        value: The file.
        known: What as_dict() gives of it.
    """
    unknown: list[str] = []
    for key, inner in value.items():
        if key not in known:
            unknown.append(key)
        elif key == "classes":
            rows = {name: None for row in inner for name in row}
            unknown += [f"classes.{name}" for name in rows if name not in _CLASS_KEYS]
        elif isinstance(inner, dict) and key != "weights":  # whose keys are names of files
            unknown += [f"{key}.{name}" for name in inner if name not in known[key]]
    return unknown


def _differ_by_form(own: str, other: str) -> bool:
    """Whether two labels are one in Unicode's composed form."""
    from unicodedata import normalize  # which a start need not load

    return normalize("NFC", own) == normalize("NFC", other)


def _from_dict(value: dict[str, Any]) -> Calibration:
    """Raises KeyError, TypeError or ValueError for anything that is none."""
    if (value["format"], value["version"]) != (FORMAT, VERSION):
        raise ValueError(f"format {_cut(value['format'])}, version {_cut(value['version'])}")
    if value["task"] not in TASKS:
        raise ValueError(f"task {_cut(value['task'])}: expected one of {', '.join(TASKS)}")
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


def _cut(value: object) -> str:
    """A value of a hostile file for a message."""
    return repr(value)[:_SHOWN]


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
