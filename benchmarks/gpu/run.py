"""Command line that runs every part in a process with a time limit, within one budget.

    python -m benchmarks.gpu [--out FOLDER] [--budget 580] [--parts NAME ...] [--dry]

Parts that do not time the GPU run first, side by side: tests, memory, and compiling ahead into a
cache. Then one part at a time uses the GPU, starting with the goals. A part that exceeds its limit
is killed; its earlier results remain.

--out is the folder of results.jsonl, summary.md, log.txt, tests.txt and profile.txt. --dry runs
everything small, on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from prepare import skip_torchvision_ops
from setting import write_atomically

from benchmarks.gpu.experiment import Experiment
from benchmarks.gpu.summary import summarize

BUDGET = 580  # seconds: ten minutes minus the start
SUMMARY_SECONDS = 8  # seconds reserved for the summary
MIN_PART_SECONDS = 12  # least remaining seconds to start a part: its imports take as long
MAX_PRINTED = 10_000  # printed characters of the summary
VITLIB, TRANSFORMERS, TIMM = "vitlib bf16", "transformers bf16", "timm bf16 compiled"


class Part(NamedTuple):
    """A part of the run.

    Attributes:
        name: Name in the results.
        function: Module and function in this package, as in "models:measure_vitlib".
        limit: Seconds until the part is killed.
        arguments: Arguments of the function, after the experiment.
    """

    name: str
    function: str
    limit: int
    arguments: tuple[Any, ...] = ()


def make_part(function: str, limit: int, *arguments: Any) -> Part:
    """Make a part that is named by its function and argument."""
    name = function.partition(":")[2].replace("_", " ")
    if arguments and isinstance(arguments[0], str):
        name += f": {arguments[0]}"
    return Part(name, function, limit, arguments)


FIRST = (
    make_part("environment:record_environment", 60),
    make_part("models:prepare_checkpoint", 90),
)
SIDE_BY_SIDE = (
    make_part("hazards:run_tests", 170),
    make_part("models:compile_ahead", 170, TIMM),
    make_part("models:compile_ahead", 170, f"{TRANSFORMERS} compiled"),
    make_part("models:measure_memory", 90, VITLIB),
    make_part("models:measure_memory", 90, TRANSFORMERS),
    make_part("models:measure_agreement", 90),
)
SEQUENTIAL = (  # most important first
    make_part("models:measure_vitlib", 70, "bf16"),
    make_part("models:measure_vitlib", 60, "fp8"),
    make_part("models:measure_interleaved", 75, (VITLIB, TRANSFORMERS, TIMM)),
    make_part("training_steps:measure_training", 40, "vitlib"),
    make_part("training_steps:measure_training", 45, "Trainer"),
    make_part("photos:measure_photos", 60),
    make_part("models:measure_peer", 40, TRANSFORMERS),
    make_part("models:measure_peer", 40, "timm bf16"),
    make_part("ops:measure_ops", 60),
    make_part("whatif:measure_passes", 50),
    make_part("whatif:measure_changes", 60),
    make_part("models:measure_vitlib", 40, "fp16"),
    make_part("hazards:check_hazards", 50),
    make_part("models:measure_vitlib", 40, "fp32"),
    make_part("models:measure_peer", 50, TIMM),
    make_part("models:measure_peer", 50, f"{TRANSFORMERS} compiled"),
    make_part("models:measure_peer", 40, "transformers fp16"),
    make_part("whatif:measure_compiled", 120),
)
PARTS = (*FIRST, *SIDE_BY_SIDE, *SEQUENTIAL)


class PartRunner:
    """Starts parts, and kills them at their limits and at the end of the budget.

    Args:
        experiment: The run.
        budget: Seconds for all parts and the summary.
    """

    def __init__(self, experiment: Experiment, budget: float) -> None:
        self.experiment = experiment
        self.end = time.monotonic() + budget - SUMMARY_SECONDS
        # A dry run forks a process that has imported everything, which is fast. CUDA does not work
        # after a fork, so a real run spawns new processes.
        method = "fork" if experiment.is_dry else "spawn"
        self.context: Any = multiprocessing.get_context(method)

    def run(self, parts: Sequence[Part], *, side_by_side: bool = False) -> None:
        """Run parts sequentially or all at once, until each has ended.

        Args:
            parts: The parts.
            side_by_side: Run all at once.
        """
        groups = [parts] if side_by_side else [[part] for part in parts]
        for group in groups:
            started = [(part, self.start(part)) for part in group if self.has_time(part)]
            try:
                for part, (process, deadline) in started:
                    self.wait(part, process, deadline)
            finally:
                for _, (process, _) in started:
                    kill_part(process)

    def has_time(self, part: Part) -> bool:
        """Return True if time remains for a part; otherwise record it as left out."""
        if self.end - time.monotonic() >= MIN_PART_SECONDS:
            return True
        self.experiment.record("left out", what=part.name, why="the budget is exhausted")
        return False

    def start(self, part: Part) -> tuple[BaseProcess, float]:
        """Start a part; return its process and its deadline."""
        deadline = min(time.monotonic() + part.limit, self.end)
        process = self.context.Process(target=run_part, args=(part, self.experiment))
        process.start()
        return process, deadline

    def wait(self, part: Part, process: BaseProcess, deadline: float) -> None:
        """Wait for a part until its deadline, and record a failure."""
        process.join(max(deadline - time.monotonic(), 0))
        if process.exitcode is None:
            self.experiment.record(
                "parts", part=part.name, error="killed: the time limit was exceeded"
            )
        elif process.exitcode:
            code = process.exitcode
            self.experiment.record("parts", part=part.name, error=f"exited with code {code}")


def kill_part(process: BaseProcess) -> None:
    """Kill a part's process and every process that it started."""
    if process.pid is None:
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def run_part(part: Part, experiment: Experiment) -> None:
    """Run a part in its own process, with its output in log.txt."""
    os.setsid()
    log = os.open(experiment.out / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    module, _, function = part.function.partition(":")
    if experiment.is_dry:
        torch.set_num_threads(1)  # a second core slows tiny products down
    start = time.monotonic()
    with experiment.attempt("parts", part=part.name):
        call = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
        call(experiment, *part.arguments)
        experiment.record("parts", part=part.name, seconds=round(time.monotonic() - start, 1))


def prepare_environment(work_folder: Path) -> None:
    """Set environment variables: caches in the run's folder, and no network."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(work_folder / "inductor"),
        "TRITON_CACHE_DIR": str(work_folder / "triton"),
    }


def import_parts() -> None:
    """Import the modules of all parts, before processes are forked."""
    for name in {part.function.partition(":")[0] for part in PARTS}:
        importlib.import_module(f"benchmarks.gpu.{name}")
    skip_torchvision_ops()
    import transformers

    _ = transformers.ViTForImageClassification
    gc.freeze()  # keep these objects out of the garbage collections of forked processes


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out = Path(os.environ.get("OUT") or "gpu_results")
    parser.add_argument("--out", type=Path, default=out, help=f"folder of results (here: {out})")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds in all ({BUDGET})")
    parser.add_argument(
        "--parts", nargs="+", metavar="NAME", help="only parts whose names contain these words"
    )
    parser.add_argument("--dry", action="store_true", help="run everything small, on the CPU")
    options = parser.parse_args()
    names = [part.name for part in PARTS]
    for text in options.parts or []:
        if not any(text in name for name in names):
            parser.error(f"--parts {text!r}: expected words of one of: {'; '.join(names)}")
    if (options.out / "results.jsonl").exists():
        parser.error(f"{options.out} has the results of another run: use another --out")
    return options


def main() -> None:
    """Run the command line."""
    options = parse_options()
    if not options.dry and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no GPU: use --dry to run everything on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="vitlib-gpu-"))
    experiment = Experiment(options.out.resolve(), scratch, options.dry)
    prepare_environment(scratch)
    if options.dry:
        import_parts()
    runner = PartRunner(experiment, options.budget)
    try:
        for parts in (FIRST, SIDE_BY_SIDE, SEQUENTIAL):
            selected = [p for p in parts if is_selected(p, options.parts)]
            runner.run(selected, side_by_side=parts is SIDE_BY_SIDE)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        text = summarize(experiment.out / "results.jsonl")
        write_atomically(experiment.out / "summary.md", text)
        print(text[:MAX_PRINTED])


def is_selected(part: Part, texts: Sequence[str] | None) -> bool:
    """Return True if a part runs: --parts names it, or other parts need it."""
    return texts is None or part in FIRST or any(text in part.name for text in texts)
