"""What a caller asks of a run, and the settings that come of it: as the run began, else from what
was asked, the model and this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from vitlib.batch.autotune import best_batch_size
from vitlib.batch.engines.local import BATCH_SIZE, cores
from vitlib.batch.formats import Format, check_format
from vitlib.batch.inputs.source import Source
from vitlib.batch.manifest import RUN, Settings, operations_of
from vitlib.batch.plan import Plan, Shards
from vitlib.batch.worker import Task, Worker
from vitlib.checkpoint.reconcile import foreign_parts
from vitlib.errors import BatchError, ConfigError, ImageError
from vitlib.fast import FastViT
from vitlib.image.depth import ignore_warning
from vitlib.predict.predictor import Predictor
from vitlib.scores import check_choice

TOP_K = 5
AUTO_IMAGES = 64  # of the first inputs, so many choose precision="auto"
MODEL = "model"  # below .run: for other processes, and where choosing it again might differ
_KEPT = "calibrated"  # beside it: it is to be taken in place of the model it was made of


@dataclass(frozen=True)
class Asked:
    """A caller's choices; None: not chosen."""

    source: Source
    task: Task | None
    top_k: int | Literal["all"] | None
    form: Format | None
    batch_size: int | None
    shard_size: int | None
    workers: int | None
    max_errors: int | float | None

    def __post_init__(self) -> None:
        """Raises ConfigError for a choice that cannot be."""
        if self.task is not None and self.task not in get_args(Task):
            raise ConfigError(f"task={self.task!r}: expected {', '.join(get_args(Task))}")
        for name in ("top_k", "batch_size", "shard_size", "workers"):
            value = getattr(self, name)
            if value is None or (name == "top_k" and value == "all"):
                continue
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r}: expected a whole number from 1")
        if self.task == "embed" and self.top_k is not None:
            raise ConfigError("top_k is of labels: leave it out for task embed")
        most = self.max_errors
        if most is not None and (
            type(most) not in (int, float) or most < 0 or (isinstance(most, float) and most > 1)
        ):
            raise ConfigError(f"max_errors={most!r}: expected a number, or a share from 0.0 to 1.0")

    def check(self, begun: Settings | None, out: Path) -> None:
        """Raises BatchError where it is not what the run in `out` began with; ConfigError where a
        library is missing or choices do not go together; SourceError for a missing source."""
        self.source.check()
        if begun is None:
            task = self.task or "classify"
            check_format(self.form or "jsonl", task, self._k(self.form or "jsonl"))
            return
        for name, value in (
            ("task", self.task), ("format", self.form), ("batch_size", self.batch_size),
            ("shard_size", self.shard_size), ("column", self.source.column),
            ("root", self.source.root),
        ):  # fmt: skip
            if value is not None:
                _check_one(name, getattr(begun, name), value, out)
        if self.top_k is not None and begun.task != "embed":
            _check_one("top_k", begun.top_k or "all", self.top_k, out)
        check_format(begun.format, begun.task, begun.top_k)

    def most_errors(self, inputs: int) -> int | None:
        """How many inputs may fail; None: any number."""
        most = self.max_errors
        return int(most * inputs) if isinstance(most, float) else most

    def settle(self, predictor: Predictor, plan: Plan, digest: str) -> Settings:
        """The settings of a run that begins, with an optimized predictor.

        Raises ConfigError where the model has no head and one is needed.
        """
        classes = predictor.model.num_classes
        task = self.task or ("classify" if classes else "embed")
        if task != "embed" and not classes:
            raise ConfigError(f"this model has no head: task {task!r} needs one, use embed")
        form: Format = self.form or "jsonl"
        numbers = task != "embed" and predictor.task == "regression"
        if numbers:
            check_choice(predictor.task, top_k=None if self.top_k == "all" else self.top_k)
        k = None if numbers else self._k(form)
        check_format(form, task, k, numbers=numbers)
        top_k = k if task != "embed" else None
        engine = predictor.engine()
        on_cpu = engine.device.type == "cpu"
        few = min(BATCH_SIZE, -(-plan.inputs // cores()))  # of a few inputs every core has some
        size = self.batch_size or (few if on_cpu else best_batch_size(engine))
        shards = Shards.default(plan.inputs)
        return Settings(
            source=self.source.names, column=self.source.column, root=self.source.root,
            model=predictor.source, model_digest=digest,
            task=task, top_k=None if top_k is None else min(top_k, classes), format=form,
            precision=str(getattr(engine.model, "precision", "fp16")),
            precision_asked=predictor.precision,
            batch_size=size, shard_size=self.shard_size or shards.size,
            threads=1 if on_cpu else torch.get_num_threads(),
            operations=operations_of(predictor),
            labels=predictor.labels if classes else (),
            width=predictor.model.num_features if task != "classify" else 0,
            problem_type=predictor.task,
            calibration=_calibration(predictor, task),
        )  # fmt: skip

    def _k(self, form: str) -> int | None:
        """Labels an image; None: all."""
        if self.top_k == "all" or (self.top_k is None and form in ("npy", "azure-csv")):
            return None
        return self.top_k or TOP_K


def _check_one(name: str, there: Any, asked: Any, out: Path) -> None:
    if asked != there:
        raise BatchError(
            f"{out} holds a run with {name}={there}, and not {asked}: give the same, leave it out, "
            "or name another --out"
        )


def as_begun(predictor: Predictor, digest: str, begun: Settings, out: Path) -> Predictor:
    """The predictor that a run goes on with. Raises BatchError where it is of another model, or was
    asked to compute otherwise."""
    if digest != begun.model_digest:
        raise BatchError(
            f"{out} holds a run of another model ({begun.model}; its weights, config or "
            "preprocessing, levels too, differ): name another --out"
        )
    now = _calibration(predictor, begun.task)
    if now != begun.calibration:
        kinds = [
            "none" if one is None else f"one of temperature {one['temperature']:.4g}"
            for one in (begun.calibration, now)
        ]
        raise BatchError(
            f"{out} holds a run whose scores have another calibration ({kinds[0]}) than the model "
            f"now ({kinds[1]}): give the model as it was (calibrated=, --no-calibration), or name "
            "another --out"
        )
    if predictor.precision not in (None, begun.precision, begun.precision_asked):
        _check_one("precision", begun.precision, predictor.precision, out)
    kept = out / RUN / MODEL
    if (kept / _KEPT).exists():
        return Predictor.load(kept)
    if predictor.precision == begun.precision or begun.precision == "fp16":
        return predictor
    precision: Any = begun.precision
    return Predictor(
        predictor.model,
        predictor.image_processor,
        precision=precision,
        calibration=predictor.calibration,
    )


def _calibration(predictor: Predictor, task: Task) -> dict[str, Any] | None:
    """What makes the scores of a run other than the model's own; of vectors nothing does."""
    own = None if task == "embed" else predictor.calibration
    return None if own is None else own.summary()


def keep(predictor: Predictor, out: Path) -> None:
    """Save what a calibration gave: another time might give another."""
    if predictor.calibrate is None or predictor.engine().device.type != "cpu":
        return
    fast = predictor.fast()
    folder = out / RUN / MODEL
    fast.save(folder)  # type: ignore[operator]
    if predictor.calibration is not None:
        predictor.calibration.store(folder)
    (folder / _KEPT).touch()


class Kept:
    """How another process makes the worker of a run; can be pickled."""

    def __init__(self, folder: Path, settings: Settings, *, optimized: bool) -> None:
        self.folder, self.optimized = os.fspath(folder.absolute()), optimized
        self.precision, self.task, self.top_k = settings.precision, settings.task, settings.top_k

    def __call__(self, number: int) -> Worker:
        """The worker of process `number`, on the GPU of that number where there are any."""
        gpus = torch.cuda.device_count()
        predictor = Predictor.load(
            self.folder,
            device=f"cuda:{number % gpus}" if gpus else None,
            precision=None if self.optimized or self.precision == "fp16" else self.precision,  # type: ignore[arg-type]
        )
        return Worker(predictor.engine(), self.task, self.top_k)


def for_others(predictor: Predictor, settings: Settings, out: Path) -> Kept:
    """Save the model where other processes find it.

    Raises ConfigError for a model with parts of its own, which no file can hold.
    """
    folder = out / RUN / MODEL
    parts = [] if isinstance(predictor.model, FastViT) else foreign_parts(predictor.model)
    if parts:
        raise ConfigError(
            f"{parts[0]}: put in by hand, and no file can give it to other processes: leave "
            "workers= and engine= out"
        )
    optimized = isinstance(predictor.model, FastViT)
    if not (folder / _KEPT).exists():
        predictor.save(folder)
    else:
        optimized = True
    return Kept(folder, settings, optimized=optimized)


def with_photos(predictor: Predictor, source: Source) -> None:
    """For precision="auto" without photos to choose by: the first inputs."""
    if predictor.precision == "auto" and predictor.calibrate is None:
        predictor.calibrate = list(islice(_readable(predictor, source), AUTO_IMAGES))


def _readable(predictor: Predictor, source: Source) -> Iterator[bytes]:
    for item in islice(source.items(_all, _nothing), 4 * AUTO_IMAGES):
        with suppress(ImageError):
            data = item.place.read()
            predictor.image_processor.to_uint8_or_float(data, ignore_warning)
            yield data


def _all(row: int) -> bool:  # noqa: ARG001
    return True


def _nothing(path: str) -> None:
    pass
