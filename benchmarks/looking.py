"""Whether maps can be trusted, and what looking inside costs.

    python benchmarks/looking.py [--photos 40] [--rounds 9] [--out FILE]

Faithfulness: DeiT-tiny's own best class on two_cats.png and on the first photos by name of
../shared's fridges, the deletion score of each map (lower is better) against the mean of 20 random
maps' and against a Gaussian in the middle. Cost: attention(rows="prefix") of all 12 layers of
ViT-B/16 against a plain forward, in turns; and the memory that it takes at 1024 pixels.
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
from setting import SHARED, heading, photos_of, table, write_whole
from torch import Tensor

import vitlib
from vitlib import explain
from vitlib.explain.faithfulness import curves

RANDOM = 20
STEPS = 14  # of 196 patches, fourteen at a time


def gaussian(pixels: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """A hill in the middle of each image, a quarter of each side wide."""
    y, x = (np.linspace(-1, 1, n) for n in grid)
    hill = np.exp(-2 * (y[:, None] ** 2 + x[None] ** 2) / 0.5)
    return np.repeat(hill[None], len(pixels), axis=0).astype(np.float32)


def deletion(model: vitlib.ViT, pixels: Tensor, values: np.ndarray) -> float:
    """The score of a map of one photo."""
    curve, shares = curves(model, pixels, values, "deletion", steps=STEPS, batch_size=STEPS + 1)
    return float(np.trapezoid(curve[0], shares))


def deletions(count: int) -> dict[str, list[float]]:
    """By map, the deletion score of each photo; "random": the mean of 20."""
    folder = SHARED / "models/deit-tiny-patch16-224"
    model, rule = vitlib.load(folder), vitlib.ImageProcessor.load(folder)
    fridges = sorted(photos_of("fridge_multilabel"))[:count]
    maps: dict[str, Callable[[Tensor], np.ndarray]] = {
        "relevance": lambda x: explain.relevance(model, x),
        "rollout": lambda x: explain.attention_rollout(model, x),
        "gradient": lambda x: explain.gradient(model, x),
        "Gaussian": lambda x: gaussian(x, model.patch_grid(x)),
    }
    found: dict[str, list[float]] = {name: [] for name in (*maps, "random")}
    random = np.random.default_rng(0)
    for photo in (SHARED / "data/photos/two_cats.png", *fridges):
        pixels = rule(photo)
        for name, draw in maps.items():
            found[name].append(deletion(model, pixels, draw(pixels)))
        grid = model.patch_grid(pixels)
        scores = [
            deletion(model, pixels, random.random((1, *grid)).astype(np.float32))
            for _ in range(RANDOM)
        ]
        found["random"].append(statistics.mean(scores))
    return found


def prefix_cost(rounds: int) -> list[list[str]]:
    """Median ratio of attention(rows="prefix") to a forward, by batch."""
    torch.manual_seed(0)
    model = vitlib.ViT(vitlib.ViTConfig.named("B/16", num_classes=1000)).eval()
    rows: list[list[str]] = []
    for batch in (1, 8):
        pixels = torch.randn(batch, 3, 224, 224)
        sides = (model, partial(model.attention, rows="prefix"))
        ratios = []
        with torch.inference_mode():
            for round_ in range(rounds + 1):
                took = []
                for side in sides:
                    start = time.perf_counter()
                    side(pixels)
                    took.append(time.perf_counter() - start)
                if round_:
                    ratios.append(took[1] / took[0])
        rows.append([str(batch), f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f}"])
    return rows


PEAK = """
import re, torch, vitlib
from pathlib import Path

def most():  # VmHWM is this program's own; ru_maxrss starts at what its parent had
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

model = vitlib.ViT(vitlib.ViTConfig.named("B/16", num_classes=1000)).eval()
pixels = torch.randn(1, 3, 1024, 1024)
with torch.inference_mode():
    model(torch.randn(1, 3, 224, 224))
    before = most()
    found = model.attention(pixels, rows="prefix")
print(most() - before)
"""


def peak() -> float:
    """MiB that attention(rows="prefix") at 1024 pixels takes beyond a model that has run at 224."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    found = deletions(options.photos)
    other = {name: found[name] for name in ("random", "Gaussian")}
    rows = [
        [
            name,
            f"{statistics.mean(scores):.3f}",
            *(
                f"{sum(a < b for a, b in zip(scores, beside, strict=True))} of {len(scores)}"
                for beside in other.values()
            ),
        ]
        for name, scores in found.items()
    ]
    text = "\n\n".join(
        (
            heading({"torch": torch.__version__}),
            table(["map", "deletion, mean", "better than random", "than a Gaussian"], rows),
            table(
                ["batch", 'attention(rows="prefix") / forward', "least"],
                prefix_cost(options.rounds),
            ),
            f"At 1024x1024 pixels it grows the process by {peak():.0f} MiB.",
        )
    )
    print(text)
    if options.out:
        write_whole(options.out, text + "\n")


if __name__ == "__main__":
    main()
