"""The temperature and thresholds of a model's scores, in calibration.json beside its weights.

`vitlib evaluate --tune` writes the file (evaluate/tuning.py). The Predictor applies it, and so do
classify, batch and serve, in the same way as evaluate.
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

from vitlib.errors import ConfigError, SourceError, count_noun
from vitlib.scores import Task, apply_temperature
from vitlib.source.locate import FAST_FILE, Source
from vitlib.system.atomic import expand_home, open_atomic

logger = logging.getLogger("vitlib")
FILE, FORMAT, VERSION = "calibration.json", "vitlib-calibration", 1
MAX_TEMPERATURE = 20.0  # temperatures are from 1 / MAX_TEMPERATURE to MAX_TEMPERATURE
CHUNK = 2**20  # bytes of weights that are hashed at a time
TASKS: tuple[Task, Task] = ("single_label_classification", "multi_label_classification")
REMEDY = (
    "tune it again (vitlib evaluate --tune), or leave it out (calibrated=False, --no-calibration)"
)
_CLASS_KEYS = ("label", "photos", "threshold")
_MAX_QUOTED = 60  # characters of the file's own text in a message


@dataclass(frozen=True)
class Calibration:
    """A temperature, and for multi-label models a threshold for each class.

    Attributes:
        labels: The model's class names, in its order.
        multi_label: True for sigmoid scores, False for softmax scores.
        temperature: Scores become those of logits / temperature; 0.05 to 20.
        thresholds: Lowest score of a label, for each class; None for single-label models.
        source: The photos that it was tuned on.
        photos: The number of those photos.
        counts: The number of those photos with each class.
        log_loss: Log loss on those photos, before and after.
        notes: Remarks about the tuning, a line each.
        date: ISO date of the tuning.
        weights: File name to SHA-256 of the weights; empty if not stored beside weights.
    """

    labels: tuple[str, ...]
    multi_label: bool
    temperature: float
    thresholds: tuple[float, ...] | None
    source: str
    photos: int
    counts: tuple[int, ...]
    log_loss: tuple[float, float]
    notes: tuple[str, ...] = ()
    date: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)

    def apply(self, scores: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Apply the temperature to scores; the order of an image's classes stays the same.

        Args:
            scores: (N, C) in 0..1.

        Returns:
            (N, C) in 0..1.
        """
        return apply_temperature(scores, self.temperature, self.multi_label)

    def check(self, labels: Sequence[str], task: Task) -> None:
        """Check that the calibration is for a model with these classes and this task.

        Args:
            labels: The model's class names.
            task: The model's task.

        Raises:
            ConfigError: The task or a class name differs.
        """
        expected = TASKS[self.multi_label]
        if task != expected:
            raise ConfigError(f"{FILE} is for a {expected}, the model's task is {task}: {REMEDY}")
        if len(labels) != len(self.labels):
            raise ConfigError(
                f"{FILE} is for {count_noun(len(self.labels), 'class')}, the model has "
                f"{len(labels)}: {REMEDY}"
            )
        for index, (own, other) in enumerate(zip(self.labels, labels, strict=True)):
            if own != other and not _is_same_text(own, other):
                raise ConfigError(
                    f"{FILE} is for other classes: its class {index} is {own[:_MAX_QUOTED]!r}, the "
                    f"model's {other[:_MAX_QUOTED]!r}: {REMEDY}"
                )

    def describe(self) -> str:
        """Return one line with the temperature and the photos that it was tuned on.

        Returns:
            Such as "temperature 1.3, tuned on 900 photos of 'validation'".
        """
        effect = f"temperature {self.temperature:.4g}"
        effect += "" if self.thresholds is None else ", a threshold for each class"
        photos = count_noun(self.photos, "photo")
        return f"{effect}, tuned on {photos} of {self.source[:_MAX_QUOTED]!r}"

    def summary(self) -> dict[str, Any]:
        """Return the fields that a server or a batch job reports.

        Returns:
            "temperature", "thresholds" (None for single-label models) and "photos".
        """
        thresholds = self.thresholds
        return {
            "temperature": self.temperature,
            "thresholds": None if thresholds is None else list(thresholds),
            "photos": self.photos,
        }

    def store(self, model: str | os.PathLike[str]) -> Path:
        """Write calibration.json beside the weights of a local model.

        The file names those weights by hash, so that it is not used with other weights.

        Args:
            model: A folder with weights, or a weights file.

        Returns:
            The path of calibration.json.

        Raises:
            SourceError: There are no weights, or the file cannot be written.
        """
        path = expand_home(model)
        stored = replace(self, weights=_hash_weights(Source(path)))
        return stored.write(path if path.is_dir() else path.parent)

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write calibration.json into a folder, atomically.

        Args:
            folder: An existing folder.

        Returns:
            The path of calibration.json.

        Raises:
            SourceError: The file cannot be written.
        """
        path = Path(folder) / FILE
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n"
        with open_atomic(path) as file:
            file.write(text.encode("utf-8", "backslashreplace"))
        return path

    def as_dict(self) -> dict[str, Any]:
        """Return the content of calibration.json.

        Returns:
            Every field, in JSON's types.
        """
        thresholds = self.thresholds or (None,) * len(self.labels)
        rows = zip(self.labels, self.counts, thresholds, strict=True)
        return {
            "format": FORMAT,
            "version": VERSION,
            "task": TASKS[self.multi_label],
            "temperature": self.temperature,
            "classes": [dict(zip(_CLASS_KEYS, row, strict=True)) for row in rows],
            "tuned_on": {"source": self.source, "photos": self.photos},
            "chosen_by": {"temperature": "log_loss", "threshold": "f1_score of the class"},
            "log_loss": dict(zip(("before", "after"), self.log_loss, strict=True)),
            "notes": list(self.notes),
            "date": self.date,
            "weights": dict(self.weights),
        }

    @classmethod
    def read(cls, source: str | os.PathLike[str] | Source) -> Calibration | None:
        """Read the calibration beside a model's files.

        Args:
            source: A hub id, a folder or a file, as for vitlib.load.

        Returns:
            The calibration; None where there is none, or where it is for another weights file of
            the same folder.

        Raises:
            SourceError: The file is too large or is not a calibration.
            ConfigError: The file is for other weights than those beside it.
        """
        src = source if isinstance(source, Source) else Source(source)
        value = src.json(FILE)
        if value is None:
            return None
        try:
            calibration = _from_dict(value)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else error
            raise SourceError(
                f"{src.name}: {FILE} is not a calibration of version {VERSION} ({why}): {REMEDY}"
            ) from error
        hashes = _hash_weights(src) if calibration.weights else {}
        if dict(calibration.weights) != hashes:
            if src.is_file and not hashes.keys() & calibration.weights.keys():
                return None
            raise ConfigError(
                f"{src.name}: {FILE} was tuned for other weights than those beside it: {REMEDY}"
            )
        unknown = _unknown_keys(value, calibration.as_dict())
        if unknown:
            names = ", ".join(_quote(key) for key in unknown[:3])
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            logger.warning("%s: %s has keys that are not used: %s%s", src.name, FILE, names, more)
        return calibration

    @classmethod
    def find(
        cls, source: Source, labels: Sequence[str], task: Task, *, is_new_head: bool
    ) -> Calibration | None:
        """Read the calibration beside a model's files and check that it fits the loaded model.

        Args:
            source: The model's files.
            labels: The class names of the loaded model.
            task: The task of the loaded model.
            is_new_head: True if the head may have been replaced at load.

        Returns:
            The calibration; None where there is none, or where the head is a new one.

        Raises:
            SourceError: The file is too large or is not a calibration.
            ConfigError: The calibration is for other weights, classes or another task.
        """
        calibration = cls.read(source)
        if calibration is None:
            return None
        if is_new_head and calibration.labels != tuple(labels):
            logger.warning("%s: calibration.json is not used: the head is a new one", source.name)
            return None
        calibration.check(labels, task)
        logger.info("%s: scores are calibrated: %s", source.name, calibration.describe())
        return calibration


def _unknown_keys(value: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return the keys of a file, dotted, that this version does not have.

    Args:
        value: The file.
        expected: The result of as_dict() for the calibration in the file.
    """
    unknown: list[str] = []
    for key, inner in value.items():
        if key not in expected:
            unknown.append(key)
        elif key == "classes":
            names = {name: None for row in inner for name in row}
            unknown += [f"classes.{name}" for name in names if name not in _CLASS_KEYS]
        elif isinstance(inner, dict) and key != "weights":  # the keys of "weights" are file names
            unknown += [f"{key}.{name}" for name in inner if name not in expected[key]]
    return unknown


