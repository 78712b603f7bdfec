"""Bar chart of the results of compare.py, from its --json file.

    python benchmarks/chart.py RESULTS.json CHART.svg [--model B/16] [--batch 8]

Bars are images per second, with a panel for each precision. Each bar has its side's name beside
it. The colors are those of Okabe and Ito, for color-blind readers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from report import GEMM, Group, median

COLORS = (
    ("vitlib", "#D55E00"),
    ("transformers", "#0072B2"),
    ("timm", "#56B4E9"),
    ("ONNX Runtime", "#CC79A7"),
    ("OpenVINO", "#009E73"),
)
WIDTH = 6.0  # inches; at 100 dpi this is the page's width of 600 pixels


def draw_chart(groups: list[Group], file: Path, model: str = "", batch: int = 0) -> None:
    """Draw the chart of one model and write it to a file.

    Args:
        groups: Results.
        file: Path of the chart; its suffix decides the format.
        model: Name of the model; the first one by default.
        batch: Batch size; by default 8 if it was measured, else the first one.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("The chart needs matplotlib: pip install matplotlib", file=sys.stderr)
        return
    model = model or groups[0].model
    model_groups = [group for group in groups if group.model == model]
    batch = batch or (8 if 8 in model_groups[0].seconds else next(iter(model_groups[0].seconds)))
    panels = [(group.precision, images_per_second(group, batch)) for group in model_groups]
    heights = [len(side_rates) + 1 for _, side_rates in panels]
    figure = Figure(figsize=(WIDTH, 0.27 * sum(heights) + 0.7), layout="constrained")
    axes = figure.subplots(
        len(panels), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )
    max_rate = max(rate for _, side_rates in panels for rate in side_rates.values())
    for (axis,), (precision, side_rates) in zip(axes, panels, strict=True):
        names, rates = list(side_rates), list(side_rates.values())
        bars = axis.barh(names, rates, color=[side_color(name) for name in names], height=0.7)
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        axis.invert_yaxis()
        axis.set_title(precision, loc="left", fontsize=10, fontweight="bold")
        axis.set_xlim(0, max_rate * 1.12)
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    title = f"ViT-{model}" if "/" in model else model
    axes[-1][0].set_xlabel(f"images per second, {title} at 224 px, batch {batch}", fontsize=9)
    temporary = file.with_name(f"part-{file.name}")
    figure.savefig(temporary, dpi=200)
    temporary.replace(file)


def images_per_second(group: Group, batch: int) -> dict[str, float]:
    """Compute the median images per second of each side, fastest first."""
    seconds = group.seconds[batch]
    rates = {
        name: batch / median([median(turn) for turn in rounds])
        for name, rounds in seconds.items()
        if name != GEMM
    }
    return dict(sorted(rates.items(), key=lambda item: -item[1]))


def side_color(name: str) -> str:
    return next((code for start, code in COLORS if name.startswith(start)), "#999999")


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
    for fields in json.loads(options.results.read_text()):
        seconds = {int(size): sides for size, sides in fields["seconds"].items()}
        values = (fields["model"], fields["precision"], fields["gflop"], fields["weights_mib"])
        groups.append(Group(*values, seconds=seconds))
    draw_chart(groups, options.file, options.model, options.batch)


if __name__ == "__main__":
    main()
