"""How long a ViT-B/16 of 346 MB takes to load in each layout, as a ratio to Hugging Face's.

    python benchmarks/layouts.py [--rounds 15]

vitlib writes one fresh model in every layout that can hold it; the layouts are loaded in turn in
one process, garbage collected outside the clock, files in the page cache. Medians.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import tempfile
import time
from pathlib import Path

import vitlib

LAYOUTS = ("hf", "timm", "meta", "torchvision", "jax")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    logging.disable(logging.WARNING)
    model = vitlib.ViT(vitlib.ViTConfig.named("B/16", num_classes=1000)).eval()
    with tempfile.TemporaryDirectory() as folder:
        for layout in LAYOUTS:
            vitlib.save(model, Path(folder) / layout, layout=layout)
        seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
        for count in range(rounds + 1):  # one that does not count
            for layout in LAYOUTS:
                gc.collect()
                start = time.perf_counter()
                loaded = vitlib.load(Path(folder) / layout)
                seconds[layout] += [time.perf_counter() - start] if count else []
                del loaded
    base = statistics.median(seconds["hf"])
    for layout, taken in seconds.items():
        middle = statistics.median(taken)
        spread = f"{min(taken) * 1e3:.0f} to {max(taken) * 1e3:.0f}"
        print(f"{layout:12} {middle * 1e3:4.0f} ms ({spread})  ratio {middle / base:.2f}")


if __name__ == "__main__":
    main()
