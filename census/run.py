"""Census: load every model of a zoo with vitlib and compare outputs with those of its library.

    python -m census.run timm transformers openclip

How data flows: a zoo module builds one model after another with its own library, saves it and
computes the reference outputs. Each model gets three verdicts. "config": vitlib loads the folder.
"bare": vitlib loads the weights file alone. "written": vitlib saves the model, and the library
loads that folder. Each verdict is one row of build/census/ZOO.*.jsonl. A row is valid until vitlib
or the census changes, so an interrupted run resumes. census.page makes docs/census.md of the rows.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor

import vitlib
from census.case import Case, ReferenceOutputs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "census"
ZOOS = ("timm", "transformers", "openclip")
TOLERANCE = 2e-6  # relative; of float32 outputs after two blocks
CASE_SECONDS = 300
OUTPUTS = ("logits", "pooled", "tokens")  # attributes of ReferenceOutputs
_AMBIGUOUS = "state which with"  # in errors that ask the user to choose among published models
# Files and folders of vitlib that neither load nor save a checkpoint.
_UNRELATED = (
    "assets",
    "batch",
    "bench.py",
    "checks",
    "cli",
    "data",
    "evaluate",
    "explain",
    "export",
)
_UNRELATED += (
    "fast",
    "image",
    "metrics",
    "plots",
    "predict",
    "retrieval.py",
    "scores.py",
    "serve",
    "train",
)
_WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


def main() -> int:
    """Run the cases without a valid row and write the page; return 1 if a verdict is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("zoos", nargs="*", metavar="ZOO", help=f"{', '.join(ZOOS)}; default: all")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases to run, by name")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if set(options.zoos) - set(ZOOS):
        parser.error(f"{' '.join(options.zoos)}: expected zoos of {', '.join(ZOOS)}")
    for zoo in options.zoos or ZOOS:
        run_zoo(zoo, options.only, options.workers)
    from census import page

    return page.write(RESULTS, ROOT / "docs" / "census.md", only=options.only)


