"""Ray engine: the inputs and results of the local one, computed on a Ray cluster.

How data flows: this process lists the source and sends references to images. A pool of actors, each
with the model, computes them. The results come back in order, and this process writes them as the
local engine's. On CPUs an actor has a core and decodes its images itself. On GPUs, which would wait
for that, tasks on any core of the cluster decode to uint8 for the actors. Ray restarts an actor or
a task that dies, with its inputs. So every node must see the images under the same name, and also
`out`, where the model is stored for the actors.

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

from vitlib.batch.inputs.items import Base64, Encoded, ImageRef, Item
from vitlib.batch.results import Results
from vitlib.batch.worker import DecodedImage, Worker, decode_item
from vitlib.errors import BatchError, ConfigError, first_line
from vitlib.image.decode import ImageLike
from vitlib.system.requirements import import_extra

OBJECT_STORE_BYTES = 512 * 2**20  # of a cluster that this process starts
WINDOW = 1_000_000  # inputs of one pipeline, at most
WINDOW_BYTES = 256 * 2**20  # of encoded images within the references of one pipeline, at most
BLOCK = 8  # batches that go to an actor together, since Ray's work is per block
CONNECT_SECONDS = 10
_FAILED = (0, 0, 0)


def run_on_ray(
    make: Callable[[int], Worker],
    preprocess: Callable[[ImageLike], torch.Tensor],
    batches: Iterable[list[Item]],
    *,
    address: str | None,
    count: int | None,
    precision: str,
) -> Generator[Results, None, None]:
    """Compute batches on a Ray cluster.

    Args:
        make: function that makes the worker of an actor; it can be pickled.
        preprocess: function of encoded bytes that returns pixels; it can be pickled.
        batches: consecutive inputs.
        address: address of the cluster; None starts one on this machine.
        count: number of actors; None for one for each GPU, or CPU where there are no GPUs.
        precision: arithmetic of the model.

    Yields:
        The results of each batch, in order.

    Raises:
        ConfigError: for an address without a cluster, too few GPUs, or a precision that they lack.
        BatchError: where Ray fails.
    """
    ray = _connect(address)
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        cpus = int(ray.cluster_resources().get("CPU", 1))
        if gpus and precision == "int8":
            raise ConfigError("int8 is for CPUs, and this cluster computes on GPUs: use bf16")
        if gpus and (count or 0) > gpus:
            raise ConfigError(
                f"workers={count}: each takes a GPU, and this cluster has {gpus}: give at most "
                "that number, or leave workers= (--workers) out"
            )
        count = count or gpus or max(1, cpus)
        iterator = iter(batches)
        while window := _take_window(iterator):
            blocks = max(-(-len(window) // BLOCK), min(len(window), 4 * count))
            size = max(map(len, window))
            rows = [{"item": pickle.dumps(item)} for batch in window for item in batch]
            data = ray.data.from_items(rows, override_num_blocks=blocks)
            pool = {"compute": ray.data.ActorPoolStrategy(size=count), "batch_size": size}
            if gpus:
                data = data.map_batches(_decode, fn_args=(preprocess,), batch_size=size)
                data = data.map_batches(_GpuActor, fn_constructor_args=(make,), num_gpus=1, **pool)
            else:
                cores = min(1.0, cpus / count)
                data = data.map_batches(
                    _CpuActor, fn_constructor_args=(make,), num_cpus=cores, **pool
                )
            yield from _iter_results(ray, data, window)
    finally:
        ray.shutdown()


def check_cluster(address: str | None) -> None:
    """Check that Ray is installed, and that a cluster listens.

    Args:
        address: address of the cluster; None for a new one.

    Raises:
        ConfigError: where one of them fails.
    """
    import_extra("ray", "ray", "engine ray needs it", "ray.data")
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # a word of Ray's own, such as auto
    # Ray would try to connect for minutes.
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster at {address}: {error}") from error


def _connect(address: str | None) -> Any:
    """Connect to a cluster or start one. Raises ConfigError where that fails."""
    import ray

    own: dict[str, Any] = (
        {} if address else {"object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
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


def _take_window(batches: Iterator[list[Item]]) -> list[list[Item]]:
    """Take the next batches, a bounded number."""
    window: list[list[Item]] = []
    inputs = size = 0
    for batch in batches:
        window.append(batch)
        inputs += len(batch)
        size += sum(_embedded_bytes(item.ref) for item in batch)
        if inputs >= WINDOW or size >= WINDOW_BYTES:
            break
    return window


def _embedded_bytes(ref: ImageRef) -> int:
    """Count the bytes of the encoded image within a reference."""
    if isinstance(ref, Encoded):
        return len(ref.data)
    return len(ref.text) if isinstance(ref, Base64) else 0


def _iter_results(ray: Any, data: Any, window: list[list[Item]]) -> Iterator[Results]:
    """Yield the results of the batches of a window, in order."""
    try:
        rows = _iter_rows(data)
        for batch in window:
            yield _join_rows(batch, list(islice(rows, len(batch))))
    except ray.exceptions.RayError as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise BatchError(
            f"Ray failed ({first}); finished rows are kept: run the same command again"
        ) from error


def _iter_rows(data: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of Ray's blocks."""
    for block in data.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):
        for i in range(len(block["row"])):
            yield {name: values[i] for name, values in block.items()}