def _is_same_text(own: str, other: str) -> bool:
    """Return True if two labels are equal in Unicode's composed form."""
    # Rarely needed: not loaded at the start.
    from unicodedata import normalize

    return normalize("NFC", own) == normalize("NFC", other)


def _from_dict(value: dict[str, Any]) -> Calibration:
    """Parse a file; raise KeyError, TypeError or ValueError where it is not a calibration."""
    if (value["format"], value["version"]) != (FORMAT, VERSION):
        raise ValueError(f"format {_quote(value['format'])}, version {_quote(value['version'])}")
    if value["task"] not in TASKS:
        raise ValueError(f"task {_quote(value['task'])}: expected one of {', '.join(TASKS)}")
    multi_label = bool(TASKS.index(value["task"]))
    rows = [_object(row) for row in _list(value["classes"])]
    thresholds = [row["threshold"] for row in rows]
    if not multi_label and any(threshold is not None for threshold in thresholds):
        raise ValueError("thresholds, with one label a photo")
    tuned, losses = _object(value["tuned_on"]), _object(value["log_loss"])
    return Calibration(
        labels=tuple(_text(row["label"]) for row in rows),
        multi_label=multi_label,
        temperature=_number(value["temperature"], 1 / MAX_TEMPERATURE, MAX_TEMPERATURE),
        thresholds=tuple(_number(t, 0, 1) for t in thresholds) if multi_label else None,
        source=_text(tuned["source"]),
        photos=int(_number(tuned["photos"], 0, 2**53)),
        counts=tuple(int(_number(row["photos"], 0, 2**53)) for row in rows),
        log_loss=(_number(losses["before"], 0, 1e9), _number(losses["after"], 0, 1e9)),
        notes=tuple(_text(note) for note in _list(value["notes"])),
        date=_text(value["date"]),
        weights={_text(k): _text(v) for k, v in _object(value["weights"]).items()},
    )


def _quote(value: object) -> str:
    """Return a value of a file for a message; the file is hostile input, so the text is cut."""
    return repr(value)[:_MAX_QUOTED]


def _number(value: object, low: float, high: float) -> float:
    """Return a finite number between bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{str(value)[:40]!r}: expected a number")
    if not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{value:g}: expected {low:g} to {high:g}")
    return float(value)


def _text(value: object) -> str:
    """Return a string."""
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r}: expected text")
    return value


def _list(value: object) -> list[Any]:
    """Return a list."""
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:40]!r}: expected a list")
    return value


def _object(value: object) -> dict[str, Any]:
    """Return a JSON object."""
    if not isinstance(value, dict):
        raise TypeError(f"{str(value)[:40]!r}: expected an object")
    return value


def _hash_weights(source: Source) -> dict[str, str]:
    """Return the SHA-256 of each file that the model is loaded from, by file name."""
    optimized = None if source.is_hub else source.file(FAST_FILE)
    hashes = {}
    for path in [optimized] if optimized is not None else source.weights():
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}") from error
        hashes[path.name] = digest.hexdigest()
    return hashes
