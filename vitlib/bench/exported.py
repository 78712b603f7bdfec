"""Time an exported file in the runtime of its format."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from vitlib.bench.turns import (
    AS_LOADED,
    TURN_SECONDS,
    Bench,
    Timing,
    describe_device,
    summarise_turns,
    time_turns,
)
from vitlib.errors import ConfigError
from vitlib.predict.runtimes import Array, Runtime, run_pixels

_SIDE = 224  # of the image for a file that takes any size and does not state one


def measure_file(
    runtime: Runtime,
    name: str,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    image_size: tuple[int, int] | None = None,
    rounds: int = 10,
    turn_seconds: float = TURN_SECONDS,
    load_seconds: float | None = None,
    progress: bool = False,
) -> Bench:
    """Time an exported file.

    Args:
        runtime: The open file.
        name: Name of the file, for the result.
        batch_sizes: Images in a call, each 1 or more; those that the file does not take are left
            out.
        image_size: Pixels (height, width), for a file that takes any size.
        rounds: Turns of each batch size, after one that does not count.
        turn_seconds: Least length of a turn.
        load_seconds: Time to open the file, for the result.
        progress: True shows a progress bar.

    Returns:
        The result, without operations of the model: a file does not state them.

    Raises:
        ConfigError: A number is below 1, or the file takes another size, or no such batch.
    """
    if rounds < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ConfigError(f"rounds={rounds}, batch_sizes={tuple(batch_sizes)}: expected 1 or more")
    size, count = _choose_size(runtime, image_size), runtime.input_shape[0]
    fitting = [batch for batch in batch_sizes if count in (None, batch)]
    if not fitting:
        raise ConfigError(
            f"{name} takes batches of {count}: give batch_sizes=({count},) (--batch-size {count})"
        )
    device, threads = torch.device("cpu"), torch.get_num_threads()
    timings: list[Timing] = []
    with tqdm(
        total=len(fitting) * (rounds + 1), unit="turn", leave=False, disable=not progress
    ) as bar:
        for batch in fitting:
            calls = {AS_LOADED: partial(run_pixels, runtime, _draw(runtime, batch, size))}
            turns = time_turns(calls, rounds, turn_seconds, device, bar.update)
            timings += summarise_turns(turns, batch, 0.0, {AS_LOADED: ""}, {}, threads)
    left_out = {f"batch {n}": f"the file takes {count}" for n in batch_sizes if n not in fitting}
    return Bench(
        model=name, image_size=size, gflop=None,
        dtype=runtime.info.precision if runtime.info else runtime.input_dtype,
        device=describe_device(device), torch=runtime.version, threads=(threads,),
        rounds=rounds, load_seconds=load_seconds, optimize_seconds={}, arithmetic={AS_LOADED: ""},
        left_out=left_out, in_8_bits=None, calibrated=False, compiled={}, gemm={},
        timings=tuple(timings),
    )  # fmt: skip


def _choose_size(runtime: Runtime, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """Return the pixels to run; raise ConfigError where the file takes others."""
    if len(runtime.input_shape) != 4:
        raise ConfigError(f"{runtime.path} takes {runtime.input_shape}: expected images")
    height, width = runtime.input_shape[2:]
    processor = None if runtime.info is None else runtime.info.make_processor()
    own = None if processor is None else processor.crop_size or processor.size
    wanted = image_size or own or (_SIDE, _SIDE)
    size = height or wanted[0], width or wanted[1]
    if image_size not in (None, size):
        raise ConfigError(
            "{} takes images of {}x{}: leave the image size out".format(runtime.path.name, *size)
        )
    return size


def _draw(runtime: Runtime, count: int, size: tuple[int, int]) -> Array:
    """Draw an input of noise, the same each time."""
    # Speed does not depend on the pixels.
    noise = np.random.default_rng(0)
    shape = (count, runtime.input_shape[1] or 3, *size)
    if runtime.input_dtype == "uint8":
        return noise.integers(0, 256, shape, np.uint8)
    return noise.standard_normal(shape, np.float32).astype(runtime.input_dtype)
