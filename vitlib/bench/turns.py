"""Time calls in turns, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from vitlib.fast.cpu import this_machine

M, K, N = 1576, 768, 3072  # the reference GEMM: eight images in ViT-B/16's first MLP linear
TURN_SECONDS = 0.25  # length of a turn; it has at least one call
AS_LOADED, GEMM = "as loaded", "gemm "
COMPILED = " compiled"  # behind a precision
Call = Callable[..., object]


@dataclass(frozen=True)
class Timing:
    """Speed of one form of the model at one batch size; times are of whole calls.

    Attributes:
        precision: Precision, with " compiled" behind it for the compiled model; or "as loaded" for
            the model without optimize().
        batch_size: Images in a call.
        threads: CPU threads.
        images_per_second: Median over the turns.
        p50_ms: Median milliseconds of a call.
        p99_ms: 99th percentile of the milliseconds of a call.
        gemm_share: Share of the GEMM rate of its arithmetic; None where there is no rate.
        times_as_loaded: Images a second, divided by those of the model as loaded.
    """

    precision: str
    batch_size: int
    threads: int
    images_per_second: float
    p50_ms: float
    p99_ms: float
    gemm_share: float | None
    times_as_loaded: float


@dataclass(frozen=True)
class Bench:
    """Result of measure(); `as_dict` is what `vitlib bench --json` prints.

    Attributes:
        model: Name of the model.
        image_size: Pixels (height, width).
        gflop: Operations of one image in 1e9, see flops(); None for an exported file.
        dtype: Dtype of the weights as loaded, or the precision of an exported file.
        device: Name of the device.
        torch: Version of torch, or of the runtime of an exported file.
        threads: CPU threads: each number that was timed.
        rounds: Turns of each form.
        load_seconds: Time to load the model, or None.
        optimize_seconds: Time of optimize(), by precision.
        arithmetic: What the large linears compute in, by form.
        left_out: Reason why a precision was not measured, by precision.
        in_8_bits: Linears of the blocks that int8 runs in 8 bits, and all of them; which ones
            depends on the calibration. None without int8.
        calibrated: int8 was calibrated with the caller's images, not with noise.
        compiled: Compiled programs that are used, as they are faster, and all of them, by
            precision; a program is for a batch size and a number of threads.
        gemm: GFLOP/s of the reference GEMM, by arithmetic; median over all turns.
        timings: Speed of each form at each batch size.
    """

    model: str
    image_size: tuple[int, int]
    gflop: float | None
    dtype: str
    device: str
    torch: str
    threads: tuple[int, ...]
    rounds: int
    load_seconds: float | None
    optimize_seconds: Mapping[str, float]
    arithmetic: Mapping[str, str]
    left_out: Mapping[str, str]
    in_8_bits: tuple[int, int] | None
    calibrated: bool
    compiled: Mapping[str, tuple[int, int]]
    gemm: Mapping[str, float]
    timings: tuple[Timing, ...]

    def as_dict(self) -> dict[str, Any]:
        """Convert to types of JSON, with the shape of the reference GEMM."""
        result = asdict(self) | {"gemm_shape": [M, K, N]}
        tuples = {name: value for name, value in result.items() if isinstance(value, tuple)}
        return result | {name: list(value) for name, value in tuples.items()}


def time_turns(
    calls: Mapping[str, Call],
    rounds: int,
    turn_seconds: float,
    device: torch.device,
    tick: Callable[[int], object],
) -> dict[str, list[list[float]]]:
    """Time calls in turns, and return the seconds of each call in each turn.

    The first round does not count. Every other one runs backwards: no call always follows another.

    Args:
        calls: Calls by name.
        rounds: Turns of each, after one that does not count.
        turn_seconds: Least length of a turn.
        device: Device that computes, which a call only queues work for.
        tick: Called with 1 after each turn.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in calls}
    names = list(calls)
    for count in range(rounds + 1):
        for name in names[:: 1 if count % 2 else -1]:
            turn = _turn(calls[name], turn_seconds, device)
            seconds[name] += [turn] if count else []
            tick(1)
    return seconds


@torch.inference_mode()
def _turn(call: Call, turn_seconds: float, device: torch.device) -> list[float]:
    """Call repeatedly for a time, at least once, and return the seconds of each call."""
    seconds: list[float] = []
    start = now = time.perf_counter()
    while not seconds or now - start < turn_seconds:
        before = time.perf_counter()
        call()
        if device.type != "cpu":  # a call only queues kernels
            torch.accelerator.synchronize(device)
        now = time.perf_counter()
        seconds.append(now - before)
    return seconds


def summarise_turns(
    turns: Mapping[str, list[list[float]]],
    batch_size: int,
    gflop: float,
    arithmetic: Mapping[str, str],
    rates: Mapping[str, float],
    threads: int,
) -> list[Timing]:
    """Summarise the turns of each form relative to the GEMM rates of the same rounds.

    Args:
        turns: Seconds of each call, by form and turn; AS_LOADED is one of the forms.
        batch_size: Images in a call.
        gflop: Operations of one image in 1e9.
        arithmetic: Arithmetic of the large linears, by form.
        rates: GFLOP/s of the reference GEMM, by GEMM + arithmetic.
        threads: CPU threads of the turns.
    """
    speeds = {
        form: median(batch_size / t for t in mean_seconds(timed)) for form, timed in turns.items()
    }
    timings = []
    for form, speed in speeds.items():
        milliseconds = [1000 * t for turn in turns[form] for t in turn]
        rate = rates.get(GEMM + arithmetic[form])
        timings.append(
            Timing(
                precision=form,
                batch_size=batch_size,
                threads=threads,
                images_per_second=speed,
                p50_ms=float(np.percentile(milliseconds, 50)),
                p99_ms=float(np.percentile(milliseconds, 99)),
                gemm_share=None if rate is None else gflop * speed / rate,
                times_as_loaded=speed / speeds[AS_LOADED],
            )
        )
    return timings


def mean_seconds(turns: list[list[float]]) -> list[float]:
    """Return the mean seconds of a call in each turn.

    Args:
        turns: Seconds of each call, by turn.
    """
    return [float(np.mean(turn)) for turn in turns]


def median(values: Iterable[float]) -> float:
    """Return the median.

    Args:
        values: One or more numbers.
    """
    return float(np.median(list(values)))


def describe_device(device: torch.device) -> str:
    """Describe a device for readers.

    Args:
        device: The device.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    machine = this_machine()
    return f"{machine.model} ({machine.architecture}; {machine.features})"
