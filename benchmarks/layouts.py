"""Time to load a ViT-B/16 of 346 MB in each layout, relative to Hugging Face's layout.

    python benchmarks/layouts.py [--rounds 15]

vitlib saves one random model in every layout. The loads are interleaved in one process. Garbage is
collected outside the timed code, and the files are in the page cache. Figures are medians.
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
        for round_index in range(rounds + 1):  # the first round is a warm-up
            for layout in LAYOUTS:
                gc.collect()
                start = time.perf_counter()
                model_copy = vitlib.load(Path(folder) / layout)
                seconds[layout] += [time.perf_counter() - start] if round_index else []
                del model_copy
    hf_median = statistics.median(seconds["hf"])
    for layout, times in seconds.items():
        median = statistics.median(times)
        spread = f"{min(times) * 1e3:.0f} to {max(times) * 1e3:.0f}"
        print(f"{layout:12} {median * 1e3:4.0f} ms ({spread})  ratio {median / hf_median:.2f}")


if __name__ == "__main__":
    main()
