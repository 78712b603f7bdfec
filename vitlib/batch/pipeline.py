"""run(): a source of images -> shards of labels and embeddings, and an account of every input.

How data flows: the source is gone through and counted (plan.py); then its items come again, those
of shards that are not whole; an engine reads and computes them, batch by batch, cut by position;
each answer is appended to its shard's journal; a shard's last answer makes its files (shards.py);
the last shard makes the manifest, the lists of errors and copies, and _SUCCESS (finish.py).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from vitlib.batch.engines.local import here, processes
from vitlib.batch.engines.ray_data import check_there, on_ray
from vitlib.batch.formats import Format, base_folder
from vitlib.batch.inputs.items import Item
from vitlib.batch.inputs.source import Source
from vitlib.batch.manifest import (
    RUN,
    SUCCESS,
    Settings,
    alone,
    begun,
    check_complete,
    digest_of,
    locked,
    nothing_left,
    operations_of,
    write_manifest,
    writing,
)
from vitlib.batch.options import Asked, as_begun, for_others, keep, with_photos
from vitlib.batch.outcome import IGNORED, Outcome, finish, outcome_of
from vitlib.batch.plan import Plan, Shards, plan_of, planned
from vitlib.batch.results import Answer
from vitlib.batch.shards import Parts
from vitlib.batch.worker import Task, Worker
from vitlib.errors import BatchError, ConfigError
from vitlib.fast.auto_precision import AutoPrecision
from vitlib.predict.predictor import Predictor
from vitlib.system.atomic import refuse_input
from vitlib.system.progress import progress_bar
from vitlib.system.torch_state import isolate_torch_settings

logger = logging.getLogger("vitlib")

Engine = Literal["local", "ray"]
Compute = Callable[[Iterable[list[Item]]], Generator[Answer, None, None]]
PLAN = "plan.json"


@isolate_torch_settings()
def run(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    model: str | os.PathLike[str] | Predictor,
    out: str | os.PathLike[str],
    task: Task | None = None,
    top_k: int | Literal["all"] | None = None,
    format: Format | None = None,  # noqa: A002
    precision: AutoPrecision | None = None,
    batch_size: int | None = None,
    shard_size: int | None = None,
    workers: int | None = None,
    max_errors: int | float | None = None,
    column: str | None = None,
    root: str | os.PathLike[str] | None = None,
    engine: Engine = "local",
    address: str | None = None,
    progress: bool = False,
) -> Outcome:
    """Label or embed every image of a source into shards in `out`; a run that was ended goes on.

    source: folders, patterns, lists, tars or image files: see source.py.
    model, precision: what Predictor.load takes, or a Predictor, which has its own precision.
    task: "classify", "embed" or "both"; None: classify where the model has a head.
    top_k: labels of each image (5), or "all": the probabilities of every class in their order.
    format: "jsonl" (default), "csv", "parquet", "npy" or "azure-csv": see formats.py.
    batch_size: images computed together; None: 8 on a CPU, found by trial on a GPU.
    shard_size: inputs of a part file; None: 1,024, more where that would make over 4,096 parts.
    workers: processes, each with the model and a core, or a GPU; None: one, with every core.
    max_errors: as soon as more inputs fail, BatchError: a number, or a share (0.05) of all; None:
        any number.
    column, root: of a list, the column that holds the images, and what its paths are relative to.
    engine: "ray" computes on a Ray cluster (address: whose; None: a new one here): see on_ray.py.

    Where RANK and WORLD_SIZE are set, as torchrun sets them, this process does each WORLD_SIZE-th
    shard; the one that ends last finishes the run, and the others' outcome is not complete.

    Raises, before any work: SourceError or BatchError for a source that is empty or unreadable, a
    column that is not there, or an `out` that holds something else, another run, or this run with
    other inputs; ConfigError for a choice that cannot be; what Predictor.load raises. Later:
    BatchError for inputs that changed, too many that failed, or a process that died; SourceError
    for a full disk. Whatever was computed is kept.
    """
    started = time.perf_counter()
    folder = Path(out)
    names = (source,) if isinstance(source, str | os.PathLike) else source
    _check_kinds(names, out, root, column)
    asked = Asked(
        Source(tuple(os.fspath(name) for name in names), column,
               None if root is None else os.fspath(root), os.fspath(out)),
        task, top_k, format, batch_size, shard_size, workers, max_errors,
    )  # fmt: skip
    _check_engine(engine, address)
    refuse_input(folder, names if root is None else (*names, root))
    rank, world = _rank()
    asked.check(begun(folder), folder)
    predictor = _opened(model, precision)
    with writing(folder), locked(folder, rank, world):
        with alone(folder), nothing_left(folder):
            plan = _plan(asked.source, folder, progress)
            predictor, settings = _settled(asked, predictor, plan, folder)
        shards = Shards(plan.inputs, settings.shard_size)
        parts = Parts(
            folder, shards, settings.format, settings.columns(base_folder(asked.source.names))
        )
        computed = 0
        most = asked.most_errors(plan.inputs)
        if not (folder / SUCCESS).exists():
            compute = _engine(engine, address, predictor, settings, workers, folder)
            todo = range(rank, shards.count, world)
            computed = _work(asked.source, plan, parts, settings, compute, todo, most, progress)
        with alone(folder):
            finish(folder, parts, settings, plan)
        outcome = outcome_of(folder, parts, plan, computed, time.perf_counter() - started)
    _check_failed(outcome.failed, most, folder)
    return outcome


def _check_kinds(names: object, out: object, root: object, column: object) -> None:
    """Raises ConfigError for values of other kinds."""
    paths = [*names] if isinstance(names, list | tuple) else [None]
    for name, value in (*(("source", path) for path in paths), ("out", out), ("root", root or "")):
        if not isinstance(value, str | os.PathLike):
            raise ConfigError(f"{name}={value!r}: expected a path, or for source a list of them")
    if not isinstance(column, str | None):
        raise ConfigError(f"column={column!r}: expected a name")


def _check_engine(engine: str, address: str | None) -> None:
    if engine not in get_args(Engine):
        raise ConfigError(f"engine={engine!r}: expected {' or '.join(get_args(Engine))}")
    if engine == "ray":
        check_there(address)
    elif address is not None:
        raise ConfigError(f"address={address!r} is a Ray cluster's: engine ray")


def _opened(
    model: str | os.PathLike[str] | Predictor, precision: AutoPrecision | None
) -> Predictor:
    if not isinstance(model, Predictor):
        return Predictor.load(model, precision=precision)
    if precision is not None:
        raise ConfigError("precision= is for a model by name: a Predictor has its own")
    return model


def _rank() -> tuple[int, int]:
    """Which of how many processes this is."""
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise ConfigError("RANK and WORLD_SIZE: expected whole numbers") from error
    if not 0 <= rank < world:
        raise ConfigError(f"RANK={rank}, WORLD_SIZE={world}: expected 0 <= RANK < WORLD_SIZE")
    return rank, world


def _plan(source: Source, out: Path, progress: bool) -> Plan:
    """What the inputs are. Raises BatchError where they are not those that the run began with."""
    path = out / RUN / PLAN
    plan = plan_of(source, out / RUN / IGNORED, progress=progress)
    if (out / SUCCESS).exists():
        check_complete(out, plan.digest)
    elif path.exists():
        plan.check_same(Plan.read(path), out)
    else:
        plan.write(path)
    return plan


def _settled(
    asked: Asked, predictor: Predictor, plan: Plan, out: Path
) -> tuple[Predictor, Settings]:
    """The predictor that computes, and the settings: the run's own where it had begun."""
    digest = digest_of(predictor)
    there = begun(out)
    if there is not None:
        predictor = as_begun(predictor, digest, there, out)
        now = operations_of(predictor)
        if now != there.operations:
            logger.warning(
                "this machine computes otherwise than that on which the run began (%s; %s): the "
                "last digits of numbers may differ between its parts", there.operations, now,
            )  # fmt: skip
        return predictor, there
    with_photos(predictor, asked.source)
    settings = asked.settle(predictor, plan, digest)
    keep(predictor, out)
    write_manifest(out, settings, {})
    return predictor, settings


