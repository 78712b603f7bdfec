"""Summary of a run in Markdown: the goals, then a table for each kind of result."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from setting import markdown_table

Row = Mapping[str, Any]
Rows = Mapping[str, list[Row]]  # results by kind
LARGEST = "the largest batch"
DRY_RUN = "none: a dry run on the CPU"


def last_value(rows: Rows, kind: str, column: str, **values: object) -> float:
    """Return a column of the last result of a kind with these values.

    Raises:
        LookupError: There is none.
    """
    if values.get("batch") == LARGEST:
        values["batch"] = rows["environment"][-1]["largest_batch"]
    for row in reversed(rows.get(kind, [])):
        if column in row and all(row.get(name) == value for name, value in values.items()):
            return float(row[column])
    raise LookupError


def model_value(
    column: str, precision: str, batch: object, input_kind: str
) -> Callable[[Rows], float]:
    """Return a function that reads a figure of a vitlib model."""
    side = f"vitlib {precision}"
    return lambda rows: last_value(rows, "models", column, side=side, batch=batch, input=input_kind)


def time_ratio(side: str) -> Callable[[Rows], float]:
    """Return a function that reads a side's time over vitlib's, at the largest batch size."""
    return lambda rows: last_value(rows, "turns", "times_vitlib", side=side, batch=LARGEST)


def training_ratio(rows: Rows) -> float:
    """Return vitlib's images per second over Trainer's."""
    vitlib_rate, peer_rate = (
        last_value(rows, "training", "img_s", side=side) for side in ("vitlib", "Trainer")
    )
    return vitlib_rate / peer_rate


def photo_ratio(workload: str) -> Callable[[Rows], float]:
    """Return a function that reads a workload's rate over the slower of decoding and model alone.

    Decoding counts with its best number of threads.
    """

    def ratio(rows: Rows) -> float:
        def rate(name: str) -> float:
            matches = [row for row in rows.get("photos", []) if row.get("workload") == name]
            rates = [row["photos_s"] for row in matches if "photos_s" in row]
            if not rates:
                raise LookupError
            return max(rates)

        return rate(workload) / min(rate("decoding alone"), rate("model alone"))

    return ratio


def memory_ratio(rows: Rows) -> float:
    """Return vitlib's peak of allocated memory over transformers'."""
    vitlib_mib, peer_mib = (
        last_value(rows, "memory", "allocated_mib", side=side, batch=LARGEST)
        for side in ("vitlib bf16", "transformers bf16")
    )
    return vitlib_mib / peer_mib


class Goal(NamedTuple):
    """A goal of the run.

    Attributes:
        name: Name in the summary.
        value: Reads the figure; raises LookupError if it was not measured.
        bound: Least or largest figure that meets the goal.
        format_spec: Format string of the figure.
        is_maximum: The bound is the largest figure, not the least.
        h100_bound: Bound on an H100 if it differs.
    """

    name: str
    value: Callable[[Rows], float]
    bound: float
    format_spec: str
    is_maximum: bool = False
    h100_bound: float | None = None


GOALS = (
    Goal(
        "bf16, batch 512, uint8 on the device",
        model_value("img_s", "bf16", LARGEST, "uint8"),
        17_500,
        "{:,.0f} img/s",
        h100_bound=16_000,
    ),
    Goal(
        "fp8, batch 512, uint8 on the device",
        model_value("img_s", "fp8", LARGEST, "uint8"),
        21_000,
        "{:,.0f} img/s",
    ),
    Goal(
        "bf16, batch 1, pixels on the device, p50",
        model_value("p50_ms", "bf16", 1, "pixels"),
        0.45,
        "{:.3f} ms",
        is_maximum=True,
    ),
    Goal(
        "bf16, batch 512, speedup over transformers, not compiled",
        time_ratio("transformers bf16"),
        1.8,
        "{:.2f}",
    ),
    Goal(
        "bf16, batch 512, speedup over timm, compiled",
        time_ratio("timm bf16 compiled"),
        1.25,
        "{:.2f}",
    ),
    Goal("training step, bf16, batch 256, speedup over Trainer", training_ratio, 1.3, "{:.2f}"),
    Goal(
        "Predictor from JPEGs, share of the slower of decoding and model",
        photo_ratio("Predictor"),
        0.95,
        "{:.0%}",
    ),
    Goal("vitlib.batch from JPEGs, share of the same", photo_ratio("vitlib.batch"), 0.95, "{:.0%}"),
    Goal(
        "memory at batch 512, share of transformers'", memory_ratio, 0.7, "{:.0%}", is_maximum=True
    ),
)


def goal_rows(rows: Rows, gpu: str) -> list[list[str]]:
    """Return a table row for each goal: name, bound, figure and status.

    The status is "met", "short" or "not measured", and "dry run" for a small model on a CPU.
    """
    lines = []
    for goal in GOALS:
        bound = goal.h100_bound if goal.h100_bound is not None and "H100" in gpu else goal.bound
        sign = "<=" if goal.is_maximum else ">="
        line = [goal.name, f"{sign} {goal.format_spec.format(bound)}"]
        try:
            value = goal.value(rows)
        except LookupError:
            lines.append([*line, "", "not measured"])
            continue
        is_met = value <= bound if goal.is_maximum else value >= bound
        status = "met" if is_met else "short"
        lines.append(
            [*line, goal.format_spec.format(value), "dry run" if gpu == DRY_RUN else status]
        )
    return lines


TABLES = {  # kind: (heading, first columns)
    "tests": ("Tests marked cuda", ("file", "outcome", "code")),
    "hazards": ("Hazards", ("name", "passed")),
    "turns": ("Interleaved, pixels on the device", ("side", "batch", "ms", "times_vitlib")),
    "training": ("Training step, bf16", ("side", "batch", "step_ms", "img_s")),
    "photos": ("From JPEGs", ("workload", "photos_s", "cores")),
    "memory": ("Memory", ("side", "batch")),
    "accuracy": ("Logits against float64, random weights", ("side",)),
    "agreement": ("DeiT-tiny on photos, against float64", ("side",)),
    "models": ("Models", ("side", "input", "batch", "img_s", "tflops", "p50_ms", "p99_ms")),
    "optimize": ("Seconds to load and optimize", ("side",)),
    "graphs": ("CUDA graphs", ("side",)),
    "kernels": ("Kernels of a call", ("side", "batch", "device_us", "launches")),
    "attention": ("Attention alone", ("tokens", "images", "variant", "dtype", "kernel", "ms")),
    "ops": ("Products and steps alone", ("step", "images", "ms", "tflops")),
    "compiling": ("Compiling", ("side",)),
}


def kind_table(kind: str, rows: list[Row]) -> str:
    """Return the table of a kind.

    It has the first columns, then every other column of any row; an error is the last one.
    """
    heading, first = TABLES[kind]
    names = dict.fromkeys([*first, *(name for row in rows for name in row)])
    columns = [
        name
        for name in names
        if name not in ("kind", "failed") and any(name in row for row in rows)
    ]
    lines = [[format_cell(row.get(name, "")) for name in columns] for row in rows]
    return f"## {heading}\n\n{markdown_table(columns, lines)}\n"


def format_cell(value: Any) -> str:
    """Format a cell of a table."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "/")[:160]


