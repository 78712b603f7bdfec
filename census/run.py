"""Read every model of a zoo with vitlib and compare; resumable after a kill.

    python -m census.run timm transformers openclip

Data flow: a zoo module makes one model after another with its own library, saves it as that library
saves and gives the numbers. Each is read here three times: the folder as it is ("config"), the
weights file alone ("bare"), and what vitlib writes back, opened by the library ("written"). Each
reading is one line of build/census/ZOO.jsonl, which counts as long as neither vitlib nor the census
changes; census.page makes docs/census.md of them.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib
import json
import logging
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
from census.case import Answer, Case

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "census"
ZOOS = ("timm", "transformers", "openclip")
TOLERANCE = 2e-6  # float32, two blocks: DESIGN's bound for tiny models
CASE_SECONDS = 300
_ASKS = "state which with"  # of layouts.facts.resolve_facts
# Of vitlib, what neither loads nor writes a checkpoint.
_UNREAD = (
    "assets",
    "batch",
    "bench.py",
    "checks",
    "cli",
    "data",
    "errors.py",
    "evaluate",
    "explain",
)
_UNREAD += (
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
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")


def main() -> int:
    """Run what is not yet known of each zoo and write the page. Returns 1 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("zoos", nargs="*", metavar="ZOO", help=f"{', '.join(ZOOS)}; default: all")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of cases to run")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if set(options.zoos) - set(ZOOS):
        parser.error(f"{' '.join(options.zoos)}: expected zoos of {', '.join(ZOOS)}")
    for zoo in options.zoos or ZOOS:
        run_zoo(zoo, options.only, options.workers)
    from census import page

    return page.write(RESULTS, ROOT / "docs" / "census.md", only=options.only)


def run_zoo(zoo: str, only: str, workers: int) -> None:
    """Run the cases of a zoo that its result file does not hold, in processes of one thread."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    print_of_code = fingerprint(zoo)
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=work, args=(zoo, only, number, workers, print_of_code))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"{zoo}: a worker ended early: run it again, it goes on")
    print(f"{zoo}: {time.monotonic() - start:.0f} s", flush=True)


def fingerprint(zoo: str) -> str:
    """Return a hash of all code that a result depends on: what loads, computes and writes."""
    digest = hashlib.sha256()
    sources = [*sorted((ROOT / "vitlib").rglob("*")), *sorted((ROOT / "census").glob("*.py"))]
    for path in sources:
        parts = path.relative_to(ROOT).parts
        other_zoo = path.name.endswith("_zoo.py") and not path.name.startswith(zoo)
        unread = path.name == "page.py" or other_zoo or parts[1] in _UNREAD
        if path.suffix in (".py", ".csv", ".json") and not unread:
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a result file; the last one may be torn by a kill."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def work(zoo: str, only: str, number: int, workers: int, code: str) -> None:
    """Run every workers-th case from `number` on, and append its rows."""
    torch.set_num_threads(1)
    logging.getLogger("vitlib").setLevel(logging.CRITICAL)
    module = importlib.import_module(f"census.{zoo}_zoo")
    path = RESULTS / f"{zoo}.{number}-{workers}.jsonl"
    done = {
        row["name"]
        for other in RESULTS.glob(f"{zoo}.*.jsonl")
        for row in read_rows(other)
        if row["code"] == code and row["form"] == "end"
    }
    cases = [case for case in module.cases() if fnmatch.fnmatch(case.name, only)]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n")  # ends a line that a kill tore
        for case in cases[number::workers]:
            if case.name in done:
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
    """Yield the verdict of each form of one case."""
    with tempfile.TemporaryDirectory(prefix="census-") as name:
        folder = Path(name) / "theirs"
        folder.mkdir()
        try:
            with deadline():
                answer = module.make(case, folder)
        except Exception as error:
            yield row("make", "unmade", reason=one_line(error))
            return
        config = compare(folder, answer)
        model = config.pop("model", None)
        yield config | {"form": "config"}
        yield bare(case, folder, Path(name) / "bare", answer) | {"form": "bare"}
        if config["verdict"] == "equal":
            yield written(module, case, model, Path(name) / "written", answer)


def compare(source: Path, answer: Answer, **facts: Any) -> dict[str, Any]:
    """Load a source and compare its numbers with the library's; `model` is in it where equal."""
    try:
        with deadline():
            model = vitlib.load(source, dtype=torch.float32, **facts)
            errors = differences(model, answer)
    except vitlib.VitlibError as error:
        asked = _ASKS in str(error)
        return row("", "asked" if asked else "refused", reason=one_line(error))
    except Exception as error:
        return row("", "crash", reason=one_line(error))
    worst = max(errors.values())
    verdict = "equal" if worst <= TOLERANCE else "wrong"
    reason = "" if verdict == "equal" else ", ".join(f"{k} {e:.1e}" for k, e in errors.items())
    return row("", verdict, worst, reason) | {"model": model}