def _engine(
    engine: Engine,
    address: str | None,
    predictor: Predictor,
    settings: Settings,
    workers: int | None,
    out: Path,
) -> Compute:
    """What turns batches of inputs into their answers."""
    if engine == "local" and (workers or 1) == 1:
        worker = Worker(predictor.engine(), settings.task, settings.top_k)
        return partial(here, worker)
    kept = for_others(predictor, settings, out)
    if engine == "ray":
        reading = predictor.engine().preprocessor()
        precision = settings.precision
        return partial(on_ray, kept, reading, address=address, count=workers, precision=precision)
    assert workers is not None
    return partial(processes, kept, count=workers)


def _work(
    source: Source,
    plan: Plan,
    parts: Parts,
    settings: Settings,
    compute: Compute,
    todo: range,
    most: int | None,
    progress: bool,
) -> int:
    """Compute the rows of the shards `todo` that are not there -> how many were."""
    failed, at = _states(parts, todo)
    left = sum(parts.shards.bounds(shard)[1] - first for shard, first in at.items())

    def needed(row: int) -> bool:
        return row >= at.get(row // settings.shard_size, plan.inputs)

    computed = 0
    with progress_bar(left, progress) as advance:
        _check_failed(failed, most, parts.out)
        items = planned(source, plan, needed) if left else iter(())
        with (
            closing(compute(_batches(items, settings))) as answers,
            closing(parts.add(answers)) as kept,
        ):  # whatever ends this ends the engine, now
            for answer in kept:
                failed += sum(error is not None for error in answer.errors)
                _check_failed(failed, most, parts.out)
                computed += len(answer)
                advance(len(answer))
    return computed


def _states(parts: Parts, todo: range) -> tuple[int, dict[int, int]]:
    """(inputs that failed so far, the first row to do of each shard that is not whole). A shard
    whose rows are all there is made whole."""
    failed, at = 0, {}
    for shard in todo:
        record = parts.record(shard)
        if record is not None:
            failed += record["failed"]
            continue
        start, stop = parts.shards.bounds(shard)
        rows = parts.begun(shard)
        failed += parts.failed(shard)
        if start + rows == stop:
            parts.finish(shard)
        else:
            at[shard] = start + rows
    return failed, at


def _batches(items: Iterable[Item], settings: Settings) -> Iterator[list[Item]]:
    """Cut by position in the shard: none crosses its end."""
    held: list[Item] = []
    for item in items:
        held.append(item)
        last = item.row % settings.shard_size
        if len(held) == settings.batch_size or last == settings.shard_size - 1:
            yield held
            held = []
    if held:
        yield held


def _check_failed(failed: int, most: int | None, out: Path) -> None:
    if most is not None and failed > most:
        raise BatchError(
            f"{failed} inputs failed: expected at most {most} (max_errors); what is done is in "
            f"{out}: allow more and give the same command again"
        )
