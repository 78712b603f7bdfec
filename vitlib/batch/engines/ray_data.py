"""The Ray engine: the same inputs and answers as the local one, computed on a Ray cluster.

How data flows: this process goes through the source and sends where the images are; a pool of
actors, each with the model, answers; the answers come back in order, and this process writes them
as it does its own. On CPUs an actor has a core and reads its images itself, as the local engine
does. On GPUs, which would wait for that, tasks on any core of the cluster read them to uint8 levels
for the actors. An actor or a task that dies is started again by Ray, with what it was doing. So
images must lie where every node sees them under the same name, and `out`, where the model is put
for the actors, too.

Needs `pip install 'vitlib[ray]'`.
"""

from __future__ import annotations

import logging
import pickle
import socket
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from vitlib.batch.inputs.items import Base64, Encoded, Item, Place
from vitlib.batch.results import Answer
from vitlib.batch.worker import Read, Worker, read
from vitlib.errors import BatchError, ConfigError, first_line
from vitlib.image.decode import ImageLike

OBJECT_STORE = 512 * 2**20  # bytes, of a cluster that is started here
WINDOW = 1_000_000  # inputs that one pipeline is told of
WINDOW_BYTES = 256 * 2**20  # or so many, of those that bring their images along
BLOCK = 8  # batches that go to an actor as one, for the sake of what Ray does for each
CONNECT_SECONDS = 10
_FAILED = (0, 0, 0)