def _join_rows(batch: list[Item], rows: list[dict[str, Any]]) -> Results:
    """Join rows to the results of a batch. Raises BatchError where they are other rows."""
    if [item.row for item in batch] != [int(row["row"]) for row in rows]:
        raise BatchError(
            f"Ray returned other rows than {batch[0].row} and after: report this error"
        )
    arrays = {
        name: np.stack([row[name] for row in rows])
        for name in ("classes", "scores", "vectors")
        if name in rows[0]
    }
    return Results(
        batch[0].row,
        [item.file for item in batch],
        [item.number for item in batch],
        [str(row["error"]) or None for row in rows],
        np.array([int(row["key"]) for row in rows], np.uint64),
        **arrays,
    )


class _CpuActor:
    """Process with the model, which decodes its images itself."""

    def __init__(self, make: Callable[[int], Worker]) -> None:
        torch.set_num_threads(1)
        self.worker = make(0)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Compute a batch of inputs."""
        items = [pickle.loads(data) for data in batch["item"]]
        images = [self.worker.decode(item) for item in items]
        return _result_rows(self.worker, np.array([item.row for item in items]), images)


def _decode(
    batch: dict[str, Any], preprocess: Callable[[ImageLike], torch.Tensor]
) -> dict[str, Any]:
    """Decode a batch of inputs, as a task on any node."""
    items = [pickle.loads(data) for data in batch["item"]]
    images = [decode_item(item, preprocess) for item in items]
    arrays = [None if x.pixels is None else x.pixels.contiguous().numpy() for x in images]
    return {
        "row": np.array([item.row for item in items]),
        "key": np.array([image.key for image in images], np.uint64),
        "error": np.array([image.error or "" for image in images], object),
        "shape": np.array([_FAILED if a is None else a.shape for a in arrays], np.int32),
        "is_uint8": np.array([a is None or a.dtype == np.uint8 for a in arrays]),
        "pixels": np.array([b"" if a is None else a.tobytes() for a in arrays], object),
    }


class _GpuActor:
    """Process with the model on the GPU that Ray gives it."""

    def __init__(self, make: Callable[[int], Worker]) -> None:
        torch.set_num_threads(1)
        self.worker = make(0)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Compute a batch of decoded images."""
        images = []
        for i, error in enumerate(batch["error"]):
            pixels = None
            if not error:
                kind = np.uint8 if batch["is_uint8"][i] else np.float32
                array = np.frombuffer(bytearray(batch["pixels"][i]), kind)
                pixels = torch.from_numpy(array.reshape(batch["shape"][i]))
            images.append(DecodedImage(pixels, str(error) or None, int(batch["key"][i])))
        return _result_rows(self.worker, batch["row"], images)


def _result_rows(worker: Worker, rows: Any, images: list[DecodedImage]) -> dict[str, Any]:
    """Compute images, and return their results in the form of Ray's blocks."""
    results = worker.compute(0, [""] * len(images), [0] * len(images), images)
    block = {
        "row": rows,
        "key": np.array([image.key for image in images], np.uint64),
        "error": np.array([error or "" for error in results.errors], object),
    }
    for name in ("classes", "scores", "vectors"):
        if (array := getattr(results, name)) is not None:
            block[name] = array
    return block
