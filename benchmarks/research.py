"""Cost of `trace` and gain of fewer tokens, as ratios to a forward of the same model in one run.

    python benchmarks/research.py [--model B/16] [--batches 1 8] [--rounds 11]

Random weights, random pixels, interleaved; figures are medians. A ratio above 1 is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import vitlib
from vitlib import tokens

Run = Callable[[torch.Tensor], object]


def list_runs(model: vitlib.ViT) -> dict[str, Run]:
    """List what is timed, by name; the first is what the ratios are to."""
    points = [f"blocks.*.attn.{name}" for name in "qkv"]
    runs: dict[str, Run] = {
        "forward": model,
        "trace of nothing": model.trace,
        "trace of q, k, v": lambda pixels: model.trace(pixels, points),
        "optimized forward": vitlib.optimize(model),
    }
    functions = {f"merge(r={r})": tokens.merge(r) for r in (8, 13, 16)}
    functions["drop(keep=0.7)"] = tokens.drop(keep=0.7)
    for name, function in functions.items():
        reduced = model.with_tokens(function)
        runs |= {name: reduced, f"optimized {name}": vitlib.optimize(reduced)}
    return runs


def main() -> None:
    """Print a table of ratios for each batch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="B/16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = vitlib.ViT(vitlib.ViTConfig.named(args.model, num_classes=1000)).eval()
    runs = list_runs(model)
    for batch in args.batches:
        pixels = torch.randn(batch, 3, *model.config.image_size)
        times: dict[str, list[float]] = {name: [] for name in runs}
        with torch.inference_mode():
            for turn in range(args.rounds + 1):  # the first warms up
                for name, run in runs.items():
                    start = time.perf_counter()
                    run(pixels)
                    if turn:
                        times[name].append(time.perf_counter() - start)
        first = times["forward"]
        print(f"batch {batch}\n| run | ms | forward / run |\n|---|--:|--:|")
        for name, seconds in times.items():
            ratio = statistics.median(a / b for a, b in zip(first, seconds, strict=True))
            print(f"| {name} | {1e3 * statistics.median(seconds):.1f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
