"""summary.md of a run: the goals first, then a table for each kind of result."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from setting import table

PlanRow = Mapping[str, Any]
Rows = Mapping[str, list[PlanRow]]  # by kind
MOST = "the largest batch"
DRY = "none: a dry run on the CPU"


def one(rows: Rows, kind: str, column: str, **values: object) -> float:
    """Return a column of the last row of a kind with these values. Raises LookupError without."""
    if values.get("batch") == MOST:
        values["batch"] = rows["environment"][-1]["largest_batch"]
    for row in reversed(rows.get(kind, [])):
        if column in row and all(row.get(name) == value for name, value in values.items()):
            return float(row[column])
    raise LookupError


def model(column: str, precision: str, batch: object, kind: str) -> Callable[[Rows], float]:
    """Return what reads a figure of a vitlib model."""
    side = f"vitlib {precision}"
    return lambda rows: one(rows, "models", column, side=side, batch=batch, input=kind)


def in_turns(side: str) -> Callable[[Rows], float]:
    """Return what reads how many times as long as vitlib a side takes for the largest batch."""
    return lambda rows: one(rows, "turns", "times_vitlib", side=side, batch=MOST)


def training(rows: Rows) -> float:
    """Return images a second of a training step over Trainer's."""
    ours, theirs = (one(rows, "training", "img_s", side=side) for side in ("vitlib", "Trainer"))
    return ours / theirs


def photos(way: str) -> Callable[[Rows], float]:
    """Return what reads the share of a way's photos a second in those of its slower half.

    Of decoding the best number of threads counts.
    """

    def share(rows: Rows) -> float:
        def rate(name: str) -> float:
            rows_of_way = [row for row in rows.get("photos", []) if row.get("way") == name]
            rates = [row["photos_s"] for row in rows_of_way if "photos_s" in row]
            if not rates:
                raise LookupError
            return max(rates)

        return rate(way) / min(rate("decoding alone"), rate("model alone"))

    return share


def memory(rows: Rows) -> float:
    """Return the peak of allocated memory over transformers'."""
    ours, theirs = (
        one(rows, "memory", "allocated_mib", side=side, batch=MOST)
        for side in ("vitlib bf16", "transformers bf16")
    )
    return ours / theirs


class Goal(NamedTuple):
    """A figure to reach."""

    name: str
    value: Callable[[Rows], float]
    bound: float
    form: str  # of the figure, as str.format() takes it
    is_most: bool = False
    h100: float | None = None  # bound on an H100, where it is another


GOALS = (
    Goal("bf16, batch 512, levels on the device", model("img_s", "bf16", MOST, "levels"), 17_500,
         "{:,.0f} img/s", h100=16_000),
    Goal("fp8, batch 512, levels on the device", model("img_s", "fp8", MOST, "levels"), 21_000,
         "{:,.0f} img/s"),
    Goal("bf16, batch 1, pixels on the device, p50", model("p50_ms", "bf16", 1, "pixels"), 0.45,
         "{:.3f} ms", is_most=True),
    Goal("bf16, batch 512, times transformers, not compiled", in_turns("transformers bf16"), 1.8,
         "{:.2f}"),
    Goal("bf16, batch 512, times timm, compiled", in_turns("timm bf16 compiled"), 1.25, "{:.2f}"),
    Goal("training step, bf16, batch 256, times Trainer", training, 1.3, "{:.2f}"),
    Goal("from JPEGs by Predictor, of the slower of decoding and model", photos("Predictor"), 0.95,
         "{:.0%}"),
    Goal("from JPEGs by vitlib.batch, of the same", photos("vitlib.batch"), 0.95, "{:.0%}"),
    Goal("memory at batch 512, of transformers'", memory, 0.7, "{:.0%}", is_most=True),
)  # fmt: skip


