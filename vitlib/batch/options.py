"""Options of a run, and its settings: those of a resumed run, else by options and model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from vitlib.batch.autotune import best_batch_size
from vitlib.batch.engines.local import BATCH_SIZE
from vitlib.batch.formats import Format, check_format
from vitlib.batch.inputs.source import Source
from vitlib.batch.manifest import RUN, Settings, describe_operations
from vitlib.batch.plan import InputPlan, Shards
from vitlib.batch.worker import Task, Worker
from vitlib.checkpoint.reconcile import foreign_parts
from vitlib.errors import BatchError, ConfigError, ImageError
from vitlib.fast import FastViT
from vitlib.image.depth import ignore_warning
from vitlib.predict.exported_files import copy_files
from vitlib.predict.predictor import Predictor
from vitlib.scores import check_choice
from vitlib.system.cores import count_cores
from vitlib.vit import ViT

TOP_K = 5
AUTO_IMAGES = 64  # first inputs that choose precision="auto"
MODEL = "model"  # folder below .run, for other processes and for calibrated models
_CALIBRATED = "calibrated"  # file in it that marks a calibrated model, which a resumed run loads


@dataclass(frozen=True)
class RunOptions:
    """Options of a caller; None where the caller does not choose.

    Attributes:
        source: the source.
        task: scores, embeddings or both.
        top_k: labels per image, or "all".
        form: format of the part files.
        batch_size: images per forward pass.
        shard_size: inputs of a part file.
        workers: number of processes.
        max_errors: inputs that may fail, as a number or a share.
    """

    source: Source
    task: Task | None
    top_k: int | Literal["all"] | None
    form: Format | None
    batch_size: int | None
    shard_size: int | None
    workers: int | None
    max_errors: int | float | None

    def __post_init__(self) -> None:
        """Raise ConfigError for options out of range."""
        if self.task is not None and self.task not in get_args(Task):
            raise ConfigError(f"task={self.task!r}: expected {', '.join(get_args(Task))}")
        for name in ("top_k", "batch_size", "shard_size", "workers"):
            value = getattr(self, name)
            if value is None or (name == "top_k" and value == "all"):
                continue
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}={value!r}: expected a whole number from 1")
        if self.task == "embed" and self.top_k is not None:
            raise ConfigError("top_k is for labels: leave it out for task embed")
        limit = self.max_errors
        if limit is not None and (
            type(limit) not in (int, float) or limit < 0 or (isinstance(limit, float) and limit > 1)
        ):
            raise ConfigError(
                f"max_errors={limit!r}: expected a number, or a share from 0.0 to 1.0"
            )

    def check(self, earlier: Settings | None, out: Path) -> None:
        """Check the options, before the model is loaded.

        Args:
            earlier: settings of the run in `out`, or None.
            out: folder of the run.

        Raises:
            BatchError: where the options differ from those of the earlier run.
            ConfigError: where a library is missing, or options do not fit each other.
            SourceError: for a source that does not exist.
        """
        self.source.check()
        if earlier is None:
            task = self.task or "classify"
            check_format(self.form or "jsonl", task, self._resolve_top_k(self.form or "jsonl"))
            return
        for name, value in (
            ("task", self.task), ("format", self.form), ("batch_size", self.batch_size),
            ("shard_size", self.shard_size), ("column", self.source.column),
            ("root", self.source.root),
        ):  # fmt: skip
            if value is not None:
                _check_same(name, getattr(earlier, name), value, out)
        if self.top_k is not None and earlier.task != "embed":
            _check_same("top_k", earlier.top_k or "all", self.top_k, out)
        check_format(earlier.format, earlier.task, earlier.top_k)

    def error_limit(self, inputs: int) -> int | None:
        """Convert max_errors to a number of inputs.

        Args:
            inputs: number of inputs of the run.

        Returns:
            Inputs that may fail; None for any number.
        """
        limit = self.max_errors
        return int(limit * inputs) if isinstance(limit, float) else limit

    def make_settings(self, predictor: Predictor, plan: InputPlan, digest: str) -> Settings:
        """Make the settings of a new run.

        Args:
            predictor: the optimized model.
            plan: the inputs.
            digest: digest of the model.

        Returns:
            The settings.

        Raises:
            ConfigError: where the task needs a head that the model lacks.
        """
        classes = predictor.model.num_classes
        task = self.task or ("classify" if classes else "embed")
        if task != "embed" and not classes:
            raise ConfigError(f"this model has no head: task {task!r} needs one, use embed")
        form: Format = self.form or "jsonl"
        regression = task != "embed" and predictor.task == "regression"
        if regression:
            check_choice(predictor.task, top_k=None if self.top_k == "all" else self.top_k)
        k = None if regression else self._resolve_top_k(form)
        check_format(form, task, k, regression=regression)
        top_k = k if task != "embed" else None
        engine = predictor.engine()
        on_cpu = engine.device.type == "cpu"
        # Few inputs are divided so that every core has some of them.
        cpu_size = min(BATCH_SIZE, -(-plan.inputs // count_cores()))
        size = self.batch_size or (cpu_size if on_cpu else best_batch_size(engine))
        shards = Shards.default(plan.inputs)
        return Settings(
            source=self.source.names, column=self.source.column, root=self.source.root,
            model=predictor.source, model_digest=digest,
            task=task, top_k=None if top_k is None else min(top_k, classes), format=form,
            precision=str(getattr(engine.model, "precision", "fp16")),
            requested_precision=predictor.precision,
            batch_size=size, shard_size=self.shard_size or shards.size,
            threads=1 if on_cpu else torch.get_num_threads(),
            operations=describe_operations(predictor),
            labels=predictor.labels if classes else (),
            width=predictor.model.num_features if task != "classify" else 0,
            problem_type=predictor.task,
            calibration=_calibration_summary(predictor, task),
        )  # fmt: skip

    def _resolve_top_k(self, form: str) -> int | None:
        """Return the number of labels per image; None for all."""
        if self.top_k == "all" or (self.top_k is None and form in ("npy", "azure-csv")):
            return None
        return self.top_k or TOP_K


def _check_same(name: str, earlier: Any, value: Any, out: Path) -> None:
    """Raise BatchError where an option differs from that of the earlier run."""
    if value != earlier:
        raise BatchError(
            f"{out} has a run with {name}={earlier}, and not {value}: give the same, leave it out, "
            "or name another --out"
        )


def restore_predictor(predictor: Predictor, digest: str, earlier: Settings, out: Path) -> Predictor:
    """Return the predictor that continues a run.

    Args:
        predictor: the model of the command.
        digest: its digest.
        earlier: settings of the run in `out`.
        out: folder of the run.

    Returns:
        A predictor that computes as the run began.

    Raises:
        BatchError: for another model, calibration or precision than the run's.
    """
    if digest != earlier.model_digest:
        raise BatchError(
            f"{out} has a run of another model ({earlier.model}; its weights, config or "
            "preprocessing, levels too, differ): name another --out"
        )
    now = _calibration_summary(predictor, earlier.task)
    if now != earlier.calibration:
        kinds = [
            "none" if x is None else f"one of temperature {x['temperature']:.4g}"
            for x in (earlier.calibration, now)
        ]
        raise BatchError(
            f"{out} has a run whose scores have another calibration ({kinds[0]}) than the model "
            f"now ({kinds[1]}): give the model as it was (calibrated=, --no-calibration), or name "
            "another --out"
        )
    if predictor.precision not in (None, earlier.precision, earlier.requested_precision):
        _check_same("precision", earlier.precision, predictor.precision, out)
    stored = out / RUN / MODEL
    if (stored / _CALIBRATED).exists():
        return Predictor.load(stored, compile=predictor.compile)
    if predictor.precision == earlier.precision or earlier.precision == "fp16":
        return predictor
    precision: Any = earlier.precision
    return Predictor(
        predictor.model,
        predictor.image_processor,
        precision=precision,
        calibration=predictor.calibration,
        compile=predictor.compile,
    )


def _calibration_summary(predictor: Predictor, task: Task) -> dict[str, Any] | None:
    """Summarise the calibration of scores; embeddings have none."""
    own = None if task == "embed" else predictor.calibration
    return None if own is None else own.summary()


def save_calibrated(predictor: Predictor, out: Path) -> None:
    """Save a model that was optimized with photos, since another calibration may differ.

    Args:
        predictor: the optimized model.
        out: folder of the run.
    """
    if predictor.calibrate is None or predictor.engine().device.type != "cpu":
        return
    fast = predictor.fast()
    folder = out / RUN / MODEL
    fast.save(folder)  # type: ignore[operator]
    if predictor.calibration is not None:
        predictor.calibration.store(folder)
    (folder / _CALIBRATED).touch()


class WorkerFactory:
    """Function that makes the worker of a run in another process; it can be pickled.

    Args:
        source: folder of the saved model, or an exported file.
        settings: settings of the run.
        optimized: True if the saved model is optimized.
        compile: True compiles the model.
        facts: image_processor and labels of an exported file, as arguments of Predictor.load.
    """

    def __init__(
        self,
        source: Path,
        settings: Settings,
        *,
        optimized: bool,
        compile: bool = False,  # noqa: A002
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.optimized = os.fspath(source.absolute()), optimized
        self.facts, self.compile = facts, compile
        self.precision, self.task, self.top_k = settings.precision, settings.task, settings.top_k

    def __call__(self, number: int) -> Worker:
        """Make the worker of a process.

        Args:
            number: number of the process, and of its GPU where there are GPUs.

        Returns:
            The worker.
        """
        # The runtime chooses the device of an exported file.
        if self.facts is not None:
            predictor = Predictor.load(self.source, **self.facts)
            return Worker(predictor.engine(), self.task, self.top_k)
        gpus = torch.cuda.device_count()
        predictor = Predictor.load(
            self.source,
            device=f"cuda:{number % gpus}" if gpus else None,
            precision=None if self.optimized or self.precision == "fp16" else self.precision,  # type: ignore[arg-type]
            compile=self.compile,
        )
        return Worker(predictor.engine(), self.task, self.top_k)


def make_worker_factory(predictor: Predictor, settings: Settings, out: Path) -> WorkerFactory:
    """Save the model for other processes.

    Args:
        predictor: the model.
        settings: settings of the run.
        out: folder of the run.

    Returns:
        Function that makes their workers.

    Raises:
        ConfigError: for a model with modules of the user's own, which a file cannot store.
    """
    folder = out / RUN / MODEL
    model = predictor.model
    if not isinstance(model, ViT | FastViT):
        facts = {"image_processor": predictor.image_processor, "labels": predictor.labels}
        copied = copy_files(model.runtime, folder)
        if predictor.calibration is not None:
            predictor.calibration.store(copied)
        return WorkerFactory(copied, settings, optimized=True, facts=facts)
    parts = [] if isinstance(model, FastViT) else foreign_parts(model)
    if parts:
        raise ConfigError(
            f"{parts[0]} is a module of your own, which a file cannot give to other processes: "
            "leave workers= and engine= out"
        )
    optimized = isinstance(model, FastViT)
    if not (folder / _CALIBRATED).exists():
        predictor.save(folder)
    else:
        optimized = True
    return WorkerFactory(folder, settings, optimized=optimized, compile=predictor.compile)


def choose_calibration_photos(predictor: Predictor, source: Source) -> None:
    """Take the first inputs as photos for precision="auto", where the caller gives none.

    Args:
        predictor: the predictor to change.
        source: the source.
    """
    if predictor.precision == "auto" and predictor.calibrate is None:
        predictor.calibrate = list(islice(_readable(predictor, source), AUTO_IMAGES))


def _readable(predictor: Predictor, source: Source) -> Iterator[bytes]:
    """Yield the first inputs that can be decoded."""
    for item in islice(source.iter_items(_always, _ignore), 4 * AUTO_IMAGES):
        with suppress(ImageError):
            data = item.ref.read()
            predictor.image_processor.to_uint8_or_float(data, ignore_warning)
            yield data


def _always(row: int) -> bool:  # noqa: ARG001
    """Need the bytes of every row."""
    return True


def _ignore(path: str) -> None:
    """Drop the names of files that are not inputs, which the plan has counted."""
