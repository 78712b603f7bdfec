"""Summarise measurements of compare.py: the speedup of vitlib over each library, in one table.

    python benchmarks/summary.py FILE.json [FILE.json ...]

A cell has the rate of the library in images a second relative to vitlib's, as vitlib's speedup:
the median of the rounds' ratios. Of ONNX Runtime's two 8-bit forms the faster one counts. Where
compare.py ran with --compile, a row more has vitlib with the forward compiled.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from report import Group, format_value, median
from setting import markdown_table

# The sides of a column, by the words that their names contain; the fastest of them counts.
COLUMNS = {
    "transformers": ("transformers bf16", "transformers"),
    "timm": ("timm bf16", "timm"),
    "ONNX Runtime": ("ONNX Runtime", "ONNX Runtime int8, dynamic", "ONNX Runtime int8, static"),
    "OpenVINO": ("OpenVINO", "OpenVINO bf16", "OpenVINO int8"),
}


def read_groups(path: Path) -> list[Group]:
    """Read the timings of a file that compare.py wrote."""
    groups = []
    for entry in json.loads(path.read_text()):
        group = Group(entry["model"], entry["precision"], entry["gflop"], entry["weights_mib"])
        group.seconds = {int(batch): sides for batch, sides in entry["seconds"].items()}
        groups.append(group)
    return groups


def row(group: Group, batch: int, side: str) -> list[str]:
    """Return a row of the table, for a side of vitlib's."""
    sides = group.seconds[batch]
    own = median([median(turn) for turn in sides[side]])
    precision = group.precision + side.removeprefix(group.vitlib_side)
    cells = [group.model, precision, str(batch), f"{batch / own:.1f}"]
    for names in COLUMNS.values():
        speedups: list[Any] = [group.speedup(batch, name, side) for name in names if name in sides]
        # transformers' own precision, where it was measured.
        is_first = names[0] == "transformers bf16" or names[0] == "timm bf16"
        chosen = speedups[:1] if is_first else sorted(speedups)[:1]
        cells.append(format_value(chosen[0] if chosen else None))
    share = group.gemm_share(batch, side)
    return [*cells, "" if share is None else f"{share:.0%}"]


def main() -> None:
    groups = [group for name in sys.argv[1:] for group in read_groups(Path(name))]
    if not groups:
        sys.exit(f"usage: {__doc__}")
    header = ["model", "precision", "batch", "vitlib, img/s", *COLUMNS, "share of GEMM rate"]
    rows = [
        row(group, batch, side)
        for group in groups
        for batch in sorted(group.seconds)
        for side in (group.vitlib_side, f"{group.vitlib_side}, compiled")
        if side in group.seconds[batch]
    ]
    print(markdown_table(header, rows, num_text_columns=2))


if __name__ == "__main__":
    main()
