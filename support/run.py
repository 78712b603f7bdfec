"""Run the tests in an environment of its own, and write their counts to docs/support.jsonl.

    python -m support.run torch 2.10.0    a version of torch, everything else as pinned
    python -m support.run python 3.13     a version of Python, everything else as pinned
    python -m support.run lowest          the oldest Python and the oldest of every dependency
    python -m support.run pinned          the environment of `make test`

`make test-torch VERSION=2.10.0` and its like run this. uv makes the environments, such as
.venv-torch-2.10.0, because pip cannot choose the oldest versions. uv finds Python on PATH or
downloads it. Where torch's own index can be reached, UV_TORCH_BACKEND=cpu takes no CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

from support.page import RESULTS, ROOT, Row, write_page

KINDS = ("torch", "python", "lowest", "pinned")
# Packages whose versions a row states: those that vitlib needs, and the oracle of its tests.
PACKAGES = ("torch", "numpy", "safetensors", "huggingface-hub", "pillow", "click", "tqdm",
            "transformers")  # fmt: skip
_DESCRIBE = """
import json, platform, sys
from importlib.metadata import version
versions = {name: version(name) for name in sys.argv[1:]}
system = f"{platform.system()} {platform.machine()}"
print(json.dumps({"python": platform.python_version(), "system": system, "versions": versions}))
"""


def main() -> int:
    """Make the environment, run the tests, write the counts and the page.

    Returns:
        The exit status of pytest.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("version", nargs="?", default="", help="of torch or Python")
    parser.add_argument("--select", default="", help="markers, as pytest -m has them")
    parser.add_argument("--prepare", action="store_true", help="make the environment alone")
    parser.add_argument("tests", nargs="*", help="files of tests, which write no counts")
    options = parser.parse_args()
    if (options.kind in ("torch", "python")) != bool(options.version):
        parser.error(f"expected a version for torch or python alone, got {options.version!r}")
    suite = f"{options.kind} {options.version}".strip()
    python = make_environment(options.kind, options.version)
    if options.prepare:
        return 0
    status, report, seconds = run_tests(python, suite, options.select, options.tests)
    if not options.tests:
        row = make_row(suite, python, report, seconds)
        record(row)
        write_page()
        print(f"{suite}: {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped")
    return status


def make_environment(kind: str, version: str) -> Path:
    """Make an environment, or bring it to the versions that are needed.

    Args:
        kind: one of KINDS.
        version: version of torch or of Python; "" for the others.

    Returns:
        The Python of the environment.
    """
    if kind == "pinned":
        return ROOT / ".venv" / "bin" / "python"
    folder = ROOT / f".venv-{'-'.join(part for part in (kind, version) if part)}"
    python = {"python": version, "lowest": oldest_python()}.get(kind, running_python())
    run_uv("venv", "--quiet", "--allow-existing", "--python", python, folder)
    choice: list[object] = ["--resolution", "lowest-direct"]
    if kind != "lowest":
        constraints = folder / "constraints.txt"
        constraints.write_text(constraints_without_torch(kind == "torch"), encoding="utf-8")
        choice = ["--constraint", constraints]
        if kind == "torch":
            choice += [f"torch=={version}"]
    executable = folder / "bin" / "python"
    run_uv("pip", "install", "--quiet", "--python", executable, *choice, "--editable", ".[dev]")
    return executable


def constraints_without_torch(without: bool) -> str:
    """Read constraints.txt, if asked without torch and triton, whose version torch chooses.

    Args:
        without: True leaves out torch and triton.

    Returns:
        The constraints.
    """
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return re.sub(r"^(torch|triton)==.*\n", "", text, flags=re.MULTILINE) if without else text


def oldest_python() -> str:
    """Return the oldest Python that pyproject.toml admits, such as 3.10."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'requires-python = ">=([\d.]+)"', text)
    assert match
    return match[1]


def running_python() -> str:
    """Return the version of the Python that runs this, such as 3.11."""
    return "{}.{}".format(*sys.version_info[:2])


def run_uv(*arguments: object) -> None:
    """Run uv; the folders of packages that pip knows are uv's too."""
    environment = dict(os.environ)
    if "PIP_FIND_LINKS" in os.environ:
        environment.setdefault("UV_FIND_LINKS", ",".join(os.environ["PIP_FIND_LINKS"].split()))
    command = [sys.executable, "-m", "uv", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def run_tests(
    python: Path, suite: str, select: str, tests: Sequence[str]
) -> tuple[int, Path, float]:
    """Run the tests as `make test` does.

    Args:
        python: Python of the environment.
        suite: name of the run.
        select: markers.
        tests: files of tests; none for all.

    Returns:
        The exit status of pytest, its report, and the seconds it took.
    """
    report = ROOT / "build" / "support" / f"{suite.replace(' ', '-')}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile"]
    if suite == "lowest":  # old packages call what is deprecated in new ones beside them
        command += ["-W", "ignore::DeprecationWarning"]
    command += [f"--junitxml={report}", *(["-m", select] if select else []), *tests]
    start = time.perf_counter()
    # Only what is installed in the environment is on the path, and scripts are its own.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
    environment["OMP_NUM_THREADS"] = "1"
    process = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=False)
    return process.returncode, report, time.perf_counter() - start


def count_outcomes(report: Path) -> tuple[Counter[str], list[str], Counter[str]]:
    """Count the outcomes of a report of pytest.

    Args:
        report: the report, in JUnit's XML.

    Returns:
        The numbers of passed, failed and skipped tests; the names of the failed ones, an error of
        a fixture among them; and the number of skips for each reason.
    """
    counts: Counter[str] = Counter()
    failed: list[str] = []
    reasons: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in case}
        skip = case.find("skipped")
        if outcomes & {"failure", "error"}:
            counts["failed"] += 1
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif skip is not None:
            counts["skipped"] += 1
            # A path differs from machine to machine, and the reason does not.
            reasons[re.sub(r"\S*/(?=\w)", "", skip.get("message") or "")[:100]] += 1
        else:
            counts["passed"] += 1
    return counts, failed, reasons


def make_row(suite: str, python: Path, report: Path, seconds: float) -> Row:
    """Make the row of a run.

    Args:
        suite: name of the run.
        python: Python of the environment.
        report: report of pytest.
        seconds: time that the tests took.

    Returns:
        The row.
    """
    counts, failed, reasons = count_outcomes(report)
    described = subprocess.run(
        [python, "-c", _DESCRIBE, *PACKAGES], capture_output=True, text=True, check=True
    )
    return {
        "suite": suite,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": describe_commit(),
        **json.loads(described.stdout),
        **{name: counts[name] for name in ("passed", "failed", "skipped")},
        "seconds": round(seconds),
        "failures": failed,
        "skips": dict(sorted(reasons.items())),
    }


def describe_commit() -> str:
    """Return the commit, with a + where files differ from it, other than the counts of a run."""

    def ask_git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    others = (".", ":!docs/support.jsonl", ":!docs/support.md")
    changed = ask_git("status", "--porcelain", "--untracked-files=no", "--", *others)
    return ask_git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def record(row: Row) -> None:
    """Write a row into docs/support.jsonl, in the place of an earlier run of the same suite."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    rows = [json.loads(line) for line in lines]
    rows = sorted([old for old in rows if old["suite"] != row["suite"]] + [row], key=_order)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _order(row: Row) -> tuple[int, list[int]]:
    """Return what rows are sorted by: the kind, then the version."""
    kind, _, version = row["suite"].partition(" ")
    return KINDS.index(kind), [int(part) for part in re.findall(r"\d+", version)]


if __name__ == "__main__":
    sys.exit(main())
