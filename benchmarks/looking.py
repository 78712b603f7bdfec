"""Faithfulness and cost of attention maps.

    python benchmarks/looking.py [--photos 40] [--rounds 9] [--out FILE]

Faithfulness: the deletion score of each map (lower is better), for DeiT-tiny's best class. The
photos are two_cats.png and the first fridge photos by name in ../shared. The references are the
mean of 20 random maps and a Gaussian in the middle. Cost: the time of attention(rows="prefix") of
all 12 layers of ViT-B/16 over that of a forward, interleaved, and its memory at 1024 pixels.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from setting import SHARED, describe_run, list_photos, markdown_table, write_atomically
from torch import Tensor

import vitlib
from vitlib import explain
from vitlib.explain.faithfulness import curves

NUM_RANDOM_MAPS = 20
STEPS = 14  # deletion steps: 14 of the 196 patches each


def gaussian(pixels: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Return a centered Gaussian for each image, a quarter of each side wide."""
    y, x = (np.linspace(-1, 1, n) for n in grid)
    bump = np.exp(-2 * (y[:, None] ** 2 + x[None] ** 2) / 0.5)
    return np.repeat(bump[None], len(pixels), axis=0).astype(np.float32)


def deletion_score(model: vitlib.ViT, pixels: Tensor, values: np.ndarray) -> float:
    """Compute the deletion score of a map of one photo."""
    curve, shares = curves(model, pixels, values, "deletion", steps=STEPS, batch_size=STEPS + 1)
    return float(np.trapezoid(curve[0], shares))


def deletion_scores(count: int) -> dict[str, list[float]]:
    """Compute the deletion score of each photo, by map; "random" is the mean of 20."""
    folder = SHARED / "models/deit-tiny-patch16-224"
    model, processor = vitlib.load(folder), vitlib.ImageProcessor.load(folder)
    fridges = sorted(list_photos("fridge_multilabel"))[:count]
    maps: dict[str, Callable[[Tensor], np.ndarray]] = {
        "relevance": lambda x: explain.relevance(model, x),
        "rollout": lambda x: explain.attention_rollout(model, x),
        "gradient": lambda x: explain.gradient(model, x),
        "Gaussian": lambda x: gaussian(x, model.patch_grid(x)),
    }
    scores_by_map: dict[str, list[float]] = {name: [] for name in (*maps, "random")}
    rng = np.random.default_rng(0)
    for photo in (SHARED / "data/photos/two_cats.png", *fridges):
        pixels = processor(photo)
        for name, compute_map in maps.items():
            scores_by_map[name].append(deletion_score(model, pixels, compute_map(pixels)))
        grid = model.patch_grid(pixels)
        scores = [
            deletion_score(model, pixels, rng.random((1, *grid)).astype(np.float32))
            for _ in range(NUM_RANDOM_MAPS)
        ]
        scores_by_map["random"].append(statistics.mean(scores))
    return scores_by_map


def prefix_cost_rows(rounds: int) -> list[list[str]]:
    """Time attention(rows="prefix") over a forward; return a table row for each batch size."""
    torch.manual_seed(0)
    model = vitlib.ViT(vitlib.ViTConfig.named("B/16", num_classes=1000)).eval()
    rows: list[list[str]] = []
    for batch in (1, 8):
        pixels = torch.randn(batch, 3, 224, 224)
        sides = (model, partial(model.attention, rows="prefix"))
        ratios = []
        with torch.inference_mode():
            for round_index in range(rounds + 1):
                seconds = []
                for side in sides:
                    start = time.perf_counter()
                    side(pixels)
                    seconds.append(time.perf_counter() - start)
                if round_index:
                    ratios.append(seconds[1] / seconds[0])
        rows.append([str(batch), f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f}"])
    return rows


PEAK_SCRIPT = """
import re, torch, vitlib
from pathlib import Path

def peak():  # VmHWM counts this program only; ru_maxrss starts at the parent's value
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

model = vitlib.ViT(vitlib.ViTConfig.named("B/16", num_classes=1000)).eval()
pixels = torch.randn(1, 3, 1024, 1024)
with torch.inference_mode():
    model(torch.randn(1, 3, 224, 224))
    before = peak()
    maps = model.attention(pixels, rows="prefix")
print(peak() - before)
"""


def measure_peak() -> float:
    """Measure the peak memory of attention(rows="prefix") at 1024 pixels, in MiB.

    It is counted from that of a model after a forward at 224 pixels.
    """
    process = subprocess.run(
        [sys.executable, "-c", PEAK_SCRIPT], capture_output=True, text=True, check=True
    )
    return int(process.stdout) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    scores_by_map = deletion_scores(options.photos)
    references = {name: scores_by_map[name] for name in ("random", "Gaussian")}
    rows = [
        [
            name,
            f"{statistics.mean(scores):.3f}",
            *(
                f"{sum(a < b for a, b in zip(scores, reference, strict=True))} of {len(scores)}"
                for reference in references.values()
            ),
        ]
        for name, scores in scores_by_map.items()
    ]
    text = "\n\n".join(
        (
            describe_run({"torch": torch.__version__}),
            markdown_table(
                ["map", "mean deletion score", "better than random", "better than a Gaussian"], rows
            ),
            markdown_table(
                ["batch", 'attention(rows="prefix") / forward', "minimum"],
                prefix_cost_rows(options.rounds),
            ),
            f'At 1024x1024 pixels, attention(rows="prefix") takes {measure_peak():.0f} MiB.',
        )
    )
    print(text)
    if options.out:
        write_atomically(options.out, text + "\n")


if __name__ == "__main__":
    main()
