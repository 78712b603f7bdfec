"""Shared helpers of the benchmarks: the CPU, the dataset folders, tables and atomic writes."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Real models and photos. VITLIB_SHARED names their folder if it is not beside the checkout.
SHARED = Path(os.environ.get("VITLIB_SHARED") or ROOT.parent / "shared")
# CPU flags that decide which kernels are fast.
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def describe_cpu() -> str:
    """Describe the CPU by model and features, without the host name."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
    except OSError:
        return f"{platform.processor() or platform.machine()} with {os.cpu_count()} CPUs"
    fields = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", text, re.MULTILINE))
    flags = [flag for flag in CPU_FEATURES if flag in fields.get("flags", "").split()]
    family = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return (
        f"{fields.get('model name', platform.machine()).strip()} ({family}; {', '.join(flags)}) "
        f"with {os.cpu_count()} CPUs"
    )


def describe_run(versions: dict[str, str]) -> str:
    """Describe date, commit, CPU and library versions in one paragraph."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    ).stdout.strip()
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{date.today()}, commit {commit or 'unknown'}, {describe_cpu()}, Python "
        f"{platform.python_version()}, {libraries}."
    )


def list_photos(dataset: str) -> list[Path]:
    """List the JPEG files of a dataset in sorted order.

    Args:
        dataset: "fridge_multilabel" or "fridge_multiclass".

    Returns:
        The paths; an empty list if the dataset is absent.
    """
    return sorted((SHARED / "data" / dataset).rglob("*.jpg"))


def write_atomically(path: Path, text: str) -> None:
    """Write a file atomically, by a temporary file and a rename.

    An interrupted process leaves either the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    temporary.replace(path)


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], num_text_columns: int = 1
) -> str:
    """Format a Markdown table.

    Args:
        header: Column headings.
        rows: Cells of each row.
        num_text_columns: Leading columns that are left-aligned; the others hold numbers.
    """
    alignment = (
        "|" + "|".join("---" if i < num_text_columns else "--:" for i in range(len(header))) + "|"
    )
    header_line, *row_lines = ("| " + " | ".join(line) + " |" for line in (header, *rows))
    return "\n".join([header_line, alignment, *row_lines])
