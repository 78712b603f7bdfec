"""The tests that need a GPU, and what only a real one shows: memory and time of graphs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from unittest import mock

import torch
from setting import ROOT

from benchmarks.gpu.experiment import Experiment
from benchmarks.gpu.models import clear, optimized
from benchmarks.gpu.timing import MIB, seconds_of

TEST_SECONDS = 150  # of the slowest file; the part has its own limit
DRY_TEST = "import pytest\n\n@pytest.mark.cuda\ndef test_nothing():\n    pass\n"


def run_tests(experiment: Experiment) -> None:
    """Run the tests that are marked cuda, each file in a process of its own.

    What a failing kernel leaves unusable is then that file's alone. In a dry run the file is one
    that is written here.
    """
    files = [
        path
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if "mark.cuda" in path.read_text()
    ]
    if experiment.is_dry:
        files = [experiment.work / "test_dry.py"]
        files[0].write_text(DRY_TEST)
    # A warning that only a GPU gives is shown, and fails nothing here.
    options = [
        "-m",
        "cuda",
        "-W",
        "default",
        "-q",
        "-rA",
        "-p",
        "no:cacheprovider",
        "--durations=5",
    ]
    if experiment.is_dry:
        options += ["-c", "/dev/null", "--rootdir", str(experiment.work)]
    for path in files:
        with experiment.attempt("tests", file=path.name):
            command = [sys.executable, "-m", "pytest", *options, str(path)]
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TEST_SECONDS
            )
            with (experiment.out / "tests.txt").open("a") as file:
                file.write(done.stdout + done.stderr)
            lines = done.stdout.splitlines()
            outcome = next((x for x in reversed(lines) if re.search("passed|failed|error", x)), "")
            failed = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
            experiment.record(
                "tests",
                file=path.name,
                outcome=outcome.strip("= "),
                code=done.returncode,
                failed=failed,
            )


def check_hazards(experiment: Experiment) -> None:
    """Run each hazard; a hazard is passed, or what was found instead is recorded."""
    for name, check in HAZARDS.items():
        with experiment.attempt("hazards", name=name), torch.inference_mode():
            experiment.record("hazards", name=name, **check(experiment))
        clear(experiment)


def graphs_are_small(experiment: Experiment) -> dict[str, object]:
    """Capture many sizes of image, and see how much memory each graph keeps."""
    fast, grown = optimized(experiment, "bf16"), []
    config = experiment.sizes.config
    for step in range(12):
        side = config.image_size[0] + step * config.patch_size[0]
        for _ in range(3):
            fast(torch.randn(2, 3, side, side, device=experiment.device))
        grown.append(reserved_mib(experiment))
    return {"passed": grown[-1] - grown[0] < 2000, "reserved_mib": grown}


def capture_is_short(experiment: Experiment) -> dict[str, object]:
    """Measure the second call of each captured size, which captures."""
    fast, seconds = optimized(experiment, "bf16"), {}
    for count in experiment.sizes.batches[:3]:
        pixels = torch.randn(
            count, 3, *experiment.sizes.config.image_size, device=experiment.device
        )
        fast(pixels)
        seconds[count] = round(seconds_of(experiment, lambda pixels=pixels: fast(pixels)), 3)
    return {"passed": max(seconds.values()) < 0.5, "seconds": seconds}


def capture_without_memory(experiment: Experiment) -> dict[str, object]:
    """Let memory end in a capture: the batch is computed all the same, and the next one too."""
    fast = optimized(experiment, "bf16")
    pixels = torch.randn(2, 3, *experiment.sizes.config.image_size, device=experiment.device)
    expected = fast(pixels)
    fast.runner.captures = True  # also in a dry run, where nothing is captured otherwise
    error = torch.OutOfMemoryError("CUDA out of memory")
    with mock.patch("vitlib.fast.cuda_runner.capture_graph", side_effect=error) as capture:
        found = [fast(pixels) for _ in range(4)]
    same = all(torch.equal(answer, expected) for answer in found)
    return {"passed": same and capture.bind_method, "captures_tried": capture.call_count}


def batch_that_does_not_fit(experiment: Experiment) -> dict[str, object]:
    """Give a batch when little memory is left: it is computed in smaller passes."""
    fast = optimized(experiment, "bf16")
    batch = experiment.sizes.batches[-1]
    pixels = torch.randn(batch, 3, *experiment.sizes.config.image_size, device=experiment.device)
    expected = fast(pixels)
    clear(experiment)
    if not experiment.on_gpu:  # whose memory cannot be taken
        return {"passed": True, "images_in_a_pass": fast.max_micro_batch}
    free, _ = torch.cuda.mem_get_info()
    left = 160 * MIB
    pop_tensor = torch.empty(max(free - left, 0), dtype=torch.uint8, device=experiment.device)
    found = fast(pixels)
    del pop_tensor
    apart = float((found - expected).abs().max() / expected.abs().max())
    return {"passed": apart <= 0.05, "apart": apart, "images_in_a_pass": fast.max_micro_batch}


def reserved_mib(experiment: Experiment) -> int:
    """Return the memory that torch holds on the GPU, in MiB; 0 on a CPU."""
    return round(torch.cuda.memory_reserved() / MIB) if experiment.on_gpu else 0


HAZARDS: dict[str, Callable[[Experiment], dict[str, object]]] = {
    "graphs keep little memory": graphs_are_small,
    "a capture takes less than half a second": capture_is_short,
    "memory that ends in a capture": capture_without_memory,
    "a batch that does not fit": batch_that_does_not_fit,
}
