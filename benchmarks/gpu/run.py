"""Every part of a run as a process with a time limit, within one budget.

    python -m benchmarks.gpu [--out FOLDER] [--budget 580] [--parts NAME ...] [--dry]

What needs no quiet card (tests, memory, compiling ahead into a cache) runs first, side by side.
Then one process at a time has the card, the goals first. A part that is cut off loses only what it
had not measured yet.

--out takes results.jsonl, summary.md, log.txt, tests.txt and profile.txt; --dry runs everything
small, on the CPU.
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
from prepare import spare_torchvision
from setting import write_whole

from benchmarks.gpu.experiment import Experiment
from benchmarks.gpu.summary import summarise

BUDGET = 580  # seconds: a call of ten minutes, less its start
LAST = 8  # seconds kept for the summary
SHORTEST = 12  # seconds: below, no part is started, as importing its libraries takes as long
SHOWN = 10_000  # characters of the summary that are printed
VITLIB, TRANSFORMERS, TIMM = "vitlib bf16", "transformers bf16", "timm bf16 compiled"


class Part(NamedTuple):
    """A part: a function of a module of this package, its argument, and its longest time."""

    name: str
    function: str  # module:function
    limit: int  # seconds
    arguments: tuple[Any, ...] = ()


def part(function: str, limit: int, *arguments: Any) -> Part:
    """Return a part, named by its function and argument."""
    words = function.partition(":")[2].replace("_", " ")
    if arguments and isinstance(arguments[0], str):
        words += f": {arguments[0]}"
    return Part(words, function, limit, arguments)


FIRST = (part("environment:record_environment", 60), part("models:prepare", 90))
SIDE_BY_SIDE = (
    part("hazards:run_tests", 170),
    part("models:compile_ahead", 170, TIMM),
    part("models:compile_ahead", 170, f"{TRANSFORMERS} compiled"),
    part("models:measure_memory", 90, VITLIB),
    part("models:measure_memory", 90, TRANSFORMERS),
    part("models:measure_agreement", 90),
)
IN_TURN = (  # what matters most first
    part("models:measure_vitlib", 70, "bf16"),
    part("models:measure_vitlib", 60, "fp8"),
    part("models:measure_in_turns", 75, (VITLIB, TRANSFORMERS, TIMM)),
    part("training_steps:measure_training", 40, "vitlib"),
    part("training_steps:measure_training", 45, "Trainer"),
    part("photos:measure_photos", 60),
    part("models:measure_peer", 40, TRANSFORMERS),
    part("models:measure_peer", 40, "timm bf16"),
    part("ops:measure_ops", 60),
    part("whatif:measure_passes", 50),
    part("whatif:measure_changes", 60),
    part("models:measure_vitlib", 40, "fp16"),
    part("hazards:check_hazards", 50),
    part("models:measure_vitlib", 40, "fp32"),
    part("models:measure_peer", 50, TIMM),
    part("models:measure_peer", 50, f"{TRANSFORMERS} compiled"),
    part("models:measure_peer", 40, "transformers fp16"),
    part("whatif:measure_compiled", 120),
)
PARTS = (*FIRST, *SIDE_BY_SIDE, *IN_TURN)


class PartRunner:
    """Starts parts, ends them at their limits, and keeps to the budget."""

    def __init__(self, experiment: Experiment, budget: float) -> None:
        self.experiment = experiment
        self.end = time.monotonic() + budget - LAST
        # A dry run's parts are copies of a process that has imported everything. CUDA cannot be
        # used in a copy: a real run's are new processes.
        method = "fork" if experiment.is_dry else "spawn"
        self.context: Any = multiprocessing.get_context(method)

    def run(self, parts: Sequence[Part], *, side_by_side: bool = False) -> None:
        """Run parts, one after another or all at once, until each has ended.

        Args:
            parts: The parts.
            side_by_side: Whether they run at once.
        """
        groups = [parts] if side_by_side else [[part] for part in parts]
        for group in groups:
            started = [(part, self.start(part)) for part in group if self.has_time(part)]
            try:
                for part, (process, until) in started:
                    self.wait(part, process, until)
            finally:
                for _, (process, _) in started:
                    kill(process)

    def has_time(self, part: Part) -> bool:
        """Return whether a part can still be started; record it where not."""
        if self.end - time.monotonic() >= SHORTEST:
            return True
        self.experiment.record("left out", what=part.name, why="the budget is used up")
        return False

    def start(self, part: Part) -> tuple[BaseProcess, float]:
        """Start a part, and return its process and the time at which it must end."""
        until = min(time.monotonic() + part.limit, self.end)
        process = self.context.Process(target=work, args=(part, self.experiment))
        process.start()
        return process, until

    def wait(self, part: Part, process: BaseProcess, until: float) -> None:
        """Wait for a part until its time is over, and record how it ended where that was badly."""
        process.join(max(until - time.monotonic(), 0))
        if process.exitcode is None:
            self.experiment.record("parts", part=part.name, error="stopped: its time was over")
        elif process.exitcode:
            code = process.exitcode
            self.experiment.record("parts", part=part.name, error=f"ended with code {code}")


def kill(process: BaseProcess) -> None:
    """End a part and every process that it started."""
    if process.pid is None:
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def work(part: Part, experiment: Experiment) -> None:
    """Run a part in a process of its own, whose output goes to log.txt."""
    os.setsid()
    log = os.open(experiment.out / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    module, _, function = part.function.partition(":")
    if experiment.is_dry:
        torch.set_num_threads(1)  # tiny products: a second core costs more than it gives
    start = time.monotonic()
    with experiment.attempt("parts", part=part.name):
        call = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
        call(experiment, *part.arguments)
        experiment.record("parts", part=part.name, seconds=round(time.monotonic() - start, 1))


def prepare_environment(work_folder: Path) -> None:
    """Set what the parts' libraries read: caches in the run's own folder, and no network."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(work_folder / "inductor"),
        "TRITON_CACHE_DIR": str(work_folder / "triton"),
    }


