"""`run`: a source of images -> shards of labels and embeddings, with every input counted.

How data flows: the source is listed and counted (plan.py). Its items of incomplete shards are
listed again, and an engine decodes and computes them in batches that no shard's end divides. Each
result is appended to its shard's journal, and the last result of a shard makes its files
(shards.py). The last shard makes the manifest, the lists of errors and duplicates, and _SUCCESS
(outcome.py).
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

from vitlib.batch.engines.local import run_local, run_processes
from vitlib.batch.engines.ray_data import check_cluster, run_on_ray
from vitlib.batch.formats import Format, find_base_folder
from vitlib.batch.inputs.items import Item
from vitlib.batch.inputs.source import Source
from vitlib.batch.locks import clean_up_on_error, exclusive, lock_folder, report_write_errors
from vitlib.batch.manifest import (
    RUN,
    SUCCESS,
    Settings,
    check_complete,
    describe_operations,
    read_earlier_run,
    write_manifest,
)
from vitlib.batch.options import (
    RunOptions,
    choose_calibration_photos,
    make_worker_factory,
    restore_predictor,
    save_calibrated,
)
from vitlib.batch.outcome import IGNORED, Outcome, finish, make_outcome
from vitlib.batch.plan import InputPlan, Shards, iter_planned, make_plan
from vitlib.batch.results import Results
from vitlib.batch.shards import ShardStore
from vitlib.batch.worker import Task, Worker
from vitlib.errors import BatchError, ConfigError
from vitlib.fast.auto_precision import AutoPrecision
from vitlib.features import EmbeddingCache, FeatureStore, open_store
from vitlib.predict.model_digest import compute_model_digest
from vitlib.predict.predictor import Predictor
from vitlib.system.atomic import refuse_input
from vitlib.system.progress import progress_bar
from vitlib.system.torch_state import isolate_torch_settings

logger = logging.getLogger("vitlib")

Engine = Literal["local", "ray"]
Compute = Callable[[Iterable[list[Item]]], Generator[Results, None, None]]
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
    features: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Outcome:
    """Label or embed every image of a source into shards in `out`; continue an interrupted run.

    Where RANK and WORLD_SIZE are set, as torchrun sets them, this process computes each
    WORLD_SIZE-th shard. The last process to end finishes the run, and the outcome of the others is
    not complete. Rows that were computed are kept whatever ends a run.

    Args:
        source: folders, patterns, lists, tars or image files: see inputs/source.py.
        model: as Predictor.load takes it, or a Predictor.
        out: folder of the run.
        task: "classify", "embed" or "both"; None classifies where the model has a head.
        top_k: labels of each image; "all" for the probabilities of every class; None for 5.
        format: "jsonl", "csv", "parquet", "npy" or "azure-csv", see formats.py; None for "jsonl".
        precision: as Predictor.load takes it; None where `model` is a Predictor.
        batch_size: images per forward pass; None for 8 on a CPU, and a trial on a GPU.
        shard_size: inputs of a part file; None for 1,024, or more to make at most 4,096 parts.
        workers: processes, each with the model and its share of the cores, or a GPU; None for one.
        max_errors: inputs that may fail, as a number or a share (0.05); None for any number.
        column: column of lists that contains the images; None detects it.
        root: folder that paths of lists are relative to; None for the list's own.
        engine: "local", or "ray" for a Ray cluster.
        address: address of the Ray cluster; None starts one on this machine.
        features: store of embeddings (vitlib/features), for the task "embed" in one process; None
            takes VITLIB_FEATURES of the environment, and without it none.
        progress: show a progress bar on stderr.

    Returns:
        The outcome.

    Raises:
        SourceError: before any work, for a source that is missing or unreadable; later for a full
            disk.
        BatchError: before any work, for a source without images, and for an `out` with another
            run, other inputs or other content; later for inputs that changed, too many errors, or
            a process that died.
        ConfigError: before any work, for options out of range, and as Predictor.load does.
    """
    started = time.perf_counter()
    folder = Path(out)
    names = (source,) if isinstance(source, str | os.PathLike) else source
    _check_kinds(names, out, root, column)
    options = RunOptions(
        Source(tuple(os.fspath(name) for name in names), column,
               None if root is None else os.fspath(root), os.fspath(out)),
        task, top_k, format, batch_size, shard_size, workers, max_errors,
    )  # fmt: skip
    _check_engine(engine, address)
    _check_name(folder)
    refuse_input(folder, names if root is None else (*names, root))
    rank, world = _rank()
    options.check(read_earlier_run(folder), folder)
    predictor = _load_predictor(model, precision)
    vectors = _open_store(features, predictor, options, engine)
    with report_write_errors(folder), lock_folder(folder, rank, world):
        with exclusive(folder), clean_up_on_error(folder):
            plan = _make_plan(options.source, folder, progress)
            predictor, settings = _resolve_settings(options, predictor, plan, folder)
        shards = Shards(plan.inputs, settings.shard_size)
        columns = settings.columns(find_base_folder(options.source.names))
        store = ShardStore(folder, shards, settings.format, columns)
        computed = 0
        error_limit = options.error_limit(plan.inputs)
        if not (folder / SUCCESS).exists():
            cache = None if vectors is None else EmbeddingCache(vectors, predictor)
            compute = _make_engine(engine, address, predictor, settings, workers, folder, cache)
            own = range(rank, shards.count, world)
            computed = _compute_shards(
                options.source, plan, store, settings, compute, own, error_limit, progress
            )
        with exclusive(folder):
            finish(folder, store, settings, plan)
        outcome = make_outcome(folder, store, plan, computed, time.perf_counter() - started)
    _check_failed(outcome.failed, error_limit, folder)
    return outcome


def _check_kinds(names: object, out: object, root: object, column: object) -> None:
    """Raise ConfigError for arguments of other types."""
    paths = [*names] if isinstance(names, list | tuple) else [None]
    for name, value in (*(("source", path) for path in paths), ("out", out), ("root", root or "")):
        if not isinstance(value, str | os.PathLike):
            raise ConfigError(f"{name}={value!r}: expected a path, or for source a list of them")
    if not isinstance(column, str | None):
        raise ConfigError(f"column={column!r}: expected a name")


def _check_name(out: Path) -> None:
    """Raise ConfigError for the name of a part file, since a run makes a folder of them."""
    form = out.suffix.lower().removeprefix(".")
    if form in get_args(Format) and not out.is_dir():
        raise ConfigError(
            f"out={str(out)!r} is the name of a file: expected that of a folder, such as "
            f"{out.stem!r}; format={form!r} (--format {form}) writes {form} files into it"
        )


def _check_engine(engine: str, address: str | None) -> None:
    """Raise ConfigError for an unknown engine, and for a missing or unused cluster."""
    if engine not in get_args(Engine):
        raise ConfigError(f"engine={engine!r}: expected {' or '.join(get_args(Engine))}")
    if engine == "ray":
        check_cluster(address)
    elif address is not None:
        raise ConfigError(f"address={address!r} is for engine 'ray': leave it out")


def _load_predictor(
    model: str | os.PathLike[str] | Predictor, precision: AutoPrecision | None
) -> Predictor:
    """Load the model. Raises ConfigError for a precision beside a Predictor."""
    if not isinstance(model, Predictor):
        return Predictor.load(model, precision=precision)
    if precision is not None:
        raise ConfigError("precision= is for a model by name: a Predictor has its own")
    return model


def _rank() -> tuple[int, int]:
    """Read the number of this process, and the number of processes."""
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as error:
        raise ConfigError("RANK and WORLD_SIZE: expected whole numbers") from error
    if not 0 <= rank < world:
        raise ConfigError(f"RANK={rank}, WORLD_SIZE={world}: expected 0 <= RANK < WORLD_SIZE")
    return rank, world


def _make_plan(source: Source, out: Path, progress: bool) -> InputPlan:
    """List the inputs. Raises BatchError where they are not those of the earlier run."""
    path = out / RUN / PLAN
    plan = make_plan(source, out / RUN / IGNORED, progress=progress)
    if (out / SUCCESS).exists():
        check_complete(out, plan.digest)
    elif path.exists():
        plan.check_same(InputPlan.read(path), out)
    else:
        plan.write(path)
    return plan


def _resolve_settings(
    options: RunOptions, predictor: Predictor, plan: InputPlan, out: Path
) -> tuple[Predictor, Settings]:
    """Return the predictor and the settings: those of the earlier run, or new ones."""
    digest = compute_model_digest(predictor)
    earlier = read_earlier_run(out)
    if earlier is not None:
        predictor = restore_predictor(predictor, digest, earlier, out)
        now = describe_operations(predictor)
        if now != earlier.operations:
            logger.warning(
                "this machine uses other operations than the one that began the run (%s; %s): the "
                "last digits of numbers may differ between its parts", earlier.operations, now,
            )  # fmt: skip
        return predictor, earlier
    choose_calibration_photos(predictor, options.source)
    settings = options.make_settings(predictor, plan, digest)
    save_calibrated(predictor, out)
    write_manifest(out, settings, {})
    return predictor, settings


def _make_engine(
    engine: Engine,
    address: str | None,
    predictor: Predictor,
    settings: Settings,
    workers: int | None,
    out: Path,
    cache: EmbeddingCache | None,
) -> Compute:
    """Make the function that computes batches of inputs."""
    if engine == "local" and (workers or 1) == 1:
        worker = Worker(predictor.engine(), settings.task, settings.top_k, cache)
        return partial(_run_and_flush, worker)
    factory = make_worker_factory(predictor, settings, out)
    if engine == "ray":
        preprocess = predictor.engine().preprocessor()
        precision = settings.precision
        return partial(
            run_on_ray, factory, preprocess, address=address, count=workers, precision=precision
        )
    assert workers is not None
    return partial(run_processes, factory, count=workers)


def _open_store(
    features: str | os.PathLike[str] | None,
    predictor: Predictor,
    options: RunOptions,
    engine: Engine,
) -> FeatureStore | None:
    """Open the store of embeddings; None where the run has no use for one.

    Raises ConfigError where the caller names a store for such a run.
    """
    embeds = options.task == "embed" or not (options.task or predictor.model.num_classes)
    if embeds and engine == "local" and (options.workers or 1) == 1:
        return open_store(features)
    if features is not None:
        raise ConfigError(
            "features= is for task='embed' in one process: leave it out, or workers= and engine="
        )
    return None


def _run_and_flush(worker: Worker, batches: Iterable[list[Item]]) -> Generator[Results, None, None]:
    """Compute batches in this process, and store embeddings whatever ends the run."""
    try:
        yield from run_local(worker, batches)
    finally:
        if worker.cache is not None:
            worker.cache.flush()


def _compute_shards(
    source: Source,
    plan: InputPlan,
    store: ShardStore,
    settings: Settings,
    compute: Compute,
    own: range,
    error_limit: int | None,
    progress: bool,
) -> int:
    """Compute the missing rows of the shards of this process; returns their number."""
    failed, first_rows = _find_incomplete(store, own)
    total = sum(store.shards.bounds(shard)[1] - first for shard, first in first_rows.items())

    def is_needed(row: int) -> bool:
        return row >= first_rows.get(row // settings.shard_size, plan.inputs)

    computed = 0
    with progress_bar(total, progress) as advance:
        _check_failed(failed, error_limit, store.out)
        items = iter_planned(source, plan, is_needed) if total else iter(())
        # `closing` stops the engine at once, whatever ends the loop.
        with (
            closing(compute(_iter_batches(items, settings))) as batches,
            closing(store.store(batches)) as stored,
        ):
            for results in stored:
                failed += sum(error is not None for error in results.errors)
                _check_failed(failed, error_limit, store.out)
                computed += len(results)
                advance(len(results))
    return computed


def _find_incomplete(store: ShardStore, own: range) -> tuple[int, dict[int, int]]:
    """Return the number of failed inputs, and the first missing row of each incomplete shard.

    A shard whose rows are all in its journal is finished here.
    """
    failed, first_rows = 0, {}
    for shard in own:
        record = store.record(shard)
        if record is not None:
            failed += record["failed"]
            continue
        start, stop = store.shards.bounds(shard)
        rows = store.recover(shard)
        failed += store.count_failed(shard)
        if start + rows == stop:
            store.finish(shard)
        else:
            first_rows[shard] = start + rows
    return failed, first_rows


def _iter_batches(items: Iterable[Item], settings: Settings) -> Iterator[list[Item]]:
    """Divide items into batches; none crosses the end of a shard."""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        is_last = item.row % settings.shard_size == settings.shard_size - 1
        if len(batch) == settings.batch_size or is_last:
            yield batch
            batch = []
    if batch:
        yield batch


def _check_failed(failed: int, limit: int | None, out: Path) -> None:
    """Raise BatchError for too many failed inputs."""
    if limit is not None and failed > limit:
        raise BatchError(
            f"{failed} inputs failed: expected at most {limit} (max_errors); finished rows are in "
            f"{out}: allow more and run the same command again"
        )