def goal_rows(rows: Rows, gpu: str) -> list[list[str]]:
    """Return a line for each goal: name, bound, figure, and how it stands.

    That is "met", "short" or "not measured"; of a small model on a CPU, "dry run".
    """
    lines = []
    for goal in GOALS:
        bound = goal.h100 if goal.h100 is not None and "H100" in gpu else goal.bound
        sign = "<=" if goal.is_most else ">="
        line = [goal.name, f"{sign} {goal.form.format(bound)}"]
        try:
            value = goal.value(rows)
        except LookupError:
            lines.append([*line, "", "not measured"])
            continue
        is_met = value <= bound if goal.is_most else value >= bound
        status = "met" if is_met else "short"
        lines.append([*line, goal.form.format(value), "dry run" if gpu == DRY else status])
    return lines


TABLES = {  # kind: heading, and the columns that come first
    "tests": ("Tests marked cuda", ("file", "outcome", "code")),
    "hazards": ("Hazards", ("name", "passed")),
    "turns": ("In turns, pixels on the device", ("side", "batch", "ms", "times_vitlib")),
    "training": ("Training step, bf16", ("side", "batch", "step_ms", "img_s")),
    "photos": ("From JPEGs", ("way", "photos_s", "cores")),
    "memory": ("Memory", ("side", "batch")),
    "accuracy": ("Logits against float64, random weights", ("side",)),
    "agreement": ("DeiT-tiny on photos, against float64", ("side",)),
    "models": ("Models", ("side", "input", "batch", "img_s", "tflops", "p50_ms", "p99_ms")),
    "optimize": ("Seconds to load and optimize", ("side",)),
    "graphs": ("CUDA graphs", ("side",)),
    "kernels": ("Kernels of a call", ("side", "batch", "device_us", "launches")),
    "attention": ("Attention alone", ("tokens", "images", "form", "dtype", "kernel", "ms")),
    "ops": ("Products and steps alone", ("step", "images", "ms", "tflops")),
    "compiling": ("Compiling", ("side",)),
}


def table_of(kind: str, rows: list[PlanRow]) -> str:
    """Return the table of a kind: every column that any of its rows has; an error in the last."""
    heading, first = TABLES[kind]
    names = dict.fromkeys([*first, *(name for row in rows for name in row)])
    columns = [
        name
        for name in names
        if name not in ("kind", "failed") and any(name in row for row in rows)
    ]
    lines = [[text(row.get(name, "")) for name in columns] for row in rows]
    return f"## {heading}\n\n{table(columns, lines, words=1)}\n"


def text(value: Any) -> str:
    """Return a cell of a table."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "/")[:160]


def summarise(results: Path) -> str:
    """Return the summary of results.jsonl."""
    rows: dict[str, list[PlanRow]] = defaultdict(list)
    for line in results.read_text().splitlines() if results.exists() else []:
        row = json.loads(line)
        rows[row["kind"]].append(row)
    environment = rows["environment"][-1] if rows["environment"] else {}
    gpu = str(environment.get("gpu", "unknown"))
    facts = [
        f"{name} {value}" for name, value in environment.items() if name not in ("kind", "gpu")
    ]
    goals = table(["goal", "bound", "here", ""], goal_rows(rows, gpu))
    parts = [f"# GPU run\n\n{gpu}; {', '.join(facts)}\n", f"## Goals\n\n{goals}\n"]
    errors = [row for some in rows.values() for row in some if "error" in row]
    failed = [line for row in rows["tests"] for line in row.get("failed", ())]
    if errors or failed:
        parts.append("## Errors\n")
        parts += [f"- {', '.join(f'{k} {text(v)}' for k, v in row.items())}" for row in errors]
        parts += [f"- {text(line)}" for line in failed]
        parts.append("")
    if rows["left out"]:
        parts.append("## Left out\n")
        parts += dict.fromkeys(f"- {row['what']}: {row['why']}" for row in rows["left out"])
        parts.append("")
    parts += [table_of(kind, rows[kind]) for kind in TABLES if rows.get(kind)]
    seconds = [f"{row['part']} {row['seconds']} s" for row in rows["parts"] if "seconds" in row]
    return "\n".join([*parts, f"## Parts\n\n{'; '.join(seconds)}\n"])