@torch.inference_mode()
def differences(model: vitlib.ViT, answer: Answer) -> dict[str, float]:
    """Return max |a - b| / max |b| of each output that the library gave."""
    outputs = {
        "logits": model(answer.pixels) if answer.logits is not None else None,
        "pooled": model.embed(answer.pixels) if answer.pooled is not None else None,
        "tokens": model.forward_features(answer.pixels) if answer.tokens is not None else None,
    }
    errors = {
        name: distance(output, getattr(answer, name))
        for name, output in outputs.items()
        if output is not None
    }
    if not errors:
        raise RuntimeError("the zoo gave nothing to compare")
    return errors


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return max |a - b| / max |b|; infinity where the shapes differ or a value is not finite."""
    if ours.shape != theirs.shape or not bool(torch.isfinite(theirs).all()):
        return float("inf")
    worst = float((ours - theirs).abs().max() / theirs.abs().max())
    return worst if worst == worst else float("inf")


def bare(case: Case, folder: Path, target: Path, answer: Answer) -> dict[str, Any]:
    """Read the weights file alone. Where vitlib asks for facts, give the architecture's name."""
    target.mkdir()
    files = [path for path in folder.iterdir() if path.suffix in _WEIGHTS]
    if len(files) != 1:
        return row("", "refused", reason=f"{len(files)} weights files")
    file = target / f"weights{files[0].suffix}"
    os.link(files[0], file)
    result = compare(file, answer)
    result.pop("model", None)
    if result["verdict"] == "asked":
        stated = compare(file, answer, architecture=case.architecture)
        if stated["verdict"] in ("wrong", "crash"):
            reason = f"after architecture={case.architecture!r}: {stated['reason']}"
            return row("", stated["verdict"], stated["error"], reason)
        result["stated"] = stated["verdict"]
    return result


def written(
    module: ModuleType, case: Case, model: vitlib.ViT, target: Path, answer: Answer
) -> dict[str, Any]:
    """Write the model back in the zoo's layout and open that with the library."""
    try:
        lost = vitlib.save(model, target, layout=module.LAYOUT)
    except vitlib.VitlibError as error:
        left = sorted(p.name for p in target.iterdir()) if target.exists() else []
        verdict = "wrong" if left else "refused"
        return row("written", verdict, reason=one_line(error) + (f"; left {left}" if left else ""))
    try:
        with deadline():
            again = module.reopen(case, target, answer)
    except Exception as error:
        return row("written", "wrong", reason=f"does not open: {one_line(error)}")
    names = ("logits", "pooled", "tokens")
    errors = {
        name: distance(getattr(again, name), getattr(answer, name))
        for name in names
        if getattr(again, name) is not None and getattr(answer, name) is not None
    }
    worst = max(errors.values(), default=float("inf"))
    verdict = "equal" if worst <= TOLERANCE else "wrong"
    reason = "" if verdict == "equal" else ", ".join(f"{k} {e:.1e}" for k, e in errors.items())
    return row("written", verdict, worst, reason) | {"lost": sorted(lost)}


def row(form: str, verdict: str, error: float | None = None, reason: str = "") -> dict[str, Any]:
    """Return one line of the results."""
    return {"form": form, "verdict": verdict, "error": error, "reason": reason[:400]}


def one_line(error: BaseException) -> str:
    """Return an error as one line; of a bug also the place."""
    text = " ".join(str(error).split())
    if isinstance(error, vitlib.VitlibError):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno})"


class deadline:  # noqa: N801
    """Raise TimeoutError in the block after CASE_SECONDS."""

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
