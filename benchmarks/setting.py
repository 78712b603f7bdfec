"""What the benchmarks have in common: the machine in words, real photos, whole files."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Real models and photos; a machine that has the checkout alone has them elsewhere.
SHARED = Path(os.environ.get("VITLIB_SHARED") or ROOT.parent / "shared")
COUNTED = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def machine() -> str:
    """The CPU and those of its instructions that count here; no name of a host."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
    except OSError:
        return f"{platform.processor() or platform.machine()} with {os.cpu_count()} CPUs"
    said = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", text, re.MULTILINE))
    flags = [flag for flag in COUNTED if flag in said.get("flags", "").split()]
    kind = f"family {said.get('cpu family', '?')} model {said.get('model', '?')}"
    return (
        f"{said.get('model name', platform.machine()).strip()} ({kind}; {', '.join(flags)}) "
        f"with {os.cpu_count()} CPUs"
    )


def heading(versions: dict[str, str]) -> str:
    """Date, commit, machine and versions, in one paragraph."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    ).stdout.strip()
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{date.today()}, commit {found or 'unknown'}, {machine()}, Python "
        f"{platform.python_version()}, {listed}."
    )


def photos_of(which: str) -> list[Path]:
    """The real photos of fridge_multilabel or fridge_multiclass, in order; [] where absent."""
    return sorted((SHARED / "data" / which).rglob("*.jpg"))


def write_whole(path: Path, text: str) -> None:
    """Write beside and rename: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    beside.replace(path)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Markdown; the first `words` columns are words, the others numbers."""
    marks = "|" + "|".join("---" if i < words else "--:" for i in range(len(head))) + "|"
    first, *others = ("| " + " | ".join(line) + " |" for line in (head, *rows))
    return "\n".join([first, marks, *others])