def summarize(results: Path) -> str:
    """Return the summary of a results.jsonl."""
    rows: dict[str, list[Row]] = defaultdict(list)
    for line in results.read_text().splitlines() if results.exists() else []:
        row = json.loads(line)
        rows[row["kind"]].append(row)
    environment = rows["environment"][-1] if rows["environment"] else {}
    gpu = str(environment.get("gpu", "unknown"))
    facts = [
        f"{name} {value}" for name, value in environment.items() if name not in ("kind", "gpu")
    ]
    goals = markdown_table(["goal", "bound", "result", "status"], goal_rows(rows, gpu))
    parts = [f"# GPU run\n\n{gpu}; {', '.join(facts)}\n", f"## Goals\n\n{goals}\n"]
    errors = [row for kind_rows in rows.values() for row in kind_rows if "error" in row]
    failed = [line for row in rows["tests"] for line in row.get("failed", ())]
    if errors or failed:
        parts.append("## Errors\n")
        parts += [
            f"- {', '.join(f'{k} {format_cell(v)}' for k, v in row.items())}" for row in errors
        ]
        parts += [f"- {format_cell(line)}" for line in failed]
        parts.append("")
    if rows["left out"]:
        parts.append("## Left out\n")
        parts += dict.fromkeys(f"- {row['what']}: {row['why']}" for row in rows["left out"])
        parts.append("")
    parts += [kind_table(kind, rows[kind]) for kind in TABLES if rows.get(kind)]
    seconds = [f"{row['part']} {row['seconds']} s" for row in rows["parts"] if "seconds" in row]
    return "\n".join([*parts, f"## Parts\n\n{'; '.join(seconds)}\n"])
