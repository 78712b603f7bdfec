"""Clocks: latency, throughput, time on the device alone, and the kernels of a call."""

from __future__ import annotations

import re
import resource
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from benchmarks.gpu.experiment import Experiment

Call = Callable[[Tensor], object]
MIB = 2**20
KINDS = {
    "attention": r"flash|fmha|attention|sdpa|cudnn_generated",
    "products": r"gemm|nvjet|cutlass|xmma|wgmma|matmul|scaled_mm|sm90_|sm80_|cublas|addmm|::mm",
    "row kernels": r"_norm_kernel|_activate_kernel|_rotate_kernel|layer_?norm|vitlib::",
    "copies": r"memcpy|memset|copy_|CatArray|direct_copy",
}


def seconds_of(experiment: Experiment, work: Callable[[], object]) -> float:
    """Return the seconds of some work, waited for."""
    experiment.synchronize()
    start = time.perf_counter()
    work()
    experiment.synchronize()
    return time.perf_counter() - start


def measure(experiment: Experiment, call: Call, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Measure a call: its first two runs, then one at a time, then many queued.

    Args:
        experiment: The run.
        call: What is measured.
        inputs: Batches that take turns, so that no two calls in succession read the same memory.

    Returns:
        Seconds of the first two calls (the second may capture a graph); median and 99th percentile
        of calls that are waited for, and the mean of queued ones, in milliseconds; the peak of
        memory, as peaks() gives it.
    """
    seconds = experiment.sizes.seconds
    reset_peaks(experiment)
    first, second = (seconds_of(experiment, lambda: call(inputs[0])) for _ in range(2))
    for i in range(3):
        call(inputs[i % len(inputs)])
    alone: list[float] = []
    until = time.perf_counter() + seconds / 2
    while len(alone) < experiment.sizes.calls or (
        time.perf_counter() < until and len(alone) < 3000
    ):
        pixels = inputs[len(alone) % len(inputs)]
        alone.append(seconds_of(experiment, lambda pixels=pixels: call(pixels)))
    median = statistics.median(alone)
    count = max(2, min(1000, int(seconds / 6 / max(median, 1e-6))))

    def queue() -> None:
        for i in range(count):
            call(inputs[i % len(inputs)])

    queued = statistics.median(seconds_of(experiment, queue) for _ in range(3)) / count
    return {
        "first_s": round(first, 3),
        "second_s": round(second, 4),
        "p50_ms": round(1e3 * median, 4),
        "p99_ms": round(1e3 * sorted(alone)[int(0.99 * len(alone))], 4),
        "queued_ms": round(1e3 * queued, 4),
        **peaks(experiment),
    }


def reset_peaks(experiment: Experiment) -> None:
    """Let peaks() count from here; on a CPU it counts from the start of the process."""
    if experiment.on_gpu:
        torch.cuda.reset_peak_memory_stats()


def peaks(experiment: Experiment) -> dict[str, int]:
    """Return the most memory of this process on the device, in MiB."""
    if not experiment.on_gpu:
        return {"allocated_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    return {
        "allocated_mib": round(torch.cuda.max_memory_allocated() / MIB),
        "reserved_mib": round(torch.cuda.max_memory_reserved() / MIB),
    }


def device_ms(experiment: Experiment, work: Callable[[], object], times: int = 10) -> float:
    """Return the milliseconds of some work on the device alone, without its launches.

    Args:
        experiment: The run.
        work: Some kernels.
        times: On a GPU, runs that are captured as one graph, whose replays are timed.
    """
    for _ in range(3):
        work()
    if not experiment.on_gpu:
        return 1e3 * statistics.median(seconds_of(experiment, work) for _ in range(3))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    here = torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        work()
    here.wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            for _ in range(times):
                work()
    finally:  # where a capture fails torch leaves its own stream as the current one
        torch.cuda.set_stream(here)
    graph.replay()
    found = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / times)
    return statistics.median(found)


def kernels(
    experiment: Experiment, call: Callable[[], object], steps: int = 3
) -> list[tuple[str, float, float]]:
    """Return the kernels of a call, longest first: name, launches, microseconds.

    On a CPU these are torch's operations.
    """
    on_gpu = experiment.on_gpu
    call()
    experiment.synchronize()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=activities) as tracer:
            for _ in range(steps):
                call()
            experiment.synchronize()
        events = tracer.events()
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in events:
        is_kernel = "CUDA" in str(event.device_type)
        if is_kernel != on_gpu or getattr(event, "is_user_annotation", False):
            continue
        if not on_gpu and "::" not in event.name:
            continue
        time_us = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        sums[event.name][0] += 1
        sums[event.name][1] += time_us
    rows = [(name, count / steps, us / steps) for name, (count, us) in sums.items()]
    return sorted(rows, key=lambda row: -row[2])


def profile(experiment: Experiment, side: str, batch: int, call: Callable[[], object]) -> None:
    """Write the kernels of a call to profile.txt, and record their number and shares by kind.

    Args:
        experiment: The run.
        side: Whose call it is.
        batch: Images in it.
        call: What is profiled.
    """
    with experiment.attempt("kernels", side=side, batch=batch):
        rows = kernels(experiment, call)
        total = sum(us for _, _, us in rows)
        shares: dict[str, float] = defaultdict(float)
        for name, _, us in rows:
            shares[kind_of(name)] += us / max(total, 1e-9)
        experiment.record(
            "kernels",
            side=side,
            batch=batch,
            device_us=round(total, 1),
            launches=round(sum(count for _, count, _ in rows), 1),
            shares={kind: round(share, 3) for kind, share in sorted(shares.items())},
            attention=[name[:90] for name, _, _ in rows if kind_of(name) == "attention"][:2],
        )
        lines = [f"{us:10.1f} us {count:7.1f} x  {name[:150]}" for name, count, us in rows[:24]]
        with (experiment.out / "profile.txt").open("a") as file:
            file.write(f"== {side}, batch {batch}: {total:.0f} us\n" + "\n".join(lines) + "\n\n")


def kind_of(name: str) -> str:
    """Return which of KINDS a kernel is, by its name; "other" for none."""
    return next((kind for kind, words in KINDS.items() if re.search(words, name, re.I)), "other")