def run_zoo(zoo: str, only: str, workers: int) -> None:
    """Run the cases of a zoo that have no valid rows, in processes of one thread each.

    Args:
        zoo: Name of the zoo.
        only: Pattern of the names of cases.
        workers: Number of processes.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    code = fingerprint(zoo)
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=run_worker, args=(zoo, only, number, workers, code))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"{zoo}: a worker failed; run it again to resume")
    print(f"{zoo}: {time.monotonic() - start:.0f} s", flush=True)


def fingerprint(zoo: str) -> str:
    """Return a hash of all code that loads, computes and saves the models of a zoo."""
    digest = hashlib.sha256()
    sources = [*sorted((ROOT / "vitlib").rglob("*")), *sorted((ROOT / "census").glob("*.py"))]
    for path in sources:
        parts = path.relative_to(ROOT).parts
        is_other_zoo = path.name.endswith("_zoo.py") and not path.name.startswith(zoo)
        is_unrelated = path.name == "page.py" or is_other_zoo or parts[1] in _UNRELATED
        if path.suffix in (".py", ".csv", ".json") and not is_unrelated:
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a result file, without lines that a kill has cut off."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def run_worker(zoo: str, only: str, number: int, workers: int, code: str) -> None:
    """Run every `workers`-th case from case `number` on and append the rows.

    Args:
        zoo: Name of the zoo.
        only: Pattern of the names of cases.
        number: Number of this worker, from 0.
        workers: Number of all workers.
        code: Fingerprint of the code, which each row stores.
    """
    torch.set_num_threads(1)
    logging.getLogger("vitlib").setLevel(logging.CRITICAL)
    module = importlib.import_module(f"census.{zoo}_zoo")
    path = RESULTS / f"{zoo}.{number}-{workers}.jsonl"
    finished = {
        row["name"]
        for file in RESULTS.glob(f"{zoo}.*.jsonl")
        for row in read_rows(file)
        if row["code"] == code and row["form"] == "end"
    }
    cases = [case for case in module.cases() if fnmatch.fnmatch(case.name, only)]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n")  # The last line may be cut off, and has no line end then.
        for case in cases[number::workers]:
            if case.name in finished:
                continue
            start = time.monotonic()
            for row in run_case(module, case):
                row |= {"name": case.name, "architecture": case.architecture, "code": code}
                row |= {"expected": case.expected, "also": list(case.also)}
                file.write(json.dumps(row) + "\n")
                if row["verdict"] in ("wrong", "crash"):
                    print(f"{zoo} {case.name} {row['form']}: {row['verdict']} {row['reason']}")
            seconds = round(time.monotonic() - start, 2)
            end = {"form": "end", "name": case.name, "code": code, "seconds": seconds}
            end |= {"architecture": case.architecture, "also": list(case.also)}
            file.write(json.dumps(end) + "\n")
            file.flush()


def run_case(module: ModuleType, case: Case) -> Iterator[dict[str, Any]]:
    """Yield the row of each form of one case."""
    with tempfile.TemporaryDirectory(prefix="census-") as name:
        folder = Path(name) / "reference"
        folder.mkdir()
        try:
            with TimeLimit():
                expected = module.make(case, folder)
        except Exception as error:
            yield make_row("make", "unmade", reason=format_error(error))
            return
        config = compare(folder, expected)
        model = config.pop("model", None)
        yield config | {"form": "config"}
        yield compare_bare(case, folder, Path(name) / "bare", expected) | {"form": "bare"}
        if config["verdict"] == "equal":
            yield compare_written(module, case, model, Path(name) / "written", expected)


def compare(source: Path, expected: ReferenceOutputs, **facts: Any) -> dict[str, Any]:
    """Load a checkpoint with vitlib and compare its outputs with the library's.

    Args:
        source: Folder or weights file.
        expected: Outputs of the library.
        **facts: Arguments of vitlib.load.

    Returns:
        A row, with the loaded model as `model` if the outputs could be compared.
    """
    try:
        with TimeLimit():
            model = vitlib.load(source, dtype=torch.float32, **facts)
            errors = output_errors(model, expected)
    except vitlib.VitlibError as error:
        verdict = "asked" if _AMBIGUOUS in str(error) else "refused"
        return make_row("", verdict, reason=format_error(error))
    except Exception as error:
        return make_row("", "crash", reason=format_error(error))
    return judge("", errors) | {"model": model}


def judge(form: str, errors: dict[str, float]) -> dict[str, Any]:
    """Return the row of a form by the relative errors of its outputs."""
    worst = max(errors.values(), default=float("inf"))
    if worst <= TOLERANCE:
        return make_row(form, "equal", worst)
    reason = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    return make_row(form, "wrong", worst, reason)


@torch.inference_mode()
def output_errors(model: vitlib.ViT, expected: ReferenceOutputs) -> dict[str, float]:
    """Return the relative error of each output of vitlib's model that the library has as well."""
    functions = {"logits": model, "pooled": model.embed, "tokens": model.forward_features}
    errors = {
        name: relative_error(function(expected.pixels), getattr(expected, name))
        for name, function in functions.items()
        if getattr(expected, name) is not None
    }
    if not errors:
        raise RuntimeError("the zoo has no reference output to compare")
    return errors


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return max |actual - expected| / max |expected|.

    It is infinite if the shapes differ or a value is not finite.
    """
    if actual.shape != expected.shape or not bool(torch.isfinite(expected).all()):
        return float("inf")
    error = float((actual - expected).abs().max() / expected.abs().max())
    return float("inf") if math.isnan(error) else error


def compare_bare(
    case: Case, folder: Path, target: Path, expected: ReferenceOutputs
) -> dict[str, Any]:
    """Load the weights file without its config, and compare.

    If vitlib refuses because several published models fit, the file is loaded again with the
    architecture's name.

    Args:
        case: The case.
        folder: Folder that the library saved.
        target: Folder to make, which gets the weights file alone.
        expected: Outputs of the library.

    Returns:
        A row.
    """
    target.mkdir()
    files = [path for path in folder.iterdir() if path.suffix in _WEIGHTS_SUFFIXES]
    if len(files) != 1:
        return make_row("", "refused", reason=f"{len(files)} weights files")
    file = target / f"weights{files[0].suffix}"
    os.link(files[0], file)
    result = compare(file, expected)
    result.pop("model", None)
    if result["verdict"] == "asked":
        second = compare(file, expected, architecture=case.architecture)
        if second["verdict"] in ("wrong", "crash"):
            reason = f"after architecture={case.architecture!r}: {second['reason']}"
            return make_row("", second["verdict"], second["error"], reason)
        result["stated"] = second["verdict"]
    return result


def compare_written(
    module: ModuleType, case: Case, model: vitlib.ViT, target: Path, expected: ReferenceOutputs
) -> dict[str, Any]:
    """Save a model in the zoo's layout, load the folder with the zoo's library, and compare.

    Args:
        module: Module of the zoo.
        case: The case.
        model: vitlib's model, which equals the library's.
        target: Folder to write.
        expected: Outputs of the library's original model.

    Returns:
        A row.
    """
    try:
        lost = vitlib.save(model, target, layout=module.LAYOUT)
    except vitlib.VitlibError as error:
        remains = sorted(path.name for path in target.iterdir()) if target.exists() else []
        reason = format_error(error) + (f"; left {remains}" if remains else "")
        return make_row("written", "wrong" if remains else "refused", reason=reason)
    try:
        with TimeLimit():
            actual = module.reopen(case, target, expected)
    except Exception as error:
        return make_row("written", "wrong", reason=f"does not open: {format_error(error)}")
    pairs = {name: (getattr(actual, name), getattr(expected, name)) for name in OUTPUTS}
    errors = {
        name: relative_error(*pair)
        for name, pair in pairs.items()
        if all(output is not None for output in pair)
    }
    return judge("written", errors) | {"lost": sorted(lost)}


def make_row(
    form: str, verdict: str, error: float | None = None, reason: str = ""
) -> dict[str, Any]:
    """Return one row of the results."""
    return {"form": form, "verdict": verdict, "error": error, "reason": reason[:400]}


def format_error(error: BaseException) -> str:
    """Return an error as one line. For errors that are not vitlib's, add the source line."""
    text = " ".join(str(error).split())
    if isinstance(error, vitlib.VitlibError):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno})"


class TimeLimit:
    """Context that raises TimeoutError after CASE_SECONDS."""

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, self._raise)
        signal.alarm(CASE_SECONDS)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)

    @staticmethod
    def _raise(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {CASE_SECONDS} s")


if __name__ == "__main__":
    if shutil.disk_usage(tempfile.gettempdir()).free < 4 * 2**30:
        sys.exit("less than 4 GiB free for temporary files")
    sys.exit(main())
