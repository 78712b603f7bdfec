"""Timers: latency, throughput, time on the device alone, and the kernels of a call."""

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
# Regular expression for the kernel names of each kind.
KERNEL_PATTERNS = {
    "attention": r"flash|fmha|attention|sdpa|cudnn_generated",
    "products": r"gemm|nvjet|cutlass|xmma|wgmma|matmul|scaled_mm|sm90_|sm80_|cublas|addmm|::mm",
    "row kernels": r"_norm_kernel|_activate_kernel|_rotate_kernel|layer_?norm|vitlib::",
    "copies": r"memcpy|memset|copy_|CatArray|direct_copy",
}


def measure_seconds(experiment: Experiment, call: Callable[[], object]) -> float:
    """Return the seconds of a call and of the GPU work that it starts."""
    experiment.synchronize()
    start = time.perf_counter()
    call()
    experiment.synchronize()
    return time.perf_counter() - start


def measure(experiment: Experiment, call: Call, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Time a call: its first two runs, then synchronized calls, then queued calls.

    Args:
        experiment: The run.
        call: Function to measure.
        inputs: Batches that are used in turn, so that successive calls read different memory.

    Returns:
        first_s and second_s: Seconds of the first two calls; the second may capture a graph.
        p50_ms and p99_ms: Percentiles of synchronized calls.
        queued_ms: Mean of queued calls.
        Further keys: See peak_memory().
    """
    seconds = experiment.sizes.seconds
    reset_peaks(experiment)
    first, second = (measure_seconds(experiment, lambda: call(inputs[0])) for _ in range(2))
    for i in range(3):
        call(inputs[i % len(inputs)])
    call_seconds: list[float] = []
    deadline = time.perf_counter() + seconds / 2
    while len(call_seconds) < experiment.sizes.calls or (
        time.perf_counter() < deadline and len(call_seconds) < 3000
    ):
        pixels = inputs[len(call_seconds) % len(inputs)]
        call_seconds.append(measure_seconds(experiment, lambda pixels=pixels: call(pixels)))
    median = statistics.median(call_seconds)
    count = max(2, min(1000, int(seconds / 6 / max(median, 1e-6))))

    def call_repeatedly() -> None:
        for i in range(count):
            call(inputs[i % len(inputs)])

    queued = (
        statistics.median(measure_seconds(experiment, call_repeatedly) for _ in range(3)) / count
    )
    return {
        "first_s": round(first, 3),
        "second_s": round(second, 4),
        "p50_ms": round(1e3 * median, 4),
        "p99_ms": round(1e3 * sorted(call_seconds)[int(0.99 * len(call_seconds))], 4),
        "queued_ms": round(1e3 * queued, 4),
        **peak_memory(experiment),
    }


def reset_peaks(experiment: Experiment) -> None:
    """Reset the counters of peak_memory(); a CPU's counter cannot be reset."""
    if experiment.on_gpu:
        torch.cuda.reset_peak_memory_stats()


def peak_memory(experiment: Experiment) -> dict[str, int]:
    """Return the peak memory of this process on the device, in MiB."""
    if not experiment.on_gpu:
        return {"allocated_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    return {
        "allocated_mib": round(torch.cuda.max_memory_allocated() / MIB),
        "reserved_mib": round(torch.cuda.max_memory_reserved() / MIB),
    }


def measure_device_ms(
    experiment: Experiment, launch: Callable[[], object], repeats: int = 10
) -> float:
    """Return the milliseconds of some kernels on the device alone, without their launches.

    Args:
        experiment: The run.
        launch: Launches the kernels.
        repeats: Launches in one captured graph, on a GPU.
    """
    for _ in range(3):
        launch()
    if not experiment.on_gpu:
        return 1e3 * statistics.median(measure_seconds(experiment, launch) for _ in range(3))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    current_stream = torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        launch()
    current_stream.wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                launch()
    finally:  # after a failed capture, torch's own stream is still the current one
        torch.cuda.set_stream(current_stream)
    graph.replay()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / repeats)
    return statistics.median(times)


def profile_kernels(
    experiment: Experiment, call: Callable[[], object], steps: int = 3
) -> list[tuple[str, float, float]]:
    """Profile a call and return its kernels, longest first: name, launches, microseconds.

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
    rows = [
        (name, count / steps, microseconds / steps) for name, (count, microseconds) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row[2])


def record_kernels(
    experiment: Experiment, side: str, batch: int, call: Callable[[], object]
) -> None:
    """Write the kernels of a call to profile.txt, and record their number and shares by kind.

    Args:
        experiment: The run.
        side: Name in the results.
        batch: Images in the batch.
        call: Function to profile.
    """
    with experiment.attempt("kernels", side=side, batch=batch):
        rows = profile_kernels(experiment, call)
        total = sum(us for _, _, us in rows)
        shares: dict[str, float] = defaultdict(float)
        for name, _, us in rows:
            shares[kernel_kind(name)] += us / max(total, 1e-9)
        experiment.record(
            "kernels",
            side=side,
            batch=batch,
            device_us=round(total, 1),
            launches=round(sum(count for _, count, _ in rows), 1),
            shares={kind: round(share, 3) for kind, share in sorted(shares.items())},
            attention=[name[:90] for name, _, _ in rows if kernel_kind(name) == "attention"][:2],
        )
        lines = [f"{us:10.1f} us {count:7.1f} x  {name[:150]}" for name, count, us in rows[:24]]
        with (experiment.out / "profile.txt").open("a") as file:
            file.write(f"== {side}, batch {batch}: {total:.0f} us\n" + "\n".join(lines) + "\n\n")


def kernel_kind(name: str) -> str:
    """Return the kind of a kernel by its name; "other" if none matches."""
    return next(
        (kind for kind, pattern in KERNEL_PATTERNS.items() if re.search(pattern, name, re.I)),
        "other",
    )