def import_all() -> None:
    """Import what parts import, before they are copied from this process."""
    for name in {part.function.partition(":")[0] for part in PARTS}:
        importlib.import_module(f"benchmarks.gpu.{name}")
    spare_torchvision()
    import transformers

    _ = transformers.ViTForImageClassification
    gc.freeze()  # a copy would look through all of it at each collection


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out = Path(os.environ.get("OUT") or "gpu_results")
    parser.add_argument("--out", type=Path, default=out, help=f"folder of results (here: {out})")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds in all ({BUDGET})")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only parts with these words")
    parser.add_argument("--dry", action="store_true", help="everything small, on the CPU")
    options = parser.parse_args()
    names = [part.name for part in PARTS]
    for words in options.parts or []:
        if not any(words in name for name in names):
            parser.error(f"--parts {words!r}: expected words of one of: {'; '.join(names)}")
    if (options.out / "results.jsonl").exists():
        parser.error(f"{options.out} holds the results of another run: give another --out")
    return options


def main() -> None:
    """Run the command line."""
    options = parse()
    if not options.dry and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no GPU here: --dry runs everything on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="vitlib-gpu-"))
    experiment = Experiment(options.out.resolve(), scratch, options.dry)
    prepare_environment(scratch)
    if options.dry:
        import_all()
    runner = PartRunner(experiment, options.budget)
    try:
        for parts in (FIRST, SIDE_BY_SIDE, IN_TURN):
            some = [p for p in parts if is_chosen(p, options.parts)]
            runner.run(some, side_by_side=parts is SIDE_BY_SIDE)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        text = summarise(experiment.out / "results.jsonl")
        write_whole(experiment.out / "summary.md", text)
        print(text[:SHOWN])


def is_chosen(part: Part, words: Sequence[str] | None) -> bool:
    """Return whether a part runs: all do, or those that --parts names and what they need."""
    return words is None or part in FIRST or any(word in part.name for word in words)