def on_ray(
    make: Callable[[int], Worker],
    pixels_of: Callable[[ImageLike], torch.Tensor],
    batches: Iterable[list[Item]],
    *,
    address: str | None,
    count: int | None,
    precision: str,
) -> Generator[Answer, None, None]:
    """Batches -> answers, in order, by `count` actors (None: one for each GPU of the cluster, or
    where it has none, for each CPU).

    make: makes an actor's worker; pixels_of: reads an image; both can be pickled. Raises
    ConfigError where `address` is no cluster, or one whose GPUs are too few or do not compute in
    `precision`, BatchError where Ray gives up.
    """
    ray = _started(address)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cpus = int(ray.cluster_resources().get("CPU", 1))
        if gpus and precision == "int8":
            raise ConfigError("int8 is for CPUs, and this cluster computes on GPUs: use bf16")
        if gpus and (count or 0) > gpus:
            raise ConfigError(
                f"workers={count}: each takes a GPU, and this cluster has {gpus}: give at most so "
                "many, or leave workers= (--workers) out"
            )
        count = count or gpus or max(1, cpus)
        left = iter(batches)
        while window := _window(left):
            blocks = max(-(-len(window) // BLOCK), min(len(window), 4 * count))
            size = max(map(len, window))
            sent = [{"item": pickle.dumps(item)} for batch in window for item in batch]
            data = ray.data.from_items(sent, override_num_blocks=blocks)
            pool = {"compute": ray.data.ActorPoolStrategy(size=count), "batch_size": size}
            if gpus:
                data = data.map_batches(_levels, fn_args=(pixels_of,), batch_size=size)
                data = data.map_batches(_OnLevels, fn_constructor_args=(make,), num_gpus=1, **pool)
            else:
                cores = min(1.0, cpus / count)
                data = data.map_batches(_Actor, fn_constructor_args=(make,), num_cpus=cores, **pool)
            yield from _answers(ray, data, window)
    finally:
        ray.shutdown()


def check_there(address: str | None) -> None:
    """Raises ConfigError where Ray is missing, or nothing listens at `address`."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ConfigError("engine ray needs it: pip install 'vitlib[ray]'") from error
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # Ray's own words, such as auto
    try:  # Ray itself tries for minutes
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster at {address}: {error}") from error


def _started(address: str | None) -> Any:
    import ray

    own: dict[str, Any] = (
        {} if address else {"object_store_memory": OBJECT_STORE, "include_dashboard": False}
    )
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = first_line(error)
        raise ConfigError(f"no Ray cluster at {address or 'this machine'}: {first}") from error
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    return ray


def _window(batches: Iterator[list[Item]]) -> list[list[Item]]:
    """The next batches, a bounded number."""
    found: list[list[Item]] = []
    inputs = size = 0
    for batch in batches:
        found.append(batch)
        inputs += len(batch)
        size += sum(_carried(item.place) for item in batch)
        if inputs >= WINDOW or size >= WINDOW_BYTES:
            break
    return found


def _carried(place: Place) -> int:
    """Bytes that an input brings along."""
    if isinstance(place, Encoded):
        return len(place.data)
    return len(place.text) if isinstance(place, Base64) else 0


def _answers(ray: Any, data: Any, window: list[list[Item]]) -> Iterator[Answer]:
    """The answers of some batches, in order."""
    try:
        rows = _rows(data)
        for batch in window:
            yield _together(batch, list(islice(rows, len(batch))))
    except ray.exceptions.RayError as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise BatchError(
            f"Ray gave up ({first}); what is done is kept: give the same command again"
        ) from error


def _rows(data: Any) -> Iterator[dict[str, Any]]:
    for block in data.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):
        for i in range(len(block["row"])):
            yield {name: values[i] for name, values in block.items()}


def _together(batch: list[Item], rows: list[dict[str, Any]]) -> Answer:
    """A batch's rows as its answer. Raises BatchError where they are not those of the batch."""
    if [item.row for item in batch] != [int(row["row"]) for row in rows]:
        raise BatchError(f"Ray gave other rows than {batch[0].row} and after: that is a fault")
    held = {
        name: np.stack([row[name] for row in rows])
        for name in ("classes", "scores", "vectors")
        if name in rows[0]
    }
    return Answer(
        batch[0].row,
        [item.file for item in batch],
        [item.number for item in batch],
        [str(row["error"]) or None for row in rows],
        np.array([int(row["key"]) for row in rows], np.uint64),
        **held,
    )


class _Actor:
    """A process with the model, that reads its images."""

    def __init__(self, make: Callable[[int], Worker]) -> None:
        torch.set_num_threads(1)
        self.worker = make(0)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Inputs -> rows."""
        items = [pickle.loads(data) for data in batch["item"]]
        reads = [self.worker.read(item) for item in items]
        return _rows_of(self.worker, np.array([item.row for item in items]), reads)


def _levels(
    batch: dict[str, Any], pixels_of: Callable[[ImageLike], torch.Tensor]
) -> dict[str, Any]:
    """Inputs -> levels, as a task on any node."""
    items = [pickle.loads(data) for data in batch["item"]]
    reads = [read(item, pixels_of) for item in items]
    arrays = [None if one.pixels is None else one.pixels.contiguous().numpy() for one in reads]
    return {
        "row": np.array([item.row for item in items]),
        "key": np.array([one.key for one in reads], np.uint64),
        "error": np.array([one.error or "" for one in reads], object),
        "shape": np.array([_FAILED if a is None else a.shape for a in arrays], np.int32),
        "whole": np.array([a is None or a.dtype == np.uint8 for a in arrays]),
        "pixels": np.array([b"" if a is None else a.tobytes() for a in arrays], object),
    }


class _OnLevels:
    """A process with the model on a GPU: Ray shows each its own alone."""

    def __init__(self, make: Callable[[int], Worker]) -> None:
        torch.set_num_threads(1)
        self.worker = make(0)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Levels -> rows."""
        reads = []
        for i, error in enumerate(batch["error"]):
            pixels = None
            if not error:
                kind = np.uint8 if batch["whole"][i] else np.float32
                array = np.frombuffer(bytearray(batch["pixels"][i]), kind)
                pixels = torch.from_numpy(array.reshape(batch["shape"][i]))
            reads.append(Read(pixels, str(error) or None, int(batch["key"][i])))
        return _rows_of(self.worker, batch["row"], reads)


def _rows_of(worker: Worker, rows: Any, reads: list[Read]) -> dict[str, Any]:
    """What the model says of them, a row for each, as Ray carries it."""
    answer = worker.answered(0, [""] * len(reads), [0] * len(reads), reads)
    found = {
        "row": rows,
        "key": np.array([one.key for one in reads], np.uint64),
        "error": np.array([error or "" for error in answer.errors], object),
    }
    for name in ("classes", "scores", "vectors"):
        if (array := getattr(answer, name)) is not None:
            found[name] = array
    return found
