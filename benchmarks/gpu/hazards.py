"""Tests that need a GPU, and checks that only a real GPU allows: memory and time of CUDA graphs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from setting import ROOT

from benchmarks.gpu.experiment import Experiment
from benchmarks.gpu.models import free_memory, optimize_checkpoint
from benchmarks.gpu.timing import MIB, measure_seconds

TEST_SECONDS = 150  # limit of a test file; the part has its own limit
DRY_RUN_TEST = "import pytest\n\n@pytest.mark.cuda\ndef test_nothing():\n    pass\n"


def run_tests(experiment: Experiment) -> None:
    """Run the tests with the mark cuda, each file in its own process, side by side.

    A kernel that fails can leave its process unusable; other files then still run. A dry run has a
    single file, which is written here.
    """
    files = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.cuda" in path.read_text()
    ]
    if experiment.is_dry:
        files = [experiment.work / "test_dry.py"]
        files[0].write_text(DRY_RUN_TEST)
    with ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(partial(run_test_file, experiment), files))


def run_test_file(experiment: Experiment, path: Path) -> None:
    """Run a test file, and record its outcome.

    Each line of pytest goes to tests.txt at once, so that those before the end of the time remain.
    """
    # Show warnings that only a GPU gives; they do not fail a test here.
    options = ["-m", "cuda", "-W", "default", "-v", "-rA", "-p", "no:cacheprovider"]
    options += ["--durations=5"]
    if experiment.is_dry:
        options += ["-c", "/dev/null", "--rootdir", str(experiment.work)]
    lines: list[str] = []
    with experiment.attempt("tests", file=path.name):
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, str(path)],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        timer = threading.Timer(TEST_SECONDS, process.kill)
        timer.start()
        assert process.stdout is not None
        with (experiment.out / "tests.txt").open("a", buffering=1) as file:
            for line in process.stdout:
                lines.append(line.strip())
                file.write(line)
        timer.cancel()
        code = process.wait()
        outcome = find_outcome(lines) if code >= 0 else f"killed after {TEST_SECONDS} s or crashed"
        experiment.record(
            "tests", file=path.name, outcome=outcome, code=code, failed=find_failures(lines)
        )


def find_outcome(lines: Sequence[str]) -> str:
    """Return the last line of pytest that counts tests; "" without one."""
    counts = (line for line in reversed(lines) if re.search("passed|failed|error", line))
    return next(counts, "").strip("= ")


def find_failures(lines: Sequence[str]) -> list[str]:
    """Return the failed tests of pytest's summary, or of its progress if it did not end."""
    failed = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return failed or [line[:200] for line in lines if re.search(r"::.* (FAILED|ERROR)\b", line)]


def check_hazards(experiment: Experiment) -> None:
    """Run each check and record its outcome."""
    for name, check in HAZARDS.items():
        with experiment.attempt("hazards", name=name), torch.inference_mode():
            experiment.record("hazards", name=name, **check(experiment))
        free_memory(experiment)


def check_graph_memory(experiment: Experiment) -> dict[str, object]:
    """Capture many image sizes, and record the memory that the graphs keep."""
    fast, reserved = optimize_checkpoint(experiment, "bf16"), []
    config = experiment.sizes.config
    for step in range(12):
        side = config.image_size[0] + step * config.patch_size[0]
        for _ in range(3):
            fast(torch.randn(2, 3, side, side, device=experiment.device))
        reserved.append(reserved_mib(experiment))
    return {"passed": reserved[-1] - reserved[0] < 2000, "reserved_mib": reserved}


def check_capture_time(experiment: Experiment) -> dict[str, object]:
    """Time the second call of each batch size, which captures a graph."""
    fast, seconds = optimize_checkpoint(experiment, "bf16"), {}
    for batch in experiment.sizes.batches[:3]:
        pixels = torch.randn(
            batch, 3, *experiment.sizes.config.image_size, device=experiment.device
        )
        fast(pixels)
        seconds[batch] = round(measure_seconds(experiment, lambda pixels=pixels: fast(pixels)), 3)
    return {"passed": max(seconds.values()) < 0.5, "seconds": seconds}


def check_out_of_memory_capture(experiment: Experiment) -> dict[str, object]:
    """Let a capture run out of memory, and check this batch and the next ones."""
    fast = optimize_checkpoint(experiment, "bf16")
    pixels = torch.randn(2, 3, *experiment.sizes.config.image_size, device=experiment.device)
    expected = fast(pixels)
    fast.runner.captures = True  # a dry run does not capture by default
    error = torch.OutOfMemoryError("CUDA out of memory")
    with mock.patch("vitlib.fast.cuda_runner.capture_graph", side_effect=error) as capture:
        outputs = [fast(pixels) for _ in range(4)]
    is_equal = all(torch.equal(output, expected) for output in outputs)
    return {"passed": is_equal and capture.called, "captures_tried": capture.call_count}


def check_oversized_batch(experiment: Experiment) -> dict[str, object]:
    """Run a batch when little memory is free; vitlib computes it in smaller passes."""
    fast = optimize_checkpoint(experiment, "bf16")
    batch = experiment.sizes.batches[-1]
    pixels = torch.randn(batch, 3, *experiment.sizes.config.image_size, device=experiment.device)
    expected = fast(pixels)
    free_memory(experiment)
    if not experiment.on_gpu:  # a CPU's memory cannot be filled
        return {"passed": True, "images_in_a_pass": fast.max_micro_batch}
    free, _ = torch.cuda.mem_get_info()
    remaining = 160 * MIB
    filler = torch.empty(max(free - remaining, 0), dtype=torch.uint8, device=experiment.device)
    logits = fast(pixels)
    del filler
    error = float((logits - expected).abs().max() / expected.abs().max())
    return {
        "passed": error <= 0.05,
        "largest_relative": error,
        "images_in_a_pass": fast.max_micro_batch,
    }


def reserved_mib(experiment: Experiment) -> int:
    """Return the GPU memory that torch reserves, in MiB; 0 on a CPU."""
    return round(torch.cuda.memory_reserved() / MIB) if experiment.on_gpu else 0


HAZARDS: dict[str, Callable[[Experiment], dict[str, object]]] = {
    "graphs keep little memory": check_graph_memory,
    "a capture takes less than half a second": check_capture_time,
    "out of memory during a capture": check_out_of_memory_capture,
    "a batch larger than the free memory": check_oversized_batch,
}
