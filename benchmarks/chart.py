"""A bar chart of compare.py's figures; alone, of what it wrote with --json.

    python benchmarks/chart.py RESULTS.json CHART.svg [--model B/16] [--batch 8]

Bars are images per second, a panel for each precision. Who is who is said beside each bar, and not
by colour alone; the colours are Okabe and Ito's, which the colour-blind can tell apart.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from report import GEMM, Group, middle

COLOURS = (
    ("vitlib", "#D55E00"),
    ("transformers", "#0072B2"),
    ("timm", "#56B4E9"),
    ("ONNX Runtime", "#CC79A7"),
    ("OpenVINO", "#009E73"),
)
WIDTH = 6.0  # inches: at 100 dots an inch, the 600 pixels that a page gives a picture


def draw(groups: list[Group], file: Path, model: str = "", batch: int = 0) -> None:
    """Write the chart; by default of the first model, at batch 8 where that was measured."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no chart: pip install matplotlib", file=sys.stderr)
        return
    model = model or groups[0].model
    measured = [group for group in groups if group.model == model]
    batch = batch or (8 if 8 in measured[0].seconds else next(iter(measured[0].seconds)))
    panels = [(group.precision, bars(group, batch)) for group in measured]
    heights = [len(found) + 1 for _, found in panels]
    figure = Figure(figsize=(WIDTH, 0.27 * sum(heights) + 0.7), layout="constrained")
    axes = figure.subplots(
        len(panels), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )
    most = max(rate for _, found in panels for rate in found.values())
    for (axis,), (precision, found) in zip(axes, panels, strict=True):
        names, rates = list(found), list(found.values())
        drawn = axis.barh(names, rates, color=[colour(name) for name in names], height=0.7)
        axis.bar_label(drawn, fmt="%.1f", padding=3, fontsize=9)
        axis.invert_yaxis()
        axis.set_title(precision, loc="left", fontsize=10, fontweight="bold")
        axis.set_xlim(0, most * 1.12)
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    title = f"ViT-{model}" if "/" in model else model
    axes[-1][0].set_xlabel(f"images per second, {title} at 224 px, batch {batch}", fontsize=9)
    beside = file.with_name(f"part-{file.name}")
    figure.savefig(beside, dpi=200)
    beside.replace(file)


def bars(group: Group, batch: int) -> dict[str, float]:
    """Side -> images per second, fastest first."""
    sides = group.seconds[batch]
    rates = {
        name: batch / middle([middle(turn) for turn in rounds])
        for name, rounds in sides.items()
        if name != GEMM
    }
    return dict(sorted(rates.items(), key=lambda item: -item[1]))


def colour(name: str) -> str:
    return next((code for start, code in COLOURS if name.startswith(start)), "#999999")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default="")
    parser.add_argument("--batch", type=int, default=0)
    options = parser.parse_args()
    groups = []
    for found in json.loads(options.results.read_text()):
        seconds = {int(size): sides for size, sides in found["seconds"].items()}
        plain = (found["model"], found["precision"], found["gflop"], found["weights"])
        groups.append(Group(*plain, seconds=seconds))
    draw(groups, options.file, options.model, options.batch)


if __name__ == "__main__":
    main()
